"""The ranking of the tiles that fit."""

import pytest
from carafepp.kernels.geometry import Spec
from carafepp.kernels.gpu.tiles.geometry import KERNELS, Tile, TileProblem
from carafepp.kernels.gpu.tiles.limits import fitting_tiles
from carafepp.kernels.gpu.tiles.ranking import SEPARATE, choose_backward, choose_tile, rank_tiles, rank_wide_tiles, rated_time, round_sizes
from carafepp.kernels.gpu.tiles.time_model import estimate_time, weighing_microseconds

PROBLEM = TileProblem(Spec(5, up=2), 256, 25, 42, 1, 2, False, 2, 4, (8, 0))


def test_a_tile_is_wide_where_rows_are_contiguous_and_square_where_channels_are():
    rows, pixels = choose_tile("forward", PROBLEM), choose_tile("forward", PROBLEM._replace(channels_last=True))
    assert rows.cells_w / rows.cells_h > pixels.cells_w / pixels.cells_h


def test_programs_share_channels_only_where_the_map_is_too_small_for_the_device():
    small, large = (choose_tile("forward", TileProblem(Spec(5, down=2), 256, n, n, 1, 2, True, 8, 8, (8, 0))) for n in (8, 256))
    assert small.split > 1
    assert large.split == 1


@pytest.mark.parametrize("kernel", KERNELS)
def test_ranked_tiles_are_all_that_fit_the_fastest_first(kernel):
    tiles = rank_tiles(kernel, PROBLEM)
    assert tiles[0] == choose_tile(kernel, PROBLEM)
    assert sorted(tiles) == sorted(fitting_tiles(kernel, PROBLEM))
    assert len(set(tiles)) == len(tiles) > 10
    times = [rated_time(kernel, PROBLEM, tile) for tile in tiles]
    assert times == sorted(times)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("height", "width", "batch"), [(25, 41, 1), (13, 167, 2), (99, 131, 3), (14, 14, 413), (3, 5, 1)])
def test_a_chosen_tile_is_nearly_the_first_of_the_ranking(kernel, height, width, batch):
    for channels_last in (False, True):
        problem = PROBLEM._replace(height=height, width=width, batch=batch, channels_last=channels_last, x_align=1, y_align=2)
        chosen, first = (rated_time(kernel, problem, tile) for tile in (choose_tile(kernel, problem), rank_tiles(kernel, problem)[0]))
        assert chosen < 1.1 * first


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("height", "width"), [(8, 16384), (1, 4096), (16384, 8)])
def test_a_map_much_longer_than_wide_is_ranked(kernel, height, width):
    for channels_last in (False, True):
        problem = PROBLEM._replace(height=height, width=width, channels_last=channels_last)
        for tile in rank_tiles(kernel, problem):
            assert min(estimate_time(kernel, problem, tile)) > 0


def test_sizes_near_each_other_share_a_ranking():
    rank_tiles.cache_clear()
    for n in range(500):
        choose_tile("forward", PROBLEM._replace(height=100 + n % 67, width=100 + n % 101, batch=1 + n % 7))
    # heights, widths and batches
    assert rank_tiles.cache_info().misses <= 5 * 5 * 7
    assert round_sizes(PROBLEM._replace(height=7, width=9, batch=511)) == PROBLEM._replace(height=7, width=10, batch=512)
    # a map that is rounded up to the least size of a copy reads none
    large = TileProblem(Spec(5, up=2), 256, 128, 64, 1, 2, False, 8, 8, (9, 0))
    small = large._replace(height=127)
    assert round_sizes(small) == large
    assert any(tile.transposed for tile in rank_tiles("logit_gradient", large)[:24])
    assert not choose_tile("logit_gradient", small).transposed


HALF_NHWC = {"channels_last": True, "x_align": 8, "y_align": 8}
FLOAT_NHWC = {"element_size": 4, "channels_last": True}
DOWN = {"spec": Spec(5, down=2), "x_align": 4, "y_align": 2}
# the last values of tiles that do not walk, for kernels that read a channels_last copy
COPY = (255, 1, 1)


@pytest.mark.parametrize(
    ("change", "forward", "backward", "logit_gradient", "source_gradient", "launches"),
    [
        ({}, (1, 8, 2, 64, 1, 2, 1), (1, 14, 4, 64, 1, 4, 2), (1, 8, 4, 32, 1, 4, 1), (2, 8, 4, 256, 1, 8, 1, 128, 16), 2),
        (HALF_NHWC, (2, 4, 1, 64, 1, 2, 1), (4, 4, 1, 32, 1, 4, 2), (2, 4, 1, 64, 1, 4, 1), (4, 4, 1, 256, 1, 8, 1, 128, 4), 2),
        ({"element_size": 4}, (1, 8, 2, 32, 1, 2, 1), (4, 4, 4, 32, 2, 4, 1), (4, 4, 4, 32, 1, 4, 1), (4, 4, 4, 64, 1, 4, 1, 128, 7), 2),
        (
            {"capability": (9, 0)},
            (1, 8, 1, 64, 1, 4, 2, *COPY),
            (1, 14, 4, 64, 1, 4, 2),
            (1, 8, 1, 64, 1, 4, 1, *COPY),
            (2, 8, 4, 256, 1, 8, 1, 128, 7),
            2,
        ),
        (
            FLOAT_NHWC | {"capability": (9, 0)},
            (2, 4, 1, 64, 1, 4, 1),
            (2, 2, 1, 64, 4, 4, 1),
            (2, 4, 1, 32, 1, 4, 1),
            (4, 4, 1, 64, 1, 4, 1, 128, 7),
            2,
        ),
        (
            FLOAT_NHWC | {"capability": (10, 0)},
            (2, 4, 1, 64, 1, 4, 1),
            (2, 2, 1, 64, 4, 4, 1),
            (2, 4, 1, 32, 1, 4, 1),
            (4, 4, 1, 64, 1, 4, 1, 128, 7),
            2,
        ),
        (DOWN, (2, 7, 2, 64, 1, 2, 1), (1, 14, 2, 64, 4, 4, 2), (2, 7, 2, 32, 1, 4, 1), (2, 4, 2, 64, 1, 4, 1, 128, 16), 2),
        (DOWN | HALF_NHWC, (4, 4, 1, 64, 1, 2, 1), (2, 4, 1, 32, 1, 4, 2), (4, 4, 1, 64, 1, 4, 1), (2, 2, 1, 256, 1, 8, 1, 128, 16), 2),
        (
            DOWN | {"element_size": 4},
            (2, 7, 2, 32, 1, 2, 1),
            (2, 4, 2, 32, 4, 4, 1),
            (2, 7, 2, 32, 1, 4, 1),
            (2, 4, 2, 32, 1, 4, 1, 128, 16),
            2,
        ),
        (
            {"spec": Spec(5, up=3, down=2)},
            (1, 3, 2, 64, 1, 2, 1),
            (1, 4, 1, 64, 1, 4, 2),
            (1, 3, 2, 32, 1, 4, 1),
            (1, 4, 4, 256, 1, 8, 1, 128, 9),
            2,
        ),
    ],
)
def test_the_choice_of_common_problems(change, forward, backward, logit_gradient, source_gradient, launches):
    # compare the emulated counts (ptx_costs.py) before changing one
    problem = PROBLEM._replace(batch=64, **change)
    chosen = [Tile(*tile) for tile in (forward, backward, logit_gradient, source_gradient)]
    assert [choose_tile(kernel, problem) for kernel in KERNELS] == chosen
    assert len(choose_backward(problem)) == launches


@pytest.mark.parametrize("kernel", ["forward", "logit_gradient"])
def test_only_large_maps_in_nchw_are_copied(kernel):
    # 8 MiB of features in 16 bits
    large = TileProblem(Spec(5, up=2), 256, 128, 128, 1, 2, False, 8, 8, (9, 0))
    small = large._replace(height=32)
    assert {tile.transposed for tile in rank_tiles(kernel, large)} == {0, 1}
    assert choose_tile("logit_gradient", large).transposed
    for problem in (small, large._replace(channels_last=True), large._replace(element_size=4)):
        assert not any(tile.transposed for tile in rank_tiles(kernel, problem))
    # the larger map, except for the gradient to the logits
    down = large._replace(spec=Spec(5, down=2))
    assert any(tile.transposed for tile in rank_tiles(kernel, down)) == (kernel == "logit_gradient")
    assert any(tile.transposed for tile in rank_wide_tiles(kernel, down))


@pytest.mark.parametrize("kernel", ["source_gradient", "backward"])
def test_other_kernels_read_no_copy(kernel):
    large = TileProblem(Spec(5, up=2), 256, 128, 128, 1, 2, False, 8, 8, (9, 0))
    assert not any(tile.transposed for tile in (*rank_tiles(kernel, large), *rank_wide_tiles(kernel, large)))


def test_a_copy_must_save_more_than_its_own_time():
    problem = TileProblem(Spec(5, up=2), 256, 128, 128, 1, 2, False, 8, 8, (9, 0))
    tile = choose_tile("logit_gradient", problem)
    alone = estimate_time("logit_gradient", problem, tile).total
    copy = 2 * 8 * 2**20 / 4.3e6
    assert rated_time("logit_gradient", problem, tile) > 1.1 * (alone + copy)
    # the kernel reads pixels, and rows of the other map alone
    rows = estimate_time("logit_gradient", problem, tile._replace(transposed=0)).total
    pixels = estimate_time("logit_gradient", problem._replace(channels_last=True), tile._replace(transposed=0)).total
    assert pixels < alone < rows


def test_a_launch_for_each_gradient_in_nchw_costs_no_launch_for_the_weights():
    problem = TileProblem(Spec(5, up=2), 256, 64, 64, 1, 2, False, 8, 8, (9, 0))
    together, *apart = (rated_time(kernel, problem, choose_tile(kernel, problem)) for kernel in ("backward", *SEPARATE))
    # alone, the gradient to the features needs that launch
    assert together < sum(apart) < together + weighing_microseconds(problem)
    assert choose_backward(problem) == SEPARATE


def test_small_maps_have_one_launch_for_both_gradients_and_large_ones_have_two():
    for channels_last in (False, True):
        small = PROBLEM._replace(channels_last=channels_last, x_align=8, y_align=8, capability=(9, 0))
        assert choose_backward(small) == ("backward",)
        assert choose_backward(small._replace(batch=64, element_size=4, x_align=4, y_align=4)) == SEPARATE
    # no tile serves both gradients of so large a window
    assert choose_backward(PROBLEM._replace(spec=Spec(31, up=2))) == SEPARATE
