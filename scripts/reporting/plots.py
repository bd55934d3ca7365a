"""Plots of a table: scores as bars, learning curves, ablations of one number as a curve, and ablations of two numbers as a heat map."""

import logging
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..common.results import FinishedRun
from .cells import count_decimals, format_scores
from .statistics import summarize
from .tables import Cell, Line, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LONGEST_LABEL = 100

# Every plot is a picture for slides, at DPI, and a drawing for papers.
FORMATS, DPI = ("png", "pdf"), 200

# A picture has at most 2**16 pixels a side.
HIGHEST = 300

# CARAFE++ is vermilion. The others are those of Okabe and Ito's colours that differ from it for every kind of colour vision.
OURS = "#d55e00"
OTHERS = ("#0072b2", "#56b4e9", "#009e73", "#cc79a7", "#7f7f7f", "#000000")
STYLES = ("-", "--", ":", "-.")

# A $ in a label is no formula, and letters in a PDF stay letters.
STYLE: dict[Any, Any] = {
    "text.parse_math": False,
    "text.usetex": False,
    "pdf.fonttype": 42,
    "font.size": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def plot_table(table: Table, folder: Path, stem: str) -> list[Path]:
    """Plot the first metric of a table as PNG and PDF, and return the files.

    They are `stem`_bars with the scores of the lines, `stem`_curves and, if the rows are an ablation, `stem`_ablation.
    """
    from matplotlib import rc_context

    points = {numbers: cell for line in table.lines if (cell := first_cell(line)) and (numbers := find_coordinates(line, table.axes))}
    plots: dict[str, Callable[[], Figure | None]] = {"bars": lambda: plot_bars(table), "curves": lambda: plot_curves(table)}
    if len(points) > 1 and len(table.axes) in (1, 2):
        draw = plot_ablation if len(table.axes) == 1 else plot_heat_map
        plots["ablation"] = lambda: draw(points, table)
    made = []
    # it reports every table of a font that it leaves out of a PDF
    logging.getLogger("fontTools").setLevel(logging.WARNING)
    with rc_context(STYLE):
        for name, plot in plots.items():
            if (figure := plot()) is not None:
                made += [folder / f"{stem}_{name}.{suffix}" for suffix in FORMATS]
                for path in made[-len(FORMATS) :]:
                    # the time would make two reports of the same runs differ
                    stamp = {"CreationDate": None} if path.suffix == ".pdf" else None
                    figure.savefig(path, dpi=DPI, metadata=stamp)
    return made


def first_cell(line: Line) -> Cell | None:
    """Return the cell of the first metric of a line, if there is one."""
    return next(iter(line.cells.values()), None)


def find_coordinates(line: Line, axes: list[str]) -> tuple[str, ...] | None:
    """Return the values of a line on the axes of an ablation, or None if it has no values.

    They are the values of the overrides of these names, or the numbers in the name of the row; "none" is also a value.
    """
    if all(axis in line.labels for axis in axes):
        found = [line.labels[axis].lower().replace("null", "none") for axis in axes]
    else:
        found = re.findall(r"\d+|none", line.labels["row"]) if not (line.setting and line.setting.options) else []
    numbers = [text for text in found if text == "none" or re.fullmatch(r"\d+(\.\d+)?", text)]
    return tuple(numbers) if len(numbers) == len(found) == len(axes) > 0 else None


def label_line(line: Line) -> str:
    """Return the label of a line in a plot."""
    text = line.title
    return text if len(text) <= LONGEST_LABEL else f"{text[: LONGEST_LABEL - 3]}..."


def find_ours(table: Table) -> set[str]:
    """Return the titles of the lines to highlight: those that name CARAFE, or else the last row of a table of its components."""
    named = {line.title for line in table.lines if "carafe" in line.title.lower()}
    components = table.baseline == "published" and table.lines and table.lines[-1].labels.get("row")
    return named or ({table.lines[-1].title} if components else set())


def none_last(text: str) -> float:
    """Return the sort key of a number; none comes last."""
    return float("inf") if text == "none" else float(text)


class Series(NamedTuple):
    """One curve or heat map of an ablation."""

    name: str
    # mean and standard deviation by coordinates
    values: dict[tuple[str, ...], tuple[float, float]]
    # decimal places of the means
    digits: int


def list_series(points: dict[tuple[str, ...], Cell], table: Table) -> list[Series]:
    """List the series of our scores and of the figures of the paper, without empty ones."""
    ours = {
        at: (cell.scores.mean, cell.scores.deviation or 0) for at, cell in points.items() if cell.scores and math.isfinite(cell.scores.mean)
    }
    paper = {at: (cell.paper, 0.0) for at, cell in points.items() if cell.paper is not None}
    found = [Series("ours", ours, table.digits), Series("paper", paper, count_decimals(figure for figure, _ in paper.values()))]
    return [series for series in found if series.values]


def make_figure(count: int, table: Table, height: float = 4.5, labels: Sequence[str] = ()) -> tuple["Figure", Sequence["Axes"]]:
    """Create a figure with `count` panels side by side, of `height` inches and with room for `labels`, and the title of the table."""
    from matplotlib.figure import Figure

    width = 5 + 0.1 * max(15, *map(len, labels)) if labels else 6.5
    figure = Figure(figsize=(width * count, min(height, HIGHEST)), layout="constrained")
    figure.suptitle(textwrap.fill(table.title, 70 * count), fontsize=13)
    return figure, figure.subplots(1, count, squeeze=False)[0]


def list_panels(table: Table) -> dict[str, list[tuple[Line, Cell]]]:
    """List the lines with scores by their first metric; a table of several tasks has a panel for each."""
    panels: dict[str, list[tuple[Line, Cell]]] = {}
    for line in table.lines:
        if (cell := first_cell(line)) and cell.scores and math.isfinite(cell.scores.mean):
            panels.setdefault(cell.metric, []).append((line, cell))
    return panels


def name_metric(line: Line) -> str:
    """Return the task, if the table has several, and the first metric of a line."""
    return " ".join([line.labels.get("task", ""), next(iter(line.cells))]).strip()


def plot_bars(table: Table) -> "Figure | None":
    """Plot the scores as horizontal bars with their values, and standard deviations over seeds; return None for fewer than two lines."""
    panels = list_panels(table)
    count = max((len(lines) for lines in panels.values()), default=0)
    if count < 2:
        return None
    ours = find_ours(table)
    figure, axes = make_figure(len(panels), table, 1.6 + 0.36 * count, [label_line(line) for lines in panels.values() for line, _ in lines])
    for axis, lines in zip(axes, panels.values(), strict=True):
        means = [cell.scores.mean for _, cell in lines if cell.scores]
        deviations = [cell.scores.deviation or 0 for _, cell in lines if cell.scores]
        colors = [OURS if line.title in ours else "#9aa5b1" for line, _ in lines]
        bars = axis.barh(range(len(lines)), means, 0.72, color=colors)
        if any(deviations):
            axis.errorbar(means, range(len(lines)), xerr=deviations, fmt="none", ecolor="black", capsize=3, linewidth=1)
        texts = [format_scores(cell.scores, table.digits) for _, cell in lines]
        # the values follow the bars of the deviations
        ends = [max(mean, 0) + (deviation if math.isfinite(deviation) else 0) for mean, deviation in zip(means, deviations, strict=True)]
        for number, (end, text) in enumerate(zip(ends, texts, strict=True)):
            weight = "bold" if lines[number][0].title in ours else "normal"
            axis.annotate(text, (end, number), (5, 0), textcoords="offset points", va="center", fontweight=weight)
        axis.set_yticks(range(len(bars)), [label_line(line) for line, _ in lines])
        for tick, (line, _) in zip(axis.get_yticklabels(), lines, strict=True):
            tick.set_fontweight("bold" if line.title in ours else "normal")
        axis.set(xlabel=name_metric(lines[0][0]), ylim=(len(lines) - 0.4, -0.6))
        # room for the values
        low, high = min(0, *means), max(ends)
        axis.set_xlim(low, high + (0.45 if any(deviations) else 0.25) * ((high - low) or 1))
        axis.tick_params(axis="y", length=0)
    return figure


def plot_ablation(points: dict[tuple[str, ...], Cell], table: Table) -> "Figure":
    """Plot the metric over one number, with bars of its standard deviation over seeds."""
    series = list_series(points, table)
    # outside the settings of the paper, our scores and its figures need different scales
    panels = [series] if table.protocol.startswith("scale=paper") else [[one] for one in series]
    figure, axes = make_figure(len(panels), table)
    order = sorted(points, key=lambda at: none_last(at[0]))
    for axis, panel in zip(axes, panels, strict=True):
        for name, values, digits in panel:
            drawn = [at for at in order if at in values]
            means, deviations = zip(*(values[at] for at in drawn), strict=True)
            style: dict[str, Any] = {"color": OURS, "marker": "o", "zorder": 3}
            if name == "paper":
                style = {"color": "black", "linestyle": "--", "marker": "s"}
            bars = deviations if any(deviations) else None
            axis.errorbar([order.index(at) for at in drawn], means, yerr=bars, label=name, capsize=3, linewidth=2, **style)
            for at, mean in zip(drawn, means, strict=True):
                # on white, so that no line crosses the number
                white = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1}
                place: Any = {"textcoords": "offset points", "ha": "center", "bbox": white, "fontsize": 10, "zorder": 5}
                axis.annotate(f"{mean:.{digits}f}", (order.index(at), mean), (0, 10), **place)
        axis.set_xticks(range(len(order)), [at[0] for at in order])
        axis.set(xlabel=table.axes[0], ylabel=next(iter(table.lines[0].cells)), xlim=(-0.3, len(order) - 0.4))
        axis.legend(frameon=False)
        # differences below the rounding look flat
        (low, high), least = axis.get_ylim(), 10 * 10.0 ** -min(digits for *_, digits in panel)
        if high - low < least:
            axis.set_ylim((low + high - least) / 2, (low + high + least) / 2)
    return figure


def plot_heat_map(points: dict[tuple[str, ...], Cell], table: Table) -> "Figure":
    """Plot the metric over two numbers; combinations without a figure are hatched."""
    panels = list_series(points, table)
    figure, axes = make_figure(len(panels), table)
    rows, columns = (sorted({at[i] for at in points}, key=none_last) for i in (0, 1))
    for axis, (name, values, digits) in zip(axes, panels, strict=True):
        means = [mean for mean, _ in values.values()]
        # the darkest colours would hide the text
        most = min(means) + 2 * (max(means) - min(means))
        colors = [[values.get((row, column), (math.nan,))[0] for column in columns] for row in rows]
        axis.pcolormesh(colors, vmin=min(means), vmax=most, cmap="YlGnBu", edgecolors="white", linewidth=2)
        axis.patch.set(hatch="//", edgecolor="lightgrey")
        for (row, column), (mean, deviation) in values.items():
            text = f"{mean:.{digits}f}" + (f"\n± {deviation:.{digits}f}" if deviation else "")
            axis.text(columns.index(column) + 0.5, rows.index(row) + 0.5, text, ha="center", va="center")
        axis.set_xticks([i + 0.5 for i in range(len(columns))], columns)
        axis.set_yticks([i + 0.5 for i in range(len(rows))], rows)
        axis.set(title=f"{next(iter(table.lines[0].cells))}, {name}", xlabel=table.axes[1], ylabel=table.axes[0], ylim=(len(rows), 0))
    return figure


def plot_curves(table: Table) -> "Figure | None":
    """Plot the metric over training steps, with mean and standard deviation over seeds; return None if no run has a curve.

    The names of the curves stand beside their ends, sorted by the last score. Those of CARAFE++ are drawn on top.
    """
    panels: dict[str, list[tuple[Line, Cell, list[FinishedRun]]]] = {}
    for line in table.lines:
        runs = list(line.setting.runs.values()) if line.setting else []
        if (cell := first_cell(line)) and any(len(run.curve) > 1 for run in runs):
            panels.setdefault(cell.metric, []).append((line, cell, runs))
    if not panels:
        return None
    ours, names = find_ours(table), list(dict.fromkeys(line.title for lines in panels.values() for line, *_ in lines))
    others = [name for name in names if name not in ours]
    labels = [f"{label_line(line)}  00.0000" for lines in panels.values() for line, *_ in lines]
    figure, axes = make_figure(len(panels), table, max(4.5, 1.5 + 0.25 * len(names)), labels)
    for axis, lines in zip(axes, panels.values(), strict=True):
        ends: list[tuple[float, str, str, bool]] = []
        last = 0
        for line, cell, runs in lines:
            curves = [{point["step"]: cell.scale * point[cell.metric] for point in run.curve if cell.metric in point} for run in runs]
            steps = sorted(set.intersection(*map(set, curves)))
            if not steps:
                continue
            means, deviations = zip(*(summarize({seed: curve[step] for seed, curve in enumerate(curves)}) for step in steps), strict=True)
            is_ours = line.title in ours
            number = (sorted(ours) if is_ours else others).index(line.title)
            palette = (OURS,) if is_ours else OTHERS
            # line styles distinguish the repetitions of a colour
            color, style = palette[number % len(palette)], STYLES[number // len(palette) % len(STYLES)]
            axis.plot(steps, means, color=color, linestyle=style, linewidth=2.8 if is_ours else 1.6, zorder=4 if is_ours else 3)
            if len(runs) > 1:
                low, high = ([mean + sign * band for mean, band in zip(means, deviations, strict=True)] for sign in (-1, 1))
                axis.fill_between(steps, low, high, color=color, alpha=0.25 if is_ours else 0.07, linewidth=0)
            ends.append((means[-1], f"{label_line(line)}  {means[-1]:.{table.digits}f}", color, is_ours))
            last = max(last, steps[-1])
        axis.set(xlabel="step", ylabel=name_metric(lines[0][0]))
        axis.locator_params(axis="x", integer=True)
        label_ends(axis, last, ends)
    return figure


def label_ends(axis: "Axes", last: float, ends: list[tuple[float, str, str, bool]]) -> None:
    """Write the names of curves, given with their last scores and colours, on the right of a panel, none over another."""
    low, high = axis.get_ylim()
    # a line of text takes 0.22 inches of a panel that is 1.3 inches lower than the figure
    least = 0.22 / (axis.figure.get_figheight() - 1.3)  # pyright: ignore[reportAttributeAccessIssue]
    heights = spread_out([(mean - low) / (high - low) if math.isfinite(mean) else 0 for mean, *_ in ends], least)
    for height, (mean, text, color, is_ours) in zip(heights, ends, strict=True):
        at = {"xy": (last, mean), "xytext": (1.06, height), "textcoords": "axes fraction", "va": "center", "annotation_clip": False}
        line = {"arrowstyle": "-", "color": color, "linewidth": 0.8, "shrinkA": 1, "shrinkB": 2, "relpos": (0, 0.5)}
        axis.annotate(text, **at, color=color, fontsize=11, fontweight="bold" if is_ours else "normal", arrowprops=line)


def spread_out(heights: Sequence[float], least: float) -> list[float]:
    """Move heights apart until neighbours differ by `least`, in their order and around their places."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    # blocks of neighbours that touch: their members, and the sum of the places that they want
    blocks: list[tuple[list[int], float]] = []
    for i in order:
        blocks.append(([i], heights[i]))
        while len(blocks) > 1:
            (below, low), (above, high) = blocks[-2:]
            if low + (len(below) - 1) * least / 2 + least <= high - (len(above) - 1) * least / 2:
                break
            middle = (low * len(below) + high * len(above)) / (len(below) + len(above))
            blocks[-2:] = [(below + above, middle)]
    places = {i: middle + (k - (len(members) - 1) / 2) * least for members, middle in blocks for k, i in enumerate(members)}
    return [places[i] for i in range(len(heights))]
