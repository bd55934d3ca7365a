"""The text of a table's cells, with the decimal places of the table and of the paper."""

import math
from collections.abc import Iterable, Sequence

from .statistics import Difference, Scores
from .tables import Cell, Table

# text by heading, a dictionary for each row
Rows = list[dict[str, str]]


def format_rows(table: Table) -> Rows:
    """Format the lines of a table as text by heading."""
    names = [
        name for name in dict.fromkeys(name for line in table.lines for name in line.cells) if table.shown is None or name in table.shown
    ]
    published = {name: [line.cells[name].paper for line in table.lines if name in line.cells] for name in names}
    places = {name: count_decimals(figures) for name, figures in published.items() if any(figure is not None for figure in figures)}
    # without a figure of the paper, the difference of single runs adds nothing to the two scores
    cells = [(name, cell) for line in table.lines for name, cell in line.cells.items()]
    differing = {name for name, cell in cells if cell.difference and (name in places or cell.difference.half is not None)}
    # other work on the machine affects wall-clock time, so that CPU time is shown if every line has it
    by_clock = any(line.setting.cpu_seconds is None for line in table.lines if line.setting)
    rows = []
    for line in table.lines:
        runs = len(line.setting.runs) if line.setting else 0
        row = dict(line.labels) | {"runs": str(runs or "")}
        for name in names:
            cell = line.cells.get(name, Cell())
            if name in places:
                row[f"{name} paper"] = "" if cell.paper is None else f"{cell.paper:.{places[name]}f}"
            row[name] = format_scores(cell.scores, table.digits)
            if name in differing:
                row[f"{name} vs {table.baseline}"] = format_difference(cell.difference, table.digits, runs)
        if line.setting:
            run = next(iter(line.setting.runs.values()))
            row |= {"parameters": f"{run.parameters:,}", "GFLOPs": f"{run.flops / 1e9:.3f}"}
            row |= {"clock seconds": f"{line.setting.seconds:.0f}"} if by_clock else {"CPU seconds": f"{line.setting.cpu_seconds:.0f}"}
        rows.append(row)
    return rows


def format_time_taken(tables: Sequence[Table]) -> str:
    """State the number of runs in the tables and the hours that they took together."""
    # a run that is a row of one table and the baseline of another counts once
    runs = {run.folder: run for table in tables for line in table.lines if line.setting for run in line.setting.runs.values()}.values()
    cpu = [run.cpu_seconds for run in runs if run.cpu_seconds is not None]
    clock = [run.seconds for run in runs if run.cpu_seconds is None]
    parts = [f"{format_duration(math.fsum(cpu))} of CPU time"] if cpu else []
    if clock:
        without = f" for the {len(clock)} without CPU time" if cpu else ""
        parts.append(f"{format_duration(math.fsum(clock))} of wall-clock time{without}")
    return f"{len(runs)} run{'s' * (len(runs) > 1)}: {' and '.join(parts)}"


def format_duration(seconds: float) -> str:
    """State a duration in hours, or in seconds if it is less than a hundredth of an hour."""
    return f"{seconds / 3600:.2f} hours" if seconds >= 36 else f"{seconds:.0f} seconds"


def count_decimals(figures: Iterable[float | None]) -> int:
    """Count the decimal places of a column of the paper's figures."""
    return max((len(str(figure).partition(".")[2]) for figure in figures if figure is not None), default=0)


def format_scores(scores: Scores | None, digits: int) -> str:
    """Format scores as mean ± standard deviation, or an empty text for None."""
    if scores is None:
        return ""
    return f"{scores.mean:.{digits}f}" + ("" if scores.deviation is None else f" ± {scores.deviation:.{digits}f}")


def format_difference(difference: Difference | None, digits: int, runs: int) -> str:
    """Format a difference as mean [interval], followed by the number of common seeds if it is less than the number of runs."""
    if difference is None:
        return ""
    mean, half, seeds = difference
    interval = "" if half is None else f" [{mean - half:+.{digits}f}, {mean + half:+.{digits}f}]"
    return f"{mean:+.{digits}f}{interval}" + (f" ({seeds} seed{'s' * (seeds > 1)})" if seeds < runs else "")
