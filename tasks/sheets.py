"""Sheets: pictures in rows and columns, with titles, a legend and a note."""

from collections.abc import Mapping, Sequence

from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from .lettering import load_font, pick_size, wrap, write_legend, write_lines

# Least length in pixels of the longer side of a picture in a sheet.
TILE = 320


def arrange(
    rows: Sequence[Sequence[Tensor]],
    *,
    columns: Sequence[str] = (),
    titles: Sequence[str] = (),
    legend: Mapping[str, Image.Image] | None = None,
    note: str = "",
    letters: int | None = None,
) -> Tensor:
    """Arrange rows of pictures in one picture.

    Small pictures are enlarged by an integer factor. Texts that are longer than their place continue on further lines.

    Args:
        rows: pictures [3, H, W] in [0, 1], of any sizes.
        columns: titles of the columns, above them.
        titles: titles of the rows, on their left, from bottom to top.
        legend: marks with their texts, below the pictures.
        note: text below the legend.
        letters: height of the letters in pixels; None means as large as the narrowest column allows.

    Returns:
        [3, height, width] in [0, 1].
    """
    longest = max(side for row in rows for picture in row for side in picture.shape[1:])
    least = max(TILE, longest)
    grid = [[_to_image(picture, least) for picture in row] for row in rows]
    count = max(len(row) for row in grid)
    widths = [max((row[i].width for row in grid if i < len(row)), default=0) for i in range(count)]
    heights = [max(image.height for image in row) for row in grid]
    size = letters or pick_size(min(widths))
    font, gap = load_font(size), max(6, size // 3)
    heads = [write_lines(wrap(text, font, width), font, width) for text, width in zip(columns, widths, strict=False)]
    sides = [_turn(text, font, height) for text, height in zip(titles, heights, strict=False)]
    left, top = (max((side.width for side in sides), default=0), max((head.height for head in heads), default=0))
    width = left + sum(widths) + gap * (count + 1 + bool(left))
    below = [write_legend(legend, font, width - 2 * gap)] if legend else []
    below += [write_lines(wrap(note, font, width - 2 * gap), font, width - 2 * gap)] if note else []
    height = top + sum(heights) + gap * (len(heights) + 1 + bool(top)) + sum(image.height + gap for image in below)
    sheet = Image.new("RGB", (width, height), "white")
    x = gap + left + gap * bool(left)
    for head, step in zip(heads, widths, strict=False):
        # titles stand on the pictures
        sheet.paste(head, (x, gap + top - head.height))
        x += step + gap
    y = top + gap * (1 + bool(top))
    for number, (row, row_height) in enumerate(zip(grid, heights, strict=True)):
        if number < len(sides):
            sheet.paste(sides[number], (gap + left - sides[number].width, y))
        x = gap + left + gap * bool(left)
        for image, step in zip(row, widths, strict=False):
            sheet.paste(image, (x, y))
            x += step + gap
        y += row_height + gap
    for image in below:
        sheet.paste(image, (gap, y))
        y += image.height + gap
    return pil_to_tensor(sheet).float() / 255


def _to_image(picture: Tensor, least: int) -> Image.Image:
    """Return a picture as an image, enlarged by the integer factor that brings its longer side nearest to `least`, from below."""
    image = to_pil_image(picture.cpu().clamp(0, 1))
    factor = max(1, least // max(image.size))
    return image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)


def _turn(text: str, font: object, height: int) -> Image.Image:
    """Write a text from bottom to top, at the middle of `height` pixels."""
    lines = wrap(text, font, height)
    written = write_lines(lines, font, height)
    # the shorter lines of a title would otherwise stand at the bottom
    shift = (height - max(round(font.getlength(line)) for line in lines)) // 2  # pyright: ignore[reportAttributeAccessIssue]
    return written.transform(written.size, Image.Transform.AFFINE, (1, 0, -shift, 0, 1, 0), fillcolor="white").rotate(90, expand=True)
