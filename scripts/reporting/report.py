"""The tables, plots and pictures of a report, printed and written."""

import importlib.util
import sys
from pathlib import Path

from omegaconf import DictConfig
from torchvision.utils import save_image

from ..common.paper import read_paper
from .pictures import compare_pictures
from .plots import plot_table
from .renderers import render_tables
from .runs import group_runs, read_runs
from .tables import Table, tabulate_kinds, tabulate_paper

FILES = {"report.md": "markdown", "report.tex": "latex", "report.csv": "csv"}


def check_options(cfg: DictConfig, tables: list[Table]) -> None:
    """Check that the chosen metrics and baseline exist.

    Raises:
        ValueError: the paper has no such metric, or the tables no such row.
    """
    columns = {column: None for task in read_paper()[1].values() for column in task}
    if unknown := [column for column in cfg.metrics if column not in columns]:
        raise ValueError(f"metrics must be among {', '.join(columns)}, got {', '.join(unknown)}")
    lines = [line for table in tables for line in table.lines]
    rows = {line.name: None for line in lines}
    if cfg.baseline and cfg.baseline not in rows:
        raise ValueError(f"baseline must be a row, one of {'; '.join(rows)}, got {cfg.baseline}")


def report(cfg: DictConfig) -> None:
    """Print the tables of finished runs, and write tables, plots and pictures to the first folder of `runs`."""
    folders = [Path(folder) for folder in ([cfg.runs] if isinstance(cfg.runs, str) else cfg.runs)]
    runs, problems = read_runs(folders)
    settings, repeated = group_runs(runs, read_paper()[0])
    # output in other formats than terminal is meant for a file, without messages
    notes = sys.stdout if cfg.format == "terminal" else sys.stderr
    print(*problems, *repeated, sep="\n", end="\n" if problems or repeated else "", file=notes)
    if not settings:
        sys.exit(f"no finished run below {', '.join(map(str, folders))}")
    tables = tabulate_paper(settings, cfg.metrics, cfg.digits, cfg.baseline)
    if others := [setting for setting in settings if not setting.table]:
        tables += tabulate_kinds(others, cfg.digits, cfg.baseline)
    check_options(cfg, tables)
    print(render_tables(tables, cfg.format))
    used = [(table.name, line.name, line.setting) for table in tables for line in table.lines if line.setting]
    borrowed = ((name, setting) for table, name, setting in used if setting.table not in ("", table))
    if rows := dict.fromkeys(f"{name}: runs of {setting.table}/{setting.row}" for name, setting in borrowed):
        print("one configuration in two tables:", *rows, sep="\n  ", file=notes)
    for file, name in FILES.items():
        (folders[0] / file).write_text(render_tables(tables, name))
    print(f"tables: {folders[0] / 'report.md'}, report.tex, report.csv", file=notes)
    names: list[str] = []
    for table in tables:
        # a table may occur with several protocols
        names.append(table.name)
        stem = table.name if names.count(table.name) == 1 else f"{table.name}_{names.count(table.name)}"
        if importlib.util.find_spec("matplotlib"):
            for path in plot_table(table, folders[0], stem):
                print(f"plot: {path}", file=notes)
        if (pictures := compare_pictures(table)) is not None:
            path = folders[0] / f"{stem.replace('others', 'compare')}.png"
            save_image(pictures, path)
            print(f"pictures (image, truth, then a run of each line of {table.name}): {path}", file=notes)
