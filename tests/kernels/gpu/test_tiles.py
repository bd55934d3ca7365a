"""The choice of tiles: what is chosen fits, depends on nothing but the problem, and gives way to what was measured."""

import json
import sys

import pytest
from carafepp.kernels.geometry import Spec
from carafepp.kernels.gpu import tile_tables
from carafepp.kernels.gpu.tile_geometry import Tile, halo, reach
from carafepp.kernels.gpu.tiles import Problem, choose, ranked
from hypothesis import given, settings
from hypothesis import strategies as st

PROBLEM = Problem(Spec(5, up=2), 256, 25, 42, 1, 2, False, 2, 4, (8, 0))


def padded(n):
    return max(16, 1 << (n - 1).bit_length())


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
    name=st.sampled_from(tile_tables.PASSES),
)
def test_every_common_problem_has_a_tile_that_fits(kernel_size, up, down, channels, size, element_size, channels_last, capability, name):
    problem = Problem(Spec(kernel_size, up, down), channels, *size, 2, element_size, channels_last, 1, 1, capability)
    tile = choose(name, problem)
    assert tile is not None
    assert tile == choose(name, problem)
    # a halo and a block of its channels lie in shared memory; the least that any supported device has is 64 KiB
    pixels = halo(problem.spec, tile.cells_h, tile.cells_w).p
    assert pixels * tile.block_c * element_size <= 64 << 10
    assert tile.split == 1 or tile.split * tile.block_c <= channels
    assert tile.num_warps == 4 or (name == "forward" and capability < (9, 0))


def test_windows_too_large_for_a_tile_have_none():
    assert choose("forward", PROBLEM._replace(spec=Spec(31, up=2))) is None
    assert choose("backward", PROBLEM._replace(spec=Spec(31, up=2))) is None


def test_a_tile_is_wide_where_rows_are_contiguous_and_square_where_channels_are():
    rows, pixels = choose("forward", PROBLEM), choose("forward", PROBLEM._replace(channels_last=True))
    assert rows.cells_w / rows.cells_h > pixels.cells_w / pixels.cells_h


def test_programs_share_channels_only_where_the_map_is_too_small_for_the_device():
    small, large = (choose("forward", Problem(Spec(5, down=2), 256, n, n, 1, 2, True, 8, 8, (8, 0))) for n in (8, 256))
    assert small.split > 1
    assert large.split == 1


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
@pytest.mark.parametrize("element_size", [2, 4])
def test_any_number_of_channels_has_a_tile(capability, element_size):
    for channels in (1, 64, 256, 512, 2048):
        problem = PROBLEM._replace(channels=channels, element_size=element_size, capability=capability)
        assert choose("forward", problem)
        assert choose("backward", problem)


def test_ranked_tiles_differ_and_begin_with_the_choice():
    tiles = ranked("backward", PROBLEM)
    assert tiles[0] == choose("backward", PROBLEM)
    assert len(set(tiles)) == len(tiles) > 10


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


@pytest.fixture
def table(tmp_path, monkeypatch):
    path = tmp_path / "tiles.json"
    monkeypatch.setenv("CARAFEPP_TILES", str(path))
    for cached in (tile_tables._loaded, tile_tables.tile):
        cached.cache_clear()
    yield path
    for cached in (tile_tables._loaded, tile_tables.tile):
        cached.cache_clear()


def test_a_measured_tile_is_found_on_its_device_only(table):
    tile = Tile(2, 2, 1, 16, 1, 4, 2)
    tile_tables.write(table, {"A GPU": {tile_tables.key("forward", PROBLEM): list(tile)}})
    assert tile_tables.tile("forward", PROBLEM, "A GPU") == tile
    assert tile_tables.tile("backward", PROBLEM, "A GPU") is None
    assert tile_tables.tile("forward", PROBLEM, "another") is None
    # images of about one size share a tile
    assert tile_tables.tile("forward", PROBLEM._replace(height=26), "A GPU") == tile
    assert tile_tables.tile("forward", PROBLEM._replace(height=250), "A GPU") is None


def test_shipped_tiles_are_tiles_of_their_problems_and_the_users_go_before_them(table):
    pytest.importorskip("triton")
    import torch
    from carafepp.kernels.gpu import tile_search

    site = tile_search.site(2, 256, 50, 84, Spec(5, up=2), torch.float16, torch.contiguous_format, "meta")
    problem = site.problem((9, 0))
    for name in tile_tables.PASSES:
        shipped = tile_tables.tile(name, problem, "A GPU")
        assert shipped in ranked(name, problem)
        assert shipped != choose(name, problem)
        assert tile_tables.tile(name, site.problem((8, 0)), "A GPU") is None
    mine = Tile(2, 2, 1, 16, 1, 4, 2)
    tile_tables.write(table, {"A GPU": {tile_tables.key("forward", problem): list(mine)}})
    for cached in (tile_tables._loaded, tile_tables.tile):
        cached.cache_clear()
    assert tile_tables.tile("forward", problem, "A GPU") == mine
    assert tile_tables.tile("backward", problem, "A GPU") == shipped


def test_a_broken_table_is_named(table):
    table.write_text('{"A GPU": {"forward": [1, 2]}}')
    with pytest.raises(ValueError, match=r"tiles\.json.*carafepp-tune"):
        tile_tables.tile("forward", PROBLEM, "A GPU")


@pytest.fixture
def tune(table, monkeypatch):
    """Run carafepp-tune as on a GPU, where the last tile tried is the fastest; return the problems it timed."""
    pytest.importorskip("triton")
    import torch
    from carafepp.kernels.gpu import tile_search
    from carafepp.scripts.tune import main

    timed = []

    def clock(site, name, limit):
        timed.append(name)
        tiles = ranked(name, site.problem((8, 0)))[:limit]
        yield from ((float(len(tiles) - i), tile) for i, tile in enumerate(tiles))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "A GPU")
    site = tile_search.site
    monkeypatch.setattr(tile_search, "site", lambda *arguments: site(*arguments[:-1], "meta"))
    monkeypatch.setattr(tile_search, "timed", clock)

    def run(*words):
        timed.clear()
        size = "+sites.a={n: 1, channels: 64, height: 25, width: 42, kernel_size: 5, up: 2}"
        arguments = ["~sites", size, "dtypes=[float16]", "memory_formats=[contiguous]", "limit=3"]
        monkeypatch.setattr(sys, "argv", ["carafepp-tune", *arguments, *words])
        main()
        return list(timed)

    return run


def test_tuning_keeps_the_fastest_and_goes_on_where_it_stopped(tune, table):
    assert tune() == ["forward", "backward"]
    tiles = json.loads(table.read_text())["A GPU"]
    problem = PROBLEM._replace(channels=64)
    assert tiles[tile_tables.key("forward", problem)] == list(ranked("forward", problem)[2])
    # interrupted after the first kernel
    del tiles[tile_tables.key("backward", problem)]
    tile_tables.write(table, {"A GPU": tiles})
    assert tune() == ["backward"]
    assert tune() == []
    assert tune("again=true") == ["forward", "backward"]


def test_without_a_gpu_tiles_are_ranked_by_their_code():
    pytest.importorskip("triton")
    import torch
    from carafepp.kernels.gpu import tile_search

    site = tile_search.site(1, 64, 25, 42, Spec(3, down=2), torch.float16, torch.channels_last, "meta")
    found = dict(map(reversed, tile_search.compiled(site, "forward", 2, 80)))
    assert set(found) == set(ranked("forward", site.problem((8, 0)))[:2])
    assert min(found.values()) > 0
