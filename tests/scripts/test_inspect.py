"""carafepp-inspect: compilation for absent GPUs, its table and its errors."""

import importlib.util
import json

import pytest
import torch
from commands import call

pytest.importorskip("triton")

from carafepp.kernels.geometry import Spec
from carafepp.kernels.gpu import assembly
from carafepp.kernels.gpu.tiles.geometry import Tile
from carafepp.kernels.gpu.tiles.ranking import SEPARATE, TOGETHER, choose_tile
from carafepp.kernels.gpu.tiles.tables import table_key, write_table
from carafepp.kernels.gpu.training_step import build_training_step

ONE_SITE = ["~sites", "+sites.one={n: 1, channels: 16, height: 8, width: 8, kernel_size: 3, up: 2}"]


@pytest.fixture(autouse=True)
def _no_width(monkeypatch):
    """Remove the width of the terminal, which pytest-xdist sets."""
    monkeypatch.delenv("COLUMNS", raising=False)


def run(monkeypatch, tmp_path, *arguments):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    call("inspect", *ONE_SITE, "dtypes=[float16]", *arguments)


def test_table_and_json_hold_every_kernel_of_a_site(monkeypatch, tmp_path, capsys):
    run(monkeypatch, tmp_path, "architectures=[sm_90]", "memory_formats=[channels_last]", "json=kernels.json")
    rows = json.loads((tmp_path / "kernels.json").read_text())
    assert len(rows) >= 2
    assert all(row["architecture"] == "sm_90" and row["registers"] > 0 and row["spills"] == 0 for row in rows)
    # on a map of 64 pixels, a launch and one program
    assert all(1 < row["predicted_us"] < 20 for row in rows)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(rows) + 1
    assert all(row["kernel"] in line and str(row["registers"]) in line for row, line in zip(rows, lines[1:], strict=True))


def test_a_spill_fails(monkeypatch, tmp_path):
    read = assembly.read_assembly
    monkeypatch.setattr(assembly, "read_assembly", lambda kernel: read(kernel)._replace(spills=1, loop_spills=1))
    with pytest.raises(SystemExit, match="spill registers in a loop"):
        run(monkeypatch, tmp_path, "architectures=[sm_80]", "memory_formats=[channels_last]")


def test_a_measured_tile_may_spill(monkeypatch, tmp_path, tile_table, capsys):
    read = assembly.read_assembly
    monkeypatch.setattr(assembly, "read_assembly", lambda kernel: read(kernel)._replace(spills=1, loop_spills=1))
    step = build_training_step(1, 16, 8, 8, Spec(3, up=2), torch.float16, torch.channels_last)
    tiles = {kernel: choose_tile(kernel, step.problem((9, 0))) for kernel in (*TOGETHER, *SEPARATE, "forward")}
    walk = Tile(2, 8, 1, 16, 1, 4, 1, 128, 4)
    keys = {table_key(kernel, step.problem((9, 0))): list(tile) for kernel, tile in (tiles | {"source_gradient": walk}).items()}
    write_table(tile_table, {"meta": keys})
    run(monkeypatch, tmp_path, "architectures=[sm_90]", "memory_formats=[channels_last]")
    assert "banded_source_gradient" in capsys.readouterr().out


def test_without_triton_it_says_what_is_missing(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "triton" else find(name, *rest))
    with pytest.raises(SystemExit, match="needs the triton package"):
        run(monkeypatch, tmp_path)


def test_an_unknown_architecture_is_named(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"architectures must be among sm_80, .*, got 'sm_12'"):
        run(monkeypatch, tmp_path, "architectures=[sm_12]")


def test_the_second_call_reads_what_the_first_has_stored(monkeypatch, tmp_path, capsys):
    options = ["architectures=[sm_80]", "memory_formats=[contiguous]"]
    run(monkeypatch, tmp_path, *options)
    first = capsys.readouterr().out
    stored = list((tmp_path / "cache").rglob("inspect/*.json"))
    assert len(stored) == len(first.splitlines()) - 1
    with monkeypatch.context() as patch:
        patch.setattr(assembly, "compile_launch", lambda *_: pytest.fail("compiles again"))
        run(monkeypatch, tmp_path, *options)
        assert capsys.readouterr().out == first
    # a file that is cut is written again
    stored[0].write_text("{")
    run(monkeypatch, tmp_path, *options)
    assert capsys.readouterr().out == first
    assert stored[0].read_text().startswith('{"registers"')


def test_the_table_fits_the_terminal(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    run(monkeypatch, tmp_path, "architectures=[sm_80]", "memory_formats=[contiguous]", "json=kernels.json")
    lines = capsys.readouterr().out.splitlines()
    rows = json.loads((tmp_path / "kernels.json").read_text())
    assert max(map(len, lines)) <= 80
    heads = len(lines) - 2 * len(rows)
    for row, labels, figures in zip(rows, lines[heads::2], lines[heads + 1 :: 2], strict=True):
        assert row["kernel"] in labels
        assert figures.split()[:2] == [str(row["registers"]), str(row["spills"])]
