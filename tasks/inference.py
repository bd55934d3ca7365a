"""Label prediction for pictures of any size, optionally at several scales, mirrored, and in windows."""

import math
from collections.abc import Callable, Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2.functional import resize

# Windows begin at multiples of this number. The strides of all networks divide it, so that the cells of their maps coincide.
ALIGNMENT = 32

SMALLEST_WINDOW = 4 * ALIGNMENT

# Number of scores at the size of the labels that are held at a time.
BAND = 2**24


def check_inference(scales: Sequence[float], window: int | None) -> None:
    """Raise ValueError if `predict_labels` does not support the scales or the window."""
    if not isinstance(scales, Sequence) or not scales or min(scales) <= 0:
        raise ValueError(f"scales must be a list of one or more numbers above 0, got {scales}")
    if window is not None and window < SMALLEST_WINDOW:
        raise ValueError(f"window must be null or at least {SMALLEST_WINDOW} pixels, got {window}")


def _interpolate(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Sample `x` [N, C, h, w] bilinearly at all pairs of rows and columns, -1..1 from edge to edge -> [N, C, rows, columns]."""
    grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1).to(x.device, x.dtype)
    return F.grid_sample(x, grid.expand(len(x), -1, -1, -1), padding_mode="border", align_corners=False)


class _Axis:
    """One axis of a picture with `size` labels, cut into tiles that fit the network's window.

    A window extends beyond its tile by an eighth of its size, so that every pixel is seen with its surroundings.
    """

    def __init__(self, size: int, sides: Sequence[int], window: int | None) -> None:
        self.size, self.margin, step = size, 0, size
        if window is not None and max(sides) > window:
            self.margin = window // 8
            step = max(1, int((window - 2 * self.margin - 2 * ALIGNMENT) * size / max(sides)))
        self.tiles = [(start, min(start + step, size)) for start in range(0, size, step)]

    def window(self, tile: tuple[int, int], side: int) -> slice:
        """Return the part of a view of `side` pixels that shows the tile and its surroundings."""
        start, end = (edge * side / self.size for edge in tile)
        low = math.floor(start - self.margin) // ALIGNMENT * ALIGNMENT
        high = math.ceil((end + self.margin) / ALIGNMENT) * ALIGNMENT
        return slice(max(low, 0), min(high, side))

    def middles(self, tile: tuple[int, int], side: int, window: slice) -> Tensor:
        """Return the centres of the tile's pixels as coordinates in the window, whose edges are -1 and 1."""
        pixels = (torch.arange(*tile, dtype=torch.float64) + 0.5) * side / self.size
        return 2 * (pixels - window.start) / (window.stop - window.start) - 1


def predict_labels(
    network: Callable[[Tensor], Tensor],
    images: Tensor,
    size: tuple[int, ...],
    *,
    base: Callable[[Tensor], Tensor] | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    window: int | None = None,
) -> Tensor:
    """Map images [N, 3, H, W] to labels [N, *size].

    Logits are interpolated bilinearly to `size`. With several scales or mirrored images, probabilities are averaged. Apart from images and
    labels, memory is bounded: the network sees no more than a window, and `BAND` scores are interpolated at a time.

    Args:
        network: maps images [N, 3, h, w] to logits [N, classes, ceil(h / s), ceil(w / s)], where s divides 32.
        base: resizes images to scale 1; None keeps their size.
        scales: factors of that size.
        flip: also average over mirrored images.
        window: the largest height and width that the network sees; larger images are divided into overlapping windows. None means no limit.
    """
    whole = base(images) if base else images
    views = [whole if scale == 1 else resize(images, [max(1, round(scale * side)) for side in whole.shape[-2:]]) for scale in scales]
    rows, columns = (_Axis(size[axis], [view.shape[axis + 2] for view in views], window) for axis in (0, 1))
    labels = torch.empty(len(images), *size, dtype=torch.long, device=images.device)
    for tile in rows.tiles:
        for column in columns.tiles:
            seen = []
            for view in views:
                height, width = view.shape[-2:]
                ys, xs = rows.window(tile, height), columns.window(column, width)
                part = view[..., ys, xs]
                middles = rows.middles(tile, height, ys), columns.middles(column, width, xs)
                seen.append((network(part).float(), *middles))
                if flip:
                    seen.append((network(part.flip(-1)).flip(-1).float(), *middles))
            band = max(1, BAND // (seen[0][0][:, :, 0, 0].numel() * (column[1] - column[0])))
            for first in range(0, tile[1] - tile[0], band):
                scores = [_interpolate(logits, ys[first : first + band], xs) for logits, ys, xs in seen]
                total = scores[0] if len(scores) == 1 else reduce(torch.add, (score.softmax(1) for score in scores))
                top = tile[0] + first
                labels[:, top : top + total.shape[2], slice(*column)] = total.argmax(1)
    return labels
