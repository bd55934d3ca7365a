"""One training step of the operator on the emulator: every launch compiled for sm_80 and run, results against float64, and what it cost."""

import math
from typing import NamedTuple

import torch
from carafepp.kernels.geometry import LSE_NORMALIZERS, PADDED_BORDERS, Spec
from carafepp.kernels.gpu import operator_launches
from carafepp.kernels.gpu.launch import Launch
from carafepp.kernels.gpu.tiles.geometry import DIRECTIONS, KernelName, Tile
from carafepp.kernels.gpu.tiles.ranking import choose_backward, choose_tile
from carafepp.kernels.reference import reassemble_reference
from operator_cases import differentiate, random_inputs, relative_error
from ptx import GPU, dram_microseconds
from ptx.bounds import GPUS
from ptx.jit import execute

# resources of the whole device; the others are those of a multiprocessor
SHARED_BY_ALL = ("dram", "l2")


class Pass(NamedTuple):
    """Forward or backward: one entry of `stats` per kernel launched."""

    stats: dict[str, dict]
    least: int  # bytes that must move: every input read once, every output written once
    gpu: GPU

    @property
    def warp_insts(self) -> int:
        return sum(s["warp_insts"] for s in self.stats.values())

    @property
    def dram_ratio(self) -> float:
        """Bytes moved from and to memory over the least."""
        return sum(s["dram_bytes"] for s in self.stats.values()) / self.least

    @property
    def bound_ratio(self) -> float:
        """Least time of every kernel on its own bottleneck, over the time that the least bytes take."""
        return sum(max(s["bound"].values()) for s in self.stats.values()) / dram_microseconds(self.least, self.gpu)

    @property
    def limiters(self) -> str:
        return ", ".join(s["limiter"] for s in self.stats.values())


class Step(NamedTuple):
    errors: dict[str, float]  # of y, dx, dlogits: largest error over the largest expected value, NaN where something is not written
    forward: Pass
    backward: Pass


def emulate(launch: Launch, capability: int = 80) -> dict:
    """Run a launch on its CPU tensors, in place, as compiled for a capability."""
    return execute(launch.source(), launch.options, launch.grid, launch.parameters(), capability=capability)


def fill_scratch(launches: list[Launch]) -> None:
    """Fill what launches fill for later ones with NaN, before any of them runs."""
    for launch in launches:
        # logits are in the place of weights that a launch does not need
        needless = {"weights"} if launch.constants.get("NEED_WEIGHTS") is False else set()
        for name in {"copy", "weights", "weights_ptr", "gradients"} & launch.arguments.keys() - needless:
            scratch = launch.arguments[name]
            (scratch if isinstance(scratch, torch.Tensor) else scratch.ptr).fill_(math.nan)


def training_step(
    n,
    c,
    h,
    w,
    spec: Spec,
    dtype=torch.float16,
    memory_format=torch.contiguous_format,
    *,
    capability=80,
    place=None,
    images=None,
    tiles: dict[KernelName, Tile] | None = None,
    run=None,
) -> Step:
    """Emulate forward and backward on random features [n, c, h, w] and logits, with outputs full of NaN.

    Args:
        capability: 80, 90 or 100, what to compile for and the GPU to count for (`ptx.bounds.GPUS`).
        images: choose the tiles, if there are any, for this many images and count as if they kept all multiprocessors busy; n if None.
        tiles: those of forward and of the kernels of backward, in place of the chosen ones.
        place: takes the name ("x", "logits", "y", "dy", "dx", "dlogits") and the size of a tensor and returns where to keep it, or None.
        run: runs a launch for a capability and returns what it counts; `emulate` if None.
    """

    def tensor(name, size):
        kept = place(name, size) if place else None
        return torch.empty(size, dtype=dtype, memory_format=memory_format) if kept is None else kept

    drawn = zip(("x", "logits", "dy"), random_inputs(n, c, h, w, spec, dtype), strict=True)
    x, logits, dy = (tensor(name, values.shape).copy_(values) for name, values in drawn)
    y, dx, dlogits = (tensor(name, like.shape).fill_(math.nan) for name, like in (("y", dy), ("dx", x), ("dlogits", logits)))
    cells, dcells = (t.unflatten(1, (spec.groups * spec.taps, spec.up, spec.up)) for t in (logits, dlogits))
    lse = torch.full((n, spec.groups, *cells.shape[2:]) if spec.normalizer in LSE_NORMALIZERS else (0,), math.nan)

    pair = divmod(capability, 10)
    if tiles:
        chosen = dict(tiles)
    elif images and spec.border not in PADDED_BORDERS:
        many = operator_launches.problem_of(x, cells, y, spec, pair)._replace(batch=images * spec.groups)
        chosen = {kernel: choose_tile(kernel, many) for kernel in ("forward", *choose_backward(many))}
    else:
        chosen = dict.fromkeys(DIRECTIONS)
    launches = operator_launches.forward_launches(x, cells, y, lse, spec, tile=chosen.pop("forward"), capability=pair)
    forward = _run(launches, (x, logits, y), capability, run, filled=images is not None)
    launches = []
    for kernel, tile in chosen.items():
        needed = (None if kernel == "logit_gradient" else dx, None if kernel == "source_gradient" else dcells)
        launches += operator_launches.backward_launches(dy, x, cells, lse, *needed, spec, tile=tile, capability=pair)
    backward = _run(launches, (dy, x, logits, dx, dlogits), capability, run, filled=images is not None)
    expected = differentiate(reassemble_reference, x.double(), logits.double(), dy.double(), **spec._asdict())
    errors = {name: relative_error(result, expected[name]) for name, result in {"y": y, "dx": dx, "dlogits": dlogits}.items()}
    return Step(errors, forward, backward)


def _run(launches: list[Launch], tensors, capability: int, run, *, filled: bool) -> Pass:
    stats = {}
    fill_scratch(launches)
    for launch in launches:
        found = (run or emulate)(launch, capability)
        if filled:
            share = min(1.0, launch.grid[0] / GPUS[capability].multiprocessors)
            bound = {name: time if name in SHARED_BY_ALL else time * share for name, time in found["bound"].items()}
            found |= {"bound": bound, "limiter": max(bound, key=bound.__getitem__)}
        stats[f"{launch.kernel.__name__} {len(stats)}"] = found
    return Pass(stats, sum(t.numel() * t.element_size() for t in tensors), GPUS[capability])
