"""carafepp-bench models: parameters, FLOPs and inference time of the networks of a table of the paper."""

import functools
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from ...tasks.runs import count_flops
from ...tasks.task import Task
from ...tasks.writing import write_csv
from ..common.options import look_up
from ..common.paper import find_baseline, list_rows, read_paper
from .hardware import describe_hardware
from .memory import keep_freed_memory
from .timing import time_in_turns


def build_network(table: str, row: str, overrides: Sequence[str]) -> Task:
    """Build the task of a row with random weights, in evaluation mode."""
    config = compose("train", overrides=[f"experiment={table}", f"row={table}/{row}", *overrides])
    torch.manual_seed(0)
    return instantiate(config.task).eval()


def choose_rows(tables: dict, table: str, rows: Sequence[str] | None) -> dict[str, float | None]:
    """Return the chosen rows (all for None) and their baselines, each with the frames per second of the paper if it gives them.

    Raises:
        ValueError: the paper has no such table, or the table no such row.
    """
    look_up("table", [table], tables)
    known: dict[str, float | None] = {}
    for figures in list_rows(tables, table):
        known.setdefault(figures["row"], figures.get("fps"))
    look_up("rows", rows or (), known)
    wanted = set(rows or known)
    wanted |= {find_baseline(tables[table], row) for row in wanted}
    return {row: fps for row, fps in known.items() if row in wanted}


@torch.no_grad()
def measure_networks(cfg: DictConfig) -> list[dict]:
    """Measure the networks of a table in interleaved rounds and return a row of figures for each.

    "ms" is the median time of an inference on one image, "relative" its ratio to the time of the baseline, and "paper_relative" the same
    ratio from the paper's frames per second. Figures that are not available are None.
    """
    tables, _ = read_paper()
    fps = choose_rows(tables, cfg.table, cfg.rows)
    networks = {row: build_network(cfg.table, row, cfg.overrides) for row in fps}
    memory_format = torch.channels_last if cfg.channels_last else torch.contiguous_format
    images: dict[str, Tensor] = {}
    found = {}
    for row, task in networks.items():
        task.to(cfg.device, memory_format=memory_format)
        size = cfg.size or task.bench_size
        images[row] = torch.rand(3, *size, generator=torch.Generator().manual_seed(0)).to(cfg.device)
        parameters = sum(parameter.numel() for parameter in task.model.parameters())
        found[row] = {"table": cfg.table, "row": row, "size": list(size), "parameters": parameters, "flops": count_flops(task, images[row])}
    calls = {row: functools.partial(task, images[row][None]) for row, task in networks.items()}
    times = time_in_turns(calls, cfg.device, cfg.rounds)
    for row, figures in found.items():
        baseline = find_baseline(tables[cfg.table], row) or row
        figures["ms"] = median(times[row]) if times else None
        figures["relative"] = median(times[row]) / median(times[baseline]) if times else None
        ours, theirs = fps[row], fps[baseline]
        figures["paper_relative"] = theirs / ours if ours and theirs else None
    return list(found.values())


def format_row(row: dict) -> str:
    """Format a row of the table."""
    ratios = "".join(f"{'' if row[name] is None else f'{row[name]:.3f}':>10}" for name in ("relative", "paper_relative"))
    ms = "" if row["ms"] is None else f"{row['ms']:.1f}"
    return f"{row['row']:<36}{row['parameters']:>14,}{row['flops'] / 1e9:>12.2f}{ms:>10}{ratios}"


def bench_models(cfg: DictConfig) -> None:
    """Print the table and write its rows to the run folder."""
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    keep_freed_memory()
    rows = measure_networks(cfg)
    height, width = rows[0]["size"]
    print(f"{cfg.table}, one image of {height} x {width}, {describe_hardware(cfg.device)}, torch {torch.__version__}")
    print(f"{'':<36}{'parameters':>14}{'GFLOPs':>12}{'ms':>10}{'/ base':>10}{'paper':>10}", *map(format_row, rows), sep="\n")
    path = Path(HydraConfig.get().runtime.output_dir) / "models.csv"
    write_csv(path, rows)
    print(f"written to {path}")
