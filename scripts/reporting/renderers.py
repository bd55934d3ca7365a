"""Tables as text for the terminal, as Markdown, LaTeX or CSV."""

import csv
import io
from collections.abc import Sequence

from ...tasks.writing import neutralize_formula
from .cells import Rows, format_rows, format_time_taken
from .tables import Table

# columns of the CSV file
COLUMNS = ["table", "protocol", "row", "task", "metric", "paper", "runs", "mean", "deviation", "baseline", "difference", "low", "high"]
COLUMNS += ["common_seeds", "parameters", "flops", "seconds", "cpu_seconds"]


def align(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """Pad all cells of a column to one width; return the rule below the headings, and the cells of headings and rows."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    widths = [max(len(name), *(len(row.get(name, "")) for row in rows)) for name in columns]
    cells = [columns, *([row.get(name, "") for name in columns] for row in rows)]
    lines = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in cells]
    return ["-" * width for width in widths], lines


def render_terminal(title: str, rows: Rows) -> str:
    """Render aligned columns with headings."""
    rule, (head, *lines) = align(rows)
    return "\n".join([*([title, ""] if title else []), *("  ".join(cells).rstrip() for cells in (head, rule, *lines)), ""])


def render_markdown(title: str, rows: Rows) -> str:
    """Render a heading and a pipe table."""
    escaped = [{escape_markdown(key): escape_markdown(value) for key, value in row.items()} for row in rows]
    rule, (head, *lines) = align(escaped)
    return "\n".join(
        [*([f"## {escape_markdown(title)}", ""] if title else []), *(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines)), ""]
    )


def render_latex(title: str, rows: Rows) -> str:
    """Render a table environment in the style of the booktabs package."""
    _, lines = align([{escape_latex(key): escape_latex(value) for key, value in row.items()} for row in rows])
    head, *body = (f"{' & '.join(cells)} \\\\" for cells in lines)
    columns = "l" * len(lines[0])
    begin = ["\\begin{table}", *([f"\\caption{{{escape_latex(title)}}}"] if title else [])]
    begin += [f"\\begin{{tabular}}{{{columns}}}", "\\toprule", head, "\\midrule"]
    return "\n".join([*begin, *body, "\\bottomrule", "\\end{tabular}", "\\end{table}", ""])


FORMATS = {"terminal": render_terminal, "markdown": render_markdown, "latex": render_latex}


def render_rows(tables: Sequence[tuple[str, Rows]], name: str) -> str:
    """Render tables, each given by its title and rows, one below the other in one of FORMATS.

    Raises:
        ValueError: there is no such format.
    """
    if name not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, or csv for runs, got {name!r}")
    return "\n".join(FORMATS[name](title, rows) for title, rows in tables)


def render_tables(tables: Sequence[Table], name: str) -> str:
    """Render tables in one of FORMATS, followed by the time that their runs took, or as CSV.

    Raises:
        ValueError: there is no such format.
    """
    if name == "csv":
        return render_csv(tables)
    # a table of runs outside the paper's experiments needs no title if it is the only one
    alone = len(tables) == 1 and tables[0].name == "others"
    text = render_rows([("" if alone else table.title, format_rows(table)) for table in tables], name)
    return f"{text}\n{'% ' * (name == 'latex')}{format_time_taken(tables)}\n"


def escape_markdown(text: str) -> str:
    """Escape what would end a cell, HTML, and links and images, which load from elsewhere."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("](", "]\\(")


def escape_latex(text: str) -> str:
    """Escape the characters that LaTeX would interpret."""
    marks = {c: f"\\{c}" for c in "&%$#_{}"} | {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}
    # LaTeX reads a bracket at the start of a line as an option of the preceding line break
    marks |= {"±": "$\\pm$", "<": "\\textless{}", ">": "\\textgreater{}", "|": "\\textbar{}", "[": "{[}"}
    return "".join(marks.get(character, character) for character in text)


def render_csv(tables: Sequence[Table]) -> str:
    """Render one CSV line for each metric of each row, with every number at full precision."""
    lines = []
    for table in tables:
        for line in table.lines:
            for name, cell in line.cells.items():
                setting, difference = line.setting, cell.difference
                record = {"table": table.name, "protocol": table.protocol}
                record |= {"row": line.name, "task": line.labels.get("task"), "metric": name}
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
    writer.writerows({name: neutralize_formula(value) for name, value in line.items()} for line in lines)
    return text.getvalue()
