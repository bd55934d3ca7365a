"""result.json, the file that says that a run is finished."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .processes import is_first_process

# control characters, which can hide or rewrite a terminal's text or end a line of a table, and halves of characters, which no file can hold
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

# what `FinishedRun.read` raises for a file that is damaged, or was written by another program
BROKEN = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, OSError)


def clean(found: Any) -> Any:
    """Replace the unprintable characters in all texts of a value read from JSON."""
    if isinstance(found, str):
        return UNPRINTABLE.sub("\ufffd", found)
    if isinstance(found, list):
        return [clean(value) for value in found]
    return {clean(key): clean(value) for key, value in found.items()} if isinstance(found, dict) else found


@dataclass(frozen=True)
class FinishedRun:
    """The content of the result.json of a finished run."""

    folder: Path
    seed: int
    choices: dict[str, str | None]
    overrides: dict[str, str]
    metrics: dict[str, float]
    parameters: int
    flops: int
    seconds: float
    # CPU time; None if the run did not record it
    cpu_seconds: float | None
    curve: list[dict[str, float]]

    @classmethod
    def read(cls, path: Path) -> "FinishedRun":
        """Read a result.json file.

        Raises:
            ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, OSError (`BROKEN`): the file is not one that
                carafepp-train writes.
        """
        found = clean(json.loads(path.read_text()))
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


def is_finished(folder: Path) -> bool:
    """Whether a run folder holds a whole result.json; a broken one counts as none, so that resuming the run writes it again."""
    path = folder / "result.json"
    if not path.exists():
        return False
    try:
        FinishedRun.read(path)
    except BROKEN as problem:
        if is_first_process():
            print(f"{path} is broken ({type(problem).__name__}: {problem}): it is written again")
        return False
    return True
