"""Fit the model of time (kernels/gpu/tile_time.py) to measured kernels, and print its costs and how well it predicts unseen problems.

Call: python tests/support/fit_tile_time.py

h200_kernels.json holds kernels that were measured on one H200 with cold caches: {"problems": {name: fields}, "kernels": [[problem, origin,
kernel, tile, blocks or null, registers, spills, shared bytes, microseconds]]}. "search" kernels are those of a blind search of tiles at one
problem; "operator" kernels are those that the operator ran. They were measured with Triton 3.6, before the kernels had the option `border`.
The registers of operator kernels are those of Triton 3.8.

The fit leaves out kernels that spill registers more than MAX_SPILLS times. The choice leaves out kernels that spill at all.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from carafepp.kernels.geometry import Spec
from carafepp.kernels.gpu.tile_geometry import KERNELS, Tile, TileProblem
from carafepp.kernels.gpu.tile_limits import SourceBlocks
from carafepp.kernels.gpu.tile_resources import (
    Resources,
    forward_resources,
    logit_gradient_resources,
    source_gradient_resources,
)
from carafepp.kernels.gpu.tile_time import COSTS, Costs, combine, copy_microseconds, count_slots, find_device
from carafepp.kernels.gpu.tile_work import Work, count_forward, count_logit_gradient, count_source_gradient
from scipy.optimize import least_squares

DATA = Path(__file__).with_name("h200_kernels.json")
MAX_SPILLS = 32
# the fit weights problems, not kernels: as if each had this many
KERNELS_OF_A_PROBLEM = 20
# the kinds of programs of a kernel
KERNELS_OF = {name: (name,) for name in KERNELS} | {"backward": ("logit_gradient", "source_gradient")}
# a kernel without programs
NOTHING = Work(*[0.0] * len(Work._fields))._replace(warps=1.0)


class Kernel(NamedTuple):
    """A measured kernel."""

    group: str  # the kernels that are left out of a fit together
    problem: TileProblem
    name: str
    tile: Tile
    blocks: SourceBlocks
    registers: int
    spills: int
    shared: int
    microseconds: float

    def works(self) -> list[Work]:
        """Return the work of every kernel in the launch; those that it lacks have no programs."""
        count = {
            "forward": lambda: count_forward(self.problem, self.tile),
            "logit_gradient": lambda: count_logit_gradient(self.problem, self.tile),
            "source_gradient": lambda: count_source_gradient(self.problem, self.tile, self.blocks),
        }
        return [build() if name in KERNELS_OF[self.name] else NOTHING for name, build in count.items()]


def read_kernels() -> list[Kernel]:
    """Return the measured kernels that the model describes."""
    data = json.loads(DATA.read_text())
    kernels = []
    for site, origin, name, tile, blocks, *figures in data["kernels"]:
        fields = data["problems"][site].copy()
        spec = Spec(fields.pop("kernel_size"), fields.pop("up"), fields.pop("down"), fields.pop("groups"))
        problem, tile = TileProblem(spec, **fields, capability=(9, 0)), Tile(*tile)
        group = f"{site} {name}" if origin == "search" else site.split()[0]
        extents = SourceBlocks(*blocks) if blocks else SourceBlocks(0, 0)
        kernels.append(Kernel(group, problem, name, tile, extents, *figures))
    return [kernel for kernel in kernels if kernel.spills <= MAX_SPILLS]


def estimate_of(kernel: Kernel) -> Resources:
    """Return the estimated resources of a kernel."""
    estimate = {
        "forward": lambda: forward_resources(kernel.problem, kernel.tile),
        "logit_gradient": lambda: logit_gradient_resources(kernel.problem, kernel.tile),
        "source_gradient": lambda: source_gradient_resources(kernel.problem, kernel.tile, kernel.blocks),
    }
    return Resources(*map(max, zip(*(estimate[name]() for name in KERNELS_OF[kernel.name]), strict=True)))


class Fit:
    """The measured kernels as arrays, and fits of the costs to some of them."""

    def __init__(self, kernels: list[Kernel]):
        self.kernels = kernels
        self.groups = np.array([kernel.group for kernel in kernels])
        self.microseconds = np.array([kernel.microseconds for kernel in kernels])
        self.works = [Work(*np.array(works, float).T) for works in zip(*(kernel.works() for kernel in kernels), strict=True)]
        programs = sum(work.programs for work in self.works)
        device = find_device((9, 0))
        resident = [
            count_slots(k.problem.capability, k.registers, k.shared, k.tile.num_warps, n) for k, n in zip(kernels, programs, strict=True)
        ]
        self.machine = {
            "stages": np.array([kernel.tile.num_stages for kernel in kernels], float),
            "slots": np.array(resident, float),
            "multiprocessors": np.minimum(device.multiprocessors, programs),
            "clock": device.clock,
            "copy": np.array([copy_microseconds(kernel.problem, kernel.name) for kernel in kernels]),
        }
        _, inverse, counts = np.unique(self.groups, return_inverse=True, return_counts=True)
        self.weights = np.sqrt(KERNELS_OF_A_PROBLEM / counts[inverse])

    def predict(self, costs: Costs) -> np.ndarray:
        """Return the predicted microseconds of every kernel."""
        return combine(costs, tuple(self.works), **self.machine).total

    def fit(self, used: np.ndarray, start: Costs = COSTS) -> Costs:
        """Return the costs that fit the kernels `used`, near `start` where the kernels do not decide."""
        first = np.log(start)

        def residuals(logarithms):
            errors = np.log(self.predict(Costs(*np.exp(logarithms))) / self.microseconds) * self.weights
            return np.concatenate([errors[used], 0.05 * (logarithms - np.log(PRIOR))])

        return Costs(*map(float, np.exp(least_squares(residuals, first, loss="soft_l1", f_scale=0.2).x)))


# what one would guess before a measurement
PRIOR = Costs(
    line=1, copy=1, shared_pass=1, operand=1, load=6, store=6, logit=16, band=30, exchange=4, split=2, start=150, instruction=5, step=800,
    source_step=1000, stage=0.3, tail=0.5,
)  # fmt: skip


class Quality(NamedTuple):
    """How well the model predicts the kernels of a problem that it was not fitted to."""

    kernels: int
    rank_correlation: float
    median_error: float
    within: float  # share of the predictions within 20 % of the measurement
    chosen: float  # time of the kernel with the least predicted time, over the least measured time; kernels without spills


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Return Spearman's rank correlation; values that are equal count in their order."""
    return float(np.corrcoef(a.argsort().argsort(), b.argsort().argsort())[0, 1])


def leave_one_out(data: Fit) -> dict[str, Quality]:
    """Return the quality of the model at every problem, fitted to all others."""
    found = {}
    for group in dict.fromkeys(data.groups):
        unseen = data.groups == group
        predicted, measured = data.predict(data.fit(~unseen))[unseen], data.microseconds[unseen]
        errors = np.abs(predicted / measured - 1)
        whole = np.array([kernel.spills == 0 for kernel in data.kernels])[unseen]
        chosen = measured[whole][predicted[whole].argmin()] / measured[whole].min()
        correlation = rank_correlation(predicted, measured)
        found[group] = Quality(unseen.sum(), correlation, float(np.median(errors)), float((errors < 0.2).mean()), chosen)
    return found


def main() -> None:
    """Print the costs, and the quality at every problem."""
    data = Fit(read_kernels())
    costs = data.fit(np.ones(len(data.kernels), bool), PRIOR)
    print("\n".join(f"    {name}={value:.3g}," for name, value in costs._asdict().items()))
    print()
    print("| problem left out | kernels | rank correlation | median error | within 20 % | chosen / best |\n" + "|---" * 6 + "|")
    for group, quality in leave_one_out(data).items():
        figures = f"{quality.rank_correlation:.2f} | {quality.median_error:.0%} | {quality.within:.0%} | {quality.chosen:.2f}"
        print(f"| {group} | {quality.kernels} | {figures} |")


if __name__ == "__main__":
    main()
