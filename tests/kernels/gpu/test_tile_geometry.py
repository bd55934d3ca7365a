"""The geometry of a tile, against the definition of windows."""

import pytest
from carafepp.kernels.geometry import Spec
from carafepp.kernels.gpu.tile_geometry import halo, reach


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
