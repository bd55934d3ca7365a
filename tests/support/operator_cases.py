"""Inputs of the operator and the comparison of a backend with the definition in float64, the same for every backend and device."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from carafepp.kernels import reassemble, reassemble_reference
from carafepp.kernels.borders import mask_outside
from carafepp.kernels.geometry import LSE_NORMALIZERS, Spec
from torch import Tensor

# n, c, h, w, options: sizes that no tile divides, single pixels and channels, every kind of scale
AWKWARD = [
    (1, 8, 6, 5, Spec(5, up=2)),
    (2, 6, 5, 7, Spec(3, up=2, groups=2)),
    (1, 6, 3, 2, Spec(7, up=2)),
    (1, 5, 1, 1, Spec(5, up=2)),
    (1, 3, 4, 3, Spec(1, up=2)),
    (1, 4, 5, 4, Spec(5, up=3)),
    (1, 4, 3, 2, Spec(3, up=4, groups=2)),
    (1, 20, 7, 11, Spec(5, down=2)),
    (1, 4, 9, 8, Spec(3, down=3)),
    (1, 3, 9, 8, Spec(3, down=2, groups=3)),
    (1, 4, 7, 5, Spec(5, up=3, down=2)),
    (1, 4, 7, 5, Spec(3, up=2, down=3)),
    (1, 4, 7, 5, Spec(3, up=2, down=2)),
    (1, 4, 5, 3, Spec(3)),
    # too wide for a tile of the Triton kernels, which take them tap by tap
    (1, 4, 35, 18, Spec(3, down=16)),
    (1, 4, 2, 1, Spec(3, up=12)),
]

# the same for the other borders: windows inside the map, larger than it, and cut off by a rational scale
BORDERED = [
    (1, 8, 6, 5, Spec(5, up=2, border="renormalize")),
    (1, 5, 1, 1, Spec(5, up=2, normalizer="sigmoid_normalized", border="renormalize")),
    (1, 4, 7, 5, Spec(3, up=4, down=5, border="renormalize")),
    (1, 4, 9, 8, Spec(5, down=2, groups=2, border="renormalize")),
    (1, 4, 2, 1, Spec(3, up=12, border="renormalize")),
    (2, 8, 5, 7, Spec(3, up=2, groups=4, normalizer="none", border="replicate")),
    (1, 6, 3, 2, Spec(7, up=2, border="replicate")),
    (1, 5, 1, 1, Spec(5, up=2, normalizer="sigmoid", border="replicate")),
    (1, 4, 7, 5, Spec(5, up=3, down=2, normalizer="sigmoid_normalized", border="replicate")),
    (1, 4, 9, 8, Spec(3, down=3, border="replicate")),
    (1, 8, 6, 5, Spec(5, up=2, border="shift")),
    (1, 4, 7, 5, Spec(3, up=3, down=2, groups=2, normalizer="none", border="shift")),
    (1, 4, 9, 8, Spec(5, down=2, normalizer="sigmoid_normalized", border="shift")),
    (1, 4, 7, 5, Spec(3, up=2, down=3, normalizer="sigmoid", border="shift")),
    (1, 5, 3, 3, Spec(3, border="shift")),
]

# Largest error over the largest value. Half precision rounds the result once; the sums have up to 2,000 terms.
TOLERANCES = {torch.float32: 4e-6, torch.float64: 1e-14, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# The matrix units of a GPU round a weight, a product and the result.
TRITON_TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

LAYOUTS = ("contiguous", "channels_last", "transposed", "sliced", "expanded")


def describe(case: tuple[int, int, int, int, Spec]) -> str:
    """Name a case of AWKWARD or BORDERED in the id of a test."""
    n, c, h, w, spec = case
    border = "" if spec.border == "zero" else f"-{spec.border}"
    return f"k{spec.kernel_size}u{spec.up}d{spec.down}g{spec.groups}-{n}x{c}x{h}x{w}{border}"


def arrange(tensor: Tensor, layout: str) -> Tensor:
    """Give a tensor [N, C, H, W] another memory layout; "expanded" repeats its first value."""
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return tensor.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "sliced":
        return tensor.repeat_interleave(2, dim=3)[..., 1::2]
    if layout == "expanded":
        return tensor[:1, :1, :1, :1].expand(tensor.shape)
    return tensor


def random_inputs(
    n: int,
    c: int,
    h: int,
    w: int,
    spec: Spec,
    dtype: torch.dtype = torch.float32,
    layouts: str | tuple[str, str, str] = "contiguous",
    *,
    device: str = "cpu",
    seed: int = 0,
    spread: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw x [n, c, h, w], logits in encoder layout with standard deviation `spread`, and the gradient dy of the output."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, c, h, w, generator=generator)
    logits = spread * torch.randn(n, spec.groups * spec.taps * spec.up**2, spec.cells(h), spec.cells(w), generator=generator)
    dy = torch.randn(n, c, spec.output_size(h), spec.output_size(w), generator=generator)
    layouts = (layouts,) * 3 if isinstance(layouts, str) else layouts
    x, logits, dy = (arrange(t.to(device, dtype), layout) for t, layout in zip((x, logits, dy), layouts, strict=True))
    return x, logits, dy


def relative_error(actual: Tensor, expected: Tensor, slack: float = 1e-9) -> float:
    """Largest error over the sum of the largest expected value and `slack`; NaN where `actual` has a NaN."""
    return ((actual.double() - expected).abs().max() / (expected.abs().max() + slack)).item()


def differentiate(
    function: Callable[..., Tensor], x: Tensor, logits: Tensor, dy: Tensor, needs: tuple[bool, bool] = (True, True), **options: object
) -> dict[str, Tensor]:
    """Return y and those of dx and dlogits that are needed, by name."""
    x, logits = (t.detach().requires_grad_(need) for t, need in zip((x, logits), needs, strict=True))
    y = function(x, logits, **options)
    wanted = {name: t for name, t in (("dx", x), ("dlogits", logits)) if t.requires_grad}
    gradients = torch.autograd.grad(y, list(wanted.values()), dy)
    return {"y": y.detach(), **dict(zip(wanted, gradients, strict=True))}


def log_sum_exp(logits: Tensor, spec: Spec, height: int, width: int) -> Tensor:
    """Log-sum-exp of every window over a map of `height` x `width`, [N, G, up, up, Hq, Wq], for logits in encoder layout."""
    windows = logits.unflatten(1, (spec.groups, spec.taps, spec.up, spec.up))
    if spec.border == "renormalize":
        windows = mask_outside(windows, spec, height, width)
    return (F.logsigmoid(windows) if spec.normalizer == "sigmoid_normalized" else windows).logsumexp(2)


def assert_matches_definition(
    backend: str,
    x: Tensor,
    logits: Tensor,
    dy: Tensor,
    spec: Spec,
    needs: tuple[bool, bool] = (True, True),
    tolerance: float | None = None,
    size: tuple[int, int] | None = None,
) -> None:
    """Compare y, the gradients that are needed and the saved log-sum-exp of a backend with the definition in float64.

    Args:
        backend: what computes the results in the dtype of `x`, on its device.
        x, logits, dy, spec: the call and the gradient of its output.
        needs: which of dx and dlogits are needed.
        tolerance: largest error over the largest value; by default that of the dtype.
        size: output size, if it is not that of the scale.
    """
    options = spec._asdict() | {"size": size}
    expected = differentiate(reassemble_reference, x.double(), logits.double(), dy.double(), needs, **options)
    saved: list[Tensor] = []  # x, logits and the log-sum-exp
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        actual = differentiate(reassemble, x, logits, dy, needs, backend=backend, **options)
    # dlogits are differences of sums over the channels, which cancel; the Triton kernels do without this
    slack = 1e-9 if backend == "triton" else (x.shape[1] / spec.groups) ** 0.5
    if backend != "reference" and spec.normalizer in LSE_NORMALIZERS:
        expected["lse"] = log_sum_exp(logits.double(), spec, *x.shape[2:])
        actual["lse"] = saved[2]
    tolerance = tolerance or (TRITON_TOLERANCES if backend == "triton" else TOLERANCES)[x.dtype]
    assert actual.keys() == expected.keys()
    for name, result in actual.items():
        assert name == "lse" or result.dtype == x.dtype
        error = relative_error(result, expected[name], slack)
        assert error <= tolerance, f"{name} is off by {error:.2e} of its largest value; {tolerance:.0e} is allowed"
