"""The gradient to the features with the product that the module adds: compiled and executed without a GPU."""

import math

import pytest
import torch
from carafepp.kernels.geometry import Spec

pytest.importorskip("triton")

from carafepp.kernels.gpu.assembly import compile_launch, read_assembly
from carafepp.kernels.gpu.operator_launches import adds_product, backward_launches
from carafepp.kernels.gpu.tiles.geometry import Tile
from carafepp.kernels.gpu.tiles.tables import find_in_tables
from carafepp.kernels.gpu.training_step import build_training_step
from carafepp.kernels.reference import reassemble_reference
from operator_cases import TRITON_TOLERANCES, arrange, differentiate, random_inputs, relative_error
from ptx_step import emulate

HALF, BF16 = torch.float16, torch.bfloat16
STANDING, WALKING = Tile(2, 4, 1, 32, 1, 4, 2), Tile(2, 4, 1, 32, 1, 4, 1, 128, 3)


@pytest.mark.parametrize(
    ("size", "spec", "dtype", "width", "tile", "capability"),
    [
        ((1, 40, 13, 11), Spec(5, down=2), HALF, 16, WALKING, 80),
        ((2, 40, 7, 6), Spec(5, up=2), BF16, 6, WALKING, 90),
        ((2, 40, 7, 6), Spec(5, up=2), BF16, 144, STANDING, 90),
        # channels of two groups, and programs that share the channels of a tile
        ((2, 80, 5, 7), Spec(3, down=2, groups=2), HALF, 20, STANDING._replace(split=2), 80),
        ((2, 72, 5, 7), Spec(3, down=2, groups=2), HALF, 64, WALKING, 80),
        ((1, 8, 2, 1), Spec(5, up=2, down=3), HALF, 1, STANDING, 80),
    ],
    ids=str,
)
def test_the_product_is_added(size, spec, dtype, width, tile, capability):
    x, logits, dy = random_inputs(*size, spec, dtype, "channels_last")
    cells = logits.unflatten(1, (spec.groups * spec.taps, spec.up, spec.up))
    lse = torch.logsumexp(cells.unflatten(1, (spec.groups, spec.taps)).float(), 2)
    dx = arrange(torch.full(x.shape, math.nan, dtype=dtype), "channels_last")
    n, c, h, w = size
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(n, h, w, width, generator=generator).to(dtype).permute(0, 3, 1, 2)
    matrix = torch.randn(width, c, generator=generator).to(dtype)
    pair = divmod(capability, 10)
    (launch,) = backward_launches(dy, x, cells, lse, dx, None, spec, tile=tile, capability=pair, factors=(features, matrix))
    assert (launch.kernel.__name__ == "banded_source_gradient") == (tile.steps > 1)
    emulate(launch, capability)
    expected = differentiate(reassemble_reference, x.double(), logits.double(), dy.double(), **spec._asdict())["dx"]
    expected = expected + torch.einsum("nkhw,kc->nchw", features.double(), matrix.double())
    assert relative_error(dx, expected) < TRITON_TOLERANCES[dtype]


@pytest.mark.parametrize(
    ("spec", "layout", "added"),
    [
        (Spec(5, down=2), torch.channels_last, True),
        (Spec(5, down=2), torch.contiguous_format, False),
        # read tap by tap
        (Spec(5, down=2, border="replicate"), torch.channels_last, False),
        # dy is four times as large as x
        (Spec(5, up=2), torch.channels_last, False),
    ],
)
def test_where_it_is_added(spec, layout, added):
    step = build_training_step(4, 256, 28, 28, spec, BF16, layout)
    assert adds_product(step.y, step.x, step.logits, spec) == added


# a compilation takes seconds
@pytest.mark.slow
@pytest.mark.parametrize(("n", "c", "side", "width"), [(64, 64, 112, 16), (64, 128, 56, 16), (64, 256, 28, 16), (64, 512, 28, 16)])
def test_it_spills_no_more(n, c, side, width):
    step = build_training_step(n, c, side, side, Spec(5, down=2), BF16, torch.channels_last)
    tile = find_in_tables("source_gradient", step.problem((9, 0)), "")
    features = torch.empty(n, width, side, side, dtype=BF16, device="meta").contiguous(memory_format=torch.channels_last)
    codes = []
    for factors in (None, (features, torch.empty(width, c, dtype=BF16, device="meta"))):
        tensors = step.y, step.x, step.logits, step.lse, torch.empty_like(step.x), None
        (launch,) = backward_launches(*tensors, step.spec, tile=tile, capability=(9, 0), factors=factors)
        codes.append(read_assembly(compile_launch(launch, 90)))
    plain, added = codes
    assert added.spills <= plain.spills
    # the product has the sources as rows: its registers come on top where the others have the channels
    assert added.blocks >= plain.blocks - 2
    assert added.widest_load == 128
