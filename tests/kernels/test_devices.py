"""Devices without a kernel: the definition runs there. Tensors in memory that report another device stand in."""

import pytest
import torch
from carafepp.kernels import backends, reassemble, reassemble_weights, torch_backend
from carafepp.kernels.geometry import BORDERS, Spec
from operator_cases import random_inputs
from torch.utils._python_dispatch import TorchDispatchMode

DEVICES = ["mps", "xpu", "privateuseone"]


class StandIn(torch.Tensor):
    """A tensor in memory that reports a device which this machine lacks; what is computed from it is a tensor in memory."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    kind: str

    @property
    def device(self) -> torch.device:
        return torch.device(self.kind, 0)


def move(tensor: torch.Tensor, kind: str) -> torch.Tensor:
    """Return a stand-in of a tensor on a device of this kind."""
    moved = tensor.detach().clone().as_subclass(StandIn)
    moved.kind = kind
    return moved.requires_grad_()


class RecordNamespaces(TorchDispatchMode):
    """Records the namespaces of the ops that are called."""

    def __init__(self):
        super().__init__()
        self.namespaces: set[str] = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.namespaces.add(op.namespace)
        return op(*args, **kwargs or {})


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("device", DEVICES)
def test_the_definition_runs_where_there_is_no_kernel(device, border, monkeypatch):
    arange = torch.arange
    # PyTorch cannot make a tensor for a device that it lacks
    monkeypatch.setattr(torch, "arange", lambda *args, device=None: arange(*args))
    spec = Spec(3, up=3, down=2, groups=2, border=border)
    x, logits, dy = random_inputs(1, 4, 4, 5, spec)
    weights = torch.rand(1, 18, *dy.shape[2:])
    functions = {logits: reassemble, weights: reassemble_weights}
    for second, function in functions.items():
        there = move(x, device), move(second, device)
        assert backends.choose_backend(None, there[0].device, there[0].dtype) == "reference"
        with RecordNamespaces() as mode:
            y = function(*there, **spec._asdict())
            gradients = torch.autograd.grad(y, there, dy)
        assert mode.namespaces == {"aten"}
        here = [tensor.clone().requires_grad_() for tensor in (x, second)]
        expected = function(*here, **spec._asdict(), backend="reference")
        assert torch.equal(y, expected)
        torch.testing.assert_close(gradients, torch.autograd.grad(expected, here, dy))


@pytest.mark.parametrize("device", DEVICES)
def test_a_backend_for_another_device_is_an_error(device):
    x, logits, _ = random_inputs(1, 4, 3, 5, Spec(3))
    there = move(x, device), move(logits, device)
    with pytest.raises(ValueError, match=f"backend 'cpu' takes CPU tensors, got x on {device}:0"):
        reassemble(*there, kernel_size=3, backend="cpu")
    if backends.HAS_TRITON:
        with pytest.raises(ValueError, match=f"backend 'triton' takes CUDA tensors, got x on {device}:0; 'reference' runs"):
            reassemble(*there, kernel_size=3, backend="triton")


@pytest.mark.parametrize("device", DEVICES)
def test_an_exported_op_runs_without_a_kernel(device):
    """A program that was exported with backend=None may be moved to any device."""
    for dtype in (torch.float32, torch.float16):
        assert backends.implementation(None, torch.device(device), dtype) is torch_backend


@pytest.mark.parametrize(
    ("device", "dtype", "triton", "name"),
    [
        ("cuda", torch.float16, True, "triton"),
        ("cuda", torch.float64, True, "reference"),
        ("cuda", torch.float32, False, "reference"),
        ("cpu", torch.float64, True, "cpu"),
        ("meta", torch.bfloat16, False, "cpu"),
        *((device, torch.float32, True, "reference") for device in DEVICES),
    ],
)
def test_the_default_backend_of_a_device(device, dtype, triton, name, monkeypatch):
    monkeypatch.setattr(backends, "HAS_TRITON", triton)
    assert backends.default_backend(device, dtype) == name


@pytest.mark.parametrize("border", BORDERS)
def test_meta_tensors_have_shapes_at_every_border(border):
    spec = Spec(3, up=2, border=border)
    x, logits, dy = random_inputs(1, 4, 3, 5, spec, device="meta")
    x.requires_grad_(), logits.requires_grad_()
    y = reassemble(x, logits, **spec._asdict())
    assert (y.shape, y.device.type) == (dy.shape, "meta")
    assert [gradient.shape for gradient in torch.autograd.grad(y, (x, logits), dy)] == [x.shape, logits.shape]
