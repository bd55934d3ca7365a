"""carafepp-tune: what it times, what it stores, and how it continues after an interruption."""

import json

import pytest
import torch
from carafepp.kernels.geometry import Spec
from carafepp.kernels.gpu.tile_geometry import TileProblem
from carafepp.kernels.gpu.tile_ranking import rank_tiles
from carafepp.kernels.gpu.tile_tables import table_key, write_table
from carafepp.scripts.tune import choose_sites
from commands import call

PROBLEM = TileProblem(Spec(5, up=2), 64, 25, 42, 1, 2, False, 2, 4, (8, 0))


@pytest.fixture
def tune(tile_table, monkeypatch):
    """Run carafepp-tune as if on a GPU where the last tile is the fastest; return the directions that it timed."""
    pytest.importorskip("triton")
    from carafepp.kernels.gpu import tile_search, training_step

    timed = []

    def time_tiles(step, direction, limit):
        timed.append(direction)
        tiles = rank_tiles(direction, step.problem((8, 0)))[:limit]
        yield from ((float(len(tiles) - i), tile) for i, tile in enumerate(tiles))

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


def test_tuning_keeps_the_fastest_and_goes_on_where_it_stopped(tune, tile_table):
    assert tune() == ["forward", "backward"]
    tiles = json.loads(tile_table.read_text())["A GPU"]
    assert tiles[table_key("forward", PROBLEM)] == list(rank_tiles("forward", PROBLEM)[2])
    # as if interrupted after the first kernel
    del tiles[table_key("backward", PROBLEM)]
    write_table(tile_table, {"A GPU": tiles})
    assert tune() == ["backward"]
    assert tune() == []
    assert tune("again=true") == ["forward", "backward"]


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
    monkeypatch.setattr(tile_search, "count_instructions", lambda step, direction, *_: searched.append(direction) or [])
    call("tune", "dtypes=[float16]", "memory_formats=[contiguous]")
    assert searched == ["forward", "backward"]
    out = capsys.readouterr().out
    assert "the first kernel took 0 s: all 2 take about 0 s" in out
