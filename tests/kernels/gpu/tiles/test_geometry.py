"""The geometry of a tile, against the definition of windows."""

import pytest
from carafepp.kernels.geometry import Spec
from carafepp.kernels.gpu.tiles.geometry import Tile, TileProblem, count_walks, halo, place_walk, reach, walk


@pytest.mark.parametrize("spec", [Spec(5, up=2), Spec(3, down=2), Spec(5, up=3, down=2), Spec(3, up=2, down=3), Spec(1)])
@pytest.mark.parametrize("cells", [1, 2, 7])
def test_halo_and_reach_count_the_locations_of_the_definition(spec, cells):
    radius = spec.kernel_size // 2
    centres = [target * spec.down // spec.up for target in range(cells * spec.up)]
    found = halo(spec, cells, 1)
    assert (found.rows, found.cols) == (len(centres), spec.up)
    assert found.height == max(centres) + radius - (min(centres) - radius) + 1
    sources = range(cells * spec.down)
    reaching = [t for t in range(-100, 100) if any(abs(t * spec.down // spec.up - source) <= radius for source in sources)]
    found = reach(spec, 1, cells)
    assert (found.rows, found.cols) == (spec.down, len(sources))
    assert (found.before, found.width) == (-min(reaching), max(reaching) - min(reaching) + 1)


def test_a_widened_halo_begins_and_ends_at_a_vector():
    spec = Spec(5)
    assert [(found.lead, found.width) for found in (halo(spec, 1, 8, vector) for vector in (1, 2))] == [(2, 12), (2, 12)]
    # from 4 before to 12 behind instead of from 2 before to 10 behind
    assert (halo(spec, 1, 8, 4).lead, halo(spec, 1, 8, 4).width) == (4, 16)
    assert (reach(spec, 1, 8, 4).lead, reach(spec, 1, 8, 4).width) == (4, 16)


@pytest.mark.parametrize("spec", [Spec(5, up=2), Spec(7, up=3), Spec(3, down=2), Spec(5, up=3, down=2), Spec(3, up=2, down=3), Spec(1)])
@pytest.mark.parametrize("cells", [1, 2, 4])
def test_a_step_holds_the_locations_of_the_definition(spec, cells):
    radius = spec.kernel_size // 2
    step = walk(spec, cells, cells, 1, 32)
    centres = [target * spec.down // spec.up for target in range(-100, 100)]
    # across: every target whose window covers a source of the tile is among the columns of the step
    owned = range(-radius, -radius + step.cols)
    covering = [t - 100 for t, centre in enumerate(centres) if any(abs(centre - source) <= radius for source in owned)]
    assert (-step.lead, step.width - step.lead) == (min(covering), max(covering) + 1)
    # down: the tiles hold every source that a target of the step reads, and one tile less does not
    read = {centre + offset for centre in centres[100 : 100 + step.height] for offset in range(-radius, radius + 1)}
    assert min(read) == -radius
    assert (step.tiles - 1) * step.rows <= max(read) + radius < step.tiles * step.rows


def test_walks_cover_the_map_and_repeat_the_steps_that_they_share():
    problem = TileProblem(Spec(5, up=2), 256, 14, 20, 1, 4, True, 4, 4, (9, 0))
    tile = Tile(2, 8, 1, 128, 1, 8, 1, 128, 4)
    step = walk(problem.spec, 2, 8, 1, 32)
    # 16 rows of sources with those before the map: eight steps, of which the second walk repeats two
    found = count_walks(problem, tile, step)
    assert (found.walks, found.across, found.down, found.visited) == (2, 3, 8, 10)
    # columns of targets: from -8, 8 and 24, 24 of them, in a map of 40
    assert found.columns == pytest.approx((16 + 24 + 16) / 3)


def test_a_walk_that_is_alone_in_its_rows_has_no_columns_before_the_map():
    problem = TileProblem(Spec(5, up=2), 256, 14, 14, 1, 2, False, 2, 4, (9, 0))
    tile = Tile(2, 16, 4, 256, 1, 16, 1, 128, 9)
    # the sources of 16 columns begin two before the map
    assert [place_walk(problem._replace(width=width), tile, 4, 64)[3:5] for width in (14, 15)] == [(32, 0), (40, 8)]
    step = place_walk(problem, tile, 4, 64)
    assert count_walks(problem, tile, step)[1:] == (1, 8, 8, 28)


def test_a_product_of_a_step_has_few_empty_places():
    # 4 x 24 targets fill three products of 32, and would leave a quarter of two products of 64 empty
    assert walk(Spec(5, up=2), 2, 8, 1, 64).d == 32
    assert walk(Spec(5, up=2), 4, 4, 1, 64).d == 64
    assert walk(Spec(3, down=2), 1, 1, 1, 64).d == 16
