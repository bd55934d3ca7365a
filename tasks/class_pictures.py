"""A picture of the scores of classes."""

import math
from typing import Any

from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from .lettering import load_font, shorten

# Length in pixels of a bar of score 1, and room for its number.
BAR, NUMBER = 600, 64

# Height in pixels of the letters, of a bar, of the step to the next bar, and of a line of text above the bars.
LETTERS, THICK, STEP, LINE = 20, 18, 24, 30

# Colours of the scores, of the scale and of its lines: blue and orange differ for every kind of colour vision.
COLORS, SCALE, RULE = ((0, 114, 178), (230, 159, 0), (0, 158, 115)), (100, 100, 100), (215, 215, 215)

LONGEST_NAME = 40


def draw_scores(rows: list[dict[str, Any]]) -> Tensor:
    """Draw the scores of classes, rows as those of `Task.per_class`, as bars from 0 to 1 -> [3, height, width] in [0, 1].

    Columns of floats are scores, with their mean above the bars; a score that is None has no bar. Columns of integers, such as the number
    of objects, are to the right of the bars.
    """
    font = load_font(LETTERS)
    label, *columns = dict.fromkeys(column for row in rows for column in row)
    scores = [column for column in columns if any(isinstance(row.get(column), float) for row in rows)]
    counts = [column for column in columns if any(isinstance(row.get(column), int) for row in rows)]
    names = [shorten(str(row[label]), LONGEST_NAME) for row in rows]
    # the last line of the head is the scale, with the titles of the counts
    cells = [counts, *(["" if row.get(column) is None else f"{row[column]:,}" for column in counts] for row in rows)]
    left = 24 + max(math.ceil(font.getlength(name)) for name in names)
    rights, top, step = [left + BAR + NUMBER], LINE * (len(scores) + 1), STEP * len(scores) + 8
    for column in zip(*cells, strict=True):
        rights.append(rights[-1] + 24 + max(math.ceil(font.getlength(text)) for text in column))
    picture = Image.new("RGB", (rights[-1] + 12, top + step * len(rows) + 8), "white")
    draw = ImageDraw.Draw(picture)

    for line, score in enumerate(scores):
        known = [row[score] for row in rows if row.get(score) is not None]
        color, middle = COLORS[line % len(COLORS)], LINE * line + LINE // 2
        draw.rectangle((left, middle - 8, left + 16, middle + 8), color)
        draw.text((left + 26, middle), f"{shorten(score, LONGEST_NAME)}, mean {sum(known) / len(known):.3f}", "black", font, anchor="lm")
    for quarter in range(5):
        x = left + BAR * quarter // 4
        draw.line((x, top, x, picture.height), RULE)
        draw.text((x, top - 4), f"{quarter / 4:g}", SCALE, font, anchor="mb")
    for number, texts in enumerate(cells):
        y, color, anchor = (top - 4, SCALE, "rb") if number == 0 else (top + step * (number - 1) + 4 + STEP // 2, "black", "rm")
        for x, text in zip(rights[1:], texts, strict=True):
            draw.text((x, y), text, color, font, anchor=anchor)
    for number, (name, row) in enumerate(zip(names, rows, strict=True)):
        y = top + step * number + 4
        draw.text((left - 12, y + STEP // 2), name, "black", font, anchor="rm")
        for line, score in enumerate(scores):
            value, middle = row.get(score), y + STEP * line + STEP // 2
            end = left + round(BAR * (value or 0))
            if value:
                draw.rectangle((left, middle - THICK // 2, end, middle + THICK // 2 - 1), COLORS[line % len(COLORS)])
            draw.text((end + 8, middle), "-" if value is None else f"{value:.3f}", "black", font, anchor="lm")
    return pil_to_tensor(picture).float() / 255
