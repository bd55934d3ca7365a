"""The ops below autograd: the allocation of results, the views of logits and outputs that a backend works on, and its call."""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import implementation
from .geometry import LSE_NORMALIZERS, Spec, memory_format


class Options(NamedTuple):
    """The options of one call of an op, in the order of the schemas: size, those of a Spec, layout of the logits, and backend."""

    size: Sequence[int]  # rows and columns of the output
    kernel_size: int
    up: int
    down: int
    groups: int
    normalizer: str
    at_targets: bool  # whether the logits are [N, G * K * K, Ho, Wo], instead of [N, G * K * K * up**2, Hq, Wq]
    backend: str | None

    @property
    def spec(self) -> Spec:
        """The options of the reassembly."""
        return Spec(self.kernel_size, self.up, self.down, self.groups, self.normalizer)


def empty_outputs(x: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Allocate y [N, C, *size] and lse [N, G, up, up, Hq, Wq] for `x` [N, C, H, W]; lse is empty for normalizers that need none."""
    n, c, h, w = x.shape
    spec = options.spec
    y = torch.empty((n, c, *options.size), dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    lse_size = (n, spec.groups, spec.up, spec.up, spec.cells(h), spec.cells(w)) if spec.normalizer in LSE_NORMALIZERS else (0,)
    return y, x.new_empty(lse_size, dtype=torch.promote_types(x.dtype, torch.float32))


def empty_gradients(x: Tensor, logits: Tensor, need_dx: bool, need_dlogits: bool) -> tuple[Tensor, Tensor]:
    """Allocate dx and dlogits; a gradient that is not needed has no elements."""
    return (
        torch.empty_like(x) if need_dx else x.new_empty(0),
        torch.empty_like(logits) if need_dlogits else x.new_empty(0),
    )


def _view_cells(logits: Tensor, x: Tensor, options: Options) -> Tensor:
    """View logits as [N, G * K * K, up, up, Hq, Wq].

    Logits in encoder layout may have further channels, which are not read. Weights at output resolution that end within a cell are padded.
    """
    n, channels, up = x.shape[0], options.groups * options.kernel_size**2, options.up
    if not options.at_targets:
        used = logits if logits.shape[1] == channels * up**2 else logits[:, : channels * up**2]
        return used.view(n, channels, up, up, *logits.shape[2:])
    rows, columns = options.spec.cells(x.shape[2]), options.spec.cells(x.shape[3])
    missing_rows, missing_columns = rows * up - logits.shape[2], columns * up - logits.shape[3]
    if missing_rows or missing_columns:
        logits = F.pad(logits, (0, missing_columns, 0, missing_rows))
    return logits.view(n, channels, rows, up, columns, up).permute(0, 1, 3, 5, 2, 4)


def _fit(y: Tensor, x: Tensor, options: Options) -> Tensor:
    """Leave out the rows and columns of an output that repeat the last one."""
    rows, columns = options.spec.output_size(x.shape[2]), options.spec.output_size(x.shape[3])
    return y if y.shape[2] <= rows and y.shape[3] <= columns else y[..., :rows, :columns]


def _repeat_last(y: Tensor, rows: int, columns: int) -> None:
    """Fill the rows and columns of `y` that follow the first `rows` and `columns` with the last of these."""
    y[..., :rows, columns:] = y[..., :rows, columns - 1 : columns]
    y[..., rows:, :] = y[..., rows - 1 : rows, :]


def _sum_repeated(dy: Tensor, rows: int, columns: int) -> Tensor:
    """Add the gradients of repeated rows and columns to those of the last of the first `rows` and `columns`."""
    total = dy[..., :rows, :].clone()
    total[..., -1, :] += dy[..., rows:, :].sum(2)
    dy, total = total, total[..., :columns].clone(memory_format=memory_format(dy))
    total[..., -1] += dy[..., columns:].sum(3)
    return total


Op = Callable[..., tuple[Tensor, Tensor]]


def _untraced(function: Op) -> Op:
    """Keep torch.compile from tracing `function`.

    torch.compiler.disable imports the whole compiler, which takes seconds. It is therefore applied only after something else has
    imported it.
    """

    @functools.cache
    def disabled() -> Op:
        return cast(Op, torch.compiler.disable(function))

    @functools.wraps(function)
    def run(*arguments: Any) -> tuple[Tensor, Tensor]:
        return (disabled() if "torch._dynamo" in sys.modules else function)(*arguments)

    return run


@_untraced
def forward(x: Tensor, logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Compute y and lse; the further arguments are those of `Options`."""
    options = Options(*arguments)
    y, lse = empty_outputs(x, options)
    if y.numel():
        core = _fit(y, x, options)
        implementation(options.backend, x.device, x.dtype).forward(x, _view_cells(logits, x, options), core, lse, options.spec)
        if core is not y:
            _repeat_last(y, *core.shape[2:])
    return y, lse


@_untraced
def backward(dy: Tensor, x: Tensor, logits: Tensor, lse: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Compute dx and dlogits; the further arguments are those of `Options`, need_dx and need_dlogits."""
    *given, need_dx, need_dlogits = arguments
    options = Options(*given)
    dx, dlogits = empty_gradients(x, logits, need_dx, need_dlogits)
    if not dy.numel():
        return dx, dlogits.zero_()
    core = _fit(dy, x, options)
    if core is not dy:
        core = _sum_repeated(dy, *core.shape[2:])
    cells = _view_cells(logits, x, options)
    dcells = None
    if need_dlogits:
        dcells = _view_cells(dlogits, x, options)
        if not options.at_targets:
            dlogits[:, dcells.shape[1] * options.up**2 :].zero_()
    implementation(options.backend, x.device, x.dtype).backward(core, x, cells, lse, dx if need_dx else None, dcells, options.spec)
    if dcells is not None and options.at_targets and dcells.data_ptr() != dlogits.data_ptr():
        # the cells are a padded copy
        dlogits.copy_(dcells.permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)[..., : dlogits.shape[2], : dlogits.shape[3]])
    return dx, dlogits
