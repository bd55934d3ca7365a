"""Fixtures that more than one folder of tests uses: the backends that run here, memory that starts as NaN, threads, and commands."""

import os
import shutil
from collections.abc import Iterator

import pytest
import torch
from carafepp.kernels.cpu.build import COMPILERS

# Triton reads this when it is imported: a process interprets all of its kernels or none
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED

TRITON = [pytest.param("triton", marks=pytest.mark.gpu)] if ON_GPU else ["triton"] if INTERPRETED else []


@pytest.fixture(scope="session")
def compiler() -> str:
    """Path of a C++ compiler; a test that needs one is skipped where there is none."""
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
    """Fill all that `torch.empty` and its relatives allocate with NaN, so that a place that a kernel leaves out shows."""
    before = torch.are_deterministic_algorithms_enabled()
    # PyTorch fills memory in this mode; what has no deterministic implementation is not a matter of these tests
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="module")
def threads_restored() -> Iterator[None]:
    """Give later tests the number of threads that this module found."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
