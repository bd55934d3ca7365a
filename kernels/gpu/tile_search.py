"""The search for the fastest tile of a kernel: by measured times on a GPU, or by counts of compiled instructions without one."""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..reference import reassemble_reference
from .assembly import compile_launch, read_assembly
from .clock import measure_milliseconds
from .launch import Launch, compile_for_current_device
from .tiles.geometry import KernelName, Tile
from .tiles.ranking import rank_tiles, rank_wide_tiles
from .training_step import TrainingStep

# measurements of a tile; the result is their median
MEASUREMENTS = 21
# the names of the arguments that a kernel fills
RESULTS: dict[KernelName, tuple[str, ...]] = {
    "forward": ("y",),
    "backward": ("dx", "dlogits"),
    "logit_gradient": ("dlogits",),
    "source_gradient": ("dx",),
}
# relative error (Frobenius norm) beyond which a result is wrong: hundreds of roundings; float32 products may be in plain TF32
TOLERANCES = {torch.float32: 1e-2, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class UnusableTileError(Exception):
    """A tile that the device cannot run, or with which the result is wrong; the message is the reason."""


class Search(NamedTuple):
    """The outcome of a search."""

    timed: list[tuple[float, Tile]]  # milliseconds, the fastest first
    skipped: Counter[str]  # tiles by the reason why they have no time


def time_tiles(step: TrainingStep, kernel: KernelName, limit: int, patience: int) -> Search:
    """Time the tiles of the wide search on the device of the step, in the order of their predicted times.

    Args:
        step: tensors on a GPU.
        kernel: the kernel.
        limit: tiles to time at most.
        patience: tiles that may follow the fastest one without being faster, before the search ends.
    """
    expected = compute_results(step, kernel)
    # the gradients read the log-sum-exp of forward
    for launch in step._replace(y=torch.empty_like(step.y)).build_launches("forward"):
        launch.start(compile_for_current_device(launch))
    target = triton.runtime.driver.active.get_current_target()
    # a kernel may have the launch of a copy before it
    launches = {tile: step.build_launches(kernel, tile=tile) for tile in rank_wide_tiles(kernel, step.problem())[:limit]}
    pool = ThreadPoolExecutor()
    compiled = {tile: [pool.submit(triton.compile, x.source(), target, x.options) for x in each] for tile, each in launches.items()}

    def measure(tile: Tile) -> float:
        starts = [functools.partial(x.start, code.result()) for x, code in zip(launches[tile], compiled[tile], strict=True)]

        def start() -> None:
            for launch in starts:
                launch()

        try:
            start()
        except triton.runtime.errors.OutOfResources:
            raise UnusableTileError("needs more than a multiprocessor has") from None
        check_results(launches[tile][-1], expected)
        return median(measure_milliseconds(start, step.x.device) for _ in range(MEASUREMENTS))

    try:
        return find_fastest(launches, measure, patience)
    finally:
        pool.shutdown(cancel_futures=True)


def find_fastest(tiles: Iterable[Tile], measure: Callable[[Tile], float], patience: int) -> Search:
    """Measure tiles until `patience` of them in a row are not faster than the fastest before them; UnusableTileError skips a tile."""
    timed: list[tuple[float, Tile]] = []
    skipped: Counter[str] = Counter()
    slower = 0
    for tile in tiles:
        try:
            milliseconds = measure(tile)
        except UnusableTileError as reason:
            skipped[str(reason)] += 1
            continue
        slower = slower + 1 if timed and milliseconds >= min(timed)[0] else 0
        timed.append((milliseconds, tile))
        if slower >= patience:
            break
    return Search(sorted(timed), skipped)


def compute_results(step: TrainingStep, kernel: KernelName) -> dict[str, Tensor]:
    """Return the results of a kernel by the definition of the operator."""
    spec = step.spec
    x, logits = step.x.detach().requires_grad_(), step.logits.flatten(1, 3).requires_grad_()
    y = reassemble_reference(x, logits, **spec._asdict())
    if kernel == "forward":
        return {"y": y.detach()}
    dx, dlogits = torch.autograd.grad(y, (x, logits), step.y)
    results = {"dx": dx, "dlogits": dlogits.unflatten(1, step.logits.shape[1:4])}
    return {name: results[name] for name in RESULTS[kernel]}


def check_results(launch: Launch, expected: dict[str, Tensor]) -> None:
    """Compare what a launch has filled with the expected results.

    Raises:
        UnusableTileError: if they differ by more than roundings.
    """
    for name, right in expected.items():
        error = (launch.arguments[name].ptr.float() - right.float()).norm() / right.float().norm()
        if not error < TOLERANCES[right.dtype]:
            raise UnusableTileError("gives a wrong result")


def count_instructions(step: TrainingStep, kernel: KernelName, limit: int, capability: int) -> Iterator[tuple[float, Tile]]:
    """Yield millions of warp instructions of the `limit` highest-ranked tiles, except tiles that spill or do not fit.

    Every instruction in the code of a program counts once, also inside loops.

    Args:
        step: tensors, usually on "meta".
        kernel: the kernel.
        limit: tiles to compile.
        capability: the compute capability to compile for, 80 for 8.0.
    """
    pair = divmod(capability, 10)
    for tile in rank_tiles(kernel, step.problem(pair))[:limit]:
        launches = step.build_launches(kernel, tile=tile, capability=pair)
        codes = [read_assembly(compile_launch(launch, capability)) for launch in launches]
        if all(not code.spills and code.blocks for code in codes):
            yield sum(code.instructions * x.num_warps * x.grid[0] for x, code in zip(launches, codes, strict=True)) / 1e6, tile
