"""Both gradients where programs compute several tiles for that to the logits, and store the weights for that to the features."""

import math

import pytest
import torch
from carafepp.kernels.geometry import LSE_NORMALIZERS, Spec

pytest.importorskip("triton")

from carafepp.kernels.gpu.operator_launches import INTERPRETED, backward_launches
from carafepp.kernels.gpu.tiles import tables
from carafepp.kernels.gpu.tiles.geometry import Tile
from carafepp.kernels.reference import reassemble_reference
from commands import run_in_interpreter
from operator_cases import TRITON_TOLERANCES, arrange, differentiate, log_sum_exp, random_inputs, relative_error
from ptx_step import emulate, fill_scratch

HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32
UP, CUT, DOWN = Spec(5, up=2), Spec(3, up=2, groups=2, border="renormalize"), Spec(5, down=2)
RATIONAL, SIGMOID = Spec(3, up=3, down=2), Spec(7, up=2, normalizer="sigmoid_normalized")
WALK = Tile(2, 8, 1, 32, 1, 4, 1, 128, 3)


@pytest.mark.parametrize(
    ("size", "spec", "dtype", "layout", "tile", "walk", "capability"),
    [
        # rows of tiles below the map, and a copy of the features
        ((1, 72, 9, 20), UP, HALF, "contiguous", Tile(2, 16, 1, 64, 1, 16, 1, 128, 2, 1), Tile(2, 16, 4, 128, 1, 16, 1, 128, 2), 90),
        ((2, 40, 14, 14), UP, HALF, "contiguous", Tile(2, 14, 2, 32, 1, 8, 1, 128), Tile(2, 16, 4, 64, 1, 8, 1, 128, 8), 90),
        ((2, 16, 7, 9), CUT, BF16, "contiguous", Tile(1, 4, 1, 16, 1, 4, 2, 255, 3), WALK, 90),
        ((1, 24, 7, 10), DOWN, FLOAT, "sliced", Tile(1, 2, 1, 16, 1, 4, 1, 255, 2), Tile(2, 2, 1, 16, 1, 4, 1), 80),
        ((1, 8, 5, 7), RATIONAL, HALF, "contiguous", Tile(1, 2, 1, 16, 1, 2, 1, 255, 2), Tile(2, 2, 1, 16, 1, 4, 1), 80),
        ((1, 20, 5, 6), SIGMOID, HALF, "contiguous", Tile(1, 2, 1, 32, 1, 4, 1, 255, 4), WALK, 80),
        # no weights from another launch
        ((1, 24, 5, 6), UP, HALF, "channels_last", Tile(1, 4, 1, 16, 1, 4, 2, 255, 2), WALK, 90),
    ],
)
def test_results_match_float64(monkeypatch, size, spec, dtype, layout, tile, walk, capability):
    tiles = {"logit_gradient": tile, "source_gradient": walk}
    monkeypatch.setattr(tables, "list_tiles", lambda *_: [tiles])
    x, logits, dy = random_inputs(*size, spec, dtype, layout, spread=2.0)
    cells = logits.unflatten(1, (spec.groups * spec.taps, spec.up, spec.up))
    # what is not written stays NaN
    dx, dlogits = (arrange(torch.full(t.shape, math.nan, dtype=dtype), layout) for t in (x, logits))
    lse = log_sum_exp(logits.float(), spec, *size[2:]) if spec.normalizer in LSE_NORMALIZERS else torch.empty(0)
    launches = backward_launches(dy, x, cells, lse, dx, dlogits.unflatten(1, cells.shape[1:4]), spec, capability=divmod(capability, 10))
    features = "banded_source_gradient" if walk.steps > 1 else "banded_backward"
    assert [launch.kernel.__name__ for launch in launches] == ["transpose"] * tile.transposed + ["banded_backward", features]
    fill_scratch(launches)
    for launch in launches:
        if INTERPRETED:
            launch.interpret()
        else:
            emulate(launch, capability)
    expected = differentiate(reassemble_reference, x.double(), logits.double(), dy.double(), **spec._asdict())
    for name, result in {"dx": dx, "dlogits": dlogits}.items():
        assert relative_error(result, expected[name]) < TRITON_TOLERANCES[dtype], name


# minutes of compiled code, step by step
@pytest.mark.slow
def test_results_in_the_interpreter():
    assert "7 passed" in run_in_interpreter(__file__, "test_results_match_float64")
