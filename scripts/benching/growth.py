"""carafepp-bench growth: how the operator's time grows with channels, pixels, taps and threads, one of them varied at a time."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from ...kernels.geometry import Spec, check_spec
from ...tasks.runs import write_csv
from ..app import app
from .operator import OURS, hardware, keep_freed_memory, measure

# of the shape that is asked for
CHANNEL_FACTORS = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4)
SIZE_FACTORS = (1 / 4, 1 / 2, 1, 2)
KERNEL_SIZES = (1, 3, 5, 7, 9)


def variants(cfg: DictConfig) -> Iterator[tuple[str, int, dict, int]]:
    """Yield (what varies, its value, changes of the op, threads)."""
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


def plot(rows: list[dict], title: str, path: Path) -> None:
    """A panel for each of what varies; dotted: in proportion to the work."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 8, "svg.fonttype": "none"}):
        panels = list(dict.fromkeys(row["varies"] for row in rows))
        figure = Figure(figsize=(2.5 * len(panels), 2.8), layout="constrained")
        for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for mode, label in (("forward", "forward"), ("both", "forward + backward")):
                chosen = sorted((row["value"], row["ms"]) for row in rows if row["varies"] == panel and row["mode"] == mode)
                axis.plot(*zip(*chosen, strict=True), "o-", markersize=3, label=label)
                # through the largest, where what does not grow weighs least; from one thread on
                at, ms = chosen[0 if panel == "threads" else -1]
                axis.plot(
                    [v for v, _ in chosen],
                    [ms * (at / v if panel == "threads" else v / at) for v, _ in chosen],
                    ":",
                    color="gray",
                    linewidth=1,
                )
            axis.set(xscale="log", yscale="log", xlabel=panel)
        figure.axes[0].set(ylabel="ms")
        figure.axes[0].legend()
        figure.suptitle(title)
        figure.savefig(path)


@app("bench")
def growth(cfg: DictConfig) -> None:
    """Print the times and leave them in the run folder."""
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    keep_freed_memory()
    rows = []
    ours = OURS[torch.device(cfg.device).type == "cuda"]
    print(hardware(cfg.device), f"{'':<15}{'':>10}{'forward':>10}{'both':>10}  ms", sep="\n")
    for varies, value, changes, threads in variants(cfg):
        chosen = OmegaConf.merge(cfg, {"op": changes, "providers": [ours]})
        spec = Spec(**{name: chosen.op[name] for name in Spec._fields})
        check_spec(spec)
        torch.set_num_threads(threads)
        found = [{"varies": varies, "value": value, "threads": threads} | row for row in measure(chosen, spec)]
        times = {row["mode"]: row["ms"] for row in found}
        print(f"{varies:<15}{value:>10}{times['forward']:>10.2f}{times['both']:>10.2f}", flush=True)
        rows += found
    folder = Path(HydraConfig.get().runtime.output_dir)
    write_csv(folder / "growth.csv", rows)
    if importlib.util.find_spec("matplotlib"):
        op = cfg.op
        title = f"{list(op.shape)}, up {op.up}, down {op.down}, k {op.kernel_size}, {hardware(cfg.device)}"
        plot(rows, title, folder / "growth.svg")
    print(f"written to {folder}")


def main() -> None:
    """Run carafepp-bench growth."""
    growth()
