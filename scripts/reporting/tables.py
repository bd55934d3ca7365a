"""Tables of settings: the paper's, with ours beside its figures, and one of all other runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..common.paper import baseline_of, list_rows, read_paper, unit_factor
from .runs import Setting
from .statistics import Difference, Scores, compare_paired, scores


@dataclass
class Cell:
    """One metric of one line: the paper's figure, ours, and the difference to the baseline."""

    # its name in result.json, and what makes the unit of the table of it
    metric: str = ""
    scale: float = 1
    paper: float | None = None
    scores: Scores | None = None
    difference: Difference | None = None


@dataclass
class Line:
    """One row of a table; without a setting there is no run of it."""

    labels: dict[str, str]
    setting: Setting | None
    baseline: Setting | None
    cells: dict[str, Cell] = field(default_factory=dict)


@dataclass
class Table:
    """What is printed, before it is formatted."""

    # the experiment, or "others"
    name: str
    caption: str
    # what its runs share
    protocol: str
    # of metrics
    digits: int
    # heading of the differences
    baseline: str
    # metrics that are printed; None for all
    shown: Sequence[str] | None
    # what the numbers in its rows' names are, if they are an ablation's
    axes: list[str]
    lines: list[Line]

    @property
    def title(self) -> str:
        return f"{self.name}: {self.caption}" + (f" ({self.protocol})" if self.protocol else "")


class SettingFinder:
    """Settings by table, row, protocol and options.

    Rows for which the paper gives the same figures in two tables are the same configuration, and runs of one are those of the other.
    """

    def __init__(self, settings: Sequence[Setting]) -> None:
        tables, metrics = read_paper()
        self.settings = {self._key(s.table, s.row, s.protocol, s.options): s for s in settings}
        self.figures: dict[tuple[str, str], dict[tuple[str, str], float]] = {}
        for name in tables:
            for row in list_rows(tables, name):
                scores = {(row["task"], column): row[column] for column in metrics[row["task"]] if column in row}
                self.figures.setdefault((name, row["row"]), {}).update(scores)

    @staticmethod
    def _key(table: str, row: str, protocol: Mapping[str, str], options: Mapping[str, str]) -> tuple:
        return table, row, frozenset(protocol.items()), frozenset(options.items())

    def same(self, table: str, row: str) -> list[tuple[str, str]]:
        """The row and those of other tables that are the same configuration, as (table, row)."""
        own = self.figures.get((table, row), {})
        others = [
            place
            for place, figures in self.figures.items()
            if (common := own.keys() & figures.keys()) and all(own[key] == figures[key] for key in common)
        ]
        return [(table, row), *(place for place in others if place != (table, row))]

    def find(self, table: str, row: str, protocol: Mapping[str, str], options: Mapping[str, str]) -> Setting | None:
        """The setting, or that of the same row in another table."""
        keys = (self._key(*place, protocol, options) for place in self.same(table, row))
        return next((self.settings[key] for key in keys if key in self.settings), None)

    def against(self, setting: Setting, table: str, row: str) -> Setting | None:
        """What a setting is compared with: the table's row told the same otherwise, or else the row itself."""
        found = (self.find(table, row, setting.protocol, options) for options in (setting.options, {}))
        return next((other for other in found if other and other is not setting), None)


def tabulate_paper(settings: Sequence[Setting], columns: Sequence[str], digits: int, baseline: str | None) -> list[Table]:
    """One table for each experiment of the paper and each protocol that its runs have, rows in the paper's order.

    Args:
        columns: of the paper's figures, those that are printed.
        digits: decimal places of fractions; per cent and dB have two less.
        baseline: the row that differences are taken to, instead of the table's own.
    """
    tables, metrics = read_paper()
    finder = SettingFinder(settings)
    found = {(s.table, tuple(s.protocol.items())): s.protocol for s in settings if s.table}
    result = []
    for name in tables:
        for protocol in (protocol for (table, _), protocol in found.items() if table == name):
            rows = list_rows(tables, name)
            lines = [(row["row"], row["row"], row["task"], finder.find(name, row["row"], protocol, {}), row) for row in rows]
            taken = [setting for *_, setting, _ in lines]
            more = [s for s in settings if s.table == name and s.protocol == protocol and s not in taken]
            tasks = dict.fromkeys(row["task"] for row in rows)
            lines += [(s.row, s.label, task, s, {}) for s in more for task in tasks]
            own = tables[name]["baseline"]
            table = Table(
                name,
                tables[name]["caption"],
                " ".join(f"{key}={value}" for key, value in protocol.items()),
                max(digits - 2, 0),
                baseline or (own if isinstance(own, str) else "baseline"),
                columns,
                tables[name].get("axes", []),
                [],
            )
            for row, label, task, setting, figures in lines:
                to = baseline or baseline_of(tables[name], row)
                labels = {"row": label} | ({"task": task} if len(tasks) > 1 else {})
                line = Line(labels, setting, finder.against(setting, name, to) if setting and to else None)
                for column, metric in metrics[task].items():
                    line.cells[column] = fill_cell(line, metric, unit_factor(column), figures.get(column))
                table.lines.append(line)
            result.append(table)
    return result


def tabulate_others(settings: Sequence[Setting], digits: int, baseline: str | None) -> Table:
    """One table of settings that are of no experiment of the paper: what distinguishes them, and all their metrics.

    The baseline is the one labelled so, or the first.
    """
    told = dict.fromkeys(key for setting in settings for key in setting.options)
    varying = [key for key in told if len({setting.options.get(key, "") for setting in settings}) > 1]
    against = next((setting for setting in settings if setting.label == baseline), settings[0])
    table = Table("others", "runs outside the paper's tables", "", digits, "baseline" if baseline else "first", None, varying, [])
    for setting in settings:
        line = Line({key: setting.options.get(key, "") for key in varying}, setting, against if setting is not against else None)
        for metric in dict.fromkeys(name for run in setting.runs.values() for name in run.metrics):
            line.cells[metric.removeprefix("val/")] = fill_cell(line, metric, 1, None)
        table.lines.append(line)
    return table


def fill_cell(line: Line, metric: str, scale: float, figure: float | None) -> Cell:
    """Fill one cell, in the unit that `scale` makes."""
    values = {seed: scale * value for seed, value in line.setting.values(metric).items()} if line.setting else {}
    others = {seed: scale * value for seed, value in line.baseline.values(metric).items()} if line.baseline else {}
    return Cell(metric, scale, figure, scores(values), compare_paired(values, others))
