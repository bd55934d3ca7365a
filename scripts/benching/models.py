"""carafepp-bench models: parameters, FLOPs, times and memory of the networks of a table of the paper, beside their baselines."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from torch import nn

from ...models.carafe import CARAFE
from ...tasks.fixed_load import keep_size
from ...tasks.runs import count_flops
from ...tasks.task import Task
from ...tasks.writing import write_csv
from ..common.options import look_up
from ..common.paper import find_baseline, list_rows, read_paper
from ..common.sites import DTYPES
from .hardware import describe_hardware
from .memory import keep_freed_memory, measure_peak_bytes
from .module import OPERATOR, WHOLE, measure_parts
from .networks import Graphed, NetworkCalls, build_network, record_sites
from .timing import CLOCKS, median_interval, time_in_turns

# how a network runs; the first two are the network as it is
MODES = ("inference", "step", "compiled", "graph")


def choose_rows(tables: dict, table: str, rows: Sequence[str] | None) -> dict[str, float | None]:
    """Return the chosen rows (all for None) and their baselines, each with the frames per second of the paper if it gives them.

    Raises:
        ValueError: the paper has no such table, or the table no such row.
    """
    look_up("table", [table], tables)
    known: dict[str, float | None] = {}
    for figures in list_rows(tables, table):
        known.setdefault(figures["row"], figures.get("fps"))
    wanted = set(known)
    if rows is not None:
        look_up("rows", rows, known)
        wanted = set(rows)
    wanted |= {find_baseline(tables[table], row) for row in wanted}
    return {row: fps for row, fps in known.items() if row in wanted}


class Networks:
    """The networks of a table of the paper and their measurement.

    Args:
        cfg: the configuration of `carafepp-bench models`.

    Raises:
        ValueError: the configuration names a table, a row, a mode, a dtype or a clock that does not exist, a CUDA graph without a GPU, or a
            size that is not a height and a width.
    """

    def __init__(self, cfg: DictConfig):
        self.cfg = cfg
        look_up("modes", cfg.modes, dict.fromkeys(MODES))
        look_up("clock", [cfg.clock], CLOCKS)
        if "graph" in cfg.modes and torch.device(cfg.device).type != "cuda":
            raise ValueError(f"modes=[graph] needs a GPU, device=cuda, got device={cfg.device}")
        tables, _ = read_paper()
        self.fps = choose_rows(tables, cfg.table, cfg.rows)
        self.baselines = {row: find_baseline(tables[cfg.table], row) or row for row in self.fps}
        self.options: dict[str, Any] = {
            "device": cfg.device,
            "dtype": look_up("dtype", [cfg.dtype], DTYPES)[0],
            "memory_format": torch.channels_last if cfg.channels_last else torch.contiguous_format,
        }
        tasks = {row: build_network(cfg.table, row, cfg.overrides) for row in self.fps}
        if cfg.size is not None and (not isinstance(cfg.size, Sequence) or len(cfg.size) != 2):
            raise ValueError(f"size must be [height, width] in pixels, or null, got {cfg.size}")
        self.size = tuple(cfg.size or next(iter(tasks.values())).bench_size)
        for task in tasks.values():
            keep_size(task, self.size)
        self.runs = {
            row: NetworkCalls(task, self.size, batch=cfg.batch, step_batch=cfg.step_batch, **self.options) for row, task in tasks.items()
        }
        # milliseconds of modules that were measured, by their representation, shape, state and pass: rows share them
        self.modules: dict[tuple[object, ...], dict[str, dict[str, float]]] = {}

    def measure(self) -> list[dict]:
        """Measure all networks and return a row of figures for each; see `measure_networks`."""
        found = {row: {"table": self.cfg.table, "row": row, "size": list(self.size)} | self._count(row) for row in self.fps}
        if self.cfg.rounds:
            for modes in (("inference", "compiled", "graph"), ("step",)):
                for row, figures in self._time([mode for mode in modes if mode in self.cfg.modes]).items():
                    found[row] |= figures
        for row, figures in found.items():
            ours, theirs = self.fps[row], self.fps[self.baselines[row]]
            figures["paper_fps"], figures["paper_relative"] = ours, theirs / ours if ours and theirs else None
        return list(found.values())

    def _count(self, row: str) -> dict[str, int]:
        run = self.runs[row]
        parameters = sum(parameter.numel() for parameter in run.task.model.parameters())
        return {"parameters": parameters, "flops": count_flops(run.task, run.images[0])}

    def _time(self, modes: Sequence[str]) -> dict[str, dict]:
        """Time the networks in these modes, all of them inference or all of them training, in interleaved rounds."""
        calls = {(mode, row): self._call(mode, run) for mode in modes for row, run in self.runs.items()}
        for run in self.runs.values():
            run.task.train("step" in modes)
        sites, peaks = {}, {}
        for (mode, row), call in calls.items():
            # a first call takes memory that later calls reuse, compiles and captures
            peaks[mode, row] = measure_peak_bytes(call, self.cfg.device) if mode in MODES[:2] else call()
            sites[mode, row] = record_sites(self.runs[row].task, call) if mode in MODES[:2] and has_carafe(self.runs[row].task) else []
        times = time_in_turns(calls, self.cfg.device, self.cfg.rounds, clock=CLOCKS[self.cfg.clock])
        found: dict[str, dict] = {row: {} for row in self.runs}
        for (mode, row), taken in times.items():
            base = times[mode, self.baselines[row]]
            ratios = [ours / theirs for ours, theirs in zip(taken, base, strict=True)]
            low, high = median_interval(ratios)
            ms = median(taken)
            batch = self.cfg.step_batch if mode == "step" else self.cfg.batch
            figures = {"ms": ms, "fps": 1e3 * batch / ms, "relative": median(ratios), "relative_low": low, "relative_high": high}
            if mode in MODES[:2]:
                figures |= {"peak_mb": peaks[mode, row] / 1e6} | self._share(mode, sites[mode, row], ms)
            found[row] |= {f"{mode}_{name}": value for name, value in figures.items()}
        return found

    def _call(self, mode: str, run: NetworkCalls) -> Callable[[], object]:
        if mode == "compiled":
            return run.wrapped(compile_network)
        return {"inference": run.infer, "step": run.step}[mode] if mode != "graph" else run.wrapped(Graphed)

    def _share(self, mode: str, sites: Sequence[tuple[CARAFE, torch.Size]], ms: float) -> dict[str, float]:
        """Return the times of operator and rest of the CARAFE modules, each measured alone, as shares of the time of the network."""
        sums = {OPERATOR: 0.0, WHOLE: 0.0}
        for module, shape in sites:
            trained = mode == "step" and any(parameter.requires_grad for parameter in module.parameters())
            name = "step" if trained else "forward"
            key = (repr(module), shape, module.training, name)
            if key not in self.modules:
                # a module alone would wait for its launches; those of a network hide behind other work
                clock = "kernels" if torch.device(self.cfg.device).type == "cuda" else self.cfg.clock
                options: dict[str, Any] = {"rounds": max(3, self.cfg.rounds), "clock": clock, "seconds": 1.0, "passes": (name,)}
                self.modules[key] = measure_parts(module, shape, **options, **self.options)
            for part in sums:
                sums[part] += self.modules[key][part][name]
        return {"operator_share": sums[OPERATOR] / ms, "rest_share": (sums[WHOLE] - sums[OPERATOR]) / ms}


def compile_network(network: nn.Module) -> nn.Module:
    """Compile a network, or a part, for the shapes of its first call."""
    return cast(nn.Module, torch.compile(network, dynamic=False))


def has_carafe(task: Task) -> bool:
    """Return whether a network has CARAFE modules."""
    return any(isinstance(module, CARAFE) for module in task.modules())


def measure_networks(cfg: DictConfig) -> list[dict]:
    """Measure the networks of a table in interleaved rounds and return a row of figures for each.

    For each mode MODE of `cfg.modes`, a row has:

    - "MODE_ms" and "MODE_fps", the median milliseconds of a call and images per second,
    - "MODE_relative", the median over the rounds of the ratio to the baseline's time in the same round, and its 95 % interval
      "MODE_relative_low" and "MODE_relative_high",

    and, for "inference" and "step", "MODE_peak_mb", the peak memory beyond weights and images, and "MODE_operator_share" and
    "MODE_rest_share", the times of the operator and of the rest of all CARAFE modules, measured alone, as shares of the network's time.
    "paper_fps" and "paper_relative" are the paper's images per second, and the ratio of times that follows. Figures that are not available
    are None or missing.

    Raises:
        ValueError: see `Networks`.
    """
    return Networks(cfg).measure()


def format_ratio(value: float | None) -> str:
    """Format a ratio in ten characters, empty if there is none."""
    return f"{'' if value is None else f'{value:.3f}':>10}"


def format_mode(rows: Sequence[dict], mode: str) -> list[str]:
    """Format the table of a mode, one line a network, below its header."""
    by_itself = mode in MODES[:2]
    header = f"{mode:<36}{'ms':>10}{'fps':>9}{'/ base':>10}{'95 % interval':>16}"
    header += f"{'peak MB':>10}{'operator':>10}{'its rest':>10}" if by_itself else ""
    header += f"{'paper fps':>11}{'/ base':>10}" if mode == "inference" else ""
    lines = [header]
    for row in rows:
        get = {name.removeprefix(f"{mode}_"): value for name, value in row.items()}
        interval = f"{get['relative_low']:.3f}..{get['relative_high']:.3f}"
        line = f"{row['row']:<36}{get['ms']:>10.2f}{get['fps']:>9.2f}{format_ratio(get['relative'])}{interval:>16}"
        line += f"{get['peak_mb']:>10.1f}{get['operator_share']:>10.1%}{get['rest_share']:>10.1%}" if by_itself else ""
        line += f"{row['paper_fps'] or '':>11}{format_ratio(row['paper_relative'])}" if mode == "inference" else ""
        lines.append(line)
    return lines


def bench_models(cfg: DictConfig) -> None:
    """Print the tables and write the rows to the run folder."""
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    keep_freed_memory()
    rows = measure_networks(cfg)
    height, width = rows[0]["size"]
    layout = "channels_last" if cfg.channels_last else "contiguous"
    settings = {"batch": cfg.batch, "step_batch": cfg.step_batch, "dtype": cfg.dtype, "layout": layout, "clock": cfg.clock}
    settings |= {"device": describe_hardware(cfg.device), "torch": torch.__version__}
    print(f"{cfg.table}, {height} x {width}, {', '.join(f'{name} {value}' for name, value in settings.items())}")
    print(f"{'':<36}{'parameters':>14}{'GFLOPs':>12}")
    print(*(f"{row['row']:<36}{row['parameters']:>14,}{row['flops'] / 1e9:>12.2f}" for row in rows), sep="\n")
    for mode in cfg.modes if cfg.rounds else ():
        print("", *format_mode(rows, mode), sep="\n")
    path = Path(HydraConfig.get().runtime.output_dir) / "models.csv"
    write_csv(path, [row | settings for row in rows])
    print(f"written to {path}")
