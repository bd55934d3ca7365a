"""carafepp-bench: the operator and other implementations, timed in interleaved rounds in one process."""

import functools
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
# the provider that only moves the bytes that a pass must move
COPY = "copy"
# a call that took less is repeated before it is timed
WARM_MS = 100


def least_bytes(mode: str, inputs: int, outputs: int) -> int:
    """Count the bytes that a mode must read and write at least, from the bytes of x and logits and those of y."""
    return {"forward": inputs + outputs, "backward": 2 * inputs + outputs, "both": 3 * inputs + 2 * outputs}[mode]


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


def held_bytes(mode: str, inputs: int, outputs: int) -> int:
    """Count the bytes of the inputs, outputs and gradients of a mode, from the bytes of x and logits and those of y."""
    return {"forward": inputs + outputs, "backward": 2 * inputs + outputs, "both": 2 * (inputs + outputs)}[mode]


class CopyCalls:
    """Copies by mode, each of half the bytes that the mode must move at least, because a copy reads and writes every byte."""

    def __init__(self, inputs: int, outputs: int, device: str):
        # zeros would not do: the system may map all pages of a zero tensor to one page, which a cache holds
        self.sources = {mode: torch.full((least_bytes(mode, inputs, outputs) // 2,), 1, dtype=torch.uint8, device=device) for mode in MODES}
        self.copies = {mode: torch.zeros_like(source) for mode, source in self.sources.items()}

    def copy(self, mode: str) -> tuple[()]:
        """Copy half of the least bytes of a mode."""
        self.copies[mode].copy_(self.sources[mode])
        return ()


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
    if cfg.providers is not None:
        look_up("providers", cfg.providers, {**found, COPY: None})
    sizes = x.nbytes + logits.nbytes, n * c * spec.output_size(h) * spec.output_size(w) * x.element_size()
    calls: dict[tuple[str, str], Callable[[], tuple[Tensor | None, ...]]] = {}
    for name in (*found, COPY) if cfg.providers is None else cfg.providers:
        if name == COPY:
            copies = CopyCalls(*sizes, cfg.device)
            calls |= {(COPY, mode): functools.partial(copies.copy, mode) for mode in MODES}
            continue
        provider = found[name]
        if isinstance(provider, str):
            print(f"{name} is skipped: {provider}")
        else:
            run = ProviderCalls(provider, x, logits)
            calls |= {(name, mode): getattr(run, mode) for mode in MODES}
    names = list(dict.fromkeys(name for name, _ in calls))
    calls = {(name, mode): calls[name, mode] for mode in MODES for name in names}
    times = time_in_turns(calls, cfg.device, cfg.rounds, seconds=cfg.seconds, at_least=3, warm_below_ms=WARM_MS)

    medians = {key: quantile(taken, 0.5) for key, taken in times.items()}
    ours = next((name for name in OURS if name in names), None)
    for (name, mode), call in calls.items():
        median = medians[name, mode]
        extra = measure_extra_bytes(call, cfg.device)
        yield {
            "provider": name,
            "mode": mode,
            "ms": median,
            "ms_20": quantile(times[name, mode], 0.2),
            "ms_80": quantile(times[name, mode], 0.8),
            "runs": len(times[name, mode]),
            "gb_per_s": least_bytes(mode, *sizes) / median / 1e6,
            "extra_mb": None if extra is None else extra / 1e6,
            "extra_share": None if extra is None else extra / held_bytes(mode, *sizes),
            "relative": median / medians[ours, mode] if ours else None,
            "copies": median / medians[COPY, mode] if COPY in names else None,
        }


HEADER = f"{'':<20}{'mode':<10}{'ms':>10}{'20 %':>10}{'80 %':>10}{'GB/s':>8}{'extra MB':>10}{'%':>6}{'/ ours':>9}{'x copy':>9}"


def format_row(row: dict) -> str:
    """Format a row below HEADER."""
    extra = " " * 16 if row["extra_mb"] is None else f"{row['extra_mb']:>10.1f}{row['extra_share']:>6.0%}"
    ratios = "".join(f"{'' if row[name] is None else f'{row[name]:.2f}':>9}" for name in ("relative", "copies"))
    times = f"{row['ms']:>10.3f}{row['ms_20']:>10.3f}{row['ms_80']:>10.3f}"
    return f"{row['provider']:<20}{row['mode']:<10}{times}{row['gb_per_s']:>8.1f}{extra}{ratios}"


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
