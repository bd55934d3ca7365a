"""carafepp-tune: what it times, what it stores, and how it continues after an interruption."""

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from carafepp.kernels.geometry import Spec
from carafepp.kernels.gpu.tiles.geometry import DIRECTIONS, KERNELS, TileProblem
from carafepp.kernels.gpu.tiles.ranking import SEPARATE, rank_tiles
from carafepp.kernels.gpu.tiles.tables import read_table, table_key, write_table
from carafepp.scripts.tune import choose_sites, store_tiles
from commands import call

PROBLEM = TileProblem(Spec(5, up=2), 64, 25, 42, 1, 2, False, 2, 4, (8, 0))


@pytest.fixture
def tune(tile_table, monkeypatch):
    """Run carafepp-tune as if on a GPU where the last tile is the fastest; return the kernels that it timed."""
    pytest.importorskip("triton")
    from carafepp.kernels.gpu import tile_search, training_step

    timed = []

    def time_tiles(step, kernel, limit, patience):
        timed.append(kernel)
        tiles = rank_tiles(kernel, step.problem((8, 0)))[:limit]
        found = [(float(len(tiles) - i), tile) for i, tile in enumerate(tiles)]
        return tile_search.Search(sorted(found), Counter({"gives a wrong result": 2}))

    build = training_step.build_training_step
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "A GPU")
    monkeypatch.setattr(training_step, "build_training_step", lambda *arguments: build(*arguments[:-1], "meta"))
    monkeypatch.setattr(tile_search, "time_tiles", time_tiles)

    def run(*words):
        timed.clear()
        size = "+sites.a={n: 1, channels: 64, height: 25, width: 42, kernel_size: 5, up: 2}"
        arguments = ["~sites", size, "dtypes=[float16]", "memory_formats=[contiguous]", "limit=3"]
        call("tune", *arguments, *words)
        return list(timed)

    return run


def test_tuning_keeps_the_fastest_and_goes_on_where_it_stopped(tune, tile_table, capsys):
    assert tune() == [*KERNELS]
    assert "skipped 2 of 5 tiles: gives a wrong result" in capsys.readouterr().out
    tiles = json.loads(tile_table.read_text())["A GPU"]
    assert tiles[table_key("forward", PROBLEM)] == list(rank_tiles("forward", PROBLEM)[2])
    # one launch is faster than two
    assert set(tiles) == {table_key(kernel, PROBLEM) for kernel in DIRECTIONS}
    # as if interrupted after the first pass
    del tiles[table_key("backward", PROBLEM)]
    write_table(tile_table, {"A GPU": tiles})
    assert tune() == ["backward", *SEPARATE]
    assert tune() == []
    assert tune("again=true") == [*KERNELS]


def test_two_launches_are_stored_where_they_are_faster(tune, tile_table, monkeypatch):
    from carafepp.kernels.gpu import tile_search

    time_tiles = tile_search.time_tiles

    def slow_backward(step, kernel, limit, patience):
        timed, skipped = time_tiles(step, kernel, limit, patience)
        return tile_search.Search([(milliseconds * (3 if kernel == "backward" else 1), tile) for milliseconds, tile in timed], skipped)

    monkeypatch.setattr(tile_search, "time_tiles", slow_backward)
    assert tune() == [*KERNELS]
    assert set(json.loads(tile_table.read_text())["A GPU"]) == {table_key(kernel, PROBLEM) for kernel in ("forward", *SEPARATE)}
    assert tune() == []


def test_kernels_without_tiles_are_skipped(tune, tile_table, monkeypatch):
    from carafepp.kernels.gpu.sums import tap_sums, target_sums

    # the output of the site has 1 MiB
    words = "dtypes=[float32]", "memory_formats=[channels_last]"
    assert tune(*words) == [*KERNELS]
    monkeypatch.setattr(tap_sums, "SMALLEST", 2**20)
    assert tune("again=true", *words) == ["backward", *SEPARATE]
    tile_table.unlink()
    assert tune(*words) == ["backward", *SEPARATE]
    assert not [key for key in json.loads(tile_table.read_text())["A GPU"] if key.startswith("forward")]
    monkeypatch.setattr(target_sums, "SMALLEST", 2**20)
    assert tune("again=true", *words) == ["logit_gradient"]


def test_tables_of_several_devices_and_jobs_are_merged(tile_table, tmp_path, capsys):
    pytest.importorskip("triton")
    tiles = {name: {f"forward {name}": [2, 2, 1, 64, 1, 4, 2]} for name in "abc"}
    write_table(tile_table, {"A GPU": tiles["a"]})
    write_table(tmp_path / "job.json", {"A GPU": tiles["b"] | {"forward a": [1, 1, 1, 64, 1, 4, 2]}})
    write_table(tmp_path / "other.json", {"another": tiles["c"] | {"forward d": [2, 2, 1, 64, 1, 4, 2, 168]}})
    call("tune", f"merge=[{tmp_path}/job.json,{tmp_path}/other.json]")
    merged = json.loads(tile_table.read_text())
    assert {*merged["A GPU"]} == {"forward a", "forward b"}
    assert {*merged["another"]} == {"forward c", "forward d"}
    # the table keeps its own tile
    assert merged["A GPU"]["forward a"] == [2, 2, 1, 64, 1, 4, 2]
    assert "3 more tiles, and 4 in all, of 2 devices" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match=r"merge must name tables of carafepp-tune, and .*lost\.json does not exist"):
        call("tune", f"merge=[{tmp_path}/lost.json]")


def test_two_commands_write_one_table(tile_table):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: store_tiles(tile_table, f"GPU {i % 3}", {f"forward {i}": [2, 2, 1, 64, 1, 4, 2]}), range(40)))
    assert sum(map(len, read_table(tile_table).values())) == 40


def test_one_site_without_a_gpu_and_chosen_sites_elsewhere():
    sites = {"a": {"n": 1}, "b": {"n": 2}, "c": {"n": 3}}
    assert choose_sites(sites, None, gpu=True) == sites
    assert choose_sites(sites, None, gpu=False) == {"a": {"n": 1}}
    assert choose_sites(sites, ["c", "a"], gpu=False) == {"c": {"n": 3}, "a": {"n": 1}}
    with pytest.raises(ValueError, match="only must be among a, b, c, got 'd'"):
        choose_sites(sites, ["d"], gpu=True)


def test_the_ranking_without_a_gpu_says_how_long_it_takes(monkeypatch, capsys):
    pytest.importorskip("triton")
    from carafepp.kernels.gpu import tile_search

    searched = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(tile_search, "count_instructions", lambda step, kernel, *_: searched.append(kernel) or [])
    call("tune", "dtypes=[float16]", "memory_formats=[contiguous]")
    assert searched == [*KERNELS]
    out = capsys.readouterr().out
    assert "the first pass took 0 s: all 2 take about 0 s" in out
