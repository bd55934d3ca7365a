"""A picture of the scores of classes."""

import math
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

# Length in pixels of a bar of score 1, and room for its number.
BAR, NUMBER = 400, 40

# Height in pixels of a bar and of a line of text above the bars.
BAR_STEP, LINE = 14, 16

# Colours of the scores, of the scale and of its lines.
COLORS, SCALE, RULE = ((31, 119, 180), (255, 127, 14), (44, 160, 44)), "grey", (225, 225, 225)

LONGEST_NAME = 40


def shorten(name: str) -> str:
    """Return a name on one line, without characters that cannot be printed, and cut off after LONGEST_NAME characters."""
    line = "".join(character if character.isprintable() else " " for character in name)
    return line if len(line) <= LONGEST_NAME else f"{line[: LONGEST_NAME - 3]}..."


def draw_scores(rows: list[dict[str, Any]]) -> Tensor:
    """Draw the scores of classes, rows as those of `Task.per_class`, as bars from 0 to 1 -> [3, height, width] in [0, 1].

    Columns of floats are scores, with their mean above the bars; a score that is None has no bar. Columns of integers, such as the number
    of objects, are to the right of the bars.
    """
    font: Any = ImageFont.load_default(12)
    label, *columns = dict.fromkeys(column for row in rows for column in row)
    scores = [column for column in columns if any(isinstance(row.get(column), float) for row in rows)]
    counts = [column for column in columns if any(isinstance(row.get(column), int) for row in rows)]
    names = [shorten(str(row[label])) for row in rows]
    # the last line of the head is the scale, with the titles of the counts
    cells = [counts, *(["" if row.get(column) is None else f"{row[column]:,}" for column in counts] for row in rows)]
    left = 16 + max(math.ceil(font.getlength(name)) for name in names)
    rights, top, step = [left + BAR + NUMBER], LINE * (len(scores) + 1), BAR_STEP * len(scores) + 6
    for column in zip(*cells, strict=True):
        rights.append(rights[-1] + 16 + max(math.ceil(font.getlength(text)) for text in column))
    picture = Image.new("RGB", (rights[-1] + 8, top + step * len(rows) + 4), "white")
    draw = ImageDraw.Draw(picture)

    for line, score in enumerate(scores):
        known = [row[score] for row in rows if row.get(score) is not None]
        draw.rectangle((left, LINE * line + 4, left + 10, LINE * line + 12), COLORS[line % len(COLORS)])
        draw.text((left + 16, LINE * line), f"{shorten(score)}, mean {sum(known) / len(known):.3f}", "black", font)
    for quarter in range(5):
        x = left + BAR * quarter // 4
        draw.line((x, top, x, picture.height), RULE)
        draw.text((x, top), f"{quarter / 4:g}", SCALE, font, anchor="mb")
    for number, texts in enumerate(cells):
        y, color, anchor = (top, SCALE, "rb") if number == 0 else (top + step * (number - 1) + 3, "black", "ra")
        for x, text in zip(rights[1:], texts, strict=True):
            draw.text((x, y), text, color, font, anchor=anchor)
    for number, (name, row) in enumerate(zip(names, rows, strict=True)):
        y = top + step * number + 3
        draw.text((left - 8, y), name, "black", font, anchor="ra")
        for line, score in enumerate(scores):
            value, above = row.get(score), y + BAR_STEP * line
            end = left + round(BAR * (value or 0))
            if value:
                draw.rectangle((left, above + 2, end, above + 12), COLORS[line % len(COLORS)])
            draw.text((end + 4, above), "-" if value is None else f"{value:.3f}", "black", font)
    return pil_to_tensor(picture).float() / 255
