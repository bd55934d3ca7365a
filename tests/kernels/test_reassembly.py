"""What the public operator promises, whatever runs behind it."""

import pytest
import torch
from carafepp.kernels import backends, reassemble, reassemble_reference, reassemble_weights, torch_backend
from carafepp.kernels.geometry import Spec
from carafepp.kernels.reference import reassembly_kernels
from torch.utils.flop_counter import FlopCounterMode


def inputs(n=1, c=8, h=5, w=6, k=3, up=2, down=1, groups=1, **kwargs):
    return torch.randn(n, c, h, w, **kwargs), torch.randn(n, groups * k * k * up * up, -(-h // down), -(-w // down), **kwargs)


X, LOGITS = inputs()


@pytest.mark.parametrize(
    ("x", "logits", "options", "error", "message"),
    [
        (X, LOGITS, dict(kernel_size=4), ValueError, r"kernel_size must be odd.*got 4"),
        (X, LOGITS, dict(kernel_size=0), ValueError, r"kernel_size must be at least 1, got 0"),
        (X, LOGITS, dict(kernel_size=3.0), TypeError, r"kernel_size must be an int, got 3\.0 of type float"),
        (X, LOGITS, dict(up=True), TypeError, r"up must be an int, got True"),
        (X, LOGITS, dict(down=-1), ValueError, r"down must be at least 1, got -1"),
        (X, LOGITS, dict(groups=3), ValueError, r"groups must divide the channels of x, got groups=3 for 8 channels"),
        (X, LOGITS, dict(normalizer="max"), ValueError, r"normalizer must be one of softmax, .*got 'max'"),
        (X, LOGITS, dict(backend="cuda"), ValueError, r"backend must be None or one of reference, cpu, torch, triton, got 'cuda'"),
        (X.double(), LOGITS.double(), dict(backend="triton"), TypeError, r"'triton' takes .*got torch\.float64"),
        (X, LOGITS[:, :-1], {}, ValueError, r"logits must have shape \(1, 36, 5, 6\).*got \(1, 35, 5, 6\)"),
        (X, LOGITS[..., :-1], {}, ValueError, r"logits must have shape \(1, 36, 5, 6\)"),
        (X[0], LOGITS, {}, ValueError, r"x must have 4 dimensions .*got shape \(8, 5, 6\)"),
        (X[:, :0], LOGITS, {}, ValueError, r"x must have C, H, W of at least 1"),
        (X.numpy(), LOGITS, {}, TypeError, r"x must be a tensor, got ndarray"),
        (X.long(), LOGITS, {}, TypeError, r"x must be of a floating-point dtype, got torch\.int64"),
        (X, LOGITS.double(), {}, TypeError, r"same dtype, got torch\.float32 and torch\.float64"),
        (X, LOGITS.to("meta"), {}, ValueError, r"same device, got cpu and meta"),
    ],
)
def test_wrong_arguments_are_named(x, logits, options, error, message):
    with pytest.raises(error, match=message):
        reassemble(x, logits, **(dict(kernel_size=3, up=2) | options))


def test_wrong_weights_are_named():
    with pytest.raises(ValueError, match=r"weights must have shape \(1, 9, 10, 12\).*got \(1, 36, 5, 6\)"):
        reassemble_weights(X, LOGITS, kernel_size=3, up=2)


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
@pytest.mark.parametrize(("up", "down", "size"), [(2, 1, (10, 12)), (1, 2, (3, 3)), (3, 2, (8, 9))])
def test_output_keeps_shape_dtype_and_memory_format(backend, up, down, size):
    x, logits = inputs(up=up, down=down, n=2)
    y = reassemble(x, logits, kernel_size=3, up=up, down=down, backend=backend)
    assert y.shape == (2, 8, *size)
    assert y.is_contiguous()
    last = reassemble(x.to(memory_format=torch.channels_last), logits, kernel_size=3, up=up, down=down, backend=backend)
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, y)


def test_gradients_keep_the_layout_of_their_inputs():
    x, logits = (t.to(memory_format=torch.channels_last).requires_grad_() for t in inputs(n=2))
    reassemble(x, logits, kernel_size=3, up=2).sum().backward()
    for tensor in (x, logits):
        assert tensor.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2), (3, 2), (2, 3)])
def test_weights_at_output_resolution(backend, up, down):
    groups = 2
    x, logits = (t.requires_grad_() for t in inputs(up=up, down=down, groups=groups, dtype=torch.float64))
    options = dict(kernel_size=3, up=up, down=down, groups=groups)
    weights = reassembly_kernels(logits, Spec(**options), *x.shape[2:]).flatten(1, 2)
    y = reassemble_weights(x, weights, **options, backend=backend)
    expected = reassemble_reference(x, logits, **options)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    for a, e in zip(torch.autograd.grad(y, (x, logits), dy), torch.autograd.grad(expected, (x, logits), dy), strict=True):
        torch.testing.assert_close(a, e)


def test_weights_at_output_resolution_are_not_copied(monkeypatch):
    x, weights = torch.randn(1, 8, 5, 6), torch.rand(1, 9, 10, 12)
    seen = []
    forward = torch_backend.forward
    monkeypatch.setattr(torch_backend, "forward", lambda x, logits, *rest: (seen.append(logits.data_ptr()), forward(x, logits, *rest)))
    reassemble_weights(x, weights, kernel_size=3, up=2, backend="torch")
    assert seen == [weights.data_ptr()]


def test_autocast_takes_both_inputs_in_its_dtype():
    x, logits = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        y = reassemble(x, logits, kernel_size=3, up=2)
        mixed = reassemble(x.bfloat16(), logits, kernel_size=3, up=2)
        double = reassemble(x.double(), logits.double(), kernel_size=3, up=2)
    assert (y.dtype, double.dtype) == (torch.bfloat16, torch.float64)
    assert torch.equal(y, mixed)
    expected = reassemble_reference(x.bfloat16().float(), logits.bfloat16().float(), kernel_size=3, up=2)
    torch.testing.assert_close(y.float(), expected, rtol=1e-2, atol=1e-2)


def test_an_op_runs_where_the_definition_is_the_default():
    """A program that was exported with backend=None may be moved to any device."""
    assert backends.default_backend("mps", torch.float32) == "reference"
    assert backends.implementation(None, torch.device("mps"), torch.float32) is torch_backend


def test_empty_batch_has_empty_results():
    x, logits = (t.requires_grad_() for t in inputs(n=0))
    y = reassemble(x, logits, kernel_size=3, up=2)
    assert y.shape == (0, 8, 10, 12)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert logits.grad.shape == logits.shape


def test_meta_tensors_give_shapes():
    x, logits = inputs(device="meta")
    y = reassemble(x.to(memory_format=torch.channels_last), logits, kernel_size=3, up=2)
    assert (y.shape, y.device.type) == ((1, 8, 10, 12), "meta")
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("grad_x", "grad_logits"), [(True, True), (True, False), (False, True)])
def test_flops_are_counted(grad_x, grad_logits):
    x, logits = inputs(n=2)
    x.requires_grad_(grad_x)
    logits.requires_grad_(grad_logits)
    with FlopCounterMode(display=False) as counter:
        y = reassemble(x, logits, kernel_size=3, up=2)
        y.sum().backward()
    # a multiplication and an addition for every tap of every output value, in each of the sums
    assert counter.get_total_flops() == 2 * 9 * y.numel() * (1 + grad_x + grad_logits)


def test_only_the_gradients_asked_for():
    x, logits = inputs()
    x.requires_grad_()
    reassemble(x, logits, kernel_size=3, up=2).sum().backward()
    assert x.grad is not None
    assert logits.grad is None
