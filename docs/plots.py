"""The plots of the documentation, from the data that it holds: `python docs/plots.py` writes them beside this file.

- results_gains.svg: the gains of the runs in docs/results, those of the study and the earlier ones, beside those of the paper
- samplers_costs.svg: the accuracy of samplers in these runs against their times in docs/measurements
- performance_times.svg: the times on a GPU in docs/measurements over that of a copy of the same bytes

Each file holds its data as its description, which a test compares with the data of today.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from carafepp.scripts.common.paper import find_baseline, list_rows, read_paper
from carafepp.scripts.reporting import Table, tabulate_paper
from comparisons import is_study, read_settings
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox
from tables import read_run

FOLDER = Path(__file__).parent
# safe for colour-blind readers; the method of the paper is orange in every plot
OURS, METHOD, PAPER = "#1d4ed8", "#c2410c", "#0f172a"
NUMERALS = ["", "I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X", "XI", "XII", "XIII", "XIV"]
# what the runs of each table score, and the metric in words
SUBJECTS = {
    "table2": "classification, top-1 in %",
    "table3": "downsamplers of Faster R-CNN, AP",
    "table4": "upsamplers of Faster R-CNN, AP",
    "table7": "places in Mask R-CNN, AP",
    "table8": "UperNet, mIoU in %",
    "table9": "places in UperNet, mIoU in %",
    "table10": "inpainting, decrease of L1 in %",
    "table11": "channels C_m, upsampling, AP",
    "table12": "channels C_m, downsampling, top-1 in %",
    "table13": "sizes of encoder and kernel, AP",
    "table14": "normaliser of the kernels, AP",
}
# metrics of which less is better
ERRORS = ("L1_percent",)
# rows without CARAFE++ in tables whose other rows have it
CONTROLS = ("same_flops", "same_parameters", "no_finest_level", "no_finest_level_carafe", "shorter_training")
# the rows of Tables III and IV that have another name as samplers
SAMPLERS = {"conv": "strided_conv"}


class Gain(NamedTuple):
    """The difference between a row of a table and its baseline: mean and half the interval of our runs, and that of the paper."""

    row: str
    mean: float
    half: float | None
    paper: float | None


def list_gains(table: Table) -> tuple[str, list[Gain]]:
    """Return the name of the first metric of a table, and the gains of the rows that have runs."""
    own = read_paper()[0][table.name]
    column = next(iter(table.lines[0].cells))
    figures = {(row["row"], row["task"]): row.get(column) for row in list_rows(read_paper()[0], table.name)}
    found = []
    for line in table.lines:
        cell, row = line.cells[column], line.labels["row"]
        # rows that the paper does not have have no figures
        task = line.labels.get("task") or next((task for name, task in figures if name == row), None)
        baseline = find_baseline(own, row)
        if cell.difference is None or baseline is None:
            continue
        reference = figures.get((baseline, task))
        gain = None if cell.paper is None or reference is None else round(cell.paper - reference, 2)
        label = row.removeprefix("row=control/") + {"bbox": ", boxes", "segm": ", masks"}.get(line.labels.get("task", ""), "")
        half = None if cell.difference.half is None else round(cell.difference.half, 2)
        found.append(Gain(label, round(cell.difference.mean, 2), half, gain))
    return column, found


def read_tables(study: bool = False) -> list[Table]:
    """Tabulate the runs in docs/results: those of the study, or the earlier ones."""
    return tabulate_paper([setting for setting in read_settings() if is_study(setting) == study], [], 4, None)


def collect_gains() -> dict[str, Any]:
    """Return metric and gains of every table with a gain: those of the earlier runs, and those of the study."""
    found: dict[str, Any] = {}
    for name, study in (("gains", False), ("study", True)):
        for table in read_tables(study):
            metric, gains = list_gains(table)
            if gains:
                found.setdefault(table.name, {"metric": metric, "gains": [], "study": []})[name] = [list(gain) for gain in gains]
    return found


def collect_costs() -> dict[str, Any]:
    """Return, for Tables IV and III, the time of each sampler and its AP: ours with its deviation, and the paper's."""
    found: dict[str, Any] = {}
    tables = {table.name: table for table in read_tables()}
    measured, _ = read_run("cpu", "samplers.csv", FOLDER / "measurements")
    for name, group, height, width in (("table4", "upsampler", 50, 84), ("table3", "downsampler", 56, 56)):
        there = [row for row in measured if (row["group"], row["shape"]) == (group, f"[1, 256, {height}, {width}]")]
        times, points = {row["sampler"]: round(float(row["step_ms"]), 2) for row in there}, {}
        for line in tables[name].lines:
            cell, row = line.cells["AP"], line.labels["row"]
            if cell.scores:
                scores = [round(cell.scores.mean, 2), round(cell.scores.deviation or 0, 2)]
                points[row] = [times[SAMPLERS.get(row, row)], *scores, cell.paper]
        found[name] = {"at": f"{group}s at C = 256, {height} x {width}", "points": points}
    return found


# name in the plot, providers
RIVALS = {
    "CARAFE++": ("triton",),
    "bilinear interpolation or 3 x 3 max pooling": ("bilinear", "max_pool"),
    "mmcv's operator, without softmax and pixel shuffle": ("mmcv",),
    "torch.compile of the definition": ("compiled_definition",),
}
LOOKS = dict(zip(RIVALS, ((METHOD, "o"), (OURS, "s"), ("#64748b", "D"), ("#64748b", "^")), strict=True))
# shape, type of the features
COMPARED = (
    ("[1, 256, 50, 76]", "float16", "contiguous"),
    ("[2, 256, 100, 168]", "float16", "channels_last"),
    ("[512, 256, 14, 14]", "float16", "channels_last"),
    ("[64, 64, 112, 112]", "float16", "channels_last"),
    ("[2, 256, 100, 168]", "float32", "channels_last"),
    ("[1, 128, 33, 47]", "float16", "channels_last"),
)
LIMIT = "a copy: the least time"


def collect_times() -> dict[str, Any]:
    """Return the times of forward and backward over that of a copy of the same bytes, by map and implementation."""
    rows, about = read_run("gpu", "times.csv", FOLDER / "measurements")
    found: dict[str, Any] = {}
    for shape, dtype, layout in COMPARED:
        there = [row for row in rows if (row["shape"], row["dtype"], row["layout"]) == (shape, dtype, layout)]
        first = there[0]
        scale = f"up {first['up']}" if first["up"] != "1" else f"down {first['down']}"
        window = "" if first["kernel_size"] == "5" else f", k {first['kernel_size']}, {first['groups']} groups"
        name = f"{' x '.join(re.findall('[0-9]+', shape))}, {scale}{window}\n{dtype}, {'NCHW' if layout == 'contiguous' else layout}"
        found[name] = {
            rival: {row["mode"]: float(row["copies"]) for row in there if row["provider"] in providers}
            for rival, providers in RIVALS.items()
            if any(row["provider"] in providers for row in there)
        }
    return {about["device"]: found}


def plot_times(data: dict[str, Any]) -> Figure:
    """Plot the times over that of a copy as points on a line for each map, a panel for each pass."""
    ((device, maps),) = data.items()
    figure = Figure(figsize=(11.5, 5.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axis, mode in zip(panels, ("forward", "backward"), strict=True):
        for position, times in enumerate(maps.values()):
            ratios = {name: found[mode] for name, found in times.items()}
            axis.plot([1, max(ratios.values())], [position, position], color="#cbd5e1", linewidth=1, zorder=1)
            for name, ratio in ratios.items():
                color, marker = LOOKS[name]
                axis.scatter(ratio, position, color=color, marker=marker, s=70 if name == "CARAFE++" else 40, zorder=2)
            ours = ratios["CARAFE++"]
            axis.annotate(f"{ours:.2g}", (ours, position), (0, 7), textcoords="offset points", ha="center", color=METHOD, fontweight="bold")
        axis.axvline(1, color=PAPER, linewidth=1.5)
        axis.set_xscale("log")
        axis.set_xlim(0.8, 400)
        axis.set_xticks(ticks := [1, 3, 10, 30, 100, 300], [f"{tick} x" for tick in ticks])
        axis.minorticks_off()
        axis.set_title(f"{mode}, {device}", loc="left", fontsize="medium", fontweight="bold")
        axis.set_xlabel("time over that of a copy of the same bytes")
        axis.grid(axis="x", color="#e2e8f0")
        axis.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
        axis.tick_params(axis="y", length=0)
    panels[0].set_yticks(range(len(maps)), list(maps))
    panels[0].set_ylim(len(maps) - 0.5, -0.7)
    panels[0].text(1.04, len(maps) - 0.55, LIMIT, fontsize="small", color=PAPER, va="bottom")
    marks = [Line2D([], [], color=LOOKS[name][0], marker=LOOKS[name][1], linestyle="none", label=name) for name in RIVALS]
    figure.legend(handles=marks, loc="outside lower center", ncols=2, frameon=False)
    return figure


def plot_gains(data: dict[str, Any]) -> Figure:
    """Plot the gains of every table in a panel of its own."""
    figure = Figure(figsize=(11.5, 15.5))
    columns: tuple[list[str], list[str]] = ([], [])
    for name in sorted(data, key=find_number):
        # the shorter column takes the next table; a title is as high as three rows
        min(columns, key=lambda names: sum(len(list_labels(data[n])) + 3 for n in names)).append(name)
    for names, left in zip(columns, (0.2, 0.735), strict=True):
        heights = [len(list_labels(data[name])) + 1.2 for name in names]
        grid = figure.add_gridspec(len(names), 1, left=left, right=left + 0.255, top=0.9, bottom=0.02, hspace=0.42, height_ratios=heights)
        for cell, name in zip(grid, names, strict=True):
            plot_table_gains(figure.add_subplot(cell), name, data[name])
    looks = [
        Line2D([], [], color=METHOD, marker="o", linewidth=1.8, label="earlier small runs: CARAFE++"),
        Line2D([], [], color=OURS, marker="o", linewidth=1.8, label="earlier small runs: others"),
        Line2D([], [], color="#64748b", marker="s", linewidth=1.8, label="study, from pretrained backbones: the same colours"),
        Line2D([], [], color=PAPER, marker="D", linestyle="none", label="the paper, full scale"),
        Line2D([], [], color="#64748b", marker="o", linewidth=1.8, label="95 % interval without zero: a difference is shown"),
        Line2D([], [], color="#64748b", marker="o", linewidth=1.8, markerfacecolor="white", label="95 % interval with zero: not shown"),
    ]
    figure.legend(handles=looks, loc="upper center", ncols=2, frameon=False, bbox_to_anchor=(0.5, 0.998))
    figure.text(0.5, 0.925, "Each row against the baseline of its table: right of the line is better.", ha="center", fontweight="bold")
    return figure


def find_number(table: str) -> int:
    """Return the number of a table, such as 4 for table4."""
    return int(table.removeprefix("table"))


def list_labels(table: dict[str, Any]) -> list[str]:
    """List the rows of a table that have a gain in either kind of runs."""
    return list(dict.fromkeys(gain[0] for gain in [*table["gains"], *table["study"]]))


def plot_table_gains(axis: Axes, name: str, table: dict[str, Any]) -> None:
    """Plot the gains of one table: ours with their intervals, filled if these exclude zero, and those of the paper as diamonds."""
    axis.axvline(0, color="#94a3b8", linewidth=1)
    sign, labels = -1 if table["metric"] in ERRORS else 1, list_labels(table)
    for kind, marker, shift in (("study", "s", -0.25), ("gains", "o", 0.02)):
        for gain in (Gain(*values) for values in table[kind]):
            position = labels.index(gain.row)
            is_ours = "carafe" in gain.row or (name not in ("table3", "table4") and gain.row not in CONTROLS)
            look: dict[str, Any] = {"color": METHOD if is_ours else OURS, "capsize": 3, "markersize": 5, "linewidth": 1.8}
            shown = gain.half is not None and abs(gain.mean) > gain.half
            place = (sign * gain.mean, position + shift)
            axis.errorbar(*place, xerr=gain.half, fmt=marker, markerfacecolor=None if shown else "white", **look)
            if gain.paper is not None:
                axis.plot(sign * gain.paper, position + 0.3, marker="D", color=PAPER, markersize=5, linestyle="none")
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.4, -0.7)
    axis.set_title(f"Table {NUMERALS[find_number(name)]}: {SUBJECTS[name]}", loc="left", fontweight="bold", fontsize="medium", x=-0.7)
    axis.grid(axis="x", color="#e2e8f0")
    axis.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.tick_params(axis="y", length=0)


def plot_costs(data: dict[str, Any]) -> Figure:
    """Plot AP against time: our small runs on the left, the paper on the right, upsamplers above downsamplers."""
    figure = Figure(figsize=(12, 10), layout="constrained")
    for (name, table), axes in zip(data.items(), figure.subplots(2, 2), strict=True):
        kind, shape = table["at"].split(" at ")
        for ours, axis in zip((True, False), axes, strict=True):
            points = {row: (p[0], p[1], p[2]) if ours else (p[0], p[3], None) for row, p in table["points"].items()}
            for row, (time, y, deviation) in points.items():
                color = METHOD if row == "carafe" else OURS
                axis.errorbar(time, y, yerr=deviation, fmt="o", color=color, capsize=4, markersize=9, linewidth=1.5)
            axis.set_xscale("log")
            axis.set_xticks(ticks := [1, 2, 5, 10, 20, 50, 100, 200, 500], list(map(str, ticks)))
            axis.set_xlim(min(point[0] for point in points.values()) / 2, 6 * max(point[0] for point in points.values()))
            axis.minorticks_off()
            axis.margins(y=0.1)
            where = "our small runs" if ours else "the paper"
            axis.set_title(f"{kind.capitalize()}, AP of {where} (Table {NUMERALS[find_number(name)]})", loc="left", fontsize="medium")
            axis.set(xlabel=f"ms, forward and backward, {shape}, CPU", ylabel="AP")
            axis.grid(color="#e2e8f0")
            axis.set_axisbelow(True)
    FigureCanvasAgg(figure).draw()
    for table, axes in zip(data.values(), (figure.axes[:2], figure.axes[2:]), strict=True):
        for ours, axis in zip((True, False), axes, strict=True):
            label_points(axis, {row: (point[0], point[1] if ours else point[3]) for row, point in table["points"].items()})
    return figure


def label_points(axis: Axes, points: dict[str, tuple[float, float]]) -> None:
    """Write the name of each point beside it, where it covers neither a point nor another name."""
    taken = [Bbox.from_bounds(*(axis.transData.transform(point) - 7), 14, 14) for point in points.values()]
    for row, point in points.items():
        color, weight = (METHOD, "bold") if row == "carafe" else (OURS, "normal")
        for dx, dy, side in ((9, 5, "left"), (9, -14, "left"), (-9, 5, "right"), (-9, -14, "right"), (9, 20, "left"), (9, -29, "left")):
            text = axis.annotate(row, point, (dx, dy), textcoords="offset points", ha=side, color=color, fontweight=weight)
            box = text.get_window_extent()
            if axis.bbox.x0 < box.x0 < box.x1 < axis.bbox.x1 and not any(box.overlaps(other) for other in taken):
                break
            text.remove()
        else:
            text = axis.annotate(row, point, (9, 5), textcoords="offset points", color=color, fontweight=weight)
        taken.append(text.get_window_extent())


def write(figure: Figure, path: Path, data: dict[str, Any]) -> None:
    """Write a plot with its data."""
    figure.savefig(path, facecolor="white", metadata={"Date": None, "Description": json.dumps(data)})
    # matplotlib ends lines with spaces
    path.write_text("".join(f"{line.rstrip()}\n" for line in path.read_text().splitlines()))


PLOTS = {
    "results_gains.svg": (collect_gains, plot_gains),
    "samplers_costs.svg": (collect_costs, plot_costs),
    "performance_times.svg": (collect_times, plot_times),
}

if __name__ == "__main__":
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": "carafepp", "font.size": 12}):
        for file, (collect, plot) in PLOTS.items():
            data = collect()
            write(plot(data), FOLDER / file, data)
