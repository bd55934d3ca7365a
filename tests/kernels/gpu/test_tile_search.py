"""The search for tiles: its end, its checks, and the count without a GPU."""

import pytest
import torch
from carafepp.kernels.geometry import Spec

pytest.importorskip("triton")

from carafepp.kernels.gpu.assembly import compile_launch, read_assembly
from carafepp.kernels.gpu.tile_search import (
    RESULTS,
    UnusableTileError,
    check_results,
    compute_results,
    count_instructions,
    find_fastest,
)
from carafepp.kernels.gpu.tiles.geometry import KERNELS, Tile, TileProblem
from carafepp.kernels.gpu.tiles.ranking import MOST_OVER_LIMIT, SEPARATE, choose_tile, rank_tiles, rank_wide_tiles
from carafepp.kernels.gpu.tiles.resources import MOST_REGISTERS, estimate_resources
from carafepp.kernels.gpu.training_step import build_training_step


def test_without_a_gpu_the_instructions_of_the_highest_ranked_tiles_are_counted():
    step = build_training_step(1, 64, 25, 42, Spec(3, down=2), torch.float16, torch.channels_last)
    found = dict(map(reversed, count_instructions(step, "forward", 2, 80)))
    assert set(found) == set(rank_tiles("forward", step.problem((8, 0)))[:2])
    assert min(found.values()) > 0


def test_the_instructions_of_a_copy_count():
    step = build_training_step(8, 256, 64, 64, Spec(5, up=2), torch.float16, torch.contiguous_format)
    ((millions, tile),) = count_instructions(step, "logit_gradient", 1, 90)
    assert tile.transposed
    _, kernel = step.build_launches("logit_gradient", tile=tile, capability=(9, 0))
    alone = read_assembly(compile_launch(kernel, 90)).instructions * kernel.num_warps * kernel.grid[0] / 1e6
    assert alone < millions < 2 * alone


PROBLEM = TileProblem(Spec(5, up=2), 256, 25, 42, 8, 2, True, 8, 8, (9, 0))


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_wide_search_holds_the_choice_and_more_of_everything(kernel):
    tiles = rank_wide_tiles(kernel, PROBLEM)
    assert choose_tile(kernel, PROBLEM) in tiles
    assert len(set(tiles)) == len(tiles) > 500
    many = {tile for tile in tiles if tile.num_warps == 16}
    assert {tile.num_warps for tile in tiles} - {16} == {2, 4, 8}
    assert bool(many) == (kernel in SEPARATE)
    assert all(tile.steps > 1 for tile in many)
    assert {tile.num_stages for tile in tiles} == {1, 2, 3, 4}
    assert {tile.max_registers for tile in tiles} == {255, 168, 128}
    assert max(tile.cells_h * tile.cells_w for tile in tiles) == 32
    # a limit is below the estimate, and not far below
    limited = [tile for tile in tiles if tile.max_registers < 255 and tile.steps == 1]
    assert all(1 < estimate_resources(kernel, PROBLEM, tile).registers / tile.max_registers <= 1.3 for tile in limited)


def test_the_search_ends_after_slower_tiles_and_counts_those_that_cannot_run():
    tiles = [Tile(1, n, 1, 64, 1, 4, 2) for n in range(1, 13)]
    times = dict(zip(tiles, [5, None, 4, 6, 6, None, 3, 7, 7, 7, 7, 1], strict=True))

    def measure(tile):
        if times[tile] is None:
            raise UnusableTileError("a reason")
        return times[tile]

    timed, skipped = find_fastest(tiles, measure, patience=3)
    # the fourth tile after the fastest is not measured
    assert timed == sorted((times[tile], tile) for tile in tiles[:10] if times[tile])
    assert timed[0] == (3, tiles[6])
    assert skipped == {"a reason": 2}


def test_the_wide_search_limits_registers_where_that_saves_some():
    limited = [tile for tile in rank_wide_tiles("logit_gradient", PROBLEM) if tile.max_registers < MOST_REGISTERS]
    assert any(tile.steps > 1 for tile in limited)
    for tile in limited:
        registers = estimate_resources("logit_gradient", PROBLEM, tile._replace(max_registers=MOST_REGISTERS)).registers
        assert tile.max_registers < registers <= MOST_OVER_LIMIT * tile.max_registers


@pytest.mark.parametrize("kernel", KERNELS)
def test_wrong_results_are_noticed(kernel):
    step = build_training_step(1, 8, 5, 6, Spec(3, up=2), torch.float16, torch.channels_last, "cpu")
    expected = compute_results(step, kernel)
    assert set(expected) == set(RESULTS[kernel])
    (launch,) = step.build_launches(kernel, tile=choose_tile(kernel, step.problem((8, 0))), capability=(8, 0))
    for name, right in expected.items():
        assert right.isfinite().all()
        launch.arguments[name].ptr.copy_(right)
    check_results(launch, expected)
    for name, right in expected.items():
        result = launch.arguments[name].ptr
        for wrong in (0.9 * right, right.roll(1, -1), torch.full_like(right, torch.nan)):
            result.copy_(wrong)
            with pytest.raises(UnusableTileError, match="wrong result"):
                check_results(launch, expected)
        result.copy_(right)
