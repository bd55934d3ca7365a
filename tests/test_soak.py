"""Short runs of the parts of `make soak` that try random calls and damaged files."""

import importlib
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.parametrize("backend", ["torch", "cpu"], indirect=True)
@pytest.mark.usefixtures("poisoned_memory", "threads_restored")
def test_random_calls(backend, monkeypatch):
    monkeypatch.syspath_prepend(TESTS)
    check = importlib.import_module("soak.calls").prepare(backend)
    counted = {check(seed) for seed in range(60)}
    assert counted >= {"cases", "wrong calls refused"}
