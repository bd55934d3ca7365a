"""The operator on CPU: calls of a C++ kernel that is compiled once per machine."""

import ctypes
import functools
import os
import struct
from typing import Any

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


@functools.cache
def library() -> ctypes.CDLL:
    """Load the compiled kernel; the first call on a machine compiles it.

    Raises:
        BuildError: the kernel cannot be compiled or loaded.
    """
    try:
        return ctypes.CDLL(str(build()))
    except OSError as error:
        raise BuildError(f"the compiled kernel cannot be loaded ({error}).") from error


@functools.cache
def _function(name: str) -> Any:
    return getattr(library(), name)


_forked = False


@functools.cache
def openmp_parallel() -> ctypes.c_void_p | None:
    """Find GOMP_parallel of the OpenMP runtime that PyTorch has loaded; without it (None) the kernel starts its own threads.

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
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p)
    except (AttributeError, OSError, TypeError):
        return None


def _forget_threads() -> None:
    global _forked
    _forked = True
    openmp_parallel.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


_TENSORS = ("x", "logits", "lse", "y", "dy", "dx", "dlogits")
_ADDRESSES = tuple(getattr(Call, name).offset for name in _TENSORS)
_write_address = struct.Struct("P").pack_into


@functools.lru_cache(maxsize=4096)
def _template(dtype: torch.dtype, spec: Spec, shape: torch.Size, size: torch.Size, threads: int, forked: bool, *strides: tuple) -> bytes:
    """Return the bytes of a `Call` without its addresses, which are all that differs between calls with the same layouts."""
    options = DTYPES.index(dtype), NORMALIZERS.index(spec.normalizer), BORDERS.index(spec.border)
    problem = (*options, *shape, *size, *spec[:4])
    return bytes(Call(problem, threads, openmp_parallel(), *((None, steps) for steps in strides)))


def _call(name: str, spec: Spec, y: Tensor, x: Tensor, *others: Tensor | None) -> None:
    """Run a function of the kernel on tensors in the order of `Call`; tensors that are None or missing at the end are not needed.

    `y` is the output or its gradient, and gives the output size.
    """
    tensors = (x, *others)
    strides = [() if t is None else t.stride() for t in tensors]
    call = bytearray(_template(x.dtype, spec, x.shape, y.shape[2:], torch.get_num_threads(), _forked, *strides))
    for offset, tensor in zip(_ADDRESSES, tensors, strict=False):
        if tensor is not None:
            _write_address(call, offset, tensor.data_ptr())
    if _function(name)((ctypes.c_char * len(call)).from_buffer(call)):
        raise MemoryError(f"the CPU kernel cannot allocate its scratch memory for x of shape {tuple(x.shape)}")


def forward(x: Tensor, logits: Tensor, y: Tensor, lse: Tensor, spec: Spec) -> None:
    """Fill y [N, C, Ho, Wo] and lse [N, G, up, up, Hq, Wq] from x and logits [N, G * K * K, up, up, Hq, Wq]."""
    _call("carafepp_forward", spec, y, x, logits, lse, y)


def backward(dy: Tensor, x: Tensor, logits: Tensor, lse: Tensor, dx: Tensor | None, dlogits: Tensor | None, spec: Spec) -> None:
    """Fill dx and dlogits, except those that are None."""
    _call("carafepp_backward", spec, dy, x, logits, lse, None, dy, dx, dlogits)
