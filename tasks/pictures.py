"""Pictures of predictions."""

import colorsys
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid, save_image

from .data import get_data
from .task import Task

# Least side in pixels of a picture that is drawn on, and of a picture in a grid.
DRAWN_SIDE, GRID_SIDE = 320, 160


def enlarge(picture: Tensor, factor: int | None = None) -> Tensor:
    """Repeat pixels [..., H, W] -> [..., factor * H, factor * W]; None means the factor that makes the longer side at least DRAWN_SIDE."""
    factor = factor or -(-DRAWN_SIDE // max(picture.shape[-2:]))
    return picture.repeat_interleave(factor, -2).repeat_interleave(factor, -1)


def pick_colors(size: int) -> list[tuple[int, int, int]]:
    """Return `size` colours; those of neighbouring labels differ clearly."""
    # the golden ratio spreads the hues of any number of labels
    hues = [(label * 0.6180339887) % 1 for label in range(size)]
    colors = (colorsys.hsv_to_rgb(hue, 0.65 + 0.35 * (i % 2), 1.0) for i, hue in enumerate(hues))
    return [(round(255 * red), round(255 * green), round(255 * blue)) for red, green, blue in colors]


def overlay(image: Tensor, labels: Tensor, *, unpainted: Collection[int], alpha: float = 0.6) -> Tensor:
    """Colour the labels [H, W] over an image [3, H, W] in [0, 1]; `unpainted` labels are not coloured."""
    colors = torch.tensor(pick_colors(int(labels.max()) + 1)).float() / 255
    opacity = torch.full([len(colors)], alpha)
    opacity[[label for label in unpainted if label < len(colors)]] = 0
    image = image.cpu().clamp(0, 1)
    return image + opacity[labels] * (colors[labels].permute(2, 0, 1) - image)


def draw_instances(
    image: Tensor, boxes: Tensor, names: Sequence[str], colors: Sequence[tuple[int, int, int]], masks: Tensor | None = None
) -> Tensor:
    """Draw masks [n, H, W], boxes [n, 4] and names over an image [3, H, W] in [0, 1], the first on top."""
    image = image.cpu().clamp(0, 1)
    if masks is not None:
        tint = image.clone()
        for mask, color in zip(masks.flip(0), reversed(colors), strict=True):
            tint[:, mask] = torch.tensor(color)[:, None] / 255
        image = (image + tint) / 2
    picture = to_pil_image(image)
    draw = ImageDraw.Draw(picture)
    font: Any = ImageFont.load_default(max(14, max(picture.size) // 50))
    instances = list(zip(boxes.tolist(), names, colors, strict=True))[::-1]
    for box, _, color in instances:
        draw.rectangle(box, outline=color, width=2)
    # names follow all boxes, so that no box crosses a name
    for (left, top, _, _), name, color in instances:
        width, height = math.ceil(font.getlength(name)) + 4, sum(font.getmetrics())
        # above the box where there is room, and never beyond the right edge
        x, y = max(0, min(left, picture.width - width)), max(0, top - height)
        draw.rectangle((x, y, x + width, y + height), fill=color)
        # perceived brightness
        bright = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 128
        draw.text((x + 2, y), name, "black" if bright else "white", font)
    return pil_to_tensor(picture).float() / 255


def draw_legend(names: dict[int, str], width: int) -> Tensor:
    """Draw a legend of label names with their colours in `overlay`, in lines of `width` pixels -> [3, 12 * lines, width] in [0, 1]."""
    font, lines, x = ImageFont.load_default(), [[]], 0
    for label, name in names.items():
        step = 14 + math.ceil(font.getlength(name))
        if x and x + step > width:
            lines.append([])
            x = 0
        lines[-1].append((x, label, name))
        x += step
    picture = Image.new("RGB", (width, 12 * len(lines)), "white")
    draw = ImageDraw.Draw(picture)
    for row, entries in enumerate(lines):
        for x, label, name in entries:
            draw.rectangle((x + 1, 12 * row + 2, x + 8, 12 * row + 9), pick_colors(label + 1)[label])
            draw.text((x + 11, 12 * row), name, "black", font)
    return pil_to_tensor(picture).float() / 255


def caption(image: Tensor, text: str) -> Tensor:
    """Write a line below an image [3, H, W] in [0, 1] -> [3, H + max(12, W // 40), W]; text beyond the width is cut off."""
    height = max(12, image.shape[2] // 40)
    line = Image.new("L", (image.shape[2], height), 255)
    ImageDraw.Draw(line).text((1, 0), text, 0, ImageFont.load_default(height * 10 // 12))
    return torch.cat([image.cpu(), pil_to_tensor(line).expand(3, -1, -1).float() / 255], dim=1)


def arrange(rows: list[list[Tensor]]) -> Tensor:
    """Arrange rows of pictures [3, H, W] of any sizes in one picture with white gaps; small pictures are enlarged by an integer factor."""
    height, width = (max(picture.shape[axis] for row in rows for picture in row) for axis in (1, 2))
    tiles = [F.pad(p, (0, width - p.shape[2], 0, height - p.shape[1]), value=1) for row in rows for p in row]
    factor = max(1, GRID_SIDE // max(height, width))
    return make_grid([enlarge(tile, factor) for tile in tiles], nrow=len(rows[0]), padding=4, pad_value=1)


class Pictures(L.Callback):
    """Callback that writes pictures of the first `count` validation samples after training, all to pictures.png and each to pictures/."""

    def __init__(self, folder: str | Path, count: int = 6) -> None:
        self.folder, self.count = Path(folder), count

    @torch.no_grad()
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the pictures."""
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, Task)
        pl_module.eval()
        data: Any = get_data(trainer).val
        convert = trainer.precision_plugin.convert_input
        rows = [pl_module.pictures(convert(data[index])) for index in range(min(self.count, len(data)))]
        (self.folder / "pictures").mkdir(exist_ok=True)
        for index, row in enumerate(rows):
            for name, picture in row.items():
                save_image(picture, self.folder / "pictures" / f"{index}_{name}.png")
        save_image(arrange([list(row.values()) for row in rows]), self.folder / "pictures.png")
