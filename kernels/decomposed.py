"""The ops as pads, slices, multiplications and additions, for runtimes that do not have carafepp.

`torch.onnx.export` decomposes every op that ONNX lacks and that is in PyTorch's table of decompositions, where registration.py puts these.
`torch.export` and `torch.compile` have tables of their own and keep the ops.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import SymBool, Tensor

from .borders import arrange_windows, pad_source, restore_windows
from .execution import Options
from .geometry import LSE_NORMALIZERS, PADDED_BORDERS, Spec
from .reference import normalize, normalize_backward

Block = tuple[int, int]  # runs of sub-rows and of sub-columns, by their place in `_runs`


def _runs(spec: Spec) -> list[tuple[int, slice]]:
    """List the runs of sub-rows (or sub-columns) of a cell that share their windows, each with the shift of its windows."""
    shifts = [sub * spec.down // spec.up for sub in range(spec.up)]
    return [(shift, slice(shifts.index(shift), shifts.index(shift) + shifts.count(shift))) for shift in sorted(set(shifts))]


def _split(x: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    """Split an axis into several, as `Tensor.unflatten` does; the exporter of traced modules fixes the size of every axis there."""
    return x.reshape(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])


def _blocks(subpixels: Tensor, spec: Spec) -> dict[Block, Tensor]:
    """Cut [..., up, up, Hq, Wq] into blocks [..., sub-pixels, Hq, Wq] that share their windows."""
    runs = list(enumerate(_runs(spec)))
    return {(a, b): subpixels[..., rows, columns, :, :].flatten(-4, -3) for a, (_, rows) in runs for b, (_, columns) in runs}


def _join(blocks: dict[Block, Tensor], spec: Spec) -> Tensor:
    """Undo `_blocks`, to [..., up**2, Hq, Wq]."""
    runs = _runs(spec)
    if len(runs) == 1:
        return blocks[0, 0]
    lengths = [run.stop - run.start for _, run in runs]
    bands = [
        torch.cat([_split(blocks[a, b], blocks[a, b].dim() - 3, (rows, columns)) for b, columns in enumerate(lengths)], dim=-3)
        for a, rows in enumerate(lengths)
    ]
    return torch.cat(bands, dim=-4).flatten(-4, -3)


def _visits(source: Tensor, rows: int, columns: int, spec: Spec) -> Iterator[tuple[Block, int, Tensor]]:
    """Yield (block, tap, part) for every weight: `part` [..., rows, columns] holds the pixels of the source that it multiplies.

    `source` [..., H, W] is padded as `pad_source` does.
    """
    runs = list(enumerate(_runs(spec)))
    last = spec.kernel_size - 1 + runs[-1][1][0]
    lead, beyond = 0 if spec.border in PADDED_BORDERS else spec.kernel_size // 2, -(-last // spec.down)
    # whole steps, so that the slice of every offset has one pixel for each cell
    below, right = ((cells + beyond) * spec.down - size - lead for cells, size in zip((rows, columns), source.shape[-2:], strict=True))
    padded = F.pad(source, (lead, right, lead, below))

    def steps(offset: int) -> slice:
        surplus = beyond - offset // spec.down
        return slice(offset, -surplus * spec.down if surplus else None, spec.down)

    for i in range(last + 1):
        band = padded[..., steps(i), :]
        for j in range(last + 1):
            part = band[..., steps(j)]
            for a, (shift_y, _) in runs:
                for b, (shift_x, _) in runs:
                    ky, kx = i - shift_y, j - shift_x
                    if 0 <= ky < spec.kernel_size and 0 <= kx < spec.kernel_size:
                        yield (a, b), ky * spec.kernel_size + kx, part


def _known_equal(sizes: Sequence[int], others: Sequence[int]) -> bool:
    """Return whether the sizes are equal for all values that the symbols of a traced program may have."""
    for size, other in zip(sizes, others, strict=True):
        equal = size == other
        if isinstance(equal, SymBool):
            from torch.fx.experimental.symbolic_shapes import statically_known_true

            equal = statically_known_true(equal)
        # a tensor stands for a size in torch.jit.trace
        if isinstance(equal, Tensor) or not equal:
            return False
    return True


def _resize_border(y: Tensor, size: Sequence[int]) -> Tensor:
    """Crop y [N, C, H, W], or pad it with zeros, at the bottom and right to `size`."""
    if _known_equal(y.shape[2:], size):
        return y
    # negative padding crops; a slice would restrict a traced program to the sizes at which it cuts as much
    return F.pad(y, (0, size[1] - y.shape[3], 0, size[0] - y.shape[2]))


def _group(x: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """View x [N, C, ...] as [N, G, C / G, ...] in the dtype of the sums."""
    return _split(x.to(dtype), 1, (groups, x.shape[1] // groups))


def _windows(x: Tensor, logits: Tensor, options: Options) -> Tensor:
    """Arrange the logits as windows [N, G, K * K, up, up, Hq, Wq] that read the padded source, in the dtype of the sums."""
    spec, up = options.spec, options.up
    channels = spec.groups * spec.taps
    if options.at_targets:
        rows, columns = (spec.cells(side) for side in x.shape[2:])
        logits = _resize_border(logits, (rows * up, columns * up))
        cells = logits.view(x.shape[0], channels, rows, up, columns, up).permute(0, 1, 3, 5, 2, 4)
    else:
        cells = _split(logits[:, : channels * up**2], 1, (channels, up, up))
    windows = _group(cells, spec.groups, torch.promote_types(x.dtype, torch.float32))
    return arrange_windows(windows, spec, *x.shape[2:])


def decompose(x: Tensor, logits: Tensor, size: Sequence[int] | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Compute y and lse of the op `carafepp::reassemble`.

    The sub-pixels that share their windows are one axis. An integer scale therefore takes one slice, multiplication and addition for each
    of the K * K weights of a window, and a rational one at most min(up, down)**2 times as many. Each slice of x is read by the
    multiplications that follow it, so that a runtime need not keep two.

    Args:
        x, logits: as for the op.
        size: rows and columns of the output; None means those of the scale.
        arguments: the other fields of `Options`.
    """
    options = Options(() if size is None else size, *arguments)
    spec = options.spec
    windows = _windows(x, logits, options)
    weights = normalize(windows, spec.normalizer)
    taps = {block: part.split(1, dim=2) for block, part in _blocks(weights, spec).items()}  # [N, G, 1, sub-pixels, Hq, Wq] each
    source = _group(pad_source(x, spec), spec.groups, weights.dtype).unsqueeze(3)  # [N, G, C / G, 1, H, W], or padded
    cell_rows, cell_columns = windows.shape[-2:]
    sums: dict[Block, Tensor] = {}
    terms: dict[Block, Tensor] = {}
    for block, tap, part in _visits(source, cell_rows, cell_columns, spec):
        term = part * taps[block][tap]
        if block in terms:
            # a sum follows the next term: onnxruntime runs the later of two inputs first, and would else keep all terms
            sums[block] = sums[block] + terms[block] if block in sums else terms[block]
        terms[block] = term
    sums = {block: sums[block] + term if block in sums else term for block, term in terms.items()}
    y = F.pixel_shuffle(_join(sums, spec).flatten(1, 3), spec.up)

    rows, columns = (spec.output_size(side) for side in x.shape[2:])
    y = _resize_border(y, (rows, columns))  # a rational scale may cut the last cell
    if size is not None and not _known_equal(size, (rows, columns)):
        y = _resize_border(F.pad(y, (0, spec.up - 1, 0, spec.up - 1), mode="replicate"), size)
    if spec.normalizer not in LSE_NORMALIZERS:
        return y.to(x.dtype), weights.new_empty(0)
    scores = F.logsigmoid(windows) if spec.normalizer == "sigmoid_normalized" else windows
    return y.to(x.dtype), scores.logsumexp(2)


def decompose_backward(dy: Tensor, x: Tensor, logits: Tensor, lse: Tensor, size: Sequence[int], *arguments: Any) -> tuple[Tensor, Tensor]:
    """Compute the gradient of the logits by the op `carafepp::reassemble_backward`, which a forward pass may use for inner products.

    Returns NotImplemented, which leaves the op as it is, for the gradient of x, weights at output resolution and sizes other than those of
    the scale.
    """
    *given, need_dx, need_dlogits = arguments
    options = Options(size, *given)
    spec = options.spec
    if need_dx or not need_dlogits or options.at_targets or not _known_equal(size, [spec.output_size(side) for side in x.shape[2:]]):
        return NotImplemented
    windows = _windows(x, logits, options)
    rows, columns = windows.shape[-2:]
    dy = _resize_border(dy, (rows * spec.up, columns * spec.up))
    dcells = F.pixel_unshuffle(dy, spec.up).unflatten(1, (dy.shape[1], spec.up, spec.up))
    gradients = _blocks(_group(dcells, spec.groups, windows.dtype), spec)  # [N, G, C / G, sub-pixels, Hq, Wq] each
    source = _group(pad_source(x, spec), spec.groups, windows.dtype).unsqueeze(3)
    products: dict[Block, dict[int, Tensor]] = {block: {} for block in gradients}
    for block, tap, part in _visits(source, rows, columns, spec):
        products[block][tap] = (part * gradients[block]).sum(2)
    dweights = _join({block: torch.stack([taps[tap] for tap in range(spec.taps)], dim=2) for block, taps in products.items()}, spec)
    dweights = dweights.view(windows.shape)
    if spec.normalizer != "none":
        dweights = normalize_backward(dweights, normalize(windows, spec.normalizer), windows, spec.normalizer)
    dlogits = restore_windows(dweights, spec, *x.shape[2:]).flatten(1, 4)
    unread = logits.shape[1] - dlogits.shape[1]
    return x.new_empty(0), (F.pad(dlogits, (0, 0, 0, 0, 0, unread)) if unread else dlogits).to(logits.dtype)
