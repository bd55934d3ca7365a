"""carafepp-report paper: every row of the paper's tables with its command, the paper's figures, and our scores at each scale."""

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from ..common.paper import find_baseline, list_rows, read_paper, read_pretraining, unit_factor
from .cells import Rows, count_decimals, format_difference, format_scores
from .renderers import render_rows
from .runs import Setting, group_runs, read_runs
from .statistics import compare_paired, summarize
from .tables import SettingFinder


def tabulate_overview(settings: Sequence[Setting], digits: int) -> list[tuple[str, Rows]]:
    """Format the title and the rows of each table of the paper.

    `gain` is the first figure of a row minus that of the baseline, `ours` our score with the settings of the paper, `difference` our score
    minus the figure of the paper, `small` our score at `scale=small`, and `small gain` its paired difference from the baseline at this
    scale. `starts from` is the classifier that the backbone of the row starts from, and the command finds it in CLASSIFIERS.
    """
    tables, metrics = read_paper()
    finder = SettingFinder(settings)
    result = []
    for name, table in tables.items():
        given = list_rows(tables, name)
        places = {column: count_decimals(f.get(column) for f in given) for column in table["columns"] if column not in ("row", "task")}
        rows = []
        for figures in given:
            row, task = figures["row"], figures["task"]
            column, metric = next(iter(metrics[task].items()))
            against = find_baseline(table, row)
            base = next((f for f in given if f["row"] == against != row and f["task"] == task), None)
            ours = find_values(finder, name, row, "paper", metric, column)
            small = find_values(finder, name, row, "small", metric, column)
            others = find_values(finder, name, against, "small", metric, column) if base else {}
            text = {"row": row, "task": task if "task" in table["columns"] else ""}
            text |= {c: "" if figures.get(c) is None else f"{figures[c]:.{n}f}" for c, n in places.items()}
            text[f"{column} gain"] = f"{figures[column] - base[column]:+.{places[column]}f}" if base else ""
            text[f"{column} ours"] = format_scores(summarize(ours), digits)
            text["difference"] = format_difference(compare_paired(ours, {seed: figures[column] for seed in ours}), digits, len(ours))
            text[f"{column} small"] = format_scores(summarize(small), digits)
            text["small gain"] = format_difference(compare_paired(small, others), digits, len(small))
            text["starts from"] = read_pretraining(name, row)
            weights = " weights_root=CLASSIFIERS" if text["starts from"] else ""
            text["command"] = f"carafepp-train experiment={name} row={name}/{row}{weights}"
            rows.append(text)
        empty = {heading for heading in rows[0] if not any(row[heading] for row in rows)}
        rows = [{heading: text for heading, text in row.items() if heading not in empty} for row in rows]
        result.append((f"{name}: {table['caption']}", rows))
    return result


def find_values(finder: SettingFinder, table: str, row: str | None, scale: str, metric: str, column: str) -> dict[int, float]:
    """Return the metric by seed of the runs with no overrides except the row, the scale and the initial weights."""
    for more in ({"backbone.weights": "FILE"}, {}):
        if row and (setting := finder.find(table, row, {"scale": scale} | more, {})):
            return {seed: unit_factor(column) * value for seed, value in setting.values(metric).items()}
    return {}


def report_paper(cfg: DictConfig) -> None:
    """Print every table of the paper."""
    runs = cfg.runs if cfg.runs is not None else "runs" if Path("runs").is_dir() else []
    found, _ = read_runs([Path(folder) for folder in ([runs] if isinstance(runs, str) else runs)])
    settings, _ = group_runs(found, read_paper()[0])
    print(render_rows(tabulate_overview(settings, max(cfg.digits - 2, 0)), cfg.format))
