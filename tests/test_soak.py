"""Short runs of the parts of `make soak` that try random calls and damaged files."""

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
