"""The gradient to the features by programs that walk down tiles, with tiles given by hand: compiled and executed without a GPU."""

import math

import pytest
import torch
from carafepp.kernels.geometry import LSE_NORMALIZERS, Spec

pytest.importorskip("triton")

from carafepp.kernels.gpu.assembly import compile_launch, read_assembly
from carafepp.kernels.gpu.operator_launches import backward_launches
from carafepp.kernels.gpu.tiles.geometry import Tile, TileProblem
from carafepp.kernels.gpu.tiles.ranking import rank_tiles
from carafepp.kernels.gpu.training_step import build_training_step
from carafepp.kernels.reference import reassemble_reference
from operator_cases import TRITON_TOLERANCES, arrange, differentiate, random_inputs, relative_error
from ptx_step import emulate

HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32
ROIS = TileProblem(Spec(5, up=2), 256, 14, 14, 512, 4, True, 4, 4, (9, 0))


@pytest.mark.parametrize(
    ("size", "spec", "dtype", "layout", "tile", "capability"),
    [
        # several walks down and across, the last of them cut off
        ((1, 40, 13, 11), Spec(5, up=2), FLOAT, "channels_last", Tile(2, 4, 1, 32, 1, 4, 1, 128, 3), 80),
        ((1, 72, 9, 10), Spec(5, up=2), HALF, "contiguous", Tile(1, 8, 2, 64, 1, 4, 2, 128, 4), 90),
        # channels as rows, with two tiles of sources in a product and with an odd number of tiles; in a pipeline, and past the last channel
        ((1, 72, 13, 11), Spec(5, up=2), HALF, "channels_last", Tile(4, 4, 1, 64, 1, 4, 1, 128, 2), 90),
        ((2, 264, 7, 9), Spec(5, up=2), BF16, "transposed", Tile(4, 4, 1, 256, 1, 8, 2, 128, 3), 90),
        ((1, 67, 6, 11), Spec(7, up=2), HALF, "channels_last", Tile(2, 8, 1, 64, 1, 4, 1, 128, 2), 90),
        ((1, 136, 9, 10), Spec(5, up=2, groups=2), HALF, "channels_last", Tile(2, 8, 1, 128, 1, 8, 1, 128, 4), 90),
        ((1, 12, 9, 10), Spec(5, up=2), FLOAT, "contiguous", Tile(4, 4, 2, 32, 1, 4, 1, 128, 2), 90),
        ((1, 8, 1, 1), Spec(5, up=2), HALF, "channels_last", Tile(4, 4, 1, 32, 1, 4, 2, 128, 4), 80),
        ((1, 5, 3, 2), Spec(7, up=3), FLOAT, "contiguous", Tile(1, 2, 1, 32, 1, 4, 1, 128, 2), 80),
        ((2, 20, 7, 11), Spec(5, down=2, groups=2), HALF, "transposed", Tile(1, 4, 1, 32, 1, 4, 2, 128, 2), 80),
        ((1, 4, 7, 5), Spec(5, up=3, down=2), BF16, "sliced", Tile(2, 2, 1, 32, 1, 4, 2, 128, 2), 80),
        ((1, 4, 7, 5), Spec(3, up=2, down=3, normalizer="none"), FLOAT, "channels_last", Tile(1, 2, 1, 32, 1, 4, 1, 128, 2), 80),
        # walks that are alone in their rows
        ((1, 12, 7, 9), Spec(5, down=2), HALF, "contiguous", Tile(2, 8, 1, 32, 1, 4, 1, 128, 2), 80),
        ((1, 4, 7, 5), Spec(5, up=3, down=2), HALF, "contiguous", Tile(2, 4, 1, 32, 1, 4, 1, 128, 2), 80),
        ((1, 4, 5, 6), Spec(1, normalizer="sigmoid"), HALF, "channels_last", Tile(2, 8, 1, 32, 1, 4, 2, 128, 2), 80),
    ],
)
def test_results_match_float64(size, spec, dtype, layout, tile, capability):
    x, logits, dy = random_inputs(*size, spec, dtype, layout)
    cells = logits.unflatten(1, (spec.groups * spec.taps, spec.up, spec.up))
    lse = torch.logsumexp(cells.unflatten(1, (spec.groups, spec.taps)).float(), 2) if spec.normalizer in LSE_NORMALIZERS else torch.empty(0)
    # what is not written stays NaN
    dx = arrange(torch.full(x.shape, math.nan, dtype=dtype), layout)
    launches = backward_launches(dy, x, cells, lse, dx, None, spec, tile=tile, capability=divmod(capability, 10))
    assert launches[-1].kernel.__name__ == "banded_source_gradient"
    for launch in launches:
        if "weights" in launch.arguments:
            launch.arguments["weights"].ptr.fill_(math.nan)
        emulate(launch, capability)
    expected = differentiate(reassemble_reference, x.double(), logits.double(), dy.double(), **spec._asdict())["dx"]
    assert relative_error(dx, expected) < TRITON_TOLERANCES[dtype]


def test_a_walk_reads_the_gradient_of_the_output_once_and_the_columns_around_it():
    # two columns of walks, which share eight columns of targets
    tile = Tile(2, 8, 1, 32, 1, 4, 1, 128, 8)
    spec = ROIS.spec
    x, logits, dy = random_inputs(1, 32, 14, 14, spec, FLOAT, "channels_last")
    cells = logits.unflatten(1, (spec.taps, 2, 2))
    (launch,) = backward_launches(dy, x, cells, torch.zeros(1, 1, *cells.shape[2:]), x, None, spec, tile=tile, capability=(9, 0))
    tensors = [value for value in launch.parameters() if isinstance(value, torch.Tensor)]
    counts = list(emulate(launch, 90)["per_buffer"].values())
    reads = 32 * counts[[tensor is dy for tensor in tensors].index(True)]["l2_sectors"] / (dy.numel() * 4)
    assert reads == pytest.approx(36 / 28)


# rows of an odd number of pixels, and windows that begin an odd number of pixels before the cells, are loaded and stored in small pieces
@pytest.mark.parametrize(("width", "kernel_size"), [(41, 5), (41, 3), (42, 3), (42, 7)])
def test_walks_over_maps_of_narrow_vectors_spill_nothing(width, kernel_size):
    step = build_training_step(64, 256, 25, width, Spec(kernel_size, up=2), HALF, torch.contiguous_format)
    tile = rank_tiles("source_gradient", step.problem((9, 0)))[0]
    assert tile.steps > 1
    launch = step.build_launches("source_gradient", tile=tile, capability=(9, 0))[-1]
    assert read_assembly(compile_launch(launch, 90)).spills == 0


# a compilation takes seconds
@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "element_size", "channels_last"), [(80, 4, True), (90, 4, True), (90, 4, False), (90, 2, True), (90, 2, False)]
)
def test_the_chosen_walk_of_rois_spills_nothing_at_a_quarter_of_the_warps(capability, element_size, channels_last):
    dtype = {2: HALF, 4: FLOAT}[element_size]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    step = build_training_step(512, 256, 14, 14, ROIS.spec, dtype, layout)
    pair = divmod(capability, 10)
    tile = next(tile for tile in rank_tiles("source_gradient", step.problem(pair)) if tile.steps > 1)
    for launch in step.build_launches("source_gradient", tile=tile, capability=pair):
        assembly = read_assembly(compile_launch(launch, capability))
        assert assembly.spills == 0
        assert assembly.registers <= 128
        assert assembly.occupancy >= 0.25
