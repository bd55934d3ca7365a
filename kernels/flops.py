"""The FLOP formulas of the ops for torch's FLOP counter: one multiplication and one addition per tap of every sum."""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

COUNTER = "torch.utils.flop_counter"


def forward_flops(
    x_shape: torch.Size, logits_shape: torch.Size, size: Sequence[int], kernel_size: int, *options: Any, out_shape: Any, **kwargs: Any
) -> int:
    """Return the FLOPs of `carafepp::reassemble`."""
    rows, columns = size
    return 2 * kernel_size**2 * x_shape[0] * x_shape[1] * rows * columns


def backward_flops(
    dy_shape: torch.Size,
    x_shape: torch.Size,
    logits_shape: torch.Size,
    lse_shape: torch.Size,
    size: Sequence[int],
    kernel_size: int,
    *options: Any,
    out_shape: Any,
    **kwargs: Any,
) -> int:
    """Return the FLOPs of `carafepp::reassemble_backward` for the requested gradients."""
    n, c, h, w = dy_shape
    *_, need_dx, need_dlogits = options
    return 2 * kernel_size**2 * n * c * h * w * (need_dx + need_dlogits)


def _register(counter: ModuleType) -> None:
    counter.register_flop_formula(torch.ops.carafepp.reassemble)(forward_flops)
    counter.register_flop_formula(torch.ops.carafepp.reassemble_backward)(backward_flops)


class _RegisterOnImport(MetaPathFinder):
    """Import hook that registers the formulas right after the first import of torch's FLOP counter."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != COUNTER:
            return None
        finders = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in finders)), None)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load(module)
            sys.meta_path.remove(self)
            _register(module)

        spec.loader.exec_module = load_and_register
        return spec


def register_formulas() -> None:
    """Make torch.utils.flop_counter.FlopCounterMode count the ops, whether it is imported before or after this package.

    The counter's module imports Triton, which takes longer than the rest of this package, so this package does not import that module. A
    counter copies the table of formulas when it is constructed, which may be before the first call of an op. An import hook that acts once
    therefore registers the formulas when the counter's module is imported.
    """
    if COUNTER in sys.modules:
        # waits if another thread is still importing the module
        _register(importlib.import_module(COUNTER))
    else:
        sys.meta_path.insert(0, _RegisterOnImport())
