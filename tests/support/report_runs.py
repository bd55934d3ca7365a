"""Folders of finished runs as carafepp-train leaves them, and the tables of a report."""

import json
from pathlib import Path

from carafepp.scripts.common.paper import read_paper
from carafepp.scripts.reporting import (
    group_runs,
    read_runs,
    tabulate_others,
    tabulate_paper,
)


def write_run(folder: Path, seed: int, metrics: dict, *overrides: str, row: str | None = None, scale: str = "small") -> Path:
    """Write the files that carafepp-train leaves in the folder of a finished run."""
    folder.mkdir(parents=True)
    experiment = row.split("/")[0] if row else None
    told = [*([f"experiment={experiment}", f"row={row}"] if row else []), f"scale={scale}", f"seed={seed}", *overrides]
    found = {
        "choices": {"experiment": experiment, "row": row, "scale": scale},
        **{"overrides": told, "seed": seed, "metrics": metrics, "seconds": 60.0, "parameters": 1234567, "flops": 2500000000},
        "curve": [{"step": 10, **metrics}, {"step": 20, **metrics}],
    }
    (folder / "result.json").write_text(json.dumps(found))
    (folder / "config.yaml").write_text("")
    return folder


def make_tables(folder: Path, baseline: str | None = None) -> list:
    settings, _ = group_runs(read_runs([folder])[0], read_paper()[0])
    columns = ["AP", "AP50", "mIoU", "top1"]
    return tabulate_paper([s for s in settings if s.table], columns, 4, baseline) + [
        tabulate_others([s for s in settings if not s.table], 4, baseline) for s in settings[:1] if any(not s.table for s in settings)
    ]
