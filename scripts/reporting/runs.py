"""Finished runs below folders, read from their result.json files and grouped by their overrides."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ..common.overrides import INCIDENTAL, is_under
from ..common.results import BROKEN, FinishedRun, clean
from ..common.run_folders import INTERRUPTED, is_in_sweep

# keys that affect the data and the training; runs that differ in these are in different tables
PROTOCOL = ["scale", "setting", "scenes", "scene", "protocol", "data", "optimizer", "schedule", "averaging", "trainer"]
# the initial weights depend on the downsamplers of the network, so that only their presence is compared
WEIGHTS = "backbone.weights"
SOURCES = [WEIGHTS, "weights_root"]


@dataclass
class Setting:
    """Runs that differ only in their seed."""

    # the table of their experiment, or ""
    table: str
    # the row of that table, or ""
    row: str
    # overrides that all runs of one table share
    protocol: dict[str, str]
    # their other overrides
    options: dict[str, str]
    runs: dict[int, FinishedRun] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The row and the other overrides of the runs."""
        return ", ".join([*([self.row] if self.row else []), *(f"{key}={value}" for key, value in self.options.items())]) or "default"

    def values(self, metric: str) -> dict[int, float]:
        """Return a metric by seed, for the runs that have it."""
        return {seed: run.metrics[metric] for seed, run in self.runs.items() if metric in run.metrics}

    @property
    def kind(self) -> dict[str, str]:
        """What the runs must have in common with others in one table: the task, the scale, the data, and their metrics."""
        run = next(iter(self.runs.values()))
        shown = {name: choice for name in ("task", "scale", "setting") if (choice := run.choices.get(name))}
        data = {key: self.options[key] for key in ("data.root", "scenes") if key in self.options}
        return shown | data | {"metrics": " ".join(sorted(run.metrics))}

    @property
    def seconds(self) -> float:
        """Mean wall-clock time of the runs."""
        return statistics.fmean(run.seconds for run in self.runs.values())

    @property
    def cpu_seconds(self) -> float | None:
        """Mean CPU time of the runs that recorded it, or None if no run did."""
        found = [run.cpu_seconds for run in self.runs.values() if run.cpu_seconds is not None]
        return statistics.fmean(found) if found else None


def numeric_order(path: Path) -> list[tuple[bool, int, str]]:
    """Return a sort key that puts run 10 after run 9."""
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in path.parts]


def is_failed_start(folder: Path) -> bool:
    """Return whether a command failed before it had trained; a job of a sweep is a row that is missing, and does not count."""
    error, trained = folder / "error.txt", ("result.json", "metrics.csv", "last.ckpt")
    if not error.exists() or any((folder / name).exists() for name in trained) or is_in_sweep(folder):
        return False
    return not error.read_text(errors="replace").startswith(INTERRUPTED)


def read_runs(folders: Iterable[Path]) -> tuple[list[FinishedRun], list[str]]:
    """Read the finished runs below the folders, and describe the runs that are broken, failed or unfinished.

    Commands that failed before they had trained are not mentioned, except in the folders themselves and in sweeps.

    Raises:
        FileNotFoundError: a folder does not exist.
    """
    runs, problems, marked = [], [], set()
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"runs={folder} is not a folder")
        marked |= {path.parent for name in ("result.json", "config.yaml", "error.txt") for path in folder.rglob(name)}
    for folder in sorted(marked, key=numeric_order):
        path, error = folder / "result.json", folder / "error.txt"
        if is_failed_start(folder) and folder not in folders:
            continue
        if path.exists():
            try:
                runs.append(FinishedRun.read(path))
            except BROKEN as problem:
                problems.append(f"{path}: broken ({type(problem).__name__}: {problem}), carafepp-train resume={folder} writes it again")
        elif error.exists():
            reason = clean(error.read_text(errors="replace").partition("\n")[0])
            problems.append(f"{folder}: {'unfinished' if reason.startswith(INTERRUPTED) else 'failed'} ({reason})")
        else:
            problems.append(f"{folder}: unfinished, continue it with carafepp-train resume={folder}")
    return runs, problems


def group_runs(runs: Iterable[FinishedRun], tables: dict) -> tuple[list[Setting], list[str]]:
    """Group runs that differ only in their seed, in the order of their folders, and describe the runs that repeat another run.

    Runs with the same overrides and another number of parameters, or other metrics, are in different groups.

    Args:
        runs: finished runs.
        tables: the tables of the paper (see `read_paper`).
    """
    settings: dict[tuple, Setting] = {}
    repeated = []
    for run in runs:
        table = run.choices.get("experiment") or ""
        options = {key: value for key, value in run.overrides.items() if not is_under(key, INCIDENTAL)}
        protocol, row = {}, ""
        if table in tables:
            options.pop("experiment", None)
            other, _, row = (run.choices.get("row") or f"{table}/").partition("/")
            if other == table:
                options.pop("row", None)
            else:
                row = ""
            protocol = {key: options.pop(key) for key in sorted(options) if is_under(key, PROTOCOL)}
            # not any(), which would leave the second in the options
            if {options.pop(key, "null") for key in SOURCES} != {"null"}:
                protocol[WEIGHTS] = "FILE"
            protocol = {"scale": run.choices.get("scale") or "paper"} | protocol
            # an experiment without a row is the baseline of its table
            if not row and not options and isinstance(baseline := tables[table]["baseline"], str):
                row = baseline
        else:
            table = ""
        # the same options with other data or another network are another setting
        if not table and "data.root" in run.overrides:
            options["data.root"] = Path(run.overrides["data.root"]).name
        network = (run.parameters, *([] if table else sorted(run.metrics)))
        identity = (table, row, *protocol.items(), None, *sorted(options.items()), *network)
        setting = settings.setdefault(identity, Setting(table, row, protocol, options))
        if run.seed in setting.runs:
            repeated.append(f"{run.folder}: omitted, because it repeats seed {run.seed} of {setting.runs[run.seed].folder}")
        else:
            setting.runs[run.seed] = run
    return list(settings.values()), repeated
