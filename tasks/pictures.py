"""Pictures of predictions."""

import colorsys
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from PIL import ImageDraw
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import save_image

from .data import get_data
from .lettering import Color, load_font, pick_size
from .sheets import TILE, arrange
from .task import Task

# The seven colours of Okabe and Ito, and three more that differ most from them with normal, protanopic and deuteranopic vision.
COLORS: list[Color] = [(230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167)]
COLORS += [(0, 0, 255), (90, 0, 0), (135, 255, 165)]

# Opacity of a colour over the brightness of an image.
FILL = 0.6


def enlarge(picture: Tensor, factor: int | None = None) -> Tensor:
    """Repeat pixels [..., H, W] -> [..., factor * H, factor * W]; None means the factor that makes the longer side at least TILE."""
    factor = factor or -(-TILE // max(picture.shape[-2:]))
    return picture.repeat_interleave(factor, -2).repeat_interleave(factor, -1)


def pick_colors(size: int) -> list[Color]:
    """Return `size` colours; the first ten can be told apart with any kind of colour vision, and later neighbours differ clearly."""
    # the golden ratio spreads the hues of any number of labels
    hues = [(label * 0.6180339887) % 1 for label in range(len(COLORS), size)]
    colors = (colorsys.hsv_to_rgb(hue, 0.65 + 0.35 * (i % 2), 1.0) for i, hue in enumerate(hues))
    return [*COLORS[:size], *((round(255 * red), round(255 * green), round(255 * blue)) for red, green, blue in colors)]


def find_outlines(regions: Tensor) -> Tensor:
    """Find the pixels next to another value in each map [N, H, W] -> [N, H, W] bool, in lines whose width suits the size of the map."""
    reach = -(-max(regions.shape[-2:]) // 200)
    values = F.pad(regions.float(), (reach,) * 4, mode="replicate")
    high, low = (sign * F.max_pool2d(sign * values, 2 * reach + 1, stride=1) for sign in (1, -1))
    return high != low


def overlay(image: Tensor, labels: Tensor, colors: Mapping[int, Color]) -> Tensor:
    """Paint the labels [H, W] that have a colour over an image [3, H, W] in [0, 1], with opaque outlines."""
    picture, outlines = image.cpu().clamp(0, 1).clone(), find_outlines(labels[None])[0]
    for label, color in colors.items():
        region, paint = labels == label, torch.tensor(color)[:, None] / 255
        # over the colours of the image, the paint would have another hue than in the legend
        picture[:, region] = torch.lerp(picture[:, region].mean(0, keepdim=True), paint, FILL)
        picture[:, region & outlines] = paint
    return picture


def draw_instances(image: Tensor, boxes: Tensor, names: Sequence[str], colors: Sequence[Color], masks: Tensor | None = None) -> Tensor:
    """Draw masks [n, H, W] with outlines, boxes [n, 4] and names over an image [3, H, W] in [0, 1], the first on top."""
    pixels = image.cpu().clamp(0, 1).clone()
    if masks is not None and len(masks):
        grey, outlines = pixels.mean(0, keepdim=True), find_outlines(masks) & masks
        for mask, outline, color in list(zip(masks, outlines, colors, strict=True))[::-1]:
            paint = torch.tensor(color)[:, None] / 255
            pixels[:, mask] = torch.lerp(grey[:, mask], paint, FILL)
            pixels[:, outline] = paint
    picture = to_pil_image(pixels)
    draw = ImageDraw.Draw(picture)
    font = load_font(pick_size(max(picture.size)))
    instances = list(zip(boxes.tolist(), names, colors, strict=True))[::-1]
    for box, _, color in instances:
        draw.rectangle(box, outline=color, width=max(2, max(picture.size) // 160))
    # names follow all boxes, so that no box crosses a name
    for (left, top, _, _), name, color in instances:
        _write_label(draw, picture.width, (left, top), name, color, font)
    return pil_to_tensor(picture).float() / 255


def write_note(image: Tensor, text: str) -> Tensor:
    """Write a text on white over the upper left corner of an image [3, H, W] in [0, 1]."""
    picture = to_pil_image(image.cpu().clamp(0, 1))
    font = load_font(pick_size(max(picture.size)))
    _write_label(ImageDraw.Draw(picture), picture.width, (0, 0), text, (255, 255, 255), font)
    return pil_to_tensor(picture).float() / 255


def _write_label(draw: Any, room: int, corner: tuple[float, float], text: str, color: Color, font: Any) -> None:
    """Write a text on a rectangle of a colour, above a corner in a picture of `room` pixels width."""
    width, height = math.ceil(font.getlength(text)) + 4, sum(font.getmetrics())
    # above the corner where there is room, and never beyond the right edge
    x, y = max(0, min(corner[0], room - width)), max(0, corner[1] - height)
    draw.rectangle((x, y, x + width, y + height), fill=color)
    # perceived brightness
    bright = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 128
    draw.text((x + 2, y), text, "black" if bright else "white", font)


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
        sheet = arrange([list(row.values()) for row in rows], columns=list(rows[0]))
        save_image(sheet, self.folder / "pictures.png")
