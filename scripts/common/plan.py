"""The plan of a whole comparison at the small scale: the sweeps over the rows of the paper's tables, in an order that gives every network
its classifier.
"""

from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from omegaconf import OmegaConf

from .options import look_up
from .paper import list_equal_rows, read_paper, read_pretraining
from .results import is_finished

SCALE = "small"
# rows that the paper does not have, by the table whose baseline they are compared with: positive controls, one of them also with CARAFE++,
# and wider networks of equal cost
ADDED = {
    "table4": ("control/no_finest_level", "control/no_finest_level_carafe", "control/shorter_training"),
    "table9": ("table9/same_flops", "table9/same_parameters"),
}


class Sweep(NamedTuple):
    """The rows of one table and the number of their seeds."""

    table: str
    rows: list[str]
    seeds: int

    def list_folders(self, out: Path) -> list[Path]:
        """List the folders of the runs."""
        return [out / f"{row}_{seed}" for row in self.rows for seed in range(self.seeds)]

    def count_left(self, out: Path) -> int:
        """Count the runs that are not finished."""
        return sum(not is_finished(folder) for folder in self.list_folders(out))

    def write_arguments(self, out: Path, jobs: int) -> list[str]:
        """Write the arguments of `carafepp-train` that run or finish the sweep."""
        return [
            "-m",
            f"experiment={self.table}",
            # the last varies fastest: all rows of a seed come before the next seed, so that an interrupted sweep has whole comparisons
            f"seed={','.join(map(str, range(self.seeds)))}",
            f"row={','.join(self.rows)}",
            f"scale={SCALE}",
            f"setting={read_task(self.table)}_study",
            *([f"weights_root={out}"] if find_start(self.rows[0]) else []),
            f"hydra.sweep.dir={out}",
            "hydra.sweep.subdir=${hydra:runtime.choices.row}_${seed}",
            *(["hydra/launcher=joblib", f"hydra.launcher.n_jobs={jobs}"] if jobs > 1 else []),
        ]


def read_task(experiment: str) -> str:
    """Return the task of an experiment."""
    defaults = OmegaConf.create(files("carafepp.conf").joinpath(f"experiment/{experiment}.yaml").read_text()).defaults
    return next(entry["override /task"] for entry in defaults if "override /task" in entry)


def read_rows(experiment: str) -> list[str]:
    """Return the rows of an experiment at the small scale, such as "table9/ppm", and those that are added to it."""
    conf = files("carafepp.conf")
    own = conf.joinpath(f"sweep/{experiment}_{SCALE}.yaml")
    if own.is_file():
        rows = OmegaConf.create(own.read_text()).row
    else:
        rows = OmegaConf.create(conf.joinpath(f"experiment/{experiment}.yaml").read_text()).hydra.sweeper.params.row
    return [*rows.split(","), *ADDED.get(experiment, ())]


def find_table(row: str) -> str:
    """Return the table that a row is compared in, such as "table9" of "table9/ppm" and "table4" of "control/no_finest_level"."""
    return next((table for table, rows in ADDED.items() if row in rows), row.partition("/")[0])


def find_start(row: str) -> str:
    """Return the classifier that a row such as "table9/ppm" starts from at the small scale, or "" if there is none."""
    return read_pretraining(find_table(row), row.partition("/")[2], SCALE)


def plan_sweeps(tables: Iterable[str], seeds: Mapping[str, int]) -> list[Sweep]:
    """Plan the sweeps over tables: those of the classifiers that their rows start from, then the others, in the order of the paper.

    A configuration that several tables share is planned once, in the table with the most seeds.

    Args:
        tables: names of tables.
        seeds: number of seeds by table.

    Raises:
        ValueError: there is no table, a table is unknown, or has no positive number of seeds.
    """
    known = list(read_paper()[0])
    look_up("tables", tables, dict.fromkeys(known))
    if wrong := [table for table in tables if not isinstance(seeds.get(table), int) or seeds[table] < 1]:
        raise ValueError(f"seeds must give every table a whole number of at least 1, got {seeds.get(wrong[0])} for {wrong[0]}")
    # seeds of every row
    planned: dict[str, int] = {}
    for table in sorted(tables, key=lambda table: (-seeds[table], known.index(table))):
        for row in read_rows(table):
            equal = list_equal_rows(table, row.removeprefix(f"{table}/"), SCALE)
            if not any(f"{other}/{name}" in planned for other, name in equal):
                planned[row] = seeds[table]
    classifiers: dict[str, int] = {}
    for row, number in planned.items():
        if start := find_start(row):
            classifiers[start] = max(number, classifiers.get(start, 0))
    for row in [*planned]:
        if row in classifiers:
            classifiers[row] = max(planned.pop(row), classifiers[row])
    return [*group_rows(classifiers, ["table2", "pretraining"]), *group_rows(planned, known)]


def group_rows(planned: Mapping[str, int], order: Iterable[str]) -> list[Sweep]:
    """Group rows with their numbers of seeds into sweeps of one table and one number of seeds."""
    sweeps: dict[tuple[str, int], list[str]] = {}
    for table in order:
        for row, number in planned.items():
            if find_table(row) == table:
                sweeps.setdefault((table, number), []).append(row)
    return [Sweep(table, rows, number) for (table, number), rows in sweeps.items()]


def describe_plan(sweeps: Iterable[Sweep], out: Path, seconds: Mapping[str, float], jobs: int) -> str:
    """Tabulate the sweeps with their runs that are left and their CPU hours, and state the hours of the whole.

    Args:
        out: the folder of the runs.
        seconds: mean CPU seconds of a run by table.
        jobs: number of trainings at a time.
    """
    lines, runs, hours = [], 0, 0.0
    for sweep in sweeps:
        left = sweep.count_left(out)
        taken = left * seconds[sweep.table] / 3600
        runs, hours = runs + left, hours + taken
        whole = f"{len(sweep.rows)} row{'s' * (len(sweep.rows) > 1)} x {sweep.seeds} seed{'s' * (sweep.seeds > 1)}"
        lines.append(f"{sweep.table:12}{whole:20}{left:4} runs left {taken:6.1f} hours")
    lines.append(f"{runs} runs left: {hours:.1f} hours of CPU time, {hours / jobs:.1f} hours with jobs={jobs} on as many free cores")
    return "\n".join(lines)
