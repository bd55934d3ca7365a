"""The comparisons of the documentation: pairs of rows, and their scores in docs/results.

The runs in docs/results/study are those of the small protocol (`setting=TASK_study`, from pretrained backbones). The others are earlier. No
difference is between the two, and no mean is over both.
"""

import functools
from pathlib import Path
from typing import NamedTuple

from carafepp.scripts.common.paper import read_paper, read_pretraining, unit_factor
from carafepp.scripts.common.plan import read_task
from carafepp.scripts.reporting import Setting, group_runs, read_runs
from carafepp.scripts.reporting.statistics import Difference, compare_paired
from carafepp.scripts.reporting.tables import SettingFinder

RESULTS = Path(__file__).parent / "results"


class Comparison(NamedTuple):
    """Two rows that a table compares by one score; a row with "/" is one of no table, such as "control/no_finest_level"."""

    words: str
    table: str
    row: str
    baseline: str
    task: str
    column: str

    @property
    def rows(self) -> str:
        """The two rows and the score, in Markdown."""
        return f"{self.table}: `{self.row}` - `{self.baseline}`, {self.column.replace('psnr_db', 'dB')}"

    def pair(self, study: bool) -> tuple[dict[int, float], dict[int, float]]:
        """Return the scores of both rows by seed."""
        row, baseline = (find_values(self.table, row, self.task, self.column, study) for row in (self.row, self.baseline))
        return row, baseline

    def difference(self, study: bool) -> Difference | None:
        """Return the paired difference over the common seeds, or None if there are none."""
        return compare_paired(*self.pair(study))


@functools.cache
def read_settings() -> list[Setting]:
    """Read the runs in docs/results, grouped by configuration."""
    return group_runs(read_runs([RESULTS])[0], read_paper()[0])[0]


def is_study(setting: Setting) -> bool:
    """Whether runs are those of the study."""
    return setting.protocol.get("setting", "").endswith("_study")


def find_setting(table: str, row: str, study: bool = False) -> Setting | None:
    """Find the runs of a row (see `Comparison`): the earlier ones, or those of the study."""
    protocol = {"scale": "small"}
    if study:
        protocol["setting"] = f"{read_task(table)}_study"
        if read_pretraining(table, row, "small"):
            protocol["backbone.weights"] = "FILE"
    if row.startswith("successors/"):
        # of an experiment without a table of the paper, whose overrides are all options
        found = [setting for setting in read_settings() if setting.options.get("row") == row]
        return next((setting for setting in found if setting.options.get("setting", "").endswith("_study") == study), None)
    name, options = ("", {"row": row}) if "/" in row else (row, {})
    return SettingFinder(read_settings()).find(table, name, protocol, options)


def find_values(table: str, row: str, task: str, column: str, study: bool = False) -> dict[int, float]:
    """Return a score by seed, in the unit of the paper; a row without runs has none."""
    setting, metric = find_setting(table, row, study), read_paper()[1][task][column]
    return {seed: unit_factor(column) * value for seed, value in setting.values(metric).items()} if setting else {}


def judge(difference: Difference | None) -> str:
    """Say whether a difference, of which more is better, shows a claim: its interval lies above zero, contains it, or lies below."""
    if difference is None or difference.half is None:
        return "no runs"
    if abs(difference.mean) <= difference.half:
        return "not shown"
    return "**shown**" if difference.mean > 0 else "**contradicted**"
