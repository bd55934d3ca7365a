"""The launch that computes weights for the gradient to the features in NCHW: compiled and executed without a GPU."""

import math

import numpy as np
import pytest
import torch
from carafepp.kernels.geometry import LSE_NORMALIZERS, NORMALIZERS, Spec
from carafepp.kernels.reference import reassembly_kernels

pytest.importorskip("triton")

from carafepp.kernels.gpu.operator_launches import backward_launches
from carafepp.kernels.gpu.tiles.geometry import Tile
from operator_cases import TRITON_TOLERANCES, random_inputs, relative_error
from ptx.memory import untouched
from ptx_step import emulate

HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32
TILE, WALK = Tile(2, 2, 1, 32, 1, 4, 1), Tile(2, 8, 2, 32, 1, 4, 1, 128, 4)


def log_sum_exp(cells, spec):
    """Return what forward saves for logits [N, G * K * K, up, up, Hq, Wq]."""
    scores = cells.float().unflatten(1, (spec.groups, spec.taps))
    if spec.normalizer == "sigmoid_normalized":
        scores = torch.nn.functional.logsigmoid(scores)
    return torch.logsumexp(scores, 2) if spec.normalizer in LSE_NORMALIZERS else torch.empty(0)


def weigh(x, cells, dy, spec, tile, capability=80):
    """Run the launch before the gradient to the features; return its weights [N, G * K * K, rows, columns], and the launch after it."""
    pair = divmod(capability, 10)
    first, second = backward_launches(dy, x, cells, log_sum_exp(cells, spec), torch.empty_like(x), None, spec, tile=tile, capability=pair)
    weights = first.arguments["weights"].ptr.fill_(math.nan)
    emulate(first, capability)
    return weights.movedim(3, 1), second


@pytest.mark.parametrize(
    ("size", "spec", "dtype", "layout", "tile", "capability"),
    [
        *(((1, 8, 3, 5), Spec(3, up=2, normalizer=normalizer), FLOAT, "contiguous", TILE, 80) for normalizer in NORMALIZERS),
        # more targets in a row and in a column than a program has
        ((2, 8, 3, 17), Spec(5, up=2, groups=2), HALF, "contiguous", WALK, 90),
        ((1, 8, 5, 1), Spec(5), BF16, "contiguous", TILE, 80),
        ((1, 8, 1, 1), Spec(1, up=3), HALF, "channels_last", TILE, 80),
        # more taps than a program has
        ((1, 4, 4, 3), Spec(7, down=2), HALF, "sliced", WALK, 80),
        # targets that a rational scale cuts off
        ((1, 4, 5, 3), Spec(3, up=3, down=2), FLOAT, "transposed", TILE, 80),
    ],
)
def test_weights_are_those_of_the_definition(size, spec, dtype, layout, tile, capability):
    x, logits, dy = random_inputs(*size, spec, dtype, ("contiguous", layout, "contiguous"), spread=2.0)
    weights, _ = weigh(x, logits.unflatten(1, (spec.groups * spec.taps, spec.up, spec.up)), dy, spec, tile, capability)
    assert not weights.isnan().any()
    expected = reassembly_kernels(logits.double(), spec, *size[2:]).flatten(1, 2)
    assert relative_error(weights[..., : dy.shape[2], : dy.shape[3]], expected) < TRITON_TOLERANCES[dtype]


def test_taps_outside_the_map_take_no_share():
    spec = Spec(3, up=2, border="renormalize")
    x, logits, dy = random_inputs(1, 8, 4, 3, spec)
    expected = reassembly_kernels(logits.double(), spec, 4, 3).flatten(1, 2)
    cells = logits.unflatten(1, (9, 2, 2))
    # what a window reads inside the map is all that its log-sum-exp counts
    lse = torch.log((cells.double().exp() * (expected.unflatten(3, (3, 2)).unflatten(2, (4, 2)).permute(0, 1, 3, 5, 2, 4) > 0)).sum(1))
    first, _ = backward_launches(dy, x, cells, lse.float()[:, None], torch.empty_like(x), None, spec, tile=TILE, capability=(8, 0))
    emulate(first)
    weights = first.arguments["weights"].ptr.movedim(3, 1)
    inside = expected > 0
    assert relative_error(weights[inside], expected[inside]) < TRITON_TOLERANCES[FLOAT]


def test_offsets_beyond_32_bits():
    spec = Spec(3, up=2)
    x, logits, dy = random_inputs(1, 4, 3, 5, spec, HALF)
    # the offset of the last tap does not fit into 32 bits
    strides = (1, 2**31 // 32 + 16, 5, 1)
    apart = torch.from_numpy(untouched(2 * (35 * strides[1] + 64)).view(np.float16)).as_strided(logits.shape, strides).copy_(logits)
    cells, expected = (t.unflatten(1, (9, 2, 2)) for t in (apart, logits))
    assert torch.equal(weigh(x, cells, dy, spec, TILE)[0], weigh(x, expected, dy, spec, TILE)[0])


def count_reads(tensor, launch, capability):
    """Return the sectors of a tensor that the loads of a launch ask for."""
    tensors = [value for value in launch.parameters() if isinstance(value, torch.Tensor)]
    counts = list(emulate(launch, capability)["per_buffer"].values())
    return counts[[value is tensor for value in tensors].index(True)]["ld_sectors"]


@pytest.mark.parametrize("tile", [Tile(2, 8, 2, 32, 1, 4, 1, 128, 8), Tile(4, 4, 4, 32, 1, 4, 1)])
@pytest.mark.parametrize("dtype", [HALF, FLOAT])
def test_a_sector_has_the_weights_of_several_pairs(dtype, tile):
    spec = Spec(5, up=2)
    x, logits, dy = random_inputs(1, 32, 14, 16, spec, dtype)
    _, launch = weigh(x, logits.unflatten(1, (25, 2, 2)), dy, spec, tile, 90)
    # pairs of a source and a target: the taps inside the map
    rows, cols = (sum(min(size, i + 3) - max(0, i - 2) for i in range(size)) for size in (14, 16))
    assert 4 * rows * cols / count_reads(launch.arguments["logits"].ptr, launch, 90) > 2


def test_only_the_gradient_to_the_features_in_nchw_has_the_launch():
    spec = Spec(5, up=2)
    for layout in ("contiguous", "channels_last"):
        x, logits, dy = random_inputs(1, 32, 8, 8, spec, HALF, layout)
        cells = logits.unflatten(1, (25, 2, 2))
        lse, dx, dlogits = log_sum_exp(cells, spec), torch.empty_like(x), torch.empty_like(cells)
        for results, weighed in (((dx, None), layout == "contiguous"), ((dx, dlogits), False), ((None, dlogits), False)):
            # one tile for both gradients is one launch
            launches = backward_launches(dy, x, cells, lse, *results, spec, tile=TILE, capability=(9, 0))
            assert [launch.kernel.__name__ for launch in launches] == ["weigh"] * weighed + ["banded_backward"]
