"""What CARAFE with gradients costs in half precision on a GPU: the launches of a pass, and the bytes that they move."""

import ctypes

import pytest
import torch
from hydra import initialize_config_module
from launches import LaunchCounter, count_bytes

pytest.importorskip("triton")

from carafepp.kernels.gpu.launch import Plans
from carafepp.kernels.gpu.layer import inference as launching
from carafepp.kernels.gpu.layer import training as kernels
from carafepp.models import carafe, inference, training
from carafepp.models.carafe import CARAFE
from carafepp.scripts.benching.networks import NetworkCalls, build_network
from carafepp.tasks.fixed_load import keep_size


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
    for module in (launching, kernels):
        monkeypatch.setattr(module, "Plan", Counted)
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


@pytest.fixture
def cleared(counted, monkeypatch):
    """Fill the outputs of planned launches with zeros, because a detector needs finite features."""

    def clear(compute):
        def call(*arguments):
            y = compute(*arguments)
            if y is not None:
                # an operation of PyTorch would be counted
                ctypes.memset(y.data_ptr(), 0, y.numel() * y.element_size())
            return y

        return call

    for name in ("train", "infer"):
        monkeypatch.setattr(f"carafepp.models.carafe.{name}", clear(getattr(carafe, name)))


def count_launches(table: str, row: str) -> int:
    """Return the launches of forward and backward of a training step of a network of the paper's tables."""
    size = (96, 128)
    with initialize_config_module("carafepp.conf", version_base=None):
        task = build_network(table, row, []).train()
    keep_size(task, size)
    calls = NetworkCalls(task, size, batch=1, step_batch=2, device="cpu", memory_format=torch.channels_last, dtype=torch.bfloat16)
    calls.optimizer.step = lambda: None
    # the first step draws the fixed load, and places anchors
    calls.step()
    COUNTS.clear()
    with LaunchCounter() as counter:
        calls.step()
    return counter.total + len(COUNTS)


@pytest.mark.parametrize(
    ("table", "baseline", "row", "more"),
    [
        ("table2", "resnet50", "resnet50_carafe", 75),
        ("table7", "published", "fpn_mask_head_backbone", 74),
        ("table9", "published", "ppm_fpn_fuse_backbone", 153),
    ],
)
def test_launches_of_training_steps(table, baseline, row, more, cleared):
    """docs/performance_networks.md gives the launches of these steps. CARAFE++ also replaces launches: of pooling, and of other norms."""
    assert count_launches(table, row) - count_launches(table, baseline) == more
