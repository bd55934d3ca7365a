"""The gradient to features in NCHW as a sum over targets in rows of pixels: right results, emulated, and where it is taken."""

import math

import pytest
import torch
from carafepp.kernels.geometry import Spec

pytest.importorskip("triton")

import triton.language as tl
from carafepp.kernels.gpu.assembly import compile_launch, read_assembly
from carafepp.kernels.gpu.operator_launches import backward_launches
from carafepp.kernels.gpu.sums import cell_target_sums, row_target_sums
from carafepp.kernels.gpu.training_step import build_training_step
from carafepp.kernels.reference import reassemble_reference
from operator_cases import TRITON_TOLERANCES, differentiate, log_sum_exp, random_inputs, relative_error
from ptx_step import emulate, training_step

NHWC, NCHW = torch.channels_last, torch.contiguous_format
FLOAT, HALF = torch.float32, torch.float16


@pytest.fixture
def always(monkeypatch):
    """Sum for maps of any size."""
    monkeypatch.setattr(row_target_sums, "SMALLEST", 0)
    monkeypatch.setattr(row_target_sums, "LEAST_FILLED", 0)


def check(step, dtype, kernel):
    assert all(error < TRITON_TOLERANCES[dtype] for error in step.errors.values()), step.errors
    assert kernel in " ".join(step.backward.stats)


@pytest.mark.parametrize(
    ("size", "spec", "capability"),
    [
        ((1, 20, 9, 16), Spec(5, up=2), 90),
        ((1, 3, 31, 20), Spec(5, up=2), 80),
        ((2, 5, 7, 18), Spec(3, up=2), 80),
        ((1, 4, 7, 13), Spec(3, up=2, border="renormalize"), 90),
        ((1, 12, 5, 7), Spec(5, up=2, groups=2, border="renormalize"), 90),
        ((1, 1, 1, 2), Spec(5, up=2), 80),
        ((2, 3, 3, 1), Spec(3, up=2, normalizer="sigmoid_normalized"), 80),
        ((3, 5, 2, 11), Spec(5, up=2, normalizer="none"), 90),
        ((1, 6, 4, 9), Spec(3, up=2, groups=3, normalizer="sigmoid"), 80),
    ],
    ids=str,
)
def test_gradients_of_up_2_match_float64(size, spec, capability, always):
    check(training_step(*size, spec, FLOAT, NCHW, capability=capability), FLOAT, "sum_block_targets")


@pytest.mark.parametrize(("rows", "columns"), [(0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("spec", [Spec(3, up=2), Spec(5, up=2, border="renormalize")], ids=str)
def test_targets_that_a_size_cuts_off_add_nothing(rows, columns, spec, always):
    """As in a pyramid whose finer map has an odd size."""
    x, logits, dy = random_inputs(1, 3, 4, 6, spec, FLOAT, "contiguous")
    dy = dy[:, :, : dy.shape[2] - rows, : dy.shape[3] - columns].contiguous()
    cells = logits.unflatten(1, (spec.taps, 2, 2))
    dx = torch.full_like(x, math.nan)
    for launch in backward_launches(dy, x, cells, log_sum_exp(logits.double(), spec, 4, 6).float(), dx, None, spec):
        emulate(launch)
    expected = differentiate(reassemble_reference, x.double(), logits.double(), dy.double(), size=dy.shape[2:], **spec._asdict())
    assert relative_error(dx, expected["dx"]) < TRITON_TOLERANCES[FLOAT]


@pytest.mark.parametrize(
    ("size", "spec", "dtype", "capability"),
    [
        ((1, 20, 12, 40), Spec(5, down=2), FLOAT, 90),
        ((1, 6, 12, 24), Spec(5, down=2), HALF, 90),
        ((2, 5, 7, 18), Spec(3, down=2), torch.bfloat16, 80),
        ((1, 12, 11, 13), Spec(5, down=2, groups=2, border="renormalize"), FLOAT, 80),
        ((1, 4, 1, 2), Spec(5, down=2), HALF, 80),
        ((2, 3, 3, 1), Spec(3, down=2, normalizer="sigmoid_normalized"), FLOAT, 80),
        ((1, 5, 9, 16), Spec(7, down=2, normalizer="none"), FLOAT, 90),
        ((1, 6, 8, 9), Spec(1, down=2, groups=3, normalizer="sigmoid"), FLOAT, 80),
    ],
    ids=str,
)
def test_gradients_of_down_2_match_float64(size, spec, dtype, capability, always):
    check(training_step(*size, spec, dtype, NCHW, capability=capability), dtype, "sum_cell_targets")


@pytest.mark.parametrize("spec", [Spec(5, up=2), Spec(5, down=2)], ids=str)
@pytest.mark.parametrize("steps", [(7, 1), (2, 3)], ids=str)
def test_tensors_may_be_parts_of_others(spec, steps, always):
    """Slices whose rows are not aligned, and those without neighbouring pixels; logits are channels_last."""

    def place(name, size):
        n, c, h, w = size
        if name in ("dy", "dx"):
            rest, step = steps
            return torch.empty(n, c + 3, h + 1, w * step + rest)[:, 1:-2, 1:, rest::step]
        return torch.empty(size).contiguous(memory_format=NHWC if "logits" in name else NCHW)

    kernel = "sum_block_targets" if spec.up == 2 else "sum_cell_targets"
    check(training_step(1, 5, 6, 8, spec, FLOAT, NCHW, place=place), FLOAT, kernel)


@pytest.mark.parametrize("spec", [Spec(5, up=2), Spec(5, down=2)], ids=str)
def test_programs_share_channels_and_offsets_may_be_wide(spec, always):
    """The last program has fewer channels than the others."""
    started = []

    def run(launch, capability):
        if "share" in launch.arguments:
            one = launch.grid[0] // launch.arguments["share"].programs
            layout = launch.constants["LAYOUT"]._replace(index=tl.int64)
            launch = launch._replace(
                grid=(one * 3, 1, 1),
                arguments=launch.arguments | {"share": cell_target_sums.Share(3, 3)},
                constants=launch.constants | {"LAYOUT": layout},
            )
            started.append(launch)
        return emulate(launch, capability)

    check(training_step(1, 8, 6, 8, spec, FLOAT, NCHW, run=run), FLOAT, "targets")
    assert len(started) == 1


def test_a_program_reads_the_rows_around_sixteen_rows_of_pixels(always):
    step = build_training_step(1, 4, 32, 32, Spec(5, up=2), FLOAT, NCHW, "cpu")
    (launch,) = step.build_launches("source_gradient", capability=(9, 0))
    tensors = [value for value in launch.parameters() if isinstance(value, torch.Tensor)]
    counts = list(emulate(launch, 90)["per_buffer"].values())[[tensor is step.y for tensor in tensors].index(True)]
    # four rows around each half of the map, and a sector beside it
    assert 32 * counts["l2_sectors"] / (step.y.numel() * 4) == 36 / 32 * 40 / 32


@pytest.mark.parametrize(
    ("spec", "dtype", "memory_format", "height", "summed"),
    [
        (Spec(5, up=2), FLOAT, NCHW, 50, True),
        (Spec(3, up=2), FLOAT, NCHW, 50, True),
        (Spec(5, up=2), FLOAT, NCHW, 5, False),
        # products with matrix units are faster
        (Spec(5, up=2), HALF, NCHW, 50, False),
        (Spec(5, up=2), FLOAT, NHWC, 50, False),
        (Spec(5, up=2, border="shift"), FLOAT, NCHW, 50, False),
        (Spec(5, up=3), FLOAT, NCHW, 50, False),
        # the weights do not fit into registers
        (Spec(7, up=2), FLOAT, NCHW, 50, False),
        (Spec(9, down=2), FLOAT, NCHW, 200, False),
        (Spec(5, up=2, groups=32), FLOAT, NCHW, 50, True),
        (Spec(5, down=2), FLOAT, NCHW, 100, True),
        (Spec(7, down=2), torch.bfloat16, NCHW, 200, True),
        (Spec(5, down=2), HALF, NCHW, 20, False),
        (Spec(5, down=2), HALF, NHWC, 200, False),
    ],
    ids=str,
)
def test_where_it_is_taken(spec, dtype, memory_format, height, summed):
    step = build_training_step(4, 256, height, 64, spec, dtype, memory_format, "meta")
    names = " ".join(launch.kernel.__name__ for launch in step.build_launches("source_gradient", capability=(9, 0)))
    assert ("sum_block_targets" in names or "sum_cell_targets" in names) == summed


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("size", "spec", "dtype"),
    [
        ((512, 256, 14, 14), Spec(5, up=2), FLOAT),
        ((2, 256, 100, 168), Spec(3, up=2), FLOAT),
        ((64, 64, 112, 112), Spec(5, down=2), FLOAT),
        ((64, 64, 112, 112), Spec(5, down=2), HALF),
    ],
    ids=str,
)
def test_the_kernels_keep_weights_in_registers(size, spec, dtype, capability):
    step = build_training_step(*size, spec, dtype, NCHW, "meta")
    (launch,) = step.build_launches("source_gradient", capability=divmod(capability, 10))
    assembly = read_assembly(compile_launch(launch, capability))
    # a few values, before the loop
    assert assembly.spills <= 24
    assert assembly.registers <= 128
