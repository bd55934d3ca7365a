"""The diagrams of the documentation: `python docs/diagrams.py` writes carafe.svg and slots.svg beside this file.

Every diagram stands on a white card, so that it can be read on a light and on a dark page.
"""

import itertools
from pathlib import Path
from xml.sax.saxutils import escape

FIXED, UP, DOWN = ("#f1f5f9", "#64748b"), ("#fed7aa", "#c2410c"), ("#dbeafe", "#1d4ed8")
INK, GREY = "#0f172a", "#475569"
FONT = "font-family='system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif'"


class Drawing:
    """An SVG drawing of this width and height; coordinates are pixels from the top left corner."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.parts = [
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' role='img' {FONT}>",
            f"<title>{escape(title)}</title>",
            "<defs><marker id='tip' viewBox='0 0 10 10' refX='9' refY='5' markerWidth='7' markerHeight='7' orient='auto-start-reverse'>"
            f"<path d='M0,0 L10,5 L0,10 z' fill='{GREY}'/></marker></defs>",
            f"<rect width='{width}' height='{height}' rx='12' fill='#ffffff' stroke='#cbd5e1'/>",
        ]

    def text(self, x: float, y: float, words: str, size: int = 19, anchor: str = "middle", color: str = INK, weight: int = 400) -> None:
        """Write words; y is the middle of the line."""
        attributes = f"x='{x:g}' y='{y + size * 0.35:g}' font-size='{size}' text-anchor='{anchor}' fill='{color}' font-weight='{weight}'"
        self.parts.append(f"<text {attributes}>{escape(words)}</text>")

    def box(self, x: float, y: float, width: float, height: float, words: str, look: tuple[str, str] = FIXED, size: int = 19) -> None:
        """Draw a box with one or several lines of text, separated by |."""
        fill, stroke = look
        self.parts.append(
            f"<rect x='{x:g}' y='{y:g}' width='{width:g}' height='{height:g}' rx='7' fill='{fill}' stroke='{stroke}' stroke-width='2'/>"
        )
        lines = words.split("|")
        for number, line in enumerate(lines):
            self.text(x + width / 2, y + height / 2 + (number - (len(lines) - 1) / 2) * size * 1.25, line, size)

    def arrow(self, *points: tuple[float, float], color: str = GREY) -> None:
        """Draw a line through points, with a tip at its end."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.parts.append(f"<polyline points='{path}' fill='none' stroke='{color}' stroke-width='2.5' marker-end='url(#tip)'/>")

    def grid(self, x: float, y: float, rows: int, columns: int, cell: float, fill: str = "#ffffff") -> None:
        """Draw a grid of square cells."""
        self.parts.append(f"<g fill='{fill}' stroke='#94a3b8'>")
        for row in range(rows):
            for column in range(columns):
                self.cell(x + column * cell, y + row * cell, cell)
        self.parts.append("</g>")

    def cell(self, x: float, y: float, side: float, look: str = "") -> None:
        """Draw a square, by default in the colours of its group."""
        self.parts.append(f"<rect x='{x:g}' y='{y:g}' width='{side:g}' height='{side:g}' {look}/>")

    def write(self, path: Path) -> None:
        """Write the file."""
        path.write_text("\n".join([*self.parts, "</svg>", ""]))


def draw_carafe() -> Drawing:
    """Draw the module: the prediction of the kernels above, the reassembly below."""
    d = Drawing(1060, 594, "CARAFE++: a content encoder predicts a kernel for every target; the operator reassembles a window with it")
    d.text(30, 34, "Kernel prediction", 22, "start", weight=700)
    top = 62
    boxes = ((250, "1 x 1 convolution|C to C_m channels"), (480, "k_enc x k_enc|convolution"), (710, "pixel shuffle,|softmax over taps"))
    for x, words in boxes:
        d.box(x, top, 200, 72, words)
    d.text(350, top + 92, "channel compressor", 17, color=GREY)
    d.text(580, top + 92, "content encoder", 17, color=GREY)
    for x in (450, 680):
        d.arrow((x, top + 36), (x + 28, top + 36))
    # the input feeds both branches
    d.text(180, 226, "Reassembly", 22, "start", weight=700)
    left, y, side = 50, 262, 24
    d.grid(left, y, 8, 8, side)
    for row in range(5):
        for column in range(5):
            d.cell(left + (2 + column) * side, y + (1 + row) * side, side, f"fill='{UP[0]}' stroke='{UP[1]}'")
    d.cell(left + 4 * side, y + 3 * side, side, f"fill='{UP[1]}' stroke='{UP[1]}'")
    d.text(left + 4 * side, y + 8 * side + 24, "input  C x H x W", 19)
    d.text(left + 4 * side, y + 8 * side + 50, "window of k x k taps", 17, color=UP[1])
    d.arrow((left + 4 * side, y - 4), (left + 4 * side, top + 36), (248, top + 36))
    # the kernel of one target
    kx, ky, kernel = 455, 276, 30
    weights = [[1, 2, 3, 2, 1], [1, 4, 6, 5, 1], [2, 6, 9, 8, 2], [1, 3, 7, 6, 1], [1, 1, 2, 2, 1]]
    for row, line in enumerate(weights):
        for column, weight in enumerate(line):
            d.cell(kx + column * kernel, ky + row * kernel, kernel, f"fill='{UP[1]}' fill-opacity='{weight / 9:.2f}' stroke='#94a3b8'")
    d.text(kx + 75, ky + 178, "reassembly kernel", 19)
    d.text(kx + 75, ky + 204, "of one target, sum 1", 17, color=GREY)
    d.arrow((810, top + 74), (810, 218), (kx + 75, 218), (kx + 75, ky - 6))
    d.text(660, 200, "a kernel for every target", 17, color=GREY)
    d.text(360, y + 92, "x", 30)
    d.arrow((left + 8 * side + 14, y + 92), (342, y + 92))
    d.arrow((378, y + 92), (kx - 10, y + 92))
    d.text(650, y + 78, "sum", 19)
    d.arrow((kx + 160, y + 92), (716, y + 92))
    # targets are half as large as sources
    right, fine = 730, 15
    d.grid(right, y - 20, 16, 16, fine)
    for row in range(2):
        for column in range(2):
            d.cell(right + (8 + column) * fine, y - 20 + (6 + row) * fine, fine, f"fill='{UP[0]}' stroke='{UP[1]}'")
    d.cell(right + 9 * fine, y - 20 + 6 * fine, fine, f"fill='{UP[1]}' stroke='{UP[1]}'")
    d.text(right + 8 * fine, y + 8 * side + 50, "output  C x up H x up W", 19)
    d.text(30, 540, "Here up = 2 and k = 5. With down = 2, the content encoder has stride 2,", 18, "start", GREY)
    d.text(30, 566, "and there is one target, with its kernel and its window, for every 2 x 2 sources.", 18, "start", GREY)
    return d


def draw_slots() -> Drawing:
    """Draw the networks and their slots."""
    d = Drawing(1060, 936, "The slots of the networks: orange boxes upsample, blue boxes downsample, grey boxes stay")
    d.box(30, 22, 112, 40, "upsampler", UP, 18)
    d.box(156, 22, 136, 40, "downsampler", DOWN, 18)
    d.box(306, 22, 130, 40, "other layers", FIXED, 18)
    d.text(460, 42, "upsampler= and downsampler= fill all slots of a colour", 18, "start", GREY)

    y = 92
    d.text(30, y, "ResNet, the backbone", 21, "start", weight=700)
    d.text(1030, y, "downsampler=, seven places", 18, "end", DOWN[1])
    y += 24
    d.box(30, y, 130, 56, "convolution|stride 2", size=17)
    d.box(186, y, 70, 56, "slot", DOWN)
    d.box(282, y, 80, 56, "c2")
    for number in range(3):
        x = 388 + number * 222
        d.box(x, y - 4, 92, 30, "slot", DOWN, 17)
        d.box(x, y + 32, 92, 30, "slot", DOWN, 17)
        d.box(x + 118, y, 78, 56, f"c{number + 3}")
        d.arrow((x + 94, y + 28), (x + 116, y + 28))
        if number < 2:
            d.arrow((x + 198, y + 28), (x + 220, y + 28))
    for x in (162, 258, 364):
        d.arrow((x, y + 28), (x + 22, y + 28))
    words = "In a stage, one slot precedes the 3 x 3 convolution, whose stride becomes 1, and one is in the shortcut."
    d.text(30, y + 84, words, 18, "start", GREY)

    y = 262
    d.text(30, y, "Faster and Mask R-CNN", 21, "start", weight=700)
    d.text(1030, y, "upsampler@model.fpn=, upsampler@model.mask_head=", 18, "end", UP[1])
    y += 26
    for number, level in enumerate((5, 4, 3, 2)):
        x = 30 + number * 160
        d.box(x, y, 64, 44, f"c{level}")
        d.box(x, y + 92, 64, 44, f"P{level}")
        d.arrow((x + 32, y + 46), (x + 32, y + 90))
        if level > 2:
            d.box(x + 82, y + 92, 60, 44, "slot", UP)
            d.arrow((x + 66, y + 114), (x + 80, y + 114))
            d.arrow((x + 144, y + 114), (x + 158, y + 114))
    d.text(46 + 32, y + 68, "lateral", 17, "start", GREY)
    d.text(660, y + 68, "mask head", 19, "start", weight=600)
    for x, width, words, look in ((660, 130, "RoI 14 x 14|convolutions", FIXED), (816, 64, "slot", UP), (906, 124, "masks|28 x 28", FIXED)):
        d.box(x, y + 86, width, 56, words, look, 17)
    d.arrow((792, y + 114), (814, y + 114))
    d.arrow((882, y + 114), (904, y + 114))

    y = 472
    d.text(30, y, "UperNet and PSPNet", 21, "start", weight=700)
    d.text(1030, y, "upsampler@model.ppm=, upsampler@model.fpn=, upsampler@model.fuse=", 18, "end", UP[1])
    y += 28
    d.box(30, y, 64, 44, "c5")
    d.box(120, y, 120, 44, "pool, grids", size=17)
    d.box(266, y, 60, 44, "slot", UP)
    d.box(352, y, 128, 44, "concatenate", size=17)
    d.text(500, y + 22, "PPM (PSPNet has this slot only)", 18, "start", GREY)
    for x in (96, 242, 328):
        d.arrow((x, y + 22), (x + 22, y + 22))
    d.arrow((416, y + 46), (416, y + 66), (62, y + 66), (62, y + 88))
    for number, level in enumerate((5, 4, 3, 2)):
        x = 30 + number * 160
        d.box(x, y + 90, 64, 44, f"P{level}")
        if level > 2:
            d.box(x + 82, y + 90, 60, 44, "slot", UP)
            d.arrow((x + 66, y + 112), (x + 80, y + 112))
            d.arrow((x + 144, y + 112), (x + 158, y + 112))
    d.text(600, y + 112, "FPN, with laterals from c4, c3, c2", 18, "start", GREY)
    for number, level in enumerate((5, 4, 3, 2)):
        x = 30 + number * 160
        d.arrow((x + 32, y + 136), (x + 32, y + 168))
        if level > 2:
            d.box(x + 82, y + 170, 60, 44, "slot", UP)
            d.arrow((x + 144, y + 192), (x + 158, y + 192))
            d.arrow((x + 66, y + 192), (x + 80, y + 192))
        d.box(x, y + 170, 64, 44, ("P5", "cat", "cat", "cat")[number], size=18)
    d.text(600, y + 192, "FUSE: upsample, concatenate, three times", 18, "start", GREY)

    y = 770
    d.text(30, y, "Global&Local and Partial Conv", 21, "start", weight=700)
    d.text(1030, y, "upsampler=, downsampler=", 18, "end", GREY)
    y += 28
    layers = (
        (30, 104, "image,|mask", FIXED), (158, 56, "slot", DOWN), (238, 62, "conv", FIXED), (324, 56, "slot", DOWN),
        (404, 62, "conv", FIXED), (490, 124, "dilated|convolutions", FIXED), (638, 56, "slot", UP), (718, 62, "conv", FIXED),
        (804, 56, "slot", UP), (884, 62, "conv", FIXED), (970, 64, "image", FIXED),
    )  # fmt: skip
    for x, width, words, look in layers:
        d.box(x, y, width, 56, words, look, 17)
    for (x, width, _, _), (following, *_) in itertools.pairwise(layers):
        d.arrow((x + width + 2, y + 28), (following - 2, y + 28))
    words = "A slot keeps the number of channels. An empty slot leaves the layers of the published network."
    d.text(30, y + 84, words, 18, "start", GREY)
    d.text(30, y + 112, "PSANet has no slot in its decoder.", 18, "start", GREY)
    return d


if __name__ == "__main__":
    folder = Path(__file__).parent
    draw_carafe().write(folder / "carafe.svg")
    draw_slots().write(folder / "slots.svg")
