"""The operator on CPU: calls of a C++ kernel that is compiled once per machine."""

import ctypes
import functools
import os
from pathlib import Path

import torch
from torch import Tensor

from ..geometry import BORDERS, NORMALIZERS, Spec
from .build import BuildError, build

# in the order of the enumeration in call.h
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Problem(ctypes.Structure):
    """Sizes and options of a call, as in call.h."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            *("dtype", "normalizer", "border", "batch", "channels", "height", "width", "output_rows", "output_columns"),
            *("kernel", "up", "down", "groups"),
        )
    )


class TensorView(ctypes.Structure):
    """`Tensor` of call.h: an address and up to six strides in elements."""

    _fields_ = (("data", ctypes.c_void_p), ("strides", ctypes.c_int64 * 6))


class Call(ctypes.Structure):
    """The argument of the kernel's functions, as in call.h."""

    _fields_ = (
        ("problem", Problem),
        ("threads", ctypes.c_int64),
        ("parallel", ctypes.c_void_p),
        *((name, TensorView) for name in ("x", "logits", "lse", "y", "dy", "dx", "dlogits")),
    )


def load(path: Path) -> ctypes.CDLL:
    """Load a compiled kernel.

    Raises:
        BuildError: the file cannot be loaded.
    """
    try:
        kernel = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"the compiled kernel cannot be loaded ({error}).") from error
    # a layout of a call, and the addresses of its tensors
    kernel.carafepp_forward.argtypes = (ctypes.POINTER(Call), *[ctypes.c_void_p] * 4)
    kernel.carafepp_backward.argtypes = (ctypes.POINTER(Call), *[ctypes.c_void_p] * 6)
    return kernel


@functools.cache
def library() -> ctypes.CDLL:
    """Load the kernel of this machine; the first call on a machine compiles it.

    Raises:
        BuildError: the kernel cannot be compiled or loaded.
    """
    return load(build())


_forked = False


@functools.cache
def openmp_parallel() -> int | None:
    """Find the address of GOMP_parallel of the OpenMP runtime that PyTorch has loaded; without it (None) the kernel starts its own threads.

    A second pool of threads would compete with PyTorch's for the same cores.

    After `os.fork`, as in workers of DataLoader and of multiprocessing's method "fork", the result is None. The threads of an OpenMP
    runtime do not survive a fork, and waiting for them would never end. In a child, every call therefore starts threads and joins them
    before it returns, and gives the same bits as in the parent, even if other threads of the parent run the operator during the fork.

    PyTorch's own parallel operations have no such fall-back. A child that uses them after its parent did waits forever, unless it first
    calls `torch.set_num_threads(1)`, as DataLoader's workers do; this includes what autograd does around the operator. A process forked by
    C code, without Python's `os.fork`, is not recognised.
    """
    if _forked:
        return None
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (AttributeError, OSError, TypeError):
        return None


def _forget_threads() -> None:
    global _forked
    _forked = True
    openmp_parallel.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


@functools.lru_cache(maxsize=4096)
def _layouts(
    dtype: torch.dtype, spec: Spec, shape: torch.Size, size: torch.Size, threads: int, parallel: int | None, *strides: tuple
) -> Call:
    """Return what all calls with these layouts share: all except addresses; the strides are those of x, logits, lse, y etc."""
    options = DTYPES.index(dtype), NORMALIZERS.index(spec.normalizer), BORDERS.index(spec.border)
    problem = (*options, *shape, *size, *spec[:4])
    return Call(problem, threads, parallel, *((None, steps) for steps in strides))


def _check(status: int, x: Tensor) -> None:
    if status:
        raise MemoryError(f"the CPU kernel cannot allocate its scratch memory for x of shape {tuple(x.shape)}")


def forward(x: Tensor, logits: Tensor, y: Tensor, lse: Tensor | None, spec: Spec) -> None:
    """Fill y [N, C, Ho, Wo] and, unless it is None, lse [N, G, up, up, Hq, Wq] from x and logits [N, G * K * K, up, up, Hq, Wq]."""
    strides = x.stride(), logits.stride(), _stride(lse), y.stride()
    layouts = _layouts(x.dtype, spec, x.shape, y.shape[2:], torch.get_num_threads(), openmp_parallel(), *strides)
    _check(library().carafepp_forward(layouts, x.data_ptr(), logits.data_ptr(), _address(lse), y.data_ptr()), x)


def backward(dy: Tensor, x: Tensor, logits: Tensor, lse: Tensor, dx: Tensor | None, dlogits: Tensor | None, spec: Spec) -> None:
    """Fill dx and dlogits, except those that are None."""
    strides = x.stride(), logits.stride(), lse.stride(), (), dy.stride(), _stride(dx), _stride(dlogits)
    layouts = _layouts(x.dtype, spec, x.shape, dy.shape[2:], torch.get_num_threads(), openmp_parallel(), *strides)
    addresses = x.data_ptr(), logits.data_ptr(), lse.data_ptr(), dy.data_ptr(), _address(dx), _address(dlogits)
    _check(library().carafepp_backward(layouts, *addresses), x)


def _stride(tensor: Tensor | None) -> tuple[int, ...]:
    return () if tensor is None else tensor.stride()


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
