"""The backends by name, and the choice of the backend for a call.

"reference" is the definition, differentiated by autograd. Each of the others is a module that implements the ops of registration.py.
"""

import functools
import importlib
import importlib.util
import warnings
from typing import Protocol, cast

import torch
from torch import Tensor

from .geometry import Spec


class Backend(Protocol):
    """The functions of a module that implements the ops. Both fill the outputs that they are given.

    A module may also have `run_forward` and `run_backward`, for layouts that are `direct`. They take the logits and their gradient
    [N, channels, Hq, Wq] in place of the cells, and `execution.Layouts` in place of the `Spec`.

    Tensors: x and dx [N, C, H, W], logits and dlogits [N, G * K * K, up, up, Hq, Wq], y and dy [N, C, Ho, Wo], lse [N, G, up, up, Hq, Wq].
    """

    def forward(self, x: Tensor, logits: Tensor, y: Tensor, lse: Tensor | None, spec: Spec) -> None:
        """Fill y, and the log-sum-exp of every window unless `lse` is None; it is empty for normalizers without one (LSE_NORMALIZERS)."""

    def backward(self, dy: Tensor, x: Tensor, logits: Tensor, lse: Tensor, dx: Tensor | None, dlogits: Tensor | None, spec: Spec) -> None:
        """Fill dx and dlogits; either of them is None where that gradient is not needed."""


MODULES = {"cpu": ".cpu.backend", "torch": ".torch_backend", "triton": ".gpu.backend"}
BACKENDS = ("reference", *MODULES)
DTYPES: dict[str, tuple[torch.dtype, ...]] = {"triton": (torch.float32, torch.float16, torch.bfloat16)}
DTYPES["cpu"] = DTYPES["torch"] = (*DTYPES["triton"], torch.float64)
# a constant, so that torch.compile need not trace the search
HAS_TRITON = importlib.util.find_spec("triton") is not None


def default_backend(device_type: str, dtype: torch.dtype) -> str:
    """Name the default backend of a device: "cpu" on CPU, "triton" on CUDA and ROCm if Triton is installed, else "reference".

    "reference" also serves float64 on a GPU. If the CPU kernel cannot be compiled, "torch" replaces it.
    """
    if device_type == "cuda":
        return "triton" if HAS_TRITON and dtype in DTYPES["triton"] else "reference"
    # a meta tensor only needs the shape function of the op, which all backends share
    return "cpu" if device_type in ("cpu", "meta") else "reference"


def choose_backend(backend: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """Name the backend that runs for an x on `device` and of `dtype`.

    Raises:
        ValueError: `backend` is unknown, or does not run on the device.
        TypeError: the backend does not take the dtype.
    """
    if backend not in (None, *BACKENDS):
        raise ValueError(f"backend must be None or one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "cpu" and device.type != "cpu":
        raise ValueError(f"backend 'cpu' takes CPU tensors, got x on {device}")
    if backend == "triton" and not HAS_TRITON:
        raise ValueError("backend 'triton' needs the triton package, which is not installed; 'reference' runs on any device")
    if backend == "triton" and device.type not in ("cuda", "cpu", "meta"):
        raise ValueError(f"backend 'triton' takes CUDA tensors, got x on {device}; 'reference' runs on any device")
    chosen = backend or default_backend(device.type, dtype)
    if chosen != "reference" and dtype not in DTYPES[chosen]:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES[chosen])
        raise TypeError(f"backend {chosen!r} takes {known}, got {dtype}; 'reference' takes any floating-point dtype")
    return chosen


@functools.cache
def implementation(backend: str | None, device: torch.device, dtype: torch.dtype) -> Backend:
    """Return the module that runs an op on tensors of `device` and `dtype`.

    "reference" does not implement the ops. "torch" replaces it, for example when a program exported on CPU runs on another device.

    Raises:
        RuntimeError: "cpu" is forced, and the kernel cannot be compiled.
    """
    name = backend or default_backend(device.type, dtype)
    if name == "cpu":
        return _cpu(forced=backend is not None)
    return _module("torch" if name == "reference" else name)


def _module(name: str) -> Backend:
    return cast(Backend, importlib.import_module(MODULES[name], __package__))


@functools.cache
def _cpu(forced: bool) -> Backend:
    """Return the compiled kernel. If it cannot be compiled, raise if it is forced, or else warn once and return the backend "torch"."""
    from .cpu.backend import library
    from .cpu.build import BuildError

    try:
        library()
    except BuildError as error:
        if forced:
            raise RuntimeError(f"backend 'cpu' needs a compiled kernel; 'torch' runs without one: {error}") from error
        warnings.warn(f"carafepp: slower PyTorch code replaces the CPU kernel: {error}", stacklevel=2)
        return _module("torch")
    return _module("cpu")
