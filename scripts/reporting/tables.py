"""Tables of settings: the tables of the paper, with its figures and ours, and a table of all other runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..common.paper import find_baseline, list_equal_rows, list_rows, read_paper, unit_factor
from .runs import Setting
from .statistics import Difference, Scores, compare_paired, summarize


@dataclass
class Cell:
    """One metric of one line: the figure of the paper, our scores, and our difference from the baseline."""

    # name of the metric in result.json, and the factor to the unit of the table
    metric: str = ""
    scale: float = 1
    paper: float | None = None
    scores: Scores | None = None
    difference: Difference | None = None


@dataclass
class Line:
    """One row of a table; `setting` is None if the row has no run."""

    labels: dict[str, str]
    setting: Setting | None
    baseline: Setting | None
    cells: dict[str, Cell] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of the row, or the label of the setting."""
        return self.labels.get("row") or (self.setting.label if self.setting else "")

    @property
    def title(self) -> str:
        """What distinguishes the line in its table: the row, or the overrides that differ."""
        return self.labels.get("row") or ", ".join(f"{key}={value}" for key, value in self.labels.items() if value) or "default"


@dataclass
class Table:
    """A table before it is formatted."""

    # name of the experiment, or "others"
    name: str
    caption: str
    # overrides that its runs share
    protocol: str
    # decimal places of the metrics
    digits: int
    # name of the baseline in the heading of the differences
    baseline: str
    # printed metrics; None for all
    shown: Sequence[str] | None
    # in an ablation, the options whose values are the numbers in the names of the rows
    axes: list[str]
    lines: list[Line]

    @property
    def title(self) -> str:
        """Name, caption and protocol."""
        return f"{self.name}: {self.caption}" + (f" ({self.protocol})" if self.protocol else "")


class SettingFinder:
    """Index of settings by table, row, protocol and options.

    The runs of a row also serve the rows of other tables with the same configuration.
    """

    def __init__(self, settings: Sequence[Setting]) -> None:
        self.settings = {self._key(s.table, s.row, s.protocol, s.options): s for s in settings}

    @staticmethod
    def _key(table: str, row: str, protocol: Mapping[str, str], options: Mapping[str, str]) -> tuple:
        return table, row, frozenset(protocol.items()), frozenset(options.items())

    def find(self, table: str, row: str, protocol: Mapping[str, str], options: Mapping[str, str]) -> Setting | None:
        """Return the setting of a row, or of an equal row in another table, if there is one."""
        keys = (self._key(*place, protocol, options) for place in list_equal_rows(table, row, protocol.get("scale")))
        return next((self.settings[key] for key in keys if key in self.settings), None)

    def find_reference(self, setting: Setting, table: str, row: str) -> Setting | None:
        """Return the setting of the given row to compare a setting with: with the same options, or else without options."""
        found = (self.find(table, row, setting.protocol, options) for options in (setting.options, {}))
        return next((other for other in found if other and other is not setting), None)


def tabulate_paper(settings: Sequence[Setting], columns: Sequence[str], digits: int, baseline: str | None) -> list[Table]:
    """Build one table for each experiment of the paper and each protocol of its runs, with the rows in the order of the paper.

    Args:
        settings: runs grouped by `group_runs`; those outside the experiments of the paper are ignored.
        columns: names of the figures of the paper to print.
        digits: decimal places of fractions; per cent and dB have two fewer.
        baseline: the row to compare with instead of the baseline of the table.
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
                to = baseline or find_baseline(tables[name], row)
                labels = {"row": label} | ({"task": task} if len(tasks) > 1 else {})
                line = Line(labels, setting, finder.find_reference(setting, name, to) if setting and to else None)
                for column, metric in metrics[task].items():
                    line.cells[column] = make_cell(line, metric, unit_factor(column), figures.get(column))
                table.lines.append(line)
            result.append(table)
    return result


def tabulate_kinds(settings: Sequence[Setting], digits: int, baseline: str | None) -> list[Table]:
    """Build one table (see `tabulate_others`) of the settings of each kind that are outside the experiments of the paper.

    Runs of another task, scale or data set are not compared, and have no metrics in common.
    """
    kinds: dict[tuple, list[Setting]] = {}
    for setting in settings:
        kinds.setdefault(tuple(setting.kind.items()), []).append(setting)
    tables = [tabulate_others(alike, digits, baseline) for alike in kinds.values()]
    if len(tables) > 1:
        for table, alike in zip(tables, kinds.values(), strict=True):
            table.protocol = " ".join(f"{key}={value}" for key, value in alike[0].kind.items() if key != "metrics")
    return tables


def tabulate_others(settings: Sequence[Setting], digits: int, baseline: str | None) -> Table:
    """Build one table of settings outside the experiments of the paper, with the overrides that distinguish them and all metrics.

    Args:
        settings: the rows.
        digits: decimal places of the metrics.
        baseline: label of the setting to compare with; if no setting has this label, the first one.
    """
    keys = dict.fromkeys(key for setting in settings for key in setting.options)
    varying = [key for key in keys if len({setting.options.get(key, "") for setting in settings}) > 1]
    against = next((setting for setting in settings if setting.label == baseline), settings[0])
    table = Table("others", "runs outside the paper's tables", "", digits, "baseline" if baseline else "first", None, varying, [])
    for setting in settings:
        line = Line({key: setting.options.get(key, "") for key in varying}, setting, against if setting is not against else None)
        for metric in dict.fromkeys(name for run in setting.runs.values() for name in run.metrics):
            line.cells[metric.removeprefix("val/")] = make_cell(line, metric, 1, None)
        table.lines.append(line)
    return table


def make_cell(line: Line, metric: str, scale: float, figure: float | None) -> Cell:
    """Build the cell of a metric, whose values in result.json are multiplied by `scale`."""
    values = {seed: scale * value for seed, value in line.setting.values(metric).items()} if line.setting else {}
    others = {seed: scale * value for seed, value in line.baseline.values(metric).items()} if line.baseline else {}
    return Cell(metric, scale, figure, summarize(values), compare_paired(values, others))
