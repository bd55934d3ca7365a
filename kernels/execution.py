"""The ops below autograd: the allocation of results, the views of logits and outputs that a backend works on, and its call."""

import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import implementation
from .geometry import LSE_NORMALIZERS, Spec, memory_format

# dtype of the log-sum-exp and of sums
WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float32: torch.float32, torch.float64: torch.float64}


class Options(NamedTuple):
    """The options of one call of an op, in the order of the schemas: size, those of a Spec, layout of the logits, and backend."""

    size: Sequence[int]  # rows and columns of the output
    kernel_size: int
    up: int
    down: int
    groups: int
    normalizer: str
    border: str
    at_targets: bool  # whether the logits are [N, G * K * K, Ho, Wo], instead of [N, G * K * K * up**2, Hq, Wq]
    backend: str | None

    @classmethod
    def read(cls, size: Sequence[int], *others: Any) -> "Options":
        """Take the arguments of an op, whose dispatcher makes a list of the size."""
        return cls(tuple(size), *others)

    @property
    def spec(self) -> Spec:
        """The options of the reassembly."""
        return Spec(self.kernel_size, self.up, self.down, self.groups, self.normalizer, self.border)


def empty_outputs(x: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Allocate y [N, C, *size] and lse [N, G, up, up, Hq, Wq] for `x` [N, C, H, W]; lse is empty for normalizers that need none."""
    n, c, h, w = x.shape
    spec = options.spec
    y = torch.empty((n, c, *options.size), dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    lse_size = (n, spec.groups, spec.up, spec.up, spec.cells(h), spec.cells(w)) if spec.normalizer in LSE_NORMALIZERS else (0,)
    return y, x.new_empty(lse_size, dtype=WIDE[x.dtype])


def empty_gradients(x: Tensor, logits: Tensor, need_dx: bool, need_dlogits: bool) -> tuple[Tensor, Tensor]:
    """Allocate dx and dlogits; a gradient that is not needed has no elements."""
    return (
        torch.empty_like(x) if need_dx else x.new_empty(0),
        torch.empty_like(logits) if need_dlogits else x.new_empty(0),
    )


class Layouts(NamedTuple):
    """What the layout of x and the options of a call determine."""

    options: Options
    spec: Spec
    y_shape: tuple[int, ...]
    y_strides: tuple[int, ...]
    lse_shape: tuple[int, ...]
    cells_shape: tuple[int, ...]  # N, G * K * K, up, up, Hq, Wq
    logit_channels: int  # those of logits in encoder layout that are read
    core: tuple[int, int] | None  # rows and columns of y before it repeats the last ones, unless it repeats none
    number: int  # distinct for every layout; a key that takes less time than the other fields

    @property
    def direct(self) -> bool:
        """Whether the cells are a view of the logits, and y is filled as a whole."""
        return self.core is None and not self.options.at_targets


_numbers = itertools.count()


# a detector that meets 500 sizes of images at ten sites has 5,000
@functools.lru_cache(maxsize=16384)
def find_layouts(shape: torch.Size, strides: tuple[int, ...], options: Options) -> Layouts:
    """Compute the layouts once for an x of this shape and these strides, because they come back in every iteration."""
    y, lse = empty_outputs(torch.empty_strided(shape, strides, device="meta"), options)
    n, _, h, w = shape
    spec = options.spec
    rows, columns = spec.output_size(h), spec.output_size(w)
    longer = y.shape[2] > rows or y.shape[3] > columns
    cells_shape = (n, spec.groups * spec.taps, spec.up, spec.up, spec.cells(h), spec.cells(w))
    core = (min(rows, y.shape[2]), min(columns, y.shape[3])) if longer else None
    channels = spec.groups * spec.taps * spec.up**2
    return Layouts(options, spec, tuple(y.shape), y.stride(), tuple(lse.shape), cells_shape, channels, core, next(_numbers))


def view_cells(logits: Tensor, layouts: Layouts) -> Tensor:
    """View logits as [N, G * K * K, up, up, Hq, Wq].

    Logits in encoder layout may have further channels, which are not read. Weights at output resolution that end within a cell are padded.
    """
    if not layouts.options.at_targets:
        used = layouts.logit_channels
        return (logits if logits.shape[1] == used else logits[:, :used]).view(layouts.cells_shape)
    n, channels, up, _, rows, columns = layouts.cells_shape
    missing_rows, missing_columns = rows * up - logits.shape[2], columns * up - logits.shape[3]
    if missing_rows or missing_columns:
        logits = F.pad(logits, (0, missing_columns, 0, missing_rows))
    return logits.view(n, channels, rows, up, columns, up).permute(0, 1, 3, 5, 2, 4)


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


def compute_outputs(x: Tensor, logits: Tensor, layouts: Layouts) -> tuple[Tensor, Tensor]:
    """Compute y and lse of tensors that no transform of PyTorch observes."""
    lse = x.new_empty(layouts.lse_shape, dtype=WIDE[x.dtype])
    return compute_features(x, logits, layouts, lse), lse


def compute_features(x: Tensor, logits: Tensor, layouts: Layouts, lse: Tensor | None = None) -> Tensor:
    """Compute y, and fill lse unless it is None."""
    y = x.new_empty_strided(layouts.y_shape, layouts.y_strides)
    if not y.numel():
        return y
    backend = implementation(layouts.options.backend, x.device, x.dtype)
    if layouts.direct and (run := getattr(backend, "run_forward", None)):
        run(x, logits, y, lse, layouts)
    else:
        core = y[..., : layouts.core[0], : layouts.core[1]] if layouts.core else y
        backend.forward(x, view_cells(logits, layouts), core, lse, layouts.spec)
        if layouts.core:
            _repeat_last(y, *layouts.core)
    return y


def compute_gradients(
    dy: Tensor, x: Tensor, logits: Tensor, lse: Tensor, layouts: Layouts, need_dx: bool, need_dlogits: bool
) -> tuple[Tensor, Tensor]:
    """Compute dx and dlogits of tensors that no transform of PyTorch observes."""
    dx, dlogits = empty_gradients(x, logits, need_dx, need_dlogits)
    if not dy.numel():
        return dx, dlogits.zero_()
    if layouts.core:
        dy = _sum_repeated(dy, *layouts.core)
    backend = implementation(layouts.options.backend, x.device, x.dtype)
    dcells = None
    if layouts.direct and (run := getattr(backend, "run_backward", None)):
        run(dy, x, logits, lse, dx if need_dx else None, dlogits if need_dlogits else None, layouts)
    else:
        dcells = view_cells(dlogits, layouts) if need_dlogits else None
        backend.backward(dy, x, view_cells(logits, layouts), lse, dx if need_dx else None, dcells, layouts.spec)
    if not need_dlogits:
        return dx, dlogits
    if not layouts.options.at_targets:
        if dlogits.shape[1] > layouts.logit_channels:
            dlogits[:, layouts.logit_channels :].zero_()
    elif dcells is not None and dcells.data_ptr() != dlogits.data_ptr():
        # the cells are a padded copy
        dlogits.copy_(dcells.permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)[..., : dlogits.shape[2], : dlogits.shape[3]])
    return dx, dlogits


@_untraced
def forward(x: Tensor, logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Compute y and lse; the further arguments are those of `Options`."""
    return compute_outputs(x, logits, find_layouts(x.shape, x.stride(), Options.read(*arguments)))


@_untraced
def backward(dy: Tensor, x: Tensor, logits: Tensor, lse: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Compute dx and dlogits; the further arguments are those of `Options`, need_dx and need_dlogits."""
    *options, need_dx, need_dlogits = arguments
    return compute_gradients(dy, x, logits, lse, find_layouts(x.shape, x.stride(), Options.read(*options)), need_dx, need_dlogits)
