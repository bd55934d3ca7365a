"""Reports of finished runs: tables with the figures of the paper, as text, plots and pictures."""

from ..common.results import FinishedRun
from .cells import format_rows, format_time_taken
from .overview import report_paper
from .pictures import compare_pictures
from .plots import plot_table
from .renderers import render_csv, render_tables
from .runs import Setting, group_runs, read_runs
from .tables import Cell, Line, Table, tabulate_kinds, tabulate_others, tabulate_paper

__all__ = [
    "Cell",
    "FinishedRun",
    "Line",
    "Setting",
    "Table",
    "compare_pictures",
    "format_rows",
    "format_time_taken",
    "group_runs",
    "plot_table",
    "read_runs",
    "render_csv",
    "render_tables",
    "report_paper",
    "tabulate_kinds",
    "tabulate_others",
    "tabulate_paper",
]
