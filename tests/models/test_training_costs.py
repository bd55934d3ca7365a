"""What CARAFE with gradients costs in half precision on a GPU: the launches of a pass, and the bytes that they move."""

import pytest
import torch
from launches import LaunchCounter, count_bytes

pytest.importorskip("triton")

from carafepp.kernels.gpu import inference as launching
from carafepp.kernels.gpu import training as kernels
from carafepp.kernels.gpu.launch import Plans
from carafepp.models import inference, training
from carafepp.models.carafe import CARAFE


class Counted:
    """A plan that is only counted, with the bytes of its tensors. Like others, it keeps none of them alive."""

    def __init__(self, launch, _):
        tensors = {id(t): t for t in launch.parameters() if isinstance(t, torch.Tensor)}
        self.name, self.bytes = launch.kernel.__name__, count_bytes(*tensors.values())
        if self.name == "differentiate":
            # it reads and writes the gradient
            self.bytes += count_bytes(launch.arguments["gradient_ptr"])
        if self.name in OPERATOR:
            # the product that the operator's gradient adds
            self.bytes = count_bytes(launch.arguments.get("map_ptr"), launch.arguments.get("matrix_ptr"))

    def run(self, _):
        COUNTS.append((self.name, self.bytes))


COUNTS = []
OPERATOR = {"banded_forward", "banded_backward", "banded_source_gradient"}


@pytest.fixture
def counted(monkeypatch):
    """Count planned launches, which do nothing, and those of PyTorch: a list of names, and the bytes of all except the operator."""
    COUNTS.clear()
    monkeypatch.setattr("carafepp.models.carafe.suits_matrix_units", lambda x: x.element_size() == 2)
    monkeypatch.setattr(launching, "runs_on", lambda *_: True)
    monkeypatch.setattr(kernels, "Plan", Counted)
    monkeypatch.setattr(launching, "plans", Plans(16))
    for module in (inference, training):
        monkeypatch.setattr(module, "is_intercepted", lambda: False)


@pytest.mark.parametrize(
    ("shape", "options", "launches", "megabytes"),
    [
        ((1, 256, 100, 168), {"up": 2}, (3, 6), 60.4),
        ((4, 256, 25, 42), {"up": 2}, (3, 6), 16.3),
        ((1, 64, 112, 112), {"down": 2, "compressor_norm": True}, (4, 7), 8.9),
        ((4, 512, 28, 28), {"down": 2, "compressor_norm": True}, (4, 7), 8.1),
    ],
)
def test_launches_and_bytes(shape, options, launches, megabytes, counted):
    """docs/performance.md gives these counts."""
    n, c, height, width = shape
    module = CARAFE(c, **options).to(memory_format=torch.channels_last)
    x = torch.randn(n, c, height, width).to(torch.bfloat16, memory_format=torch.channels_last).requires_grad_()
    totals = []
    with LaunchCounter() as forward, torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    totals.append(forward.total + len(COUNTS))
    dy = torch.ones_like(y)
    with LaunchCounter() as backward:
        y.backward(dy)
    totals.append(backward.total + len(COUNTS) - totals[0])
    assert tuple(totals) == launches
    ours = sum(moved for _, moved in COUNTS)
    assert round((ours + forward.bytes + backward.bytes) / 1e6, 1) == megabytes
