"""Text in pictures: lines that fit a width, captions and legends, in letters that are readable at half the size."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, cat
from torchvision.transforms.v2.functional import pil_to_tensor

Color = tuple[int, int, int]

# Least height of letters in pixels, and the share of the width of a picture that their height has.
LETTERS, SHARE = 22, 18

# Longer texts are cut off.
LONGEST = 200


def pick_size(width: int) -> int:
    """Return the height of letters in pixels for a picture of `width` pixels."""
    return max(LETTERS, width // SHARE)


def load_font(size: int) -> Any:
    """Load the font that comes with Pillow."""
    return ImageFont.load_default(size)


def shorten(text: str, longest: int = LONGEST) -> str:
    """Return a text on one line, without characters that cannot be printed, and cut off after `longest` characters."""
    line = "".join(character if character.isprintable() else " " for character in text)
    return line if len(line) <= longest else f"{line[: longest - 3]}..."


def wrap(text: str, font: Any, width: int) -> list[str]:
    """Break a text into lines of at most `width` pixels: at its line breaks, after spaces and punctuation, or else within a word."""
    lines = []
    for part in text.split("\n"):
        line = ""
        for word in re.findall(r"[^\s/=,_.]*[\s/=,_.]*", shorten(part)):
            # a word that is longer than a line continues on the next one
            pieces = [word] if font.getlength(word.rstrip()) <= width else list(word)
            for piece in pieces:
                if line and font.getlength((line + piece).rstrip()) > width:
                    lines.append(line.rstrip())
                    line = ""
                line += piece
        lines.append(line.rstrip())
    return lines


def write_lines(lines: Sequence[str], font: Any, width: int, color: str = "black") -> Image.Image:
    """Write lines of text on a white picture of `width` pixels, as high as they need."""
    step = sum(font.getmetrics())
    picture = Image.new("RGB", (width, step * len(lines) + step // 4), "white")
    draw = ImageDraw.Draw(picture)
    for number, line in enumerate(lines):
        draw.text((0, step * number), line, color, font)
    return picture


def make_swatch(color: Color, size: int) -> Image.Image:
    """Make the square of a colour that stands before a name in a legend."""
    picture = Image.new("RGB", (size, size), color)
    # an edge, so that light colours can be seen on white
    ImageDraw.Draw(picture).rectangle((0, 0, size - 1, size - 1), outline=(90, 90, 90))
    return picture


def write_legend(marks: Mapping[str, Image.Image], font: Any, width: int) -> Image.Image:
    """Write a legend of `width` pixels: marks, each before its text, on as many lines as they need."""
    step, lines, x = sum(font.getmetrics()), [[]], 0
    line_step = step + step // 3
    for text, mark in marks.items():
        name = wrap(text, font, max(width - mark.width - step, step))
        length = mark.width + step // 3 + max(math.ceil(font.getlength(line)) for line in name)
        if x and x + length > width:
            lines.append([])
            x = 0
        lines[-1].append((x, mark, name))
        x += length + step
    heights = [max((len(name) for _, _, name in line), default=0) * line_step for line in lines]
    picture = Image.new("RGB", (width, sum(heights) + step // 3), "white")
    draw, y = ImageDraw.Draw(picture), step // 3
    for line, height in zip(lines, heights, strict=True):
        for x, mark, name in line:
            picture.paste(mark, (x, y + (step - mark.height) // 2), mark.convert("RGBA"))
            for number, part in enumerate(name):
                draw.text((x + mark.width + step // 3, y + number * line_step), part, "black", font)
        y += height
    return picture


def draw_legend(colors: Mapping[str, Color], width: int) -> Tensor:
    """Draw a legend of names and colours -> [3, height, width] in [0, 1]; without names its height is 0."""
    size = pick_size(width)
    marks = {name: make_swatch(color, size) for name, color in colors.items()}
    picture = write_legend(marks, load_font(size), width) if marks else Image.new("RGB", (width, 0))
    return pil_to_tensor(picture).float() / 255


def caption(image: Tensor, text: str) -> Tensor:
    """Write a text, on as many lines as it needs, below an image [3, H, W] in [0, 1] -> [3, H + height of the lines, W]."""
    width = image.shape[2]
    font = load_font(pick_size(width))
    lines = write_lines(wrap(text, font, width), font, width)
    return cat([image.cpu(), pil_to_tensor(lines).float() / 255], dim=1)
