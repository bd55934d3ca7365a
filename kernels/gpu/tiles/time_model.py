"""A model of the time of a kernel: counted work, times fitted costs, on the programs that a multiprocessor holds.

A multiprocessor with n programs, of which it holds r at a time, runs them in waves of r, and the rest in a last one:

    wave(r) = norm(alone, r * busy)
    time = norm(wave(r) * (n // r) + wave(n % r), copy) + first + launch        wave(0) = 0

- *alone*: the time of a program alone: the latency of its loops, the instructions of its warps, and its memory operations. Programs that
  are resident at the same time share this time.
- *busy*: the time in which the multiprocessor can do the work of a program. Its units work at the same time: those that access memory and
  shared memory, issue instructions, and multiply matrices.
- *copy*: the memory moves the least bytes at the speed of a copy.
- *first*: the first programs meet cold caches.

`norm` joins times that overlap in part: it is at least the longest and at most the sum.

The costs are fitted to kernels measured on H200s (tests/support/fit_tile_time.py). docs/performance_kernels.md says how well the model
predicts problems that the fit has not seen. On other devices, the same cycles are spread over their multiprocessors at their clock; no
measurement supports this. The model does not describe float32 products in plain TF32, kernels that work tap by tap, and spilled registers.
"""

from functools import cache
from typing import NamedTuple

from .geometry import KernelName, Tile, TileProblem, source_bytes
from .residency import RESIDENCY_LIMITS, resident_blocks
from .resources import Resources, estimate_resources
from .work import Work, count_work

# time of a launch without work, in microseconds
LAUNCH = 1.5
# speed of a transposition over that of a copy
TRANSPOSITION_SPEED = 0.85
# instructions that a multiprocessor issues in a cycle
ISSUE = 4
# exponents of the norms that join the times of parts, and of the units of a multiprocessor
PARTS, UNITS = 1.5, 2
# products of a step, one after the other, by element size: float32 has three of split operands
PRODUCTS = {2: 1, 4: 3}


class Device(NamedTuple):
    """The speed of one device."""

    multiprocessors: int
    clock: float  # GHz
    copy: float  # bytes that a copy reads and writes in a second, in TB


# one device of each capability: V100, A100, A40, RTX 4090, H200, B200; others take the nearest capability below
DEVICES = {
    (7, 0): Device(80, 1.53, 0.8),
    (8, 0): Device(108, 1.41, 1.8),
    (8, 6): Device(84, 1.74, 0.6),
    (8, 9): Device(128, 2.52, 0.9),
    (9, 0): Device(132, 1.755, 4.3),
    (10, 0): Device(148, 1.85, 7.0),
}


class Costs(NamedTuple):
    """The cost of a unit of each kind of work: cycles of a multiprocessor, or instructions of a warp."""

    line: float  # cycles
    partial: float
    copy: float
    shared_pass: float
    load: float  # instructions
    store: float
    logit: float
    band: float
    exchange: float
    start: float  # of each warp
    instruction: float  # cycles until a warp issues the next one
    step: float  # latency of the loads of a step of a loop, in cycles
    stage: float  # share of this latency that every further stage of the pipeline hides, over the share that remains
    product: float  # latency of a product, with the synchronisation around it
    first: float  # of the time of a program alone


COSTS = Costs(
    line=1.2,
    partial=0.868,
    copy=1.97,
    shared_pass=0.905,
    load=0.495,
    store=7.37,
    logit=9.71,
    band=28.4,
    exchange=23,
    start=438,
    instruction=2.75,
    step=155,
    stage=0.832,
    product=428,
    first=0.424,
)


class Estimate(NamedTuple):
    """The predicted time of a kernel in microseconds, and its parts."""

    total: float
    alone: float
    busy: float
    copy: float


def estimate_time(kernel: KernelName, problem: TileProblem, tile: Tile, resources: Resources | None = None) -> Estimate:
    """Return the predicted time of a kernel on the device of the capability of the problem.

    Args:
        kernel: the kernel.
        problem: the call.
        tile: the tile.
        resources: those of the compiled kernel; without them they are estimated.
    """
    works = count_work(kernel, problem, tile)
    registers, shared = resources or estimate_resources(kernel, problem, tile)
    device = find_device(problem.capability)
    return combine(
        COSTS,
        works,
        stages=count_stages(tile),
        products=PRODUCTS[problem.element_size],
        # a program that does not fit has no time; the limits of tiles exclude it
        resident=max(1, count_resident(problem.capability, registers, shared, tile.num_warps)),
        multiprocessors=device.multiprocessors,
        clock=device.clock,
        copy=copy_microseconds(problem, kernel),
    )


def count_stages(tile: Tile) -> int:
    """Return the stages of the pipeline of a kernel; programs that walk have none."""
    return tile.num_stages if tile.steps == 1 else 1


@cache
def find_device(capability: tuple[int, int]) -> Device:
    """Return the device of this capability, or of the nearest one below."""
    return DEVICES[max((known for known in DEVICES if known <= capability), default=min(DEVICES))]


def count_resident(capability: tuple[int, int], registers: int, shared: int, warps: int) -> int:
    """Return how many programs a multiprocessor holds at the same time, 0 if it has no room for one."""
    limits = max((known for known in RESIDENCY_LIMITS if known <= 10 * capability[0] + capability[1]), default=min(RESIDENCY_LIMITS))
    return resident_blocks(limits, registers, shared, warps)[0]


def copy_microseconds(problem: TileProblem, kernel: KernelName) -> float:
    """Return the microseconds in which the device copies the least bytes of a kernel: those of the tensors that it reads or fills."""
    spec = problem.spec
    cells = problem.height * problem.width * problem.batch
    sources, targets = (cells * problem.channels * scale**2 for scale in (spec.down, spec.up))
    logits = cells * spec.taps * spec.up**2
    # a gradient to the logits is as large as they are, and a gradient to the features as large as the features
    elements = {
        "forward": sources + logits + targets,
        "backward": 2 * sources + 2 * logits + targets,
        "logit_gradient": sources + 2 * logits + targets,
        "source_gradient": sources + logits + targets,
    }
    return elements[kernel] * problem.element_size / find_device(problem.capability).copy * 1e-6


def transposition_microseconds(problem: TileProblem) -> float:
    """Return the microseconds of the launch that copies source features in NCHW to channels_last."""
    # it reads and writes every byte
    return LAUNCH + 2 * source_bytes(problem) / find_device(problem.capability).copy * 1e-6 / TRANSPOSITION_SPEED


def weighing_microseconds(problem: TileProblem) -> float:
    """Return the microseconds of the launch that computes weights in the place of logits."""
    # it reads the logits and writes as many weights, in another order
    return LAUNCH + 2 * writing_microseconds(problem)


def writing_microseconds(problem: TileProblem) -> float:
    """Return the microseconds in which weights are written in the place of logits."""
    logits = problem.batch * problem.height * problem.width * problem.spec.taps * problem.spec.up**2 * problem.element_size
    return logits / find_device(problem.capability).copy * 1e-6 / TRANSPOSITION_SPEED


def combine(
    costs: Costs,
    works: tuple[Work, ...],
    *,
    stages: float,
    products: float,
    resident: float,
    multiprocessors: float,
    clock: float,
    copy: float,
) -> Estimate:
    """Return the time of a kernel. Every argument except the costs may also be an array, for many kernels at a time.

    Args:
        costs: the fitted costs.
        works: the work of each kind of program.
        stages: of the pipelines of the kernel.
        products: of a step.
        resident: programs that a multiprocessor holds at the same time.
        multiprocessors: of the device.
        clock: GHz.
        copy: microseconds for a copy of the least bytes.
    """
    alone = busy = programs = 0.0
    latency = costs.step / (1 + costs.stage * (stages - 1)) + costs.product * products
    for work in works:
        memory = costs.line * work.lines + costs.partial * work.partials + costs.copy * work.copies
        shared = costs.shared_pass * work.passes
        instructions = costs.load * work.loads + costs.store * work.stores + costs.logit * work.logits + costs.band * work.band
        instructions = instructions + costs.exchange * work.exchanges + costs.start * work.warps
        used = latency * work.steps + costs.instruction * instructions / work.warps + memory + shared + work.products
        alone = alone + work.programs * used
        busy = busy + work.programs * _norm(UNITS, memory, shared, instructions / ISSUE, work.products)
        programs = programs + work.programs
    # of a program, in microseconds
    alone, busy = (cycles * 1e-3 / clock / programs for cycles in (alone, busy))
    held = -(-programs // multiprocessors)
    # the fewer of both, of numbers and of arrays
    wave = held + (resident - held) * (resident < held)
    waves, rest = held // wave, held % wave
    computed = waves * _norm(PARTS, alone, wave * busy) + (rest > 0) * _norm(PARTS, alone, rest * busy)
    total = _norm(PARTS, computed, copy) + costs.first * alone + LAUNCH
    return Estimate(total, alone * (waves + (rest > 0)), busy * held, copy)


def _norm(exponent: float, *times: float) -> float:
    return sum(time**exponent for time in times) ** (1 / exponent)
