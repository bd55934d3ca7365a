"""The gradient to float32 features in channels_last as a sum over targets: right results, emulated, and where it is taken."""

from dataclasses import replace

import pytest
import torch
from carafepp.kernels.geometry import Spec

pytest.importorskip("triton")

from carafepp.kernels.gpu import operator_launches
from carafepp.kernels.gpu.assembly import compile_launch, read_assembly
from carafepp.kernels.gpu.sums import tap_sums, target_sums
from carafepp.kernels.gpu.training_step import build_training_step
from operator_cases import TRITON_TOLERANCES
from ptx import run
from ptx.bounds import H100
from ptx_step import training_step

NHWC = torch.channels_last
FLOAT = torch.float32


@pytest.fixture
def always(monkeypatch):
    """Sum for maps of any size."""
    for module in (tap_sums, target_sums):
        monkeypatch.setattr(module, "SMALLEST", 0)
    monkeypatch.setattr(tap_sums, "MOST_WEIGHTS", 1000)


@pytest.mark.parametrize(
    ("size", "spec", "capability"),
    [
        ((1, 64, 9, 13), Spec(5, up=2), 90),
        ((2, 20, 7, 5), Spec(3, up=2), 80),
        ((1, 12, 5, 7), Spec(5, up=2, groups=2, border="renormalize"), 90),
        ((1, 4, 1, 2), Spec(5, up=2), 80),
        ((1, 68, 3, 2), Spec(5, up=2, normalizer="sigmoid_normalized"), 80),
        ((3, 5, 2, 11), Spec(1, up=2, normalizer="none"), 90),
        ((1, 6, 4, 9), Spec(3, up=2, groups=3, normalizer="sigmoid"), 80),
    ],
    ids=str,
)
def test_gradients_match_float64(size, spec, capability, always):
    step = training_step(*size, spec, FLOAT, NHWC, capability=capability)
    assert [name.split()[0] for name in step.backward.stats] == ["banded_backward", "weigh_sites", "sum_targets"]
    assert all(error < TRITON_TOLERANCES[FLOAT] for error in step.errors.values()), step.errors


def test_tensors_may_be_parts_of_others(always):
    """A slice of the channels, whose pixels are not aligned, and logits in NCHW."""

    def place(name, size):
        n, c, h, w = size
        return torch.empty(n, c + 3, h, w).contiguous(memory_format=NHWC)[:, 1:-2] if name in ("dy", "dx") else torch.empty(size)

    def place_all(name, size):
        kept = place(name, size)
        return kept if "logits" in name else kept.contiguous(memory_format=NHWC) if name in ("x", "y") else kept

    step = training_step(1, 10, 5, 6, Spec(3, up=2), FLOAT, NHWC, place=place_all)
    assert all(error < TRITON_TOLERANCES[FLOAT] for error in step.errors.values()), step.errors
    assert "sum_targets" in " ".join(step.backward.stats)


@pytest.mark.parametrize(
    ("spec", "dtype", "memory_format", "height", "summed"),
    [
        (Spec(5, up=2), FLOAT, NHWC, 200, True),
        (Spec(5, up=2), FLOAT, NHWC, 50, False),
        (Spec(5, up=2), torch.bfloat16, NHWC, 200, False),
        (Spec(5, up=2), FLOAT, torch.contiguous_format, 200, False),
        (Spec(5, down=2), FLOAT, NHWC, 200, False),
        (Spec(5, up=2, border="shift"), FLOAT, NHWC, 200, False),
        # these would take minutes to compile, and the last one weights of 12 times the memory of the output
        (Spec(5, up=3), FLOAT, NHWC, 200, False),
        (Spec(9, up=2), FLOAT, NHWC, 200, False),
        (Spec(5, up=2, groups=128), FLOAT, NHWC, 200, False),
    ],
    ids=str,
)
def test_where_it_is_taken(spec, dtype, memory_format, height, summed):
    step = build_training_step(1, 256, height, 64, spec, dtype, memory_format, "meta")
    names = [launch.kernel.__name__ for launch in step.build_launches("backward", capability=(9, 0))]
    assert ("sum_targets" in names) == summed


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("size", [(2, 256, 100, 168), (512, 256, 14, 14), (4, 512, 64, 64)], ids=str)
def test_the_kernels_do_not_spill(size, capability):
    step = build_training_step(*size, Spec(5, up=2), FLOAT, NHWC, "meta")
    for launch in step.build_launches("source_gradient", capability=divmod(capability, 10)):
        assembly = read_assembly(compile_launch(launch, capability))
        assert not assembly.spills
        assert assembly.registers <= 128


def test_a_multiprocessor_reads_the_targets_of_a_program_once(always):
    """It holds two programs, and its L1 what both read in a step."""
    step = build_training_step(1, 64, 32, 32, Spec(5, up=2), FLOAT, NHWC, "cpu")
    launch = step.build_launches("source_gradient", capability=(9, 0))[-1]
    gpu = replace(H100, multiprocessors=1, threads=2 * 32 * launch.num_warps)
    found = run(compile_launch(launch, 90).asm["ptx"], launch.grid, launch.parameters(), gpu=gpu)
    tensors = [value for value in launch.parameters() if isinstance(value, torch.Tensor)]
    counts = list(found["per_buffer"].values())[[tensor is step.y for tensor in tensors].index(True)]
    # programs of 8 x 16 pixels, with two pixels around them that are in the map
    assert 32 * counts["l2_sectors"] / (step.y.numel() * 4) <= 44 / 32 * 36 / 32


def test_a_product_is_not_forgotten(always):
    """Where a launch adds a product to the gradient, it is a product with a banded matrix."""
    step = build_training_step(1, 64, 8, 8, Spec(5, up=2), FLOAT, NHWC)
    given = step.y, step.x, step.logits, step.lse, torch.empty_like(step.x), None
    factors = torch.empty(1, 16, 8, 8).contiguous(memory_format=NHWC), torch.empty(16, 64)
    (launch,) = operator_launches.backward_launches(*given, step.spec, factors=factors)
    assert launch.kernel.__name__ != "sum_targets"
