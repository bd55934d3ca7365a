"""Cases for the Triton kernels on any device: the tests in the interpreter and on a GPU run the same cases."""

import math

import torch
from carafepp.kernels.geometry import LSE_NORMALIZERS, Spec
from carafepp.kernels.gpu import backend as triton_backend
from carafepp.kernels.reference import reassemble_reference

# largest error over the largest value of the reference, by dtype: a rounding of a weight, of a product, of the result
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

SIZES = [
    (1, 8, 6, 5, Spec(5, up=2)),
    (2, 8, 5, 7, Spec(3, up=2, groups=4)),
    (1, 6, 3, 2, Spec(7, up=2)),
    (1, 5, 1, 1, Spec(5, up=2)),
    (1, 3, 4, 3, Spec(1, up=2)),
    (1, 4, 5, 4, Spec(5, up=3)),
    (1, 4, 3, 2, Spec(3, up=4, groups=2)),
    (1, 20, 7, 11, Spec(5, down=2)),
    (1, 4, 9, 8, Spec(3, down=3)),
    (1, 4, 9, 8, Spec(3, down=2, groups=4)),
    (1, 4, 7, 5, Spec(5, up=3, down=2)),
    (1, 4, 7, 5, Spec(3, up=2, down=3)),
    (1, 4, 7, 5, Spec(3, up=2, down=2)),
    (1, 4, 5, 3, Spec(3)),
    # too wide for a tile: tap by tap
    (1, 4, 35, 18, Spec(3, down=16)),
    (1, 4, 2, 1, Spec(3, up=12)),
]


def poisoned(like: torch.Tensor) -> torch.Tensor:
    """A tensor of NaN in the layout of `like`, so that a place that a kernel does not write shows."""
    return torch.empty_like(like).fill_(math.nan)


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest error over the largest expected value; NaN if the result has a NaN."""
    return ((result.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-6)).item()


def random_inputs(n, c, h, w, spec, dtype, device, memory_format=torch.contiguous_format):
    """Source features and logits in encoder layout."""
    generator = torch.Generator().manual_seed(n + c + h + w)
    x = torch.randn(n, c, h, w, generator=generator)
    logits = torch.randn(n, spec.groups * spec.taps * spec.up**2, spec.cells(h), spec.cells(w), generator=generator)
    return (t.to(device, dtype).to(memory_format=memory_format) for t in (x, logits))


def check(x, logits, spec, needs=(True, True)) -> None:
    """Compare the result and both gradients of the Triton kernels with the definition in float64."""
    x64, logits64 = x.double().requires_grad_(), logits.double().requires_grad_()
    expected = reassemble_reference(x64, logits64, **spec._asdict())
    dy = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0)).to(x.device, x.dtype)
    gradients = torch.autograd.grad(expected, (x64, logits64), dy.double())

    cells = logits.unflatten(1, (spec.groups * spec.taps, spec.up, spec.up))
    y = poisoned(torch.empty_like(expected, dtype=x.dtype))
    lse = x.new_full((len(x), spec.groups, *cells.shape[2:]) if spec.normalizer in LSE_NORMALIZERS else (0,), math.nan, dtype=torch.float32)
    triton_backend.forward(x, cells, y, lse, spec)
    assert relative_error(y, expected.detach()) < TOLERANCES[x.dtype]
    assert not lse.isnan().any()

    results = [poisoned(t) if need else None for t, need in zip((x, logits), needs, strict=True)]
    dlogits = None if results[1] is None else results[1].unflatten(1, cells.shape[1:4])
    triton_backend.backward(dy, x, cells, lse, results[0], dlogits, spec)
    for result, gradient in zip(results, gradients, strict=True):
        assert result is None or relative_error(result, gradient) < TOLERANCES[x.dtype]
