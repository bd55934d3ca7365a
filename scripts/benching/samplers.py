"""carafepp-bench samplers: parameters, FLOPs, time and memory of every sampler, with published figures."""

import math
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ...tasks.writing import write_csv
from ..common.options import look_up
from ..common.sites import DTYPES
from .hardware import describe_hardware
from .memory import measure_peak_bytes
from .timing import CLOCKS, time_in_turns

GROUPS = files("carafepp.conf")

# C, H, W of the source: in the feature pyramid of an 800 x 1344 image, and where ResNet-50 downsamples a 224 x 224 image
SITES = {
    "upsampler": [(256, 25, 42), (256, 50, 84), (256, 100, 168)],
    "downsampler": [(64, 112, 112), (128, 56, 56), (256, 56, 56), (256, 28, 28), (512, 28, 28), (512, 14, 14), (1024, 14, 14)],
}
# the sampler by whose times the other times are divided
BASELINES = {"upsampler": "nearest", "downsampler": "strided_conv"}
# parameters at C = 256 from CARAFE (Wang et al., 2019), Table 2, exact for the convolutions and CARAFE, from DySample (Liu et al., 2023),
# and of the modules that the authors of the later samplers published
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
    "dlu": "35,489",
    "lda_aqu": "39,410",
    "freq_fusion": "104,690",
    "resfu": "47,570",
    "jbu": "26,726",
    "local_attender": "1,285",
}

aten = torch.ops.aten


def flops_per_output(flops: int) -> Callable[..., int]:
    """Return a FLOP formula that counts `flops` for every element of the output."""
    return lambda *args, out_shape, **kwargs: flops * torch.Size(out_shape).numel()


def count_fft_flops(x: torch.Size, dim: list[int], *args: Any, out_shape: torch.Size, **kwargs: Any) -> int:
    """Count the FLOPs of a Fourier transform of radix 2: 5 log2(size) for every element."""
    return round(5 * math.log2(math.prod(x[i] for i in dim)) * torch.Size(out_shape).numel())


# operations without a formula in FlopCounterMode: interpolation (as Table 2 of CARAFE counts it), pools, Fourier transforms,
# elementwise functions
FLOPS = {
    aten.upsample_bilinear2d: flops_per_output(8),
    aten.grid_sampler_2d: flops_per_output(8),
    aten.avg_pool2d: lambda x, kernel_size, *args, out_shape, **kwargs: math.prod(kernel_size) * torch.Size(out_shape).numel(),
    aten._fft_c2c: count_fft_flops,
    **{
        op: flops_per_output(1)
        for op in (aten.add, aten.sub, aten.mul, aten.div, aten.exp, aten.pow, aten.sigmoid, aten.relu, aten.relu_, aten.leaky_relu)
    },
}


def load_slots(group: str) -> dict[str, Callable[[int], nn.Module]]:
    """Load every sampler of a configuration group (conf/upsampler, conf/downsampler) by name, the baseline first."""
    paths = sorted((Path(path.name).stem, path) for path in (GROUPS / group).iterdir())
    slots = {name: instantiate(OmegaConf.create(path.read_text())) for name, path in paths if name not in ("published", "shared")}
    return {BASELINES[group]: slots.pop(BASELINES[group]), **slots}


def make_inputs(
    module: nn.Module, shape: tuple[int, ...], memory_format: torch.memory_format = torch.contiguous_format, **options: Any
) -> list[Tensor]:
    """Make random features [N, C, H, W], followed by a guide [N, C, 2H, 2W] for a sampler that needs one."""
    n, c, h, w = shape
    sizes = [(h, w), (2 * h, 2 * w)] if getattr(module, "needs_guide", False) else [(h, w)]
    return [torch.randn(n, c, *size, **options).contiguous(memory_format=memory_format).requires_grad_() for size in sizes]


def count_flops_per_pixel(slot: Callable[[int], nn.Module], shape: tuple[int, ...]) -> float:
    """Count the FLOPs of a forward pass (2 for a multiply-add, 0 for normalisation layers) per pixel of the output [N, C, Ho, Wo]."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
        module = slot(shape[1])
        y = module(*(x.detach() for x in make_inputs(module, shape)))
    return counter.get_total_flops() / (y.shape[0] * y.shape[2] * y.shape[3])


class SamplerCalls:
    """The calls of one sampler on fixed inputs, by mode."""

    def __init__(self, module: nn.Module, arguments: list[Tensor]):
        self.module, self.arguments = module, arguments
        self.leaves = [*arguments, *module.parameters()]
        self.dy = torch.randn_like(self.forward())

    def forward(self) -> Tensor:
        """Compute the output without a graph."""
        with torch.no_grad():
            return self.module(*self.arguments)

    def step(self) -> tuple[Tensor, ...]:
        """Compute the output and the gradients of inputs and parameters."""
        return torch.autograd.grad(self.module(*self.arguments), self.leaves, self.dy)


def measure_site(group: str, shape: tuple[int, ...], cfg: DictConfig) -> list[dict]:
    """Measure the chosen samplers of a group and its baseline at one site, features [N, C, H, W]; return a row of figures for each."""
    chosen = {name: slot for name, slot in load_slots(group).items() if cfg.names is None or name in (*cfg.names, BASELINES[group])}
    options = {"device": cfg.device, "dtype": look_up("dtype", [cfg.dtype], DTYPES)[0]}
    memory_format = torch.channels_last if cfg.channels_last else torch.contiguous_format
    runs = {}
    for name, slot in chosen.items():
        module = slot(shape[1]).to(**options, memory_format=memory_format)
        runs[name] = SamplerCalls(module, make_inputs(module, shape, memory_format=memory_format, **options))
    peaks = {name: measure_peak_bytes(run.step, cfg.device) for name, run in runs.items()}
    calls = {(name, mode): getattr(run, mode) for mode in ("forward", "step") for name, run in runs.items()}
    times = time_in_turns(calls, cfg.device, cfg.rounds, clock=CLOCKS[cfg.clock], seconds=cfg.seconds)
    rows = []
    for name, slot in chosen.items():
        forward, step = (median(times[name, mode]) for mode in ("forward", "step"))
        rows.append(
            {
                "group": group,
                "shape": list(shape),
                "sampler": name,
                "guided": getattr(runs[name].module, "needs_guide", False),
                "parameters": sum(parameter.numel() for parameter in runs[name].module.parameters()),
                "published_parameters": PUBLISHED.get(name, "") if group == "upsampler" and shape[1] == 256 else "",
                "flops_per_pixel": count_flops_per_pixel(slot, shape),
                "forward_ms": forward,
                "forward_relative": forward / median(times[BASELINES[group], "forward"]),
                "step_ms": step,
                "step_relative": step / median(times[BASELINES[group], "step"]),
                "peak_mb": peaks[name] / 1e6,
            }
        )
    return rows


# 97 characters, for a terminal of 100
HEADER = "{:<18}{:>11}{:>11}{:>12}{:>10}{:>7}{:>12}{:>7}{:>9}"
LINE = "{sampler:<18}{parameters:>11,}{published_parameters:>11}{flops_per_pixel:>12,.0f}{forward_ms:>10.2f}{forward_relative:>7.1f}"
LINE += "{step_ms:>12.2f}{step_relative:>7.1f}{peak_mb:>9.1f}"


def measure_samplers(cfg: DictConfig) -> list[dict]:
    """Measure the chosen samplers at every site of their groups, print a table for each site, and return all rows.

    Raises:
        ValueError: a group, a sampler or a clock does not exist.
    """
    look_up("clock", [cfg.clock], CLOCKS)
    look_up("groups", cfg.groups, SITES)
    if cfg.names is not None:
        look_up("names", cfg.names, dict.fromkeys(sorted({name for group in SITES for name in load_slots(group)})))
    layout = "channels_last" if cfg.channels_last else "contiguous"
    print(f"batch {cfg.batch}, {cfg.dtype}, {layout}, {describe_hardware(cfg.device)}, torch {torch.__version__}, {cfg.clock} time")
    print("FLOPs of a forward pass per output pixel; median ms of forward, and of forward and backward, with")
    print("their ratios to the baseline; peak MB of forward and backward")
    rows = []
    for group in cfg.groups:
        for c, h, w in SITES[group]:
            print(f"\n{group}s at C = {c}, {h} x {w}; the baseline is {BASELINES[group]}", flush=True)
            site = measure_site(group, (cfg.batch, c, h, w), cfg)
            print(HEADER.format("", "parameters", "published", "FLOPs/pixel", "forward", "ratio", "+ backward", "ratio", "peak MB"))
            print(*(LINE.format(**row) for row in site), sep="\n", flush=True)
            rows += site
    return rows


def bench_samplers(cfg: DictConfig) -> None:
    """Print the tables and write their rows to the run folder."""
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    rows = measure_samplers(cfg)
    path = Path(HydraConfig.get().runtime.output_dir) / "samplers.csv"
    settings = {"dtype": cfg.dtype, "channels_last": cfg.channels_last, "clock": cfg.clock}
    settings |= {"device": describe_hardware(cfg.device), "torch": torch.__version__}
    write_csv(path, [row | settings for row in rows])
    print(f"\nwritten to {path}")
