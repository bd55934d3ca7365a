"""The ranking of the tiles that fit."""

from carafepp.kernels.geometry import Spec
from carafepp.kernels.gpu.tile_geometry import TileProblem
from carafepp.kernels.gpu.tile_ranking import choose_tile, rank_tiles

PROBLEM = TileProblem(Spec(5, up=2), 256, 25, 42, 1, 2, False, 2, 4, (8, 0))


def test_a_tile_is_wide_where_rows_are_contiguous_and_square_where_channels_are():
    rows, pixels = choose_tile("forward", PROBLEM), choose_tile("forward", PROBLEM._replace(channels_last=True))
    assert rows.cells_w / rows.cells_h > pixels.cells_w / pixels.cells_h


def test_programs_share_channels_only_where_the_map_is_too_small_for_the_device():
    small, large = (choose_tile("forward", TileProblem(Spec(5, down=2), 256, n, n, 1, 2, True, 8, 8, (8, 0))) for n in (8, 256))
    assert small.split > 1
    assert large.split == 1


def test_ranked_tiles_differ_and_begin_with_the_choice():
    tiles = rank_tiles("backward", PROBLEM)
    assert tiles[0] == choose_tile("backward", PROBLEM)
    assert len(set(tiles)) == len(tiles) > 10
