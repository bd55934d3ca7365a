"""Short runs of the parts of `make soak`."""

import importlib
import os
import re
import sys
from pathlib import Path

import pytest
from commands import run_line

TESTS = Path(__file__).parent
PATHS = os.pathsep.join(filter(None, [str(TESTS), str(TESTS / "support"), os.environ.get("PYTHONPATH")]))


@pytest.mark.parametrize("backend", ["torch", "cpu"], indirect=True)
@pytest.mark.usefixtures("poisoned_memory", "threads_restored")
def test_random_calls(backend, monkeypatch):
    monkeypatch.syspath_prepend(TESTS)
    check = importlib.import_module("soak.calls").prepare(backend)
    counted = {check(seed) for seed in range(60)}
    assert counted >= {"cases", "wrong calls refused"}


def test_damaged_files(tmp_path):
    """The part as `make soak` runs it, in a process of its own."""
    run = run_line([sys.executable, "-P", "-m", "soak", "files", "--minutes", "0.1"], tmp_path, PYTHONPATH=PATHS)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "failures: 0" in run.stdout
    assert sum(map(int, re.findall(r"^  .*: (\d+)$", run.stdout, re.MULTILINE))) >= 10


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc, which only Linux has")
def test_killed_training(tmp_path):
    """One training with workers, which five signals end."""
    run = run_line([sys.executable, "-P", "-m", "soak", "trainings", "--minutes", "0", "--seed", "29"], tmp_path, PYTHONPATH=PATHS)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "  compared bit by bit: 1\n" in run.stdout
    assert re.search(r"^  kills: [2-5]$", run.stdout, re.MULTILINE)
