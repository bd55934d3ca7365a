"""The public functions: errors for wrong arguments, inputs that are read in place, autocast."""

import warnings

import pytest
import torch
from carafepp.kernels import reassemble, reassemble_reference, reassemble_weights, torch_backend
from carafepp.kernels.geometry import Spec
from operator_cases import random_inputs

X, LOGITS, _ = random_inputs(1, 8, 5, 6, Spec(3, up=2))
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", ".*quantized tensor creation functions", UserWarning)
    QUANTISED = torch.quantize_per_tensor(X, 0.1, 0, torch.quint8)


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
        (X, LOGITS, dict(border="reflect"), ValueError, r"border must be one of zero, .*shift, got 'reflect'"),
        (X, LOGITS, dict(border=None), ValueError, r"border must be one of .*got None"),
        (X, LOGITS, dict(border="renormalize", normalizer="none"), ValueError, r"border 'renormalize' needs .*softmax or .*got 'none'"),
        (X, LOGITS, dict(border="renormalize", normalizer="sigmoid"), ValueError, r"border 'renormalize' needs .*got 'sigmoid'"),
        (X, LOGITS, dict(border="shift", kernel_size=7), ValueError, r"border 'shift' .*kernel_size=7 rows and columns.*got x of 5 x 6"),
        (X, LOGITS, dict(backend="cuda"), ValueError, r"backend must be None or one of reference, cpu, torch, triton, got 'cuda'"),
        (X.double(), LOGITS.double(), dict(backend="triton"), TypeError, r"'triton' takes .*got torch\.float64"),
        (X, LOGITS[:, :-1], {}, ValueError, r"logits must have shape \(1, 36, 5, 6\).*got \(1, 35, 5, 6\)"),
        (X, LOGITS[..., :-1], {}, ValueError, r"logits must have shape \(1, 36, 5, 6\)"),
        (X[0], LOGITS, {}, ValueError, r"x must have 4 dimensions .*got shape \(8, 5, 6\)"),
        (X[:, :0], LOGITS, {}, ValueError, r"x must have C, H, W of at least 1"),
        (X.numpy(), LOGITS, {}, TypeError, r"x must be a tensor, got ndarray"),
        (X.long(), LOGITS, {}, TypeError, r"x must be of a floating-point dtype, got torch\.int64"),
        (QUANTISED, QUANTISED, {}, TypeError, r"x must be of a floating-point dtype, got torch\.quint8"),
        (X, LOGITS.double(), {}, TypeError, r"same dtype, got torch\.float32 and torch\.float64"),
        (X.to_sparse(), LOGITS, {}, TypeError, r"x must be a dense tensor, got layout torch\.sparse_coo"),
        (X, LOGITS.to_mkldnn(), {}, TypeError, r"logits must be a dense tensor, got layout torch\._mkldnn"),
        (torch.nested.nested_tensor([X[0]]), LOGITS, {}, TypeError, r"x must be a dense tensor, got a nested one"),
        (X, LOGITS, dict(size=(10, 14)), ValueError, r"size must .* less than up=2 pixels from 10 x 12, .* for 5 x 6 .*got 10 x 14"),
        (X, LOGITS, dict(size=(8, 12)), ValueError, r"size must .*got 8 x 12"),
        (X, LOGITS, dict(size=(10,)), TypeError, r"size must be a pair of integers \(rows, columns\), got \(10,\)"),
        (X, LOGITS, dict(size=(10.0, 12)), TypeError, r"size must be a pair of integers"),
        (X, LOGITS, dict(size=12), TypeError, r"size must be a pair of integers .*got 12"),
        (X, LOGITS.to("meta"), {}, ValueError, r"same device, got cpu and meta"),
    ],
)
def test_wrong_arguments_are_named(x, logits, options, error, message):
    with pytest.raises(error, match=message):
        reassemble(x, logits, **(dict(kernel_size=3, up=2) | options))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(kernel_size=3.0), TypeError, r"kernel_size must be an int, got 3\.0 of type float"),
        (dict(kernel_size=[3, 3]), TypeError, r"kernel_size must be an int, got \[3, 3\] of type list"),
        (dict(up=2.0), TypeError, r"up must be an int, got 2\.0 of type float; write up=2"),
        (dict(down=True), TypeError, r"down must be an int, got True"),
        (dict(groups=1.0), TypeError, r"groups must be an int, got 1\.0"),
        (dict(normalizer=["softmax"]), ValueError, r"normalizer must be one of .*got \['softmax'\]"),
        (dict(border=["zero"]), ValueError, r"border must be one of .*got \['zero'\]"),
        (dict(backend=["cpu"]), ValueError, r"backend must be None or one of .*got \['cpu'\]"),
        (dict(size=(10.0, 12.0)), TypeError, r"size must be a pair of integers .*got \(10\.0, 12\.0\)"),
        (dict(size=torch.tensor([10, 12])), TypeError, r"size must be a pair of integers"),
    ],
)
def test_options_that_equal_those_of_a_right_call_are_still_wrong(options, error, message):
    """A call is checked once, but the numbers 3, 3.0 and True are not the same option."""
    right = dict(kernel_size=3, up=2, down=1, groups=1, size=(10, 12))
    reassemble(X, LOGITS, **right)
    with pytest.raises(error, match=message):
        reassemble(X, LOGITS, **(right | options))


@pytest.mark.parametrize("size", [(10, 12), [10, 12], torch.Size([10, 12]), None], ids=repr)
def test_the_size_may_be_any_sequence(size):
    assert torch.equal(reassemble(X, LOGITS, kernel_size=3, up=2, size=size), reassemble(X, LOGITS, kernel_size=3, up=2))


def test_wrong_weights_are_named():
    with pytest.raises(ValueError, match=r"weights must have shape \(1, 9, 10, 12\).*got \(1, 36, 5, 6\)"):
        reassemble_weights(X, LOGITS, kernel_size=3, up=2)


class Labelled(torch.Tensor):
    pass


def test_a_subclass_keeps_its_type():
    y = reassemble(X, LOGITS, kernel_size=3, up=2)
    for x, logits in ((X.as_subclass(Labelled), LOGITS), (X, LOGITS.as_subclass(Labelled))):
        labelled = reassemble(x, logits, kernel_size=3, up=2)
        assert type(labelled) is Labelled
        assert torch.equal(labelled, y)
    weights = torch.rand(1, 9, 10, 12)
    assert type(reassemble_weights(X, weights.as_subclass(Labelled), kernel_size=3, up=2)) is Labelled


def test_weights_give_no_longer_output():
    with pytest.raises(ValueError, match=r"size must not exceed .*got 11 x 12"):
        reassemble_weights(X, torch.rand(1, 9, 11, 12), kernel_size=3, up=2, size=(11, 12))


def test_a_longer_output_repeats_its_last_row_and_column():
    y = reassemble(X, LOGITS, kernel_size=3, up=2)
    longer = reassemble(X, LOGITS, kernel_size=3, up=2, size=(11, 13))
    assert torch.equal(longer[..., :10, :12], y)
    assert torch.equal(longer[..., 10, :12], y[..., 9, :])
    assert torch.equal(longer[..., 12], longer[..., 11])


def test_weights_at_output_resolution_are_not_copied(monkeypatch):
    x, weights = torch.randn(1, 8, 5, 6), torch.rand(1, 9, 10, 12)
    seen = []
    forward = torch_backend.forward
    monkeypatch.setattr(torch_backend, "forward", lambda x, logits, *rest: (seen.append(logits.data_ptr()), forward(x, logits, *rest)))
    reassemble_weights(x, weights, kernel_size=3, up=2, backend="torch")
    assert seen == [weights.data_ptr()]


def test_autocast_takes_both_inputs_in_its_dtype():
    x, logits = X, LOGITS
    with torch.autocast("cpu", torch.bfloat16):
        y = reassemble(x, logits, kernel_size=3, up=2)
        mixed = reassemble(x.bfloat16(), logits, kernel_size=3, up=2)
        double = reassemble(x.double(), logits.double(), kernel_size=3, up=2)
    assert (y.dtype, double.dtype) == (torch.bfloat16, torch.float64)
    assert torch.equal(y, mixed)
    expected = reassemble_reference(x.bfloat16().float(), logits.bfloat16().float(), kernel_size=3, up=2)
    torch.testing.assert_close(y.float(), expected, rtol=1e-2, atol=1e-2)


def test_only_the_gradients_asked_for():
    x, logits = X.clone().requires_grad_(), LOGITS
    reassemble(x, logits, kernel_size=3, up=2).sum().backward()
    assert x.grad is not None
    assert logits.grad is None
