"""The compiled kernels of the operator, executed without a GPU: right results, within a budget of instructions and bytes, at any offset."""

import numpy as np
import pytest
import torch
from carafepp.kernels.geometry import NORMALIZERS, Spec

pytest.importorskip("triton")

from carafepp.kernels.gpu.assembly import compile_launch, read_assembly
from carafepp.kernels.gpu.tiles.geometry import DIRECTIONS, Tile
from carafepp.kernels.gpu.training_step import build_training_step
from operator_cases import TRITON_TOLERANCES
from ptx.memory import untouched
from ptx_step import training_step

NCHW, NHWC = torch.contiguous_format, torch.channels_last
HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("size", "spec", "dtype", "memory_format", "capability"),
    [
        ((1, 40, 6, 11), Spec(5, up=2), HALF, NCHW, 80),
        ((1, 64, 6, 11), Spec(5, up=2), HALF, NCHW, 90),
        ((1, 40, 6, 11), Spec(5, up=2), FLOAT, NHWC, 80),
        ((2, 12, 5, 7), Spec(3, up=2, groups=4), BF16, NHWC, 80),
        ((1, 6, 3, 2), Spec(7, up=2), FLOAT, NCHW, 80),
        ((1, 16, 1, 1), Spec(3, up=4), HALF, NHWC, 80),
        ((1, 20, 7, 11), Spec(5, down=2), HALF, NCHW, 80),
        ((1, 64, 7, 11), Spec(5, down=2), BF16, NHWC, 90),
        ((2, 16, 9, 8), Spec(3, down=2, groups=2), FLOAT, NHWC, 80),
        ((1, 4, 7, 5), Spec(5, up=3, down=2), HALF, NCHW, 80),
        ((1, 5, 5, 3), Spec(3), BF16, NCHW, 80),
        # too many channels for one product of the gradient to the sources
        ((1, 272, 3, 4), Spec(3, up=2), FLOAT, NHWC, 90),
        ((1, 40, 6, 11), Spec(5, up=2, border="renormalize"), HALF, NCHW, 80),
        ((1, 64, 7, 6), Spec(3, up=4, down=5, border="renormalize"), BF16, NHWC, 90),
        ((1, 8, 5, 6), Spec(3, up=2, border="replicate"), FLOAT, NHWC, 80),
        ((1, 6, 2, 1), Spec(5, up=3, down=2, normalizer="sigmoid", border="replicate"), HALF, NCHW, 90),
        ((1, 6, 7, 5), Spec(3, up=3, down=2, groups=2, border="shift"), HALF, NCHW, 80),
        ((1, 8, 9, 8), Spec(5, down=2, normalizer="sigmoid_normalized", border="shift"), BF16, NHWC, 90),
        ((1, 40, 6, 11), Spec(5, up=2), HALF, NCHW, 100),
        ((1, 64, 7, 11), Spec(5, down=2), FLOAT, NHWC, 100),
        ((1, 6, 7, 5), Spec(3, up=3, down=2, groups=2, border="shift"), HALF, NCHW, 100),
    ],
)
def test_results_match_float64(size, spec, dtype, memory_format, capability):
    errors = training_step(*size, spec, dtype, memory_format, capability=capability).errors
    assert len(errors) == 3
    assert all(value < TRITON_TOLERANCES[dtype] for value in errors.values()), errors


TILES_OF_CELLS = {name: Tile(2, 4, 1, 16, 1, 4, 1) for name in ("forward", "logit_gradient", "source_gradient")}


@pytest.mark.parametrize("normalizer", [name for name in NORMALIZERS if name != "softmax"])
def test_every_normalizer(normalizer):
    errors = training_step(1, 16, 4, 9, Spec(3, up=2, normalizer=normalizer)).errors
    assert all(value < TRITON_TOLERANCES[HALF] for value in errors.values()), errors


@pytest.mark.parametrize(("spec", "capability"), [(Spec(5, up=2), 90), (Spec(3, up=4, groups=2), 80)])
def test_logits_in_channels_last_are_accessed_in_runs(spec, capability):
    step = training_step(1, 16, 8, 8, spec, HALF, NHWC, capability=capability, tiles=TILES_OF_CELLS)
    assert all(value < TRITON_TOLERANCES[HALF] for value in step.errors.values()), step.errors
    least = spec.groups * spec.taps * spec.up**2 * 8 * 8 * HALF.itemsize / 32
    forward, (gradient, _) = step.forward.stats["banded_forward 0"], step.backward.stats.values()
    # x, logits, y and the log-sum-exp; x, logits, the log-sum-exp, dy, dlogits, and the place of weights, which stays empty
    read, (_, read_again, *_, written, _) = list(forward["per_buffer"].values())[1], gradient["per_buffer"].values()
    for sectors in (read["ld_sectors"], read_again["ld_sectors"], written["st_sectors"]):
        assert least <= sectors < 3 * least


def test_logits_may_have_another_memory_format_than_features():
    errors = training_step(
        1, 16, 5, 6, Spec(3, up=2), HALF, NHWC, place=lambda name, size: torch.empty(size) if "logits" in name else None
    ).errors
    assert all(value < TRITON_TOLERANCES[HALF] for value in errors.values()), errors


# images that fill a device: on fewer, tiles do more work in all, in more programs
MANY = 64
UP, DOWN = ((1, 256, 25, 42), Spec(5, up=2)), ((1, 256, 50, 84), Spec(5, down=2))


@pytest.mark.parametrize(
    ("memory_format", "instructions", "bounds"),
    [
        # warp instructions in millions, largest bound over the DRAM bound; forward, backward
        (NCHW, (1.3, 3.5), (2.0, 5.0)),
        (NHWC, (0.65, 1.5), (1.3, 3.0)),
    ],
)
@pytest.mark.parametrize(("size", "spec"), [UP, DOWN])
def test_cost_stays_within_budget(size, spec, memory_format, instructions, bounds):
    step = training_step(*size, spec, HALF, memory_format, images=MANY)
    assert max(step.errors.values()) < TRITON_TOLERANCES[HALF], step.errors
    for cost, most_instructions, most_time in zip(step[1:], instructions, bounds, strict=True):
        # two gradients read that of the output twice: 1.66 times the least bytes of up 2. A copy and weights are written and read as well
        copies, weights = (sum(name.startswith(kernel) for name in cost.stats) for kernel in ("transpose ", "weigh "))
        assert 1.0 <= cost.dram_ratio < (1.05 if len(cost.stats) - copies == 1 else 1.7) + 0.4 * copies + 0.2 * weights
        assert cost.warp_insts < most_instructions * 1e6
        assert cost.bound_ratio < most_time


def test_float32_is_computed_in_full_at_the_cost_of_little():
    step = training_step(*UP[0], UP[1], FLOAT, NCHW, images=MANY)
    assert max(step.errors.values()) < TRITON_TOLERANCES[FLOAT], step.errors
    assert step.forward.bound_ratio < 2.5


@pytest.mark.parametrize(
    "axes",
    [
        {"x": 0, "logits": 0, "y": 0, "dy": 0, "dx": 0, "dlogits": 0},
        {"x": 1, "logits": 2, "y": 1, "dy": 2, "dx": 1, "dlogits": 2},
        {"x": 2, "logits": 1, "y": 2, "dy": 1, "dx": 2, "dlogits": 1},
    ],
)
def test_offsets_beyond_32_bits(axes):
    def place(name, size):
        strides = list(torch.empty(size).stride())
        # every stride fits into 32 bits, the offset of the last index along the axis does not
        strides[axes[name]] = (2**31 // (size[axes[name]] - 1) // 16 + 1) * 16
        extent = 1 + sum((n - 1) * stride for n, stride in zip(size, strides, strict=True))
        return torch.from_numpy(untouched(2 * extent).view(np.float16)).as_strided(size, strides)

    errors = training_step(3, 4, 3, 5, Spec(3, up=2), place=place).errors
    assert all(value < TRITON_TOLERANCES[HALF] for value in errors.values()), errors


@pytest.mark.parametrize(
    ("capability", "size", "spec", "dtype", "memory_format"),
    [
        (80, *UP, HALF, NCHW),
        (80, *UP, FLOAT, NHWC),
        (80, *DOWN, FLOAT, NCHW),
        (90, *UP, HALF, NCHW),
        (90, *UP, BF16, NHWC),
        (90, *DOWN, HALF, NHWC),
        (90, *UP, FLOAT, NCHW),
        (100, *UP, HALF, NHWC),
        (100, *DOWN, FLOAT, NHWC),
        (80, UP[0], UP[1]._replace(border="renormalize"), HALF, NCHW),
        (90, UP[0], UP[1]._replace(border="renormalize"), FLOAT, NHWC),
    ],
)
def test_assembly_spills_nothing_and_uses_tensor_cores(capability, size, spec, dtype, memory_format):
    step = build_training_step(*size, spec, dtype, memory_format)
    launches = [x for direction in DIRECTIONS for x in step.build_launches(direction, capability=divmod(capability, 10))]
    codes = [compile_launch(launch, capability) for launch in launches]
    products = 0
    for code in codes:
        assembly = read_assembly(code)
        assert assembly.spills == 0
        assert assembly.blocks > 0
        if "tt.dot" in code.asm["ttir"]:
            products += 1
            name = "HGMMA" if capability == 90 and dtype != FLOAT else "MMA"
            assert any(name in opcode for opcode in assembly.tensor_core), assembly
    assert products > 0


@pytest.mark.parametrize(("capability", "dtype", "memory_format", "border"), [(80, FLOAT, NCHW, "shift"), (90, HALF, NHWC, "replicate")])
def test_assembly_of_padded_windows_spills_nothing(capability, dtype, memory_format, border):
    step = build_training_step(*UP[0], UP[1]._replace(border=border), dtype, memory_format)
    launches = [x for direction in DIRECTIONS for x in step.build_launches(direction, capability=divmod(capability, 10))]
    assert [launch.kernel.__name__ for launch in launches] == ["tap_forward", "tap_logit_gradient", "padded_source_gradient"]
    for launch in launches:
        assembly = read_assembly(compile_launch(launch, capability))
        assert assembly.spills == 0
        assert assembly.blocks > 0
