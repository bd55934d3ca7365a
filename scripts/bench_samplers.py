"""carafepp-bench samplers: what every sampler costs, beside what was published."""

import json
import weakref
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from statistics import median

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from .app import app

GROUPS = files("carafepp.conf")

# C, H, W of the source: the feature pyramid of an 800 x 1344 image, and where ResNet-50 downsamples a 224 x 224 image
SITES = {
    "upsampler": [(256, 25, 42), (256, 50, 84), (256, 100, 168)],
    "downsampler": [(64, 112, 112), (128, 56, 56), (256, 56, 56), (256, 28, 28), (512, 28, 28), (512, 14, 14), (1024, 14, 14)],
}
# what times are relative to
BASELINES = {"upsampler": "nearest", "downsampler": "strided_conv"}
# parameters at C = 256: CARAFE (Wang et al., 2019), Table 2, the convolutions and CARAFE exactly; DySample (Liu et al., 2023)
PUBLISHED = {
    "nearest": "0",
    "bilinear": "0",
    "nearest_conv": "590,080",
    "bilinear_conv": "590,080",
    "deconv": "590,080",
    "pixel_shuffle": "2,360,320",
    "gum": "132 K",
    "spatial_attention": "2.3 K",
    "carafe": "74,148",
    "dysample": "8.2 K",
}

aten = torch.ops.aten


def _per_output(flops: int) -> Callable[..., int]:
    return lambda *args, out_shape, **kwargs: flops * torch.Size(out_shape).numel()


# what FlopCounterMode leaves out, per output element: interpolation (as Table 2 of CARAFE counts it), pools, elementwise functions
FLOPS = {
    aten.upsample_bilinear2d: _per_output(8),
    aten.grid_sampler_2d: _per_output(8),
    aten.avg_pool2d: _per_output(9),
    **{
        op: _per_output(1)
        for op in (aten.add, aten.sub, aten.mul, aten.div, aten.exp, aten.pow, aten.sigmoid, aten.relu, aten.relu_, aten.leaky_relu)
    },
}


class PeakMemory(TorchDispatchMode):
    """Count the bytes of the tensors that are created inside and alive at the same time, at most: `peak`."""

    def __init__(self):
        super().__init__()
        self.live = set()
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.live:
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                self.live.add(key)
                weakref.finalize(storage, self._free, key, size)
                self.bytes += size
                self.peak = max(self.peak, self.bytes)
        return out

    def _free(self, key: int, size: int) -> None:
        self.live.discard(key)
        self.bytes -= size


def peak_memory(run: Callable[[], None], device: str) -> int:
    """Bytes that `run` needs at most beyond those in use before; on a GPU with the workspaces of libraries."""
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with PeakMemory() as memory:
        run()
    return memory.peak


def slots(group: str) -> dict[str, Callable[[int], nn.Module]]:
    """Every occupant that the configuration has for the slots of `group`, the baseline first."""
    paths = sorted((Path(path.name).stem, path) for path in (GROUPS / group).iterdir())
    slots = {name: instantiate(OmegaConf.create(path.read_text())) for name, path in paths if name != "published"}
    return {BASELINES[group]: slots.pop(BASELINES[group]), **slots}


def inputs(module: nn.Module, shape: tuple[int, ...], **options) -> list[Tensor]:
    """x [N, C, H, W], and for a sampler that needs one a guide [N, C, 2H, 2W]."""
    n, c, h, w = shape
    sizes = [(h, w), (2 * h, 2 * w)] if getattr(module, "needs_guide", False) else [(h, w)]
    return [torch.randn(n, c, *size, **options).requires_grad_() for size in sizes]


def flops_per_pixel(slot: Callable[[int], nn.Module], shape: tuple[int, ...]) -> float:
    """FLOPs of one forward, 2 for a multiply-add, over the pixels of the output [N, C, Ho, Wo]; normalisation layers are left out."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
        module = slot(shape[1])
        y = module(*(x.detach() for x in inputs(module, shape)))
    return counter.get_total_flops() / (y.shape[0] * y.shape[2] * y.shape[3])


def measure(slot: Callable[[int], nn.Module], shape: tuple[int, ...], cfg: DictConfig) -> dict:
    """Parameters, FLOPs, median times (ms) and peak memory (MB) of one sampler at one site."""
    options = {"device": cfg.device, "dtype": getattr(torch, cfg.dtype)}
    module = slot(shape[1]).to(**options)
    arguments = inputs(module, shape, **options)
    if cfg.channels_last:
        module = module.to(memory_format=torch.channels_last)
        arguments = [x.detach().contiguous(memory_format=torch.channels_last).requires_grad_() for x in arguments]
    leaves = [*arguments, *module.parameters()]
    dy = torch.randn_like(module(*arguments))

    def forward():
        with torch.no_grad():
            module(*arguments)

    def step():
        torch.autograd.grad(module(*arguments), leaves, dy)

    def time(run) -> float:
        timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
        return median(timer.blocked_autorange(min_run_time=cfg.seconds).times) * 1e3

    return {
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "flops_per_pixel": flops_per_pixel(slot, shape),
        "forward_ms": time(forward),
        "step_ms": time(step),
        "peak_mb": peak_memory(step, cfg.device) / 1e6,
    }


def rows(cfg: DictConfig) -> Iterator[dict]:
    """Measure every chosen sampler at every site of its group."""
    for group in cfg.groups:
        for c, h, w in SITES[group]:
            baseline = None
            for name, slot in slots(group).items():
                if cfg.names is not None and name not in (*cfg.names, BASELINES[group]):
                    continue
                row = {"group": group, "site": [c, h, w], "sampler": name, **measure(slot, (cfg.batch, c, h, w), cfg)}
                baseline = baseline or row
                row["forward_relative"] = row["forward_ms"] / baseline["forward_ms"]
                row["step_relative"] = row["step_ms"] / baseline["step_ms"]
                row["published_parameters"] = PUBLISHED.get(name, "") if group == "upsampler" and c == 256 else ""
                yield row


HEADER = "{:<18}{:>12}{:>12}{:>14}{:>12}{:>8}{:>12}{:>8}{:>10}"
LINE = "{sampler:<18}{parameters:>12,}{published_parameters:>12}{flops_per_pixel:>14,.0f}{forward_ms:>12.2f}{forward_relative:>8.1f}"
LINE += "{step_ms:>12.2f}{step_relative:>8.1f}{peak_mb:>10.1f}"


def bench_samplers(cfg: DictConfig) -> list[dict]:
    """Print one table a site, row by row as they are measured, and return the rows.

    Raises:
        ValueError: a sampler that no configuration file has.
    """
    known = {name for group in SITES for name in slots(group)}
    for name in cfg.names or ():
        if name not in known:
            raise ValueError(f"names must be among {', '.join(sorted(known))}, got {name!r}")
    device = torch.cuda.get_device_name() if torch.device(cfg.device).type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"batch {cfg.batch}, {cfg.dtype}, {'channels_last' if cfg.channels_last else 'contiguous'}, {device}, torch {torch.__version__}")
    print("FLOPs per output pixel of a forward; median ms of a forward, and of a forward and backward; peak MB of tensors in the latter")
    site, done = None, []
    for row in rows(cfg):
        if row["site"] != site:
            site = row["site"]
            c, h, w = site
            print(f"\n{row['group']}s at C = {c}, {h} x {w}")
            relative = f"/ {'nearest' if row['group'] == 'upsampler' else 'conv'}"
            print(HEADER.format("", "parameters", "published", "FLOPs/pixel", "forward", relative, "+ backward", relative, "peak MB"))
        print(LINE.format(**row), flush=True)
        done.append(row)
    if cfg.json:
        Path(cfg.json).write_text(json.dumps(done, indent=1))
    return done


@app("bench_samplers")
def main(cfg: DictConfig) -> None:
    """Measure the samplers."""
    bench_samplers(cfg)


if __name__ == "__main__":
    main()
