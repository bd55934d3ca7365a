"""The tile of every common problem fits."""

import pytest
from carafepp.kernels.geometry import Spec
from carafepp.kernels.gpu.tile_geometry import DIRECTIONS, TileProblem, halo
from carafepp.kernels.gpu.tile_ranking import choose_tile
from hypothesis import given, settings
from hypothesis import strategies as st

PROBLEM = TileProblem(Spec(5, up=2), 256, 25, 42, 1, 2, False, 2, 4, (8, 0))


@settings(deadline=None, derandomize=True, max_examples=60, database=None)
@given(
    kernel_size=st.sampled_from([1, 3, 5, 7]),
    up=st.integers(1, 4),
    down=st.integers(1, 4),
    channels=st.sampled_from([1, 24, 64, 256, 1024]),
    size=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    element_size=st.sampled_from([2, 4]),
    channels_last=st.booleans(),
    capability=st.sampled_from([(7, 5), (8, 0), (8, 6), (9, 0), (10, 0), (12, 0)]),
    direction=st.sampled_from(DIRECTIONS),
)
def test_every_common_problem_has_a_tile_that_fits(
    kernel_size, up, down, channels, size, element_size, channels_last, capability, direction
):
    problem = TileProblem(Spec(kernel_size, up, down), channels, *size, 2, element_size, channels_last, 1, 1, capability)
    tile = choose_tile(direction, problem)
    assert tile is not None
    assert tile == choose_tile(direction, problem)
    # a halo and a block of its channels lie in shared memory; the least that any supported device has is 64 KiB
    pixels = halo(problem.spec, tile.cells_h, tile.cells_w).p
    assert pixels * tile.block_c * element_size <= 64 << 10
    assert tile.split == 1 or tile.split * tile.block_c <= channels
    assert tile.num_warps == 4 or (direction == "forward" and capability < (9, 0))


def test_windows_too_large_for_a_tile_have_none():
    assert choose_tile("forward", PROBLEM._replace(spec=Spec(31, up=2))) is None
    assert choose_tile("backward", PROBLEM._replace(spec=Spec(31, up=2))) is None


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
@pytest.mark.parametrize("element_size", [2, 4])
def test_any_number_of_channels_has_a_tile(capability, element_size):
    for channels in (1, 64, 256, 512, 2048):
        problem = PROBLEM._replace(channels=channels, element_size=element_size, capability=capability)
        assert choose_tile("forward", problem)
        assert choose_tile("backward", problem)
