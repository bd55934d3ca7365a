"""carafepp-bench growth: the time of the operator over channels, pixels, taps and threads, one varied at a time."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from ...kernels.geometry import Spec, check_spec
from ...tasks.writing import write_csv
from .hardware import describe_hardware
from .memory import keep_freed_memory
from .operator import OURS, measure_operator
from .plots import plot_growth

# factors of the given shape
CHANNEL_FACTORS = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4)
SIZE_FACTORS = (1 / 4, 1 / 2, 1, 2)
KERNEL_SIZES = (1, 3, 5, 7, 9)


def list_variants(cfg: DictConfig) -> Iterator[tuple[str, int, dict, int]]:
    """Yield the varied quantity, its value, the changes of the configuration `op`, and the number of threads."""
    n, c, h, w = cfg.op.shape
    threads = torch.get_num_threads()
    for channels in sorted({max(1, round(c * factor / cfg.op.groups)) * cfg.op.groups for factor in CHANNEL_FACTORS}):
        yield "channels", channels, {"shape": [n, channels, h, w]}, threads
    for height, width in sorted({(max(1, round(h * factor)), max(1, round(w * factor))) for factor in SIZE_FACTORS}):
        yield "source pixels", n * height * width, {"shape": [n, c, height, width]}, threads
    for size in KERNEL_SIZES:
        yield "taps", size**2, {"kernel_size": size}, threads
    if torch.device(cfg.device).type == "cpu":
        for count in range(1, threads + 1):
            yield "threads", count, {}, count


def bench_growth(cfg: DictConfig) -> None:
    """Print the times and write them to the run folder."""
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    keep_freed_memory()
    rows = []
    ours = OURS[torch.device(cfg.device).type == "cuda"]
    print(describe_hardware(cfg.device), f"{'':<15}{'':>10}{'forward':>10}{'both':>10}  ms", sep="\n")
    for varies, value, changes, threads in list_variants(cfg):
        chosen = cast(DictConfig, OmegaConf.merge(cfg, {"op": changes, "providers": [ours]}))
        spec = Spec(**{name: chosen.op[name] for name in Spec._fields})
        check_spec(spec)
        torch.set_num_threads(threads)
        found = [{"varies": varies, "value": value, "threads": threads} | row for row in measure_operator(chosen, spec)]
        times = {row["mode"]: row["ms"] for row in found}
        print(f"{varies:<15}{value:>10}{times['forward']:>10.2f}{times['both']:>10.2f}", flush=True)
        rows += found
    folder = Path(HydraConfig.get().runtime.output_dir)
    write_csv(folder / "growth.csv", rows)
    if importlib.util.find_spec("matplotlib"):
        op = cfg.op
        title = f"{list(op.shape)}, up {op.up}, down {op.down}, k {op.kernel_size}, {describe_hardware(cfg.device)}"
        plot_growth(rows, title, folder / "growth.svg")
    print(f"written to {folder}")
