"""Fixtures that more than one folder of tests uses: the backends that run here, memory that starts as NaN, threads, tables of tiles."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from carafepp.kernels.cpu.build import COMPILERS

# Triton reads this when it is imported: a process interprets all of its kernels or none
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED

# a shell that starts a job in the background makes it ignore Ctrl-C, which processes that the tests start would inherit
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

TRITON = [pytest.param("triton", marks=pytest.mark.gpu)] if ON_GPU else ["triton"] if INTERPRETED else []


@pytest.fixture(scope="session")
def compiler() -> str:
    """Return the path of a C++ compiler, or skip the test if there is none."""
    found = next(filter(None, map(shutil.which, COMPILERS)), None)
    return found or pytest.skip("no C++ compiler")


@pytest.fixture(params=["reference", "torch", "cpu", *TRITON], scope="session")
def backend(request) -> str:
    """Every backend that can run here, one at a time. tests/kernels/gpu/test_triton.py runs "triton" in Triton's interpreter."""
    if request.param == "cpu":
        request.getfixturevalue("compiler")
    return request.param


@pytest.fixture(scope="session")
def device(backend: str) -> str:
    """The device that the backend runs on."""
    return "cuda" if backend == "triton" and ON_GPU else "cpu"


@pytest.fixture(scope="module")
def poisoned_memory() -> Iterator[None]:
    """Fill the memory that `torch.empty` and similar functions allocate with NaN, so that a place that a kernel does not write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    # PyTorch fills memory in this mode; operations without a deterministic implementation may still run
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="module")
def threads_restored() -> Iterator[None]:
    """Restore the number of threads after the tests of this module."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tile_table(tmp_path, monkeypatch) -> Path:
    """Path of the user's table of tiles, which does not exist and which no process has read."""
    path = tmp_path / "tiles.json"
    monkeypatch.setenv("CARAFEPP_TILES", str(path))
    return path
