"""Searching the tiles of a problem: by the clock on a GPU, by the compiled code where there is none."""

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..geometry import Spec
from .backend import backward_launches, forward_launches, problem_of
from .clock import milliseconds
from .compiled import compile_launch, read
from .launch import Launch
from .tile_geometry import Tile
from .tiles import Problem, ranked

# a tile is timed
TIMES = 21


class Site(NamedTuple):
    """The tensors of one training step of the operator."""

    x: Tensor  # [N, C, H, W]
    logits: Tensor  # [N, G * K * K, up, up, Hq, Wq]
    y: Tensor  # [N, C, Ho, Wo]
    lse: Tensor  # [N, G, up, up, Hq, Wq]
    spec: Spec

    def problem(self, capability: tuple[int, int] | None = None) -> Problem:
        """What the choice of a tile depends on."""
        return problem_of(self.x, self.logits, self.y, self.spec, capability)

    def launch(self, name: str, tile: Tile, capability: tuple[int, int] | None = None) -> Launch:
        """The launch of a pass ("forward" or "backward") with this tile; the output stands for its gradient, inputs for theirs."""
        chosen = {"tile": tile, "capability": capability}
        if name == "forward":
            (launch,) = forward_launches(self.x, self.logits, self.y, self.lse, self.spec, **chosen)
        else:
            dx, dlogits = torch.empty_like(self.x), torch.empty_like(self.logits)
            (launch,) = backward_launches(self.y, self.x, self.logits, self.lse, dx, dlogits, self.spec, **chosen)
        return launch


def site(n: int, channels: int, height: int, width: int, spec: Spec, dtype: torch.dtype, memory_format, device: str) -> Site:
    """Features [n, channels, height, width] with random values, or none on device "meta"."""

    def random(*size: int) -> Tensor:
        empty = torch.empty(size, dtype=dtype, device=device, memory_format=memory_format)
        return empty if device == "meta" else empty.normal_()

    taps = spec.groups * spec.taps
    logits = random(n, taps * spec.up**2, spec.cells(height), spec.cells(width)).unflatten(1, (taps, spec.up, spec.up))
    lse = torch.zeros((n, spec.groups, *logits.shape[2:]), device=device)
    y = random(n, channels, spec.output_size(height), spec.output_size(width))
    return Site(random(n, channels, height, width), logits, y, lse, spec)


def timed(site: Site, name: str, limit: int) -> Iterator[tuple[float, Tile]]:
    """Yield milliseconds (median) of the `limit` most promising tiles on the device of the site, but for those that it cannot run."""
    launches = {tile: site.launch(name, tile) for tile in ranked(name, site.problem())[:limit]}
    target = triton.runtime.driver.active.get_current_target()
    with ThreadPoolExecutor() as pool:
        kernels = list(pool.map(lambda launch: triton.compile(launch.source(), target, launch.options), launches.values()))
    for (tile, launch), kernel in zip(launches.items(), kernels, strict=True):
        start = functools.partial(launch.start, kernel)
        try:
            yield median(milliseconds(start, site.x.device) for _ in range(TIMES)), tile
        except triton.runtime.errors.OutOfResources:
            continue


def compiled(site: Site, name: str, limit: int, capability: int) -> Iterator[tuple[float, Tile]]:
    """Yield millions of warp instructions of the most promising tiles that compile for 80, 90, ... without spills: each once a program."""
    pair = divmod(capability, 10)
    for tile in ranked(name, site.problem(pair))[:limit]:
        launch = site.launch(name, tile, pair)
        assembly = read(compile_launch(launch, capability))
        if not assembly.spills and assembly.blocks:
            yield assembly.instructions * launch.num_warps * launch.grid[0] / 1e6, tile
