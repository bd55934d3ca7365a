"""The tables of tiles: the tile that each problem finds, and the error of a broken table."""

import pytest
import torch
from carafepp.kernels.geometry import Spec
from carafepp.kernels.gpu.tiles.geometry import KERNELS, Tile, TileProblem
from carafepp.kernels.gpu.tiles.ranking import SEPARATE, TOGETHER, rank_tiles
from carafepp.kernels.gpu.tiles.tables import SHIPPED_TABLES, find_in_tables, find_kernels, load_table, table_key, write_table

PROBLEM = TileProblem(Spec(5, up=2), 256, 25, 42, 1, 2, False, 2, 4, (8, 0))
TILE = Tile(2, 2, 1, 16, 1, 4, 2)


def test_a_measured_tile_is_found_on_its_device_only(tile_table):
    write_table(tile_table, {"A GPU": {table_key("forward", PROBLEM): list(TILE)}})
    assert find_in_tables("forward", PROBLEM, "A GPU") == TILE
    assert find_in_tables("backward", PROBLEM, "A GPU") is None
    assert find_in_tables("forward", PROBLEM, "another") is None
    # images of about one size share a tile
    assert find_in_tables("forward", PROBLEM._replace(height=26), "A GPU") == TILE
    assert find_in_tables("forward", PROBLEM._replace(height=250), "A GPU") is None


@pytest.fixture
def shipped_problem():
    """Return the problem of a site of the shipped table, on a GPU of a given capability."""
    pytest.importorskip("triton")
    from carafepp.kernels.gpu.training_step import build_training_step

    return build_training_step(2, 256, 50, 84, Spec(5, up=2), torch.float16, torch.contiguous_format).problem


@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_shipped_tiles_fit_their_problems(tile_table, shipped_problem, kernel):
    problem = shipped_problem((9, 0))
    shipped = find_in_tables(kernel, problem, "A GPU")
    assert shipped in rank_tiles(kernel, problem)
    assert find_in_tables(kernel, shipped_problem((8, 0)), "A GPU") is None


def test_counted_tiles_serve_the_maps_of_a_mask_head_alone(tile_table):
    pytest.importorskip("triton")
    from carafepp.kernels.gpu.assembly import compile_launch, read_assembly
    from carafepp.kernels.gpu.training_step import build_training_step

    def build(*size):
        return build_training_step(*size, Spec(5, up=2), torch.float16, torch.contiguous_format)

    counted, measured = (table["sm_90"] for table in map(load_table, reversed(SHIPPED_TABLES)))
    problem = build(512, 256, 14, 14).problem((9, 0))
    keys = [f"{table_key(kernel, problem)} 14x14" for kernel in SEPARATE]
    assert counted.keys() == set(keys)
    assert not counted.keys() & measured.keys()
    launches = build(512, 256, 14, 14).build_launches("backward", capability=(9, 0))
    assert [launch.constants["TILE"] for launch in launches] == [Tile(*counted[key]) for key in keys]
    for launch in launches:
        assembly = read_assembly(compile_launch(launch, 90))
        assert assembly.loop_spills == 0
        assert assembly.occupancy >= 0.25
    # of the same area
    wide = build(4, 256, 100, 166).problem((9, 0))
    assert [table_key(kernel, wide) for kernel in SEPARATE] == [table_key(kernel, problem) for kernel in SEPARATE]
    assert [find_in_tables(kernel, wide, "A GPU") for kernel in SEPARATE] == [None, None]


def test_a_users_launch_of_both_gradients_goes_before_shipped_launches_of_each(tile_table):
    pytest.importorskip("triton")
    from carafepp.kernels.gpu.training_step import build_training_step

    step = build_training_step(512, 256, 14, 14, Spec(5, up=2), torch.float16, torch.contiguous_format)
    problem = step.problem((9, 0))
    assert find_kernels((SEPARATE, TOGETHER), problem, "meta") == SEPARATE
    write_table(tile_table, {"meta": {table_key("backward", problem): list(TILE)}})
    load_table.cache_clear()
    assert find_kernels((SEPARATE, TOGETHER), problem, "meta") == TOGETHER
    (launch,) = step.build_launches("backward", capability=(9, 0))
    assert launch.constants["TILE"] == TILE


def test_the_users_tiles_go_before_the_shipped_ones(tile_table, shipped_problem):
    problem = shipped_problem((9, 0))
    write_table(tile_table, {"A GPU": {table_key("forward", problem): list(TILE)}})
    assert find_in_tables("forward", problem, "A GPU") == TILE
    assert find_in_tables("forward", problem, "another") != TILE
    assert find_in_tables("backward", problem, "A GPU") == find_in_tables("backward", problem, "another") is not None


def test_measured_tiles_decide_whether_the_gradients_share_a_launch(tile_table, shipped_problem):
    from carafepp.kernels.gpu.training_step import build_training_step

    step = build_training_step(2, 256, 50, 84, Spec(5, up=2), torch.float16, torch.contiguous_format)

    def needs():
        launches = [launch.constants for launch in step.build_launches("backward") if "TILE" in launch.constants]
        return [(constants["NEED_DLOGITS"], constants["NEED_DX"]) for constants in launches]

    problem = step.problem()
    write_table(tile_table, {"meta": {table_key("backward", problem): list(TILE)}})
    assert needs() == [(True, True)]
    load_table.cache_clear()
    write_table(tile_table, {"meta": {table_key(kernel, problem): list(TILE) for kernel in KERNELS}})
    assert needs() == [(True, False), (False, True)]


def test_a_table_is_read_once(tile_table):
    assert find_in_tables("forward", PROBLEM, "A GPU") is None
    write_table(tile_table, {"A GPU": {table_key("forward", PROBLEM): list(TILE)}})
    assert find_in_tables("forward", PROBLEM, "A GPU") is None


@pytest.mark.parametrize(
    "text",
    [
        b'{"A GPU": {"forward": [1, 2]}}',
        b'{"A GPU": {"forward": [4, 8, "4", 32, 1, 4, 2]}}',
        b'{"A GPU": {"forward": [4, 8, 4, 32, 1, 4, 0]}}',
        b'{"A GPU": {"forward": [4, 8, 4, 32, 1, true, 2]}}',
        b'{"A GPU": {"forward": [4, 8, 4, 32, 1, 4, 2.5]}}',
        b'{"A GPU": {"forward": ',
        b'{"A GPU": "\xff"}',
        b"[" * 100_000,
        b"[]",
    ],
)
def test_a_broken_table_is_named(tile_table, text):
    tile_table.write_bytes(text)
    with pytest.raises(ValueError, match=r"tiles\.json is not a table.*carafepp-tune"):
        find_in_tables("forward", PROBLEM, "A GPU")
