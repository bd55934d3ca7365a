"""Finished runs below folders, gathered by what they were told; figures come from result.json files only."""

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ..common.overrides import INCIDENTAL, is_under

# what a network is trained on, and how: runs that differ in these do not stand in one table
PROTOCOL = ["scale", "setting", "data", "optimizer", "schedule", "trainer"]
# what differs with a network's downsamplers: that there are some is what counts
WEIGHTS = "backbone.weights"


@dataclass(frozen=True)
class FinishedRun:
    """One finished run: what its result.json says, in the types that are needed.

    Raises (`read`):
        ValueError, KeyError, TypeError, AttributeError, OSError: the file is not what carafepp-train writes.
    """

    folder: Path
    seed: int
    choices: dict[str, str | None]
    overrides: dict[str, str]
    metrics: dict[str, float]
    parameters: int
    flops: int
    seconds: float
    # of the processor; None in runs from before it was recorded
    cpu_seconds: float | None
    curve: list[dict[str, float]]

    @classmethod
    def read(cls, path: Path) -> "FinishedRun":
        found = json.loads(path.read_text())
        if unknown := {type(choice).__name__ for choice in found["choices"].values()} - {"str", "NoneType"}:
            raise TypeError(f"choices must be names, got {', '.join(sorted(unknown))}")
        pairs = (override.lstrip("+").partition("=") for override in found["overrides"])
        return cls(
            folder=path.parent,
            seed=int(found["seed"]),
            choices=found["choices"],
            overrides={key: value for key, _, value in pairs},
            metrics={name: float(value) for name, value in found["metrics"].items()},
            parameters=int(found["parameters"]),
            flops=int(found["flops"]),
            seconds=float(found["seconds"]),
            cpu_seconds=float(found["cpu_seconds"]) if "cpu_seconds" in found else None,
            curve=[{"step": point["step"]} | {name: float(value) for name, value in point.items()} for point in found.get("curve", [])],
        )


@dataclass
class Setting:
    """Runs that differ in their seed only."""

    # the paper's table that the run's experiment is, or ""
    table: str
    # of that table, or ""
    row: str
    # overrides that runs of one table share
    protocol: dict[str, str]
    # the others
    options: dict[str, str]
    runs: dict[int, FinishedRun] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The row, and what else the runs were told."""
        return ", ".join([*([self.row] if self.row else []), *(f"{key}={value}" for key, value in self.options.items())]) or "default"

    def values(self, metric: str) -> dict[int, float]:
        """The metric by seed."""
        return {seed: run.metrics[metric] for seed, run in self.runs.items() if metric in run.metrics}

    @property
    def seconds(self) -> float:
        return statistics.fmean(run.seconds for run in self.runs.values())

    @property
    def cpu_seconds(self) -> float | None:
        """Of the processor, over the runs that recorded it; None if none did."""
        found = [run.cpu_seconds for run in self.runs.values() if run.cpu_seconds is not None]
        return statistics.fmean(found) if found else None


def natural_order(path: Path) -> list[tuple[bool, int, str]]:
    """Sort by: run 10 after run 9."""
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in path.parts]


def read_runs(folders: Iterable[Path]) -> tuple[list[FinishedRun], list[str]]:
    """Read the finished runs below the folders, and name those that are broken, failed or unfinished.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    runs, problems, marked = [], [], set()
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"runs={folder} is not a folder")
        marked |= {path.parent for name in ("result.json", "config.yaml", "error.txt") for path in folder.rglob(name)}
    for folder in sorted(marked, key=natural_order):
        path, error = folder / "result.json", folder / "error.txt"
        if path.exists():
            try:
                runs.append(FinishedRun.read(path))
            except (ValueError, KeyError, TypeError, AttributeError, OSError) as problem:
                problems.append(f"{path}: broken ({type(problem).__name__}: {problem})")
        elif error.exists():
            problems.append(f"{folder}: failed ({error.read_text(errors='replace').partition(chr(10))[0]})")
        else:
            problems.append(f"{folder}: unfinished, continue it with carafepp-train resume={folder}")
    return runs, problems


def group_runs(runs: Iterable[FinishedRun], tables: dict) -> tuple[list[Setting], list[str]]:
    """Put runs together that differ in their seed only, in the order of their folders, and name those that repeat one.

    `tables` are the experiments of the paper, as in conf/paper.yaml.
    """
    settings: dict[tuple, Setting] = {}
    repeated = []
    for run in runs:
        table = run.choices.get("experiment") or ""
        options = {key: value for key, value in run.overrides.items() if not is_under(key, INCIDENTAL)}
        protocol, row = {}, ""
        if table in tables:
            options.pop("experiment", None)
            place, _, row = (run.choices.get("row") or f"{table}/").partition("/")
            if place == table:
                options.pop("row", None)
            else:
                row = ""
            protocol = {key: options.pop(key) for key in sorted(options) if is_under(key, PROTOCOL)}
            if options.pop(WEIGHTS, "null") != "null":
                protocol[WEIGHTS] = "FILE"
            protocol = {"scale": run.choices.get("scale") or "paper"} | protocol
            # an experiment alone is its table's baseline
            if not row and not options and isinstance(baseline := tables[table]["baseline"], str):
                row = baseline
        else:
            table = ""
        identity = (table, row, *protocol.items(), None, *sorted(options.items()))
        setting = settings.setdefault(identity, Setting(table, row, protocol, options))
        if run.seed in setting.runs:
            repeated.append(f"{run.folder}: left out, it repeats seed {run.seed} of {setting.runs[run.seed].folder}")
        else:
            setting.runs[run.seed] = run
    return list(settings.values()), repeated
