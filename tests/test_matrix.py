"""`make matrix` takes one Triton for each minor version, continues where it was stopped, and survives compilers that crash."""

import json
import os
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def matrix(monkeypatch):
    # the module itself extends the path
    monkeypatch.setattr(sys, "path", [str(ROOT / "docs"), *sys.path])
    return import_module("matrix")


@pytest.mark.parametrize(
    ("versions", "oldest", "chosen"),
    [
        (["3.5.1", "3.10.0", "3.5.0", "3.4.0", "3.3.1", "2.1.0"], "3.4", ["3.4.0", "3.5.1", "3.10.0"]),
        (["4.0.0", "3.9.12", "3.9.2", "3.9.2.post1", "4.0.1rc1"], "3.9.3", ["3.9.12", "4.0.0"]),
        ([], "3.4", []),
    ],
)
def test_the_newest_patch_of_every_minor_version(versions, oldest, chosen, matrix):
    assert matrix.choose_versions(versions, oldest) == chosen


WORKER = """
import json, os, sys
target, *cases = sys.argv[1:]
for case in cases:
    with open("calls.txt", "a") as file:
        print(target, case, file=file)
    if case == "crash":
        print("LLVM ERROR: out of luck", file=sys.stderr, flush=True)
        os.abort()
    print(json.dumps({"case": case, "kernels": 2, "registers": 64, "spills": 0, "error": 1e-7, "equal": True, "problem": ""}), flush=True)
"""


def test_a_crash_costs_one_case_and_a_second_call_continues(tmp_path, matrix, monkeypatch):
    (tmp_path / "triton_matrix.py").write_text(WORKER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(matrix, "environment", lambda name: {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path)})
    jobs = [matrix.Job("3.4.0", "sm_80", ("a", "crash", "b")), matrix.Job("3.9.0", "gfx942", ("a",))]
    path = tmp_path / "build" / "rows.jsonl"
    rows = matrix.run_jobs(jobs, path)
    keys = [(row["triton"], row["target"], row["case"]) for row in rows]
    assert keys == [("3.4.0", "sm_80", "a"), ("3.4.0", "sm_80", "crash"), ("3.4.0", "sm_80", "b"), ("3.9.0", "gfx942", "a")]
    assert [bool(row["problem"]) for row in rows] == [False, True, False, False]
    assert "status -6: LLVM ERROR: out of luck" in rows[1]["problem"]
    assert [matrix.is_wrong(row) for row in rows] == [False, True, False, False]

    # killed while it wrote its last line
    calls = Path("calls.txt").read_text()
    *lines, last = path.read_text().strip().splitlines()
    lost = json.loads(last)
    path.write_text("\n".join([*lines, last[:20]]))
    assert matrix.run_jobs(jobs, path) == rows
    assert Path("calls.txt").read_text() == f"{calls}{lost['target']} {lost['case']}\n"
    assert matrix.run_jobs(jobs, path) == rows
    assert len(Path("calls.txt").read_text().splitlines()) == 5


def test_a_case_has_every_kernel(matrix):
    """A kernel is a compiled function that no other one calls."""
    triton = pytest.importorskip("triton")
    cases = import_module("triton_matrix")
    files = [path.relative_to(ROOT) for path in (ROOT / "kernels" / "gpu").rglob("*.py") if "@triton.jit" in path.read_text()]
    modules = [import_module(".".join(["carafepp", *path.with_suffix("").parts])) for path in files]
    functions = {name: value for module in modules for name, value in vars(module).items() if isinstance(value, triton.JITFunction)}
    called = {name for name in functions for function in functions.values() if re.search(rf"(?<!def )(?<!\.)\b{name}\(", function.src)}
    launched = {launch.kernel.__name__ for name in cases.list_cases("sm_90") for launch in cases.list_launches(name, (9, 0))}
    assert launched == functions.keys() - called
    assert not [name for name in cases.list_cases("gfx942") if name not in cases.list_cases("sm_80")]


def test_the_table_says_what_came_of_every_target(matrix):
    tables = import_module("tables")
    right = {"triton": "3.4.0", "target": "sm_80", "case": "a", "registers": "80", "spills": "0", "equal": "True", "problem": ""}
    right["sectors"] = "100"
    rows = [
        right,
        right | {"spills": "3", "equal": "False"},
        right | {"registers": "", "spills": "", "equal": "", "problem": "Crash: why"},
        right | {"target": "gfx942", "equal": "", "sectors": "", "problem": "not linked"},
        right | {"triton": "3.5.1", "sectors": "240"},
        right | {"triton": "3.5.1", "case": "b", "sectors": "50"},
        right | {"triton": "3.6.0", "case": "b", "sectors": "45"},
    ]
    assert tables.tabulate_matrix(rows).splitlines()[2:] == [
        "| 3.4.0 | 2 of 3 compiled; 1 of 2 equal; spills in 1; Crash: why | 1 of 1 compiled; no spills; not linked |",
        "| 3.5.1 | 2 of 2 compiled; 2 of 2 equal; no spills; up to 2.4 x the sectors |  |",
        "| 3.6.0 | 1 of 1 compiled; 1 of 1 equal; no spills |  |",
    ]
    assert matrix.is_wrong({"target": "sm_90", "equal": False, "registers": 80, "spills": 0})
    assert not matrix.is_wrong({"target": "sm_90", "equal": True, "registers": 80, "spills": 2})
    assert not matrix.is_wrong({"target": "gfx942", "registers": 80, "spills": 2, "problem": "not linked"})
    assert matrix.is_wrong({"target": "gfx942", "registers": None, "problem": "Crash: why"})
