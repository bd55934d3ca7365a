"""carafepp-bench attention: attention of a fine map to windows of a coarse one, beside the same attention to copies at the target size."""

from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from torch import Tensor
from torch.nn import functional as F

from ...models.window_attention import attend_windows
from ...tasks.writing import write_csv
from ..common.options import look_up
from ..common.sites import DTYPES
from .hardware import describe_hardware
from .memory import measure_peak_bytes
from .timing import CLOCKS, time_in_turns


def attend_copies(queries: Tensor, keys: Tensor, values: Tensor, *, up: int, kernel_size: int, heads: int) -> Tensor:
    """Compute what `attend_windows` does for targets of up * H x up * W, from keys and values that are copied to the target size.

    This is the form of a dilated neighborhood attention, of which each tap reads the copies `up` pixels further.
    """
    size = queries.shape[2:]
    copies = [F.interpolate(x, size, mode="nearest").unflatten(1, (heads, -1)) for x in (keys, values)]
    parts = queries.unflatten(1, (heads, -1)) / (queries.shape[1] // heads) ** 0.5
    fine = [torch.arange(side, device=keys.device) for side in size]
    starts = [(i // up - kernel_size // 2).clamp(0, side // up - kernel_size) * up + i % up for i, side in zip(fine, size, strict=True)]
    taps = [(starts[0][:, None] + up * ky, starts[1] + up * kx) for ky in range(kernel_size) for kx in range(kernel_size)]
    scores = torch.stack([(parts * copies[0][..., rows, columns]).sum(dim=2) for rows, columns in taps], dim=2)  # [N, heads, K * K, h, w]
    weights = scores.softmax(dim=2)
    y = torch.zeros_like(copies[1])
    for tap, (rows, columns) in enumerate(taps):
        y = y + weights[:, :, tap, None] * copies[1][..., rows, columns]
    return y.flatten(1, 2)


def time_attention(cfg: DictConfig) -> list[dict]:
    """Measure both forms, forward, and forward with backward, and return a row for each.

    Raises:
        ValueError: the dtype or the clock does not exist.
    """
    look_up("clock", [cfg.clock], CLOCKS)
    dtype = look_up("dtype", [cfg.dtype], DTYPES)[0]
    size = cfg.rows, cfg.columns
    shapes = (cfg.query_channels, cfg.up * size[0], cfg.up * size[1]), (cfg.query_channels, *size), (cfg.channels, *size)
    inputs = [torch.randn(cfg.batch, *shape, device=cfg.device, dtype=dtype).requires_grad_() for shape in shapes]
    options = {"up": cfg.up, "kernel_size": cfg.kernel_size, "heads": cfg.heads}
    dy = torch.randn(cfg.batch, cfg.channels, *shapes[0][1:], device=cfg.device, dtype=dtype)
    forms: dict[str, Callable[..., Tensor]] = {"operator": attend_windows, "copies": attend_copies}

    def forward(form: str) -> Tensor:
        with torch.no_grad():
            return forms[form](*inputs, **options)

    def step(form: str) -> tuple[Tensor, ...]:
        return torch.autograd.grad(forms[form](*inputs, **options), inputs, dy)

    runs = {(form, name): lambda form=form, run=run: run(form) for name, run in (("forward", forward), ("step", step)) for form in forms}
    peaks = {key: measure_peak_bytes(run, cfg.device) for key, run in runs.items()}
    times = time_in_turns(runs, cfg.device, cfg.rounds, clock=CLOCKS[cfg.clock])
    return [
        {"pass": name, "form": form, "ms": median(times[form, name]), "peak_mb": peaks[form, name] / 1e6}
        for form, name in runs  # forward first
    ]


def bench_attention(cfg: DictConfig) -> None:
    """Print the figures and write them to the run folder."""
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    fine = cfg.up * cfg.rows, cfg.up * cfg.columns
    print(f"{cfg.channels} channels, {cfg.rows} x {cfg.columns} -> {fine[0]} x {fine[1]}, {cfg.kernel_size} x {cfg.kernel_size} windows")
    print(f"batch {cfg.batch}, {cfg.dtype}, {describe_hardware(cfg.device)}, torch {torch.__version__}, {cfg.clock} time")
    rows = time_attention(cfg)
    output = cfg.batch * cfg.channels * fine[0] * fine[1] * look_up("dtype", [cfg.dtype], DTYPES)[0].itemsize / 1e6
    print(f"{'pass':<10}{'form':<12}{'ms':>10}{'peak MB':>12}     the output has {output:,.1f} MB")
    for row in rows:
        print(f"{row['pass']:<10}{row['form']:<12}{row['ms']:>10.2f}{row['peak_mb']:>12,.1f}")
    path = Path(HydraConfig.get().runtime.output_dir) / "attention.csv"
    write_csv(path, rows)
    print(f"\nwritten to {path}")
