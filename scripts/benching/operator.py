"""The operator beside its rivals, in one process and in turns."""

import contextlib
import ctypes
import importlib.util
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from torch import Tensor

from ...kernels.geometry import Spec, check_spec
from ...kernels.gpu.clock import measure_milliseconds
from ...tasks.runs import write_csv
from ..app import app
from .providers import providers

MODES = ("forward", "backward", "both")
OURS = ("cpu", "triton")
# a call that takes less is repeated before it is timed: the one before it in turn has emptied the caches
WARM_MS = 100


class Run:
    """One provider on its inputs: what each mode calls."""

    def __init__(self, provider: Callable[[Tensor, Tensor], Tensor], x: Tensor, logits: Tensor):
        self.provider = provider
        self.x, self.logits = x, logits
        self.y = provider(self.x, self.logits)
        self.dy = torch.randn_like(self.y)
        # interpolation and pooling do not use the logits
        self.gradients(retain_graph=True)

    def gradients(self, y: Tensor | None = None, **options) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.y if y is None else y, (self.x, self.logits), self.dy, allow_unused=True, **options)

    def forward(self) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (self.provider(self.x, self.logits),)

    def backward(self) -> tuple[Tensor, ...]:
        return self.gradients(retain_graph=True)

    def both(self) -> tuple[Tensor, ...]:
        y = self.provider(self.x, self.logits)
        return y, *self.gradients(y)

    def least_bytes(self, mode: str) -> int:
        """What the mode must read and write at least."""
        inputs, outputs = self.x.nbytes + self.logits.nbytes, self.dy.nbytes
        return {"forward": inputs + outputs, "backward": 2 * inputs + outputs, "both": 3 * inputs + 2 * outputs}[mode]

    def held_bytes(self, mode: str) -> int:
        """Inputs, outputs and gradients together."""
        inputs, outputs = self.x.nbytes + self.logits.nbytes, self.dy.nbytes
        return {"forward": inputs + outputs, "backward": 2 * inputs + outputs, "both": 2 * (inputs + outputs)}[mode]


def timed(function: Callable[[], object], device: str) -> float:
    """Milliseconds of one call; on a GPU of its kernels alone."""
    if torch.device(device).type == "cuda":
        return measure_milliseconds(function, device)
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e3


def extra_bytes(function: Callable[[], tuple[Tensor | None, ...]], device: str) -> int | None:
    """Peak memory of a call beyond what was held before and what it returns; of the whole process on CPU, known on Linux only."""
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = function()
        return torch.cuda.max_memory_allocated() - before - sum(t.nbytes for t in results if t is not None)
    status = Path("/proc/self/status")
    try:
        # freed memory goes back first, so that what the call takes is seen
        ctypes.CDLL(None).malloc_trim(0)
        before = _resident(status, "VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError, TypeError):
        return None
    results = function()
    return max(0, _resident(status, "VmHWM") - before - sum(t.nbytes for t in results if t is not None))


def _resident(status: Path, name: str) -> int:
    (line,) = (line for line in status.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def keep_freed_memory() -> None:
    """Have the C library (glibc) keep what is freed, as a training process has it after some steps.

    Else whether the pages of an output are new, which costs as much as filling them, depends on what other providers have freed.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        library = ctypes.CDLL(None)
        for option, size in ((-1, 2**30), (-3, 2**25)):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            library.mallopt(option, size)


def quantile(times: list[float], share: float) -> float:
    times = sorted(times)
    return times[round(share * (len(times) - 1))]


def measure(cfg: DictConfig, spec: Spec) -> Iterator[dict]:
    """Time every provider that applies, in turns, and yield a row for each provider and mode."""
    n, c, h, w = cfg.op.shape
    options = {"device": cfg.device, "dtype": getattr(torch, cfg.dtype)}
    memory_format = torch.channels_last if cfg.channels_last else torch.contiguous_format
    x = torch.randn(n, c, h, w, **options).contiguous(memory_format=memory_format).requires_grad_()
    logits = torch.randn(n, spec.groups * spec.taps * spec.up**2, spec.cells(h), spec.cells(w), **options)
    logits = logits.contiguous(memory_format=memory_format).requires_grad_()

    found = providers(spec, (n, c, h, w), cfg.device, cfg.max_unfold_gb * 1e9)
    for name in cfg.providers or ():
        if name not in found:
            raise ValueError(f"providers must be among {', '.join(found)}, got {name!r}")
    runs = {}
    for name in cfg.providers or found:
        if isinstance(found[name], str):
            print(f"{name} is left out: {found[name]}")
        else:
            runs[name] = Run(found[name], x, logits)
    times = defaultdict(list)
    for _ in range(cfg.rounds):
        for mode in MODES:
            for name, run in runs.items():
                taken = times[name, mode]
                function = getattr(run, mode)
                if taken and taken[-1] < WARM_MS:
                    function()
                if len(taken) < 3 or sum(taken) < cfg.seconds * 1e3:
                    taken.append(timed(function, cfg.device))

    ours = next((name for name in OURS if name in runs), None)
    for mode in MODES:
        for name, run in runs.items():
            taken = times[name, mode]
            median = quantile(taken, 0.5)
            extra = extra_bytes(getattr(run, mode), cfg.device)
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


def line(row: dict) -> str:
    extra = " " * 16 if row["extra_mb"] is None else f"{row['extra_mb']:>10.1f}{row['extra_share']:>6.0%}"
    relative = "" if row["relative"] is None else f"{row['relative']:.2f}"
    times = f"{row['ms']:>10.3f}{row['ms_20']:>10.3f}{row['ms_80']:>10.3f}"
    return f"{row['provider']:<20}{row['mode']:<10}{times}{row['gb_per_s']:>8.1f}{extra}{relative:>9}"


def plot(rows: list[dict], title: str, path: Path) -> None:
    """One bar a provider and mode, on a logarithmic axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots(1, len(MODES), sharey=True)
    for axis, mode in zip(axes, MODES, strict=True):
        chosen = [row for row in rows if row["mode"] == mode]
        axis.barh([row["provider"] for row in chosen], [row["ms"] for row in chosen])
        axis.set(xscale="log", xlabel="ms", title=mode)
        axis.invert_yaxis()
    figure.suptitle(title)
    figure.savefig(path)


def hardware(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError, StopIteration):
        names = (text.split(":", 1)[1].strip() for text in Path("/proc/cpuinfo").read_text().splitlines() if text.startswith("model name"))
        return f"{next(names)}, {torch.get_num_threads()} threads"
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


@app("bench")
def main(cfg: DictConfig) -> None:
    """Print the table and leave it in the run folder."""
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    keep_freed_memory()
    op = dict(cfg.op)
    spec = Spec(**{name: op[name] for name in Spec._fields})
    check_spec(spec)
    where = {"device": hardware(cfg.device), "torch": torch.__version__, "python": platform.python_version()}
    layout = "channels_last" if cfg.channels_last else "contiguous"
    title = f"{list(cfg.op.shape)}, up {spec.up}, down {spec.down}, k {spec.kernel_size}, groups {spec.groups}, {cfg.dtype}, {layout}"
    print(title, ", ".join(f"{name} {value}" for name, value in where.items()), sep="\n")
    rows = list(measure(cfg, spec))
    print(HEADER, *map(line, rows), sep="\n")
    folder = Path(HydraConfig.get().runtime.output_dir)
    settings = {**op, "shape": list(op["shape"]), "dtype": cfg.dtype, "layout": layout, "threads": torch.get_num_threads(), **where}
    write_csv(folder / "times.csv", [row | settings for row in rows])
    if importlib.util.find_spec("matplotlib"):
        plot(rows, title, folder / "times.png")
    print(f"written to {folder}")
