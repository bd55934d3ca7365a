"""A model of the time of a kernel: counted work, times fitted costs, on the programs that a multiprocessor holds.

    time = sqrt(alone² + busy² + copy²) + first + tail + launch

- *alone*: every program takes the time that it would take alone: the latency of its loops and of the instructions of its warps. The
  programs that are resident at the same time share this time.
- *busy*: the multiprocessors issue all instructions and serve all memory operations.
- *copy*: the memory moves the least bytes at the speed of a copy.
- *first*: the first programs meet cold caches.
- *tail*: the last programs run while the rest of the device is idle. There is none if all programs run at the same time.

The costs are fitted to kernels measured on one H200 (tests/support/fit_tile_time.py). docs/performance_kernels.md says how well the model
predicts problems that the fit has not seen. On other devices, the same cycles are spread over their multiprocessors at their clock; no
measurement supports this. The model does not describe float32 products in plain TF32, kernels that work tap by tap, and spilled registers.
"""

from functools import cache
from typing import NamedTuple

from .residency import RESIDENCY_LIMITS, resident_blocks
from .tile_geometry import KernelName, Tile, TileProblem, source_bytes
from .tile_resources import Resources, estimate_resources
from .tile_work import Work, count_work

# time of a launch without work, in microseconds
LAUNCH = 1.5
# speed of a transposition over that of a copy
TRANSPOSITION_SPEED = 0.85
# instructions that a multiprocessor issues in a cycle
ISSUE = 4
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
    copy: float
    shared_pass: float
    load: float  # instructions
    store: float
    logit: float
    band: float
    exchange: float
    split: float
    start: float  # of each warp
    instruction: float  # cycles until a warp issues the next one
    step: float  # latency of the loads of a step of a loop, in cycles
    stage: float  # share of this latency that every further stage of the pipeline hides, over the share that remains
    product: float  # latency of a product, with the synchronisation around it
    first: float  # of the mean time of a program alone
    tail: float


COSTS = Costs(
    line=0.939,
    copy=2.89,
    shared_pass=0.708,
    load=0.395,
    store=6.82,
    logit=5.05,
    band=17.1,
    exchange=12.3,
    split=0.826,
    start=312,
    instruction=5.72,
    step=290,
    stage=0.481,
    product=421,
    first=0.627,
    tail=1.08,
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
    programs = sum(work.programs for work in works)
    registers, shared = resources or estimate_resources(kernel, problem, tile)
    device = find_device(problem.capability)
    return combine(
        COSTS,
        works,
        stages=count_stages(tile),
        products=PRODUCTS[problem.element_size],
        # a program that does not fit has no time; the limits of tiles exclude it
        slots=max(1.0, count_slots(problem.capability, registers, shared, tile.num_warps, programs)),
        multiprocessors=min(device.multiprocessors, programs),
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


def count_slots(capability: tuple[int, int], registers: int, shared: int, warps: int, programs: float) -> float:
    """Return how many of the programs run at the same time, 0 if a multiprocessor has no room for one."""
    limits = max((known for known in RESIDENCY_LIMITS if known <= 10 * capability[0] + capability[1]), default=min(RESIDENCY_LIMITS))
    resident, _ = resident_blocks(limits, registers, shared, warps)
    return min(programs, resident * find_device(capability).multiprocessors)


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
    logits = problem.batch * problem.height * problem.width * problem.spec.taps * problem.spec.up**2 * problem.element_size
    # it reads the logits and writes as many weights, in another order
    return LAUNCH + 2 * logits / find_device(problem.capability).copy * 1e-6 / TRANSPOSITION_SPEED


def combine(
    costs: Costs,
    works: tuple[Work, ...],
    *,
    stages: float,
    products: float,
    slots: float,
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
        slots: programs that run at the same time.
        multiprocessors: that have a program.
        clock: GHz.
        copy: microseconds for a copy of the least bytes.
    """
    alone = busy = programs = 0.0
    latency = costs.step / (1 + costs.stage * (stages - 1)) + costs.product * products
    for work in works:
        memory = costs.line * work.lines + costs.copy * work.copies + costs.shared_pass * work.passes + work.products
        instructions = costs.load * work.loads + costs.store * work.stores + costs.logit * work.logits + costs.band * work.band
        instructions = instructions + costs.exchange * work.exchanges + costs.split * work.splits + costs.start * work.warps
        alone = alone + work.programs * (latency * work.steps + costs.instruction * instructions / work.warps + memory)
        busy = busy + work.programs * (memory + instructions / ISSUE)
        programs = programs + work.programs
    cycle = 1e-3 / clock
    parts = (alone * cycle / slots, busy * cycle / multiprocessors, copy)
    ends = (costs.first + costs.tail * (1 - slots / programs)) * alone / programs * cycle
    return Estimate(sum(part**2 for part in parts) ** 0.5 + ends + LAUNCH, *parts)
