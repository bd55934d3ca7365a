"""carafepp-bench: the operator and other implementations, timed in interleaved rounds in one process."""

import importlib.util
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from torch import Tensor

from ...kernels.geometry import Spec, check_spec
from ...tasks.writing import write_csv
from ..common.options import look_up
from ..common.sites import DTYPES
from .hardware import describe_hardware
from .memory import keep_freed_memory, measure_extra_bytes
from .plots import plot_times
from .providers import list_providers
from .timing import quantile, time_in_turns

MODES = ("forward", "backward", "both")
OURS = ("cpu", "triton")
# a call that took less is repeated before it is timed
WARM_MS = 100


class ProviderCalls:
    """The calls of one provider on fixed inputs: x [N, C, H, W] and logits [N, G * K * K * up * up, Hq, Wq], by mode."""

    def __init__(self, provider: Callable[[Tensor, Tensor], Tensor], x: Tensor, logits: Tensor):
        self.provider = provider
        self.x, self.logits = x, logits
        self.y = provider(self.x, self.logits)
        self.dy = torch.randn_like(self.y)
        # interpolation and pooling do not use the logits
        self.gradients(retain_graph=True)

    def gradients(self, y: Tensor | None = None, **options: bool) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and logits from an output, by default from the output of the constructor."""
        return torch.autograd.grad(self.y if y is None else y, (self.x, self.logits), self.dy, allow_unused=True, **options)

    def forward(self) -> tuple[Tensor, ...]:
        """Compute the output without a graph."""
        with torch.no_grad():
            return (self.provider(self.x, self.logits),)

    def backward(self) -> tuple[Tensor | None, ...]:
        """Compute the gradients of the output of the constructor."""
        return self.gradients(retain_graph=True)

    def both(self) -> tuple[Tensor | None, ...]:
        """Compute the output and the gradients."""
        y = self.provider(self.x, self.logits)
        return y, *self.gradients(y)

    def least_bytes(self, mode: str) -> int:
        """Count the bytes that a mode must read and write at least."""
        inputs, outputs = self.x.nbytes + self.logits.nbytes, self.dy.nbytes
        return {"forward": inputs + outputs, "backward": 2 * inputs + outputs, "both": 3 * inputs + 2 * outputs}[mode]

    def held_bytes(self, mode: str) -> int:
        """Count the bytes of the inputs, outputs and gradients of a mode."""
        inputs, outputs = self.x.nbytes + self.logits.nbytes, self.dy.nbytes
        return {"forward": inputs + outputs, "backward": 2 * inputs + outputs, "both": 2 * (inputs + outputs)}[mode]


def measure_operator(cfg: DictConfig, spec: Spec) -> Iterator[dict]:
    """Time every applicable provider in interleaved rounds, and yield a row of figures for each provider and mode.

    Raises:
        ValueError: the shape has not four numbers, or the type or a chosen provider does not exist.
    """
    if len(cfg.op.shape) != 4:
        raise ValueError(f"op.shape must be [N, C, H, W], got {cfg.op.shape}")
    n, c, h, w = cfg.op.shape
    options = {"device": cfg.device, "dtype": look_up("dtype", [cfg.dtype], DTYPES | {"float64": torch.float64})[0]}
    memory_format = torch.channels_last if cfg.channels_last else torch.contiguous_format
    x = torch.randn(n, c, h, w, **options).contiguous(memory_format=memory_format).requires_grad_()
    logits = torch.randn(n, spec.groups * spec.taps * spec.up**2, spec.cells(h), spec.cells(w), **options)
    logits = logits.contiguous(memory_format=memory_format).requires_grad_()

    found = list_providers(spec, (n, c, h, w), cfg.device, cfg.max_unfold_gb * 1e9)
    look_up("providers", cfg.providers or (), found)
    runs = {}
    for name in cfg.providers or found:
        provider = found[name]
        if isinstance(provider, str):
            print(f"{name} is skipped: {provider}")
        else:
            runs[name] = ProviderCalls(provider, x, logits)
    calls = {(name, mode): getattr(run, mode) for mode in MODES for name, run in runs.items()}
    times = time_in_turns(calls, cfg.device, cfg.rounds, seconds=cfg.seconds, at_least=3, warm_below_ms=WARM_MS)

    ours = next((name for name in OURS if name in runs), None)
    for mode in MODES:
        for name, run in runs.items():
            taken = times[name, mode]
            median = quantile(taken, 0.5)
            extra = measure_extra_bytes(calls[name, mode], cfg.device)
            yield {
                "provider": name,
                "mode": mode,
                "ms": median,
                "ms_20": quantile(taken, 0.2),
                "ms_80": quantile(taken, 0.8),
                "runs": len(taken),
                "gb_per_s": run.least_bytes(mode) / median / 1e6,
                "extra_mb": None if extra is None else extra / 1e6,
                "extra_share": None if extra is None else extra / run.held_bytes(mode),
                "relative": median / quantile(times[ours, mode], 0.5) if ours else None,
            }


HEADER = f"{'':<20}{'mode':<10}{'ms':>10}{'20 %':>10}{'80 %':>10}{'GB/s':>8}{'extra MB':>10}{'%':>6}{'/ ours':>9}"


def format_row(row: dict) -> str:
    """Format a row below HEADER."""
    extra = " " * 16 if row["extra_mb"] is None else f"{row['extra_mb']:>10.1f}{row['extra_share']:>6.0%}"
    relative = "" if row["relative"] is None else f"{row['relative']:.2f}"
    times = f"{row['ms']:>10.3f}{row['ms_20']:>10.3f}{row['ms_80']:>10.3f}"
    return f"{row['provider']:<20}{row['mode']:<10}{times}{row['gb_per_s']:>8.1f}{extra}{relative:>9}"


def bench_operator(cfg: DictConfig) -> None:
    """Print the table and write it to the run folder."""
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    keep_freed_memory()
    op = dict(cfg.op)
    spec = Spec(**{name: op[name] for name in Spec._fields})
    check_spec(spec)
    where = {"device": describe_hardware(cfg.device), "torch": torch.__version__, "python": platform.python_version()}
    layout = "channels_last" if cfg.channels_last else "contiguous"
    title = f"{list(cfg.op.shape)}, up {spec.up}, down {spec.down}, k {spec.kernel_size}, groups {spec.groups}, {cfg.dtype}, {layout}"
    print(title, ", ".join(f"{name} {value}" for name, value in where.items()), sep="\n")
    rows = list(measure_operator(cfg, spec))
    print(HEADER, *map(format_row, rows), sep="\n")
    folder = Path(HydraConfig.get().runtime.output_dir)
    settings = {**op, "shape": list(op["shape"]), "dtype": cfg.dtype, "layout": layout, "threads": torch.get_num_threads(), **where}
    write_csv(folder / "times.csv", [row | settings for row in rows])
    if importlib.util.find_spec("matplotlib"):
        plot_times(rows, title, folder / "times.png")
    print(f"written to {folder}")
