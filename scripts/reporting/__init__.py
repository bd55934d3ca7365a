"""Reports: finished runs below folders, gathered into tables beside the paper's figures, as text, plots and pictures."""

from .formats import format_csv, format_table, format_time_taken, format_titled
from .overview import report_paper
from .pictures import compare_pictures
from .plots import plot_table
from .runs import FinishedRun, Setting, group_runs, read_runs
from .tables import Cell, Line, Table, tabulate_others, tabulate_paper

__all__ = [
    "Cell",
    "FinishedRun",
    "Line",
    "Setting",
    "Table",
    "compare_pictures",
    "format_csv",
    "format_table",
    "format_time_taken",
    "format_titled",
    "group_runs",
    "plot_table",
    "read_runs",
    "report_paper",
    "tabulate_others",
    "tabulate_paper",
]
