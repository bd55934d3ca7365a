"""The tiles that fit: every common problem has one, and no tile takes more than a GPU has."""

import pytest
from carafepp.kernels.geometry import Spec
from carafepp.kernels.gpu.tiles.geometry import DIRECTIONS, KERNELS, Tile, TileProblem, halo
from carafepp.kernels.gpu.tiles.limits import SHARED_BYTES, fits, fitting_tiles, source_blocks
from carafepp.kernels.gpu.tiles.ranking import choose_tile
from hypothesis import given, settings
from hypothesis import strategies as st

PROBLEM = TileProblem(Spec(5, up=2), 256, 25, 42, 1, 2, False, 2, 4, (8, 0))
# of 7 x 7 windows in float32, whose halo leaves no room for the 64 channels that the matrix units from capability 9.0 on multiply
SCALES_WITHOUT_TILE = {(2, 4), (3, 3), (3, 4), (4, 3), (4, 4)}


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
    kernel=st.sampled_from(KERNELS),
)
def test_common_problems_have_a_tile_that_fits(kernel_size, up, down, channels, size, element_size, channels_last, capability, kernel):
    problem = TileProblem(Spec(kernel_size, up, down), channels, *size, 2, element_size, channels_last, 1, 1, capability)
    tile = choose_tile(kernel, problem)
    if kernel in DIRECTIONS and (kernel_size, element_size) == (7, 4) and (up, down) in SCALES_WITHOUT_TILE and capability >= (9, 0):
        assert tile is None
        return
    assert tile is not None
    assert tile == choose_tile(kernel, problem)
    # a halo and a block of its channels lie in shared memory; the least that any supported device has is 64 KiB
    pixels = halo(problem.spec, tile.cells_h, tile.cells_w).p
    assert pixels * tile.block_c * element_size <= 64 << 10
    assert tile.split == 1 or tile.split * tile.block_c <= channels
    assert tile.num_warps == 4 or (kernel == "forward" and capability < (9, 0)) or kernel in ("logit_gradient", "source_gradient")


@pytest.mark.parametrize("kernel", KERNELS)
def test_only_the_largest_common_windows_have_no_tile(kernel):
    scales = {(up, down) for up in range(1, 5) for down in range(1, 5)}
    for capability, expected in (((8, 0), set()), ((9, 0), SCALES_WITHOUT_TILE)):
        problem = PROBLEM._replace(element_size=4, capability=capability)
        found = {scale for scale in scales if choose_tile(kernel, problem._replace(spec=Spec(7, *scale))) is None}
        # the other kernels can do with fewer channels
        assert found == (expected if kernel in DIRECTIONS else set())


def test_windows_too_large_for_a_tile_have_none():
    large = PROBLEM._replace(spec=Spec(31, up=2))
    assert [kernel for kernel in KERNELS if choose_tile(kernel, large)] == ["source_gradient"]


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
@pytest.mark.parametrize("element_size", [2, 4])
def test_any_number_of_channels_has_a_tile(capability, element_size):
    for channels in (1, 64, 256, 512, 2048):
        problem = PROBLEM._replace(channels=channels, element_size=element_size, capability=capability)
        assert all(choose_tile(kernel, problem) for kernel in KERNELS)


@pytest.mark.parametrize(
    ("kernel", "problem", "tile"),
    [
        # a halo of 128 sources: 128 x 64 accumulators, 256 registers in each of 64 threads
        ("forward", PROBLEM._replace(spec=Spec(5, up=3)), Tile(4, 4, 1, 64, 1, 2, 2)),
        # 512 sources of 64 float32 channels in two terms are 256 KiB
        ("forward", PROBLEM._replace(spec=Spec(5, down=5), element_size=4), Tile(4, 4, 1, 64, 1, 4, 1)),
        # a window of 225 taps for 64 targets: 128 logits in each of 128 threads
        ("logit_gradient", PROBLEM._replace(spec=Spec(15, up=2)), Tile(4, 4, 1, 64, 1, 4, 2)),
        # 128 targets of more than one cell
        ("logit_gradient", PROBLEM, Tile(2, 16, 1, 64, 1, 4, 2)),
        # 64 sources of 256 channels: 128 accumulators in each of 128 threads, beside the gradients
        ("source_gradient", PROBLEM._replace(spec=Spec(5, down=4)), Tile(2, 2, 1, 256, 1, 4, 2)),
    ],
)
def test_a_tile_beyond_one_limit_does_not_fit(kernel, problem, tile):
    assert not fits(kernel, problem, tile)
    assert fits(kernel, PROBLEM, tile._replace(cells_h=1, cells_w=2, block_c=32))


@pytest.mark.parametrize("element_size", [2, 4])
def test_features_and_band_share_the_memory_of_a_program(element_size):
    problem = PROBLEM._replace(element_size=element_size, spec=Spec(5, down=2))
    for tile in fitting_tiles("forward", problem):
        window = halo(problem.spec, tile.cells_h, tile.cells_w, tile.vector)
        assert window.p * (tile.block_c + window.m) * element_size * (element_size // 2) <= SHARED_BYTES


def test_a_single_cell_may_have_more_targets_than_other_tiles():
    large = PROBLEM._replace(spec=Spec(1, up=11))
    assert {(tile.cells_h, tile.cells_w) for tile in fitting_tiles("backward", large)} == {(1, 1)}


def test_vectors_divide_the_alignment_of_rows():
    problem = PROBLEM._replace(x_align=1, y_align=2)
    assert {tile.vector for tile in fitting_tiles("forward", problem)} == {1}
    assert {tile.vector for tile in fitting_tiles("backward", problem)} == {1, 2}
    assert {tile.vector for tile in fitting_tiles("backward", problem._replace(channels_last=True))} == {1}


@pytest.mark.parametrize(
    ("channels", "element_size", "capability", "split", "expected"),
    [
        (24, 2, (8, 0), 1, (32, 64)),
        (256, 2, (8, 0), 1, (256, 64)),
        (256, 4, (8, 0), 1, (256, 32)),
        (2048, 2, (8, 0), 4, (256, 64)),
        # four programs share up to 256 float32 channels at capability 9.0, and up to 512 channels of 16 bits at 10.0
        (256, 4, (9, 0), 4, (64, 32)),
        (272, 4, (9, 0), 1, (64, 32)),
        (2048, 2, (9, 0), 1, (256, 64)),
        (2048, 2, (10, 0), 1, (128, 64)),
    ],
)
def test_in_one_launch_the_gradient_to_the_sources_takes_all_channels_that_fit(channels, element_size, capability, split, expected):
    problem = PROBLEM._replace(channels=channels, element_size=element_size, capability=capability)
    assert source_blocks("backward", problem, Tile(1, 4, 1, 64, split, 4, 2)) == expected


@pytest.mark.parametrize(
    ("channels", "element_size", "targets"), [(32, 2, 64), (128, 2, 64), (256, 2, 32), (32, 4, 16), (128, 4, 16), (256, 4, 16)]
)
def test_in_its_own_launch_it_has_the_channels_of_the_tile(channels, element_size, targets):
    problem = PROBLEM._replace(element_size=element_size)
    assert source_blocks("source_gradient", problem, Tile(1, 4, 1, channels, 1, 4, 2)) == (channels, targets)


@pytest.mark.parametrize(("channels", "expected"), [(1, {16}), (24, {32}), (100, {32, 64, 128}), (2048, {32, 64, 128, 256})])
def test_the_gradient_to_the_sources_takes_blocks_of_the_channels_that_there_are(channels, expected):
    problem = PROBLEM._replace(channels=channels)
    assert {tile.block_c for tile in fitting_tiles("source_gradient", problem)} == expected
    assert {tile.split for tile in fitting_tiles("logit_gradient", problem)} == {1}
