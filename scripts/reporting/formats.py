"""Tables as text: for the terminal, Markdown, LaTeX, and CSV with every number at full precision."""

import csv
import io
import math
from collections.abc import Iterable

from .statistics import Difference, Scores
from .tables import Cell, Table

Rows = list[dict[str, str]]

COLUMNS = ["table", "protocol", "row", "task", "metric", "paper", "runs", "mean", "deviation", "baseline", "difference", "low", "high"]
COLUMNS += ["common_seeds", "parameters", "flops", "seconds", "cpu_seconds"]


def format_table(table: Table) -> Rows:
    """The lines of a table as text, by heading."""
    names = [
        name for name in dict.fromkeys(name for line in table.lines for name in line.cells) if table.shown is None or name in table.shown
    ]
    published = {name: [line.cells[name].paper for line in table.lines if name in line.cells] for name in names}
    places = {name: count_decimals(figures) for name, figures in published.items() if any(figure is not None for figure in figures)}
    # where nothing of the paper stands beside them, a difference of single runs says no more than the two figures
    cells = [(name, cell) for line in table.lines for name, cell in line.cells.items()]
    differing = {name for name, cell in cells if cell.difference and (name in places or cell.difference.half is not None)}
    # a busy machine changes the time by the clock, so that of the processor is shown if every line has it
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


def format_time_taken(tables: list[Table]) -> str:
    """How many runs the tables have, and how long they took in all."""
    # one that is its table's row and another's baseline counts once
    runs = {run.folder: run for table in tables for line in table.lines if line.setting for run in line.setting.runs.values()}.values()
    processor = [run.cpu_seconds for run in runs if run.cpu_seconds is not None]
    clock = [run.seconds for run in runs if run.cpu_seconds is None]
    parts = [f"{math.fsum(processor) / 3600:.2f} hours of processor time"] if processor else []
    if clock:
        parts.append(f"{math.fsum(clock) / 3600:.2f} hours by the clock" + (f" of the {len(clock)} that lack it" if processor else ""))
    return f"{len(runs)} run{'s' * (len(runs) > 1)}: {' and '.join(parts)}"


def count_decimals(figures: Iterable[float | None]) -> int:
    """Decimal places that the paper gives a column's figures with."""
    return max((len(str(figure).partition(".")[2]) for figure in figures if figure is not None), default=0)


def format_scores(scores: Scores | None, digits: int) -> str:
    """Mean ± standard deviation."""
    if scores is None:
        return ""
    return f"{scores.mean:.{digits}f}" + ("" if scores.deviation is None else f" ± {scores.deviation:.{digits}f}")


def format_difference(difference: Difference | None, digits: int, runs: int) -> str:
    """Mean [interval], and the number of seeds where it is less than that of the runs."""
    if difference is None:
        return ""
    mean, half, seeds = difference
    interval = "" if half is None else f" [{mean - half:+.{digits}f}, {mean + half:+.{digits}f}]"
    return f"{mean:+.{digits}f}{interval}" + (f" ({seeds} seed{'s' * (seeds > 1)})" if seeds < runs else "")


def _aligned(rows: Rows) -> tuple[list[str], list[list[str]]]:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    widths = [max(len(name), *(len(row.get(name, "")) for row in rows)) for name in columns]
    cells = [columns, *([row.get(name, "") for name in columns] for row in rows)]
    lines = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in cells]
    return ["-" * width for width in widths], lines


def format_terminal(title: str, rows: Rows) -> str:
    """Columns under their headings."""
    rule, (head, *lines) = _aligned(rows)
    return "\n".join([*([title, ""] if title else []), *("  ".join(cells).rstrip() for cells in (head, rule, *lines)), ""])


def format_markdown(title: str, rows: Rows) -> str:
    """A heading and a pipe table."""
    escaped = [{key.replace("|", "\\|"): value.replace("|", "\\|") for key, value in row.items()} for row in rows]
    rule, (head, *lines) = _aligned(escaped)
    return "\n".join([*([f"## {title}", ""] if title else []), *(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines)), ""])


def format_latex(title: str, rows: Rows) -> str:
    """A table environment in the style of the booktabs package."""
    _, lines = _aligned([{_tex(key): _tex(value) for key, value in row.items()} for row in rows])
    head, *body = (f"{' & '.join(cells)} \\\\" for cells in lines)
    columns = "l" * len(lines[0])
    begin = ["\\begin{table}", *([f"\\caption{{{_tex(title)}}}"] if title else [])]
    begin += [f"\\begin{{tabular}}{{{columns}}}", "\\toprule", head, "\\midrule"]
    return "\n".join([*begin, *body, "\\bottomrule", "\\end{tabular}", "\\end{table}", ""])


FORMATS = {"terminal": format_terminal, "markdown": format_markdown, "latex": format_latex}


def format_titled(tables: list[tuple[str, Rows]], name: str) -> str:
    """Titles and rows, one below the other, in one of FORMATS."""
    if name not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, or csv for runs, got {name!r}")
    return "\n".join(FORMATS[name](title, rows) for title, rows in tables)


def _tex(text: str) -> str:
    marks = {c: f"\\{c}" for c in "&%$#_{}"} | {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}
    # a bracket that begins a line would be an option of the line break before it
    marks |= {"±": "$\\pm$", "<": "\\textless{}", ">": "\\textgreater{}", "|": "\\textbar{}", "[": "{[}"}
    return "".join(marks.get(character, character) for character in text)


def format_csv(tables: list[Table]) -> str:
    """One line a metric of a table's row, for other programs."""
    lines = []
    for table in tables:
        for line in table.lines:
            for name, cell in line.cells.items():
                setting, difference = line.setting, cell.difference
                record = {"table": table.name, "protocol": table.protocol}
                record |= {"row": line.labels.get("row") or setting.label, "task": line.labels.get("task"), "metric": name}
                record |= {"paper": cell.paper, "runs": len(setting.runs) if setting else 0}
                record |= dict(zip(("mean", "deviation"), cell.scores or (None, None), strict=True))
                record |= {"baseline": line.baseline and line.baseline.label, "difference": difference and difference.mean}
                if difference and difference.half is not None:
                    record |= {"low": difference.mean - difference.half, "high": difference.mean + difference.half}
                record["common_seeds"] = difference and difference.seeds
                if setting:
                    run = next(iter(setting.runs.values()))
                    record |= {"parameters": run.parameters, "flops": run.flops}
                    record |= {"seconds": setting.seconds, "cpu_seconds": setting.cpu_seconds}
                lines.append(record)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
