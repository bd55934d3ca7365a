"""Plots of a table: learning curves, ablations of one number as a curve, and ablations of two numbers as a heat map."""

import math
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..common.results import FinishedRun
from .cells import count_decimals
from .statistics import summarize
from .tables import Cell, Line, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


LONGEST_LABEL = 300


def plot_table(table: Table, folder: Path, stem: str) -> list[Path]:
    """Plot the first metric of a table to `stem`_curves.png and, if its rows are an ablation, `stem`_ablation.png; return the files."""
    from matplotlib import rc_context

    # labels are overrides of the runs, and a $ in them is no formula
    with rc_context({"text.parse_math": False, "text.usetex": False}):
        made = [plot_curves(table, folder / f"{stem}_curves.png")]
        points = {numbers: cell for line in table.lines if (cell := first_cell(line)) and (numbers := find_coordinates(line, table.axes))}
        if len(points) > 1 and len(table.axes) in (1, 2):
            draw = plot_ablation if len(table.axes) == 1 else plot_heat_map
            made.append(draw(points, table, folder / f"{stem}_ablation.png"))
    return [path for path in made if path]


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
    """Return the label of a line in a legend."""
    return line.labels.get("row") or ", ".join(f"{key}={value}" for key, value in line.labels.items() if value) or "default"


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


def make_figure(count: int, table: Table) -> tuple["Figure", Sequence["Axes"]]:
    """Create a figure with `count` panels side by side and the title of the table."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * count, 4.5), layout="constrained")
    figure.suptitle(textwrap.fill(table.title, 80 * count), fontsize="medium")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def plot_ablation(points: dict[tuple[str, ...], Cell], table: Table, path: Path) -> Path:
    """Plot the metric over one number, with bars of its standard deviation over seeds."""
    series = list_series(points, table)
    # outside the settings of the paper, our scores and its figures need different scales
    panels = [series] if table.protocol.startswith("scale=paper") else [[one] for one in series]
    figure, axes = make_figure(len(panels), table)
    order = sorted(points, key=lambda at: none_last(at[0]))
    for axis, panel in zip(axes, panels, strict=True):
        for name, values, _ in panel:
            drawn = [at for at in order if at in values]
            means, deviations = zip(*(values[at] for at in drawn), strict=True)
            style: dict[str, Any] = {"color": "C0", "marker": "o"}
            if name == "paper":
                style = {"color": "black", "linestyle": "--", "marker": "s"}
            bars = deviations if any(deviations) else None
            axis.errorbar([order.index(at) for at in drawn], means, yerr=bars, label=name, capsize=3, **style)
        axis.set_xticks(range(len(order)), [at[0] for at in order])
        axis.set(xlabel=table.axes[0], ylabel=next(iter(table.lines[0].cells)))
        axis.legend()
        # differences below the rounding look flat
        (low, high), least = axis.get_ylim(), 10 * 10.0 ** -min(digits for *_, digits in panel)
        if high - low < least:
            axis.set_ylim((low + high - least) / 2, (low + high + least) / 2)
    figure.savefig(path)
    return path


def plot_heat_map(points: dict[tuple[str, ...], Cell], table: Table, path: Path) -> Path:
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
    figure.savefig(path)
    return path


def plot_curves(table: Table, path: Path) -> Path | None:
    """Plot the metric over training steps, with mean and standard deviation over seeds; return None if no run has a curve."""
    panels: dict[str, list[tuple[Line, Cell, list[FinishedRun]]]] = {}
    for line in table.lines:
        runs = list(line.setting.runs.values()) if line.setting else []
        if (cell := first_cell(line)) and any(len(run.curve) > 1 for run in runs):
            panels.setdefault(cell.metric, []).append((line, cell, runs))
    if not panels:
        return None
    figure, axes = make_figure(len(panels), table)
    handles = dict.fromkeys(label_line(line) for lines in panels.values() for line, *_ in lines)
    for axis, lines in zip(axes, panels.values(), strict=True):
        for line, cell, runs in lines:
            curves = [{point["step"]: cell.scale * point[cell.metric] for point in run.curve if cell.metric in point} for run in runs]
            steps = sorted(set.intersection(*map(set, curves)))
            if not steps:
                continue
            means, deviations = zip(*(summarize({seed: curve[step] for seed, curve in enumerate(curves)}) for step in steps), strict=True)
            number = list(handles).index(label_line(line))
            # a colour cycle has ten colours; line styles distinguish its repetitions
            (drawn,) = axis.plot(steps, means, color=f"C{number % 10}", linestyle=("-", "--", ":", "-.")[number // 10 % 4])
            handles[label_line(line)] = drawn
            if len(runs) > 1:
                low, high = ([mean + sign * band for mean, band in zip(means, deviations, strict=True)] for sign in (-1, 1))
                axis.fill_between(steps, low, high, color=drawn.get_color(), alpha=0.15, linewidth=0)
        axis.set(xlabel="step", ylabel=" ".join([lines[0][0].labels.get("task", ""), next(iter(lines[0][0].cells))]).strip())
    # crossing lines leave no room for a legend inside the panels
    drawn = {label: handle for label, handle in handles.items() if handle}
    # a picture has at most 2**16 pixels a side
    labels = [label if len(label) <= LONGEST_LABEL else f"{label[:LONGEST_LABEL]}..." for label in drawn]
    figure.set_size_inches(6 * len(panels) + 0.08 * max(map(len, labels), default=0), min(max(4.5, 0.2 * len(handles)), 600))
    figure.legend(drawn.values(), labels, loc="outside right center", fontsize="small")
    figure.savefig(path)
    return path
