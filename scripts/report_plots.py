"""Plots of a table: learning curves with bands, ablations of one number with error bars, of two as a heat map."""

import re
import statistics
from pathlib import Path

from .report_tables import Cell, Line, Table


def plots(table: Table, folder: Path, stem: str) -> list[Path]:
    """Write the plots that a table allows, of its lines' first metrics, to `stem`_curves.png and `stem`_ablation.png."""
    made = [curves(table, folder / f"{stem}_curves.png")]
    points = {numbers: cell for line in table.lines if (cell := main(line)) and (numbers := coordinates(line, table.axes))}
    if len(points) > 1 and len(table.axes) in (1, 2):
        draw = ablation if len(table.axes) == 1 else heat_map
        made.append(draw(points, table, folder / f"{stem}_ablation.png"))
    return [path for path in made if path]


def main(line: Line) -> Cell | None:
    """The line's first metric."""
    return next(iter(line.cells.values()), None)


def coordinates(line: Line, axes: list[str]) -> tuple[str, ...] | None:
    """The line's place on the axes: the overrides of those names, or the numbers in the row's name; "none" is a place too."""
    if all(axis in line.labels for axis in axes):
        found = [line.labels[axis].lower().replace("null", "none") for axis in axes]
    else:
        found = re.findall(r"\d+|none", line.labels["row"]) if not (line.setting and line.setting.options) else []
    numbers = [text for text in found if text == "none" or re.fullmatch(r"\d+(\.\d+)?", text)]
    return tuple(numbers) if len(numbers) == len(found) == len(axes) > 0 else None


def place(text: str) -> float:
    """Sort by: none comes last."""
    return float("inf") if text == "none" else float(text)


def _panels(points: dict[tuple[str, ...], Cell]) -> list[tuple[str, dict[tuple[str, ...], tuple[float, float]]]]:
    """Ours and the paper's, apart since their scales are: mean and deviation by place."""
    ours = {at: (cell.scores.mean, cell.scores.deviation or 0) for at, cell in points.items() if cell.scores}
    paper = {at: (cell.paper, 0) for at, cell in points.items() if cell.paper is not None}
    return [(name, values) for name, values in (("ours", ours), ("paper", paper)) if values]


def _figure(count: int, table: Table):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * count, 4.5), layout="constrained")
    figure.suptitle(table.title, fontsize="medium")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def ablation(points: dict[tuple[str, ...], Cell], table: Table, path: Path) -> Path:
    """The metric over one number, its standard deviation over seeds as bars."""
    panels = _panels(points)
    figure, axes = _figure(len(panels), table)
    name = next(iter(table.lines[0].cells))
    for axis, (title, values) in zip(axes, panels, strict=True):
        order = sorted(values, key=lambda at: place(at[0]))
        means, deviations = zip(*(values[at] for at in order), strict=True)
        axis.errorbar([at[0] for at in order], means, yerr=deviations if any(deviations) else None, marker="o", capsize=3)
        axis.set(title=title, xlabel=table.axes[0], ylabel=name)
    figure.savefig(path)
    return path


def heat_map(points: dict[tuple[str, ...], Cell], table: Table, path: Path) -> Path:
    """The metric over two numbers; combinations without a run stay white."""
    panels = _panels(points)
    figure, axes = _figure(len(panels), table)
    rows, columns = (sorted({at[i] for at in points}, key=place) for i in (0, 1))
    for axis, (title, values) in zip(axes, panels, strict=True):
        axis.imshow([[values.get((row, column), (float("nan"),))[0] for column in columns] for row in rows], aspect="auto", alpha=0.6)
        for (row, column), (mean, deviation) in values.items():
            text = f"{mean:.{table.digits}f}" + (f"\n± {deviation:.{table.digits}f}" if deviation else "")
            axis.text(columns.index(column), rows.index(row), text, ha="center", va="center")
        axis.set_xticks(range(len(columns)), columns)
        axis.set_yticks(range(len(rows)), rows)
        axis.set(title=f"{next(iter(table.lines[0].cells))}, {title}", xlabel=table.axes[1], ylabel=table.axes[0])
    figure.savefig(path)
    return path


def curves(table: Table, path: Path) -> Path | None:
    """The metric over the training, mean and standard deviation over the seeds that a line has."""
    panels: dict[str, list[tuple[Line, Cell]]] = {}
    for line in table.lines:
        if (cell := main(line)) and line.setting and any(len(run.curve) > 1 for run in line.setting.runs.values()):
            panels.setdefault(cell.metric, []).append((line, cell))
    if not panels:
        return None
    figure, axes = _figure(len(panels), table)
    for axis, (metric, lines) in zip(axes, panels.items(), strict=True):
        for line, cell in lines:
            runs = [
                {point["step"]: cell.scale * point[metric] for point in run.curve if metric in point} for run in line.setting.runs.values()
            ]
            steps = sorted(set.intersection(*map(set, runs)))
            if not steps:
                continue
            means = [statistics.fmean(run[step] for run in runs) for step in steps]
            (drawn,) = axis.plot(steps, means, label=line.setting.label)
            if len(runs) > 1:
                bands = [statistics.stdev(run[step] for run in runs) for step in steps]
                low, high = ([mean + sign * band for mean, band in zip(means, bands, strict=True)] for sign in (-1, 1))
                axis.fill_between(steps, low, high, color=drawn.get_color(), alpha=0.2, linewidth=0)
        axis.set(xlabel="step", ylabel=metric)
        axis.legend(fontsize="small")
    figure.savefig(path)
    return path
