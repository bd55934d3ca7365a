"""Fit the model of time (kernels/gpu/tiles/time_model.py) to measured kernels, and print its costs and how well it predicts unseen ones.

Call: python tests/support/fit_tile_time.py [count]

h200_kernels.json holds kernels that were measured on an H200 with cold caches and Triton 3.6: {"problems": {name: fields}, "kernels":
[[problem, origin, kernel, tile, blocks or null, registers, spills, shared bytes, microseconds, works]]}. "search" kernels are those of a
blind search of tiles at one problem; "operator" kernels are those that the operator ran; both are older than the option `border`, and the
registers of operator kernels are those of Triton 3.8. "tiles" kernels are the first tiles of the wide search at five problems, with
commit 3cfb41d. "rows" kernels are later ones, which access logits in NCHW along the rows of cells.

`works` is the work of each kind of program of a kernel: the fields of Work, as tiles/work.py counted them for the code that was
measured. The kernels and their counts may therefore change later. A newly measured kernel is added without `works`; the argument `count`
counts its work with the code present, and stores it.

The fit leaves out kernels that spill registers more than MAX_SPILLS times. The choice leaves out kernels that spill at all.
"""

import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from carafepp.kernels.geometry import Spec
from carafepp.kernels.gpu.tiles.geometry import KERNELS, Tile, TileProblem
from carafepp.kernels.gpu.tiles.limits import SourceBlocks
from carafepp.kernels.gpu.tiles.resources import (
    Resources,
    forward_resources,
    logit_gradient_resources,
    source_gradient_resources,
    walk_resources,
)
from carafepp.kernels.gpu.tiles.time_model import (
    COSTS,
    PRODUCTS,
    Costs,
    combine,
    copy_microseconds,
    count_resident,
    count_stages,
    find_device,
)
from carafepp.kernels.gpu.tiles.work import Work, count_work
from scipy.optimize import least_squares

DATA = Path(__file__).with_name("h200_kernels.json")
MAX_SPILLS = 32
# the kernels of one name at one problem count as if they were at most this many
MOST_ALIKE = 20
SPEC_FIELDS = ("kernel_size", "up", "down", "groups")
# fields of a kernel in the file after its tile, except its counts
FIGURES = 5
# the kinds of programs, and those of each kernel
PROGRAMS = ("forward", "logit_gradient", "source_gradient")
KERNELS_OF = {name: (name,) for name in KERNELS} | {"backward": ("logit_gradient", "source_gradient")}
# a kernel without programs
NOTHING = Work(*[0.0] * len(Work._fields))._replace(warps=1.0)


class Kernel(NamedTuple):
    """A measured kernel."""

    site: str  # of the problem: its shape. The kernels of a site are left out of a fit together
    problem: TileProblem
    name: str
    tile: Tile
    blocks: SourceBlocks
    registers: int
    spills: int
    shared: int
    microseconds: float
    counted: list[list[float]]  # the work of each kind of program that the launch has

    def works(self) -> list[Work]:
        """Return the work of every kind of program; those that the launch lacks have no programs."""
        counted = dict(zip(KERNELS_OF[self.name], self.counted, strict=True))
        return [Work(*counted[name]) if name in counted else NOTHING for name in PROGRAMS]


def read_kernels() -> list[Kernel]:
    """Return the measured kernels that the model describes."""
    data = json.loads(DATA.read_text())
    kernels = []
    for site, _, name, tile, blocks, *figures in data["kernels"]:
        problem, tile = read_problem(data["problems"][site]), Tile(*tile)
        extents = SourceBlocks(*blocks) if blocks else SourceBlocks(0, 0)
        kernels.append(Kernel(site.split()[0], problem, name, tile, extents, *figures))
    return [kernel for kernel in kernels if kernel.spills <= MAX_SPILLS]


def read_problem(fields: dict[str, int]) -> TileProblem:
    """Return a problem of the file."""
    spec = Spec(*(fields[name] for name in SPEC_FIELDS))
    return TileProblem(spec, **{name: value for name, value in fields.items() if name not in SPEC_FIELDS}, capability=(9, 0))


def count_new() -> None:
    """Add counts to the kernels in the file that have none."""
    data = json.loads(DATA.read_text())
    for kernel in data["kernels"]:
        site, _, name, tile, *rest = kernel
        if len(rest) == FIGURES:
            works = count_work(name, read_problem(data["problems"][site]), Tile(*tile))
            kernel.append([[float(f"{value:.6g}") for value in work] for work in works])
    problems = ",\n".join(f"  {json.dumps(site)}: {json.dumps(fields)}" for site, fields in data["problems"].items())
    kernels = ",\n".join(f"  {json.dumps(kernel, separators=(',', ':'))}" for kernel in data["kernels"])
    DATA.write_text(f'{{\n "problems": {{\n{problems}\n }},\n "kernels": [\n{kernels}\n ]\n}}\n')


def estimate_of(kernel: Kernel) -> Resources:
    """Return the estimated resources of a kernel."""
    problem, tile = kernel.problem, kernel.tile
    if tile.steps > 1:
        return walk_resources(problem, tile)
    estimate = {
        "forward": lambda: forward_resources(problem, tile),
        "logit_gradient": lambda: logit_gradient_resources(problem, tile),
        # all of them precede channels as the rows of products in channels_last
        "source_gradient": lambda: source_gradient_resources(problem, tile, kernel.blocks, tall=not problem.x_last),
    }
    registers, shared = map(max, zip(*(estimate[name]() for name in KERNELS_OF[kernel.name]), strict=True))
    return Resources(min(registers, tile.max_registers), shared)


class Fit:
    """The measured kernels as arrays, and fits of the costs to some of them."""

    def __init__(self, kernels: list[Kernel]):
        self.kernels = kernels
        self.sites = np.array([kernel.site for kernel in kernels])
        self.names = np.array([kernel.name for kernel in kernels])
        self.microseconds = np.array([kernel.microseconds for kernel in kernels])
        self.works = [Work(*np.array(works, float).T) for works in zip(*(kernel.works() for kernel in kernels), strict=True)]
        device = find_device((9, 0))
        resident = [count_resident(k.problem.capability, k.registers, k.shared, k.tile.num_warps) for k in kernels]
        self.machine = {
            "stages": np.array([count_stages(kernel.tile) for kernel in kernels], float),
            "products": np.array([PRODUCTS[kernel.problem.element_size] for kernel in kernels], float),
            "resident": np.array(resident, float),
            "multiprocessors": device.multiprocessors,
            "clock": device.clock,
            "copy": np.array([copy_microseconds(kernel.problem, kernel.name) for kernel in kernels]),
        }
        alike = {problem: index for index, problem in enumerate(dict.fromkeys((k.problem, k.name) for k in kernels))}
        self.alike = np.array([alike[k.problem, k.name] for k in kernels])
        self.weights = np.sqrt(np.minimum(1, MOST_ALIKE / np.bincount(self.alike)[self.alike]))

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
    line=1, partial=0.5, copy=1, shared_pass=1, load=6, store=6, logit=16, band=30, exchange=4, start=150, instruction=5, step=800,
    stage=0.3, product=300, first=0.5,
)  # fmt: skip


class Quality(NamedTuple):
    """How well the model predicts the kernels of one name at a site that it was not fitted to."""

    kernels: int
    rank_correlation: float
    # of two kernels of a problem whose times differ by more than a tenth, the share that is predicted in their order
    ordered: float
    median_error: float
    within: float  # share of the predictions within 20 % of the measurement
    # of the kernels of a problem that do not spill, the time of the one with the least predicted time, over the least time: the mean and
    # the largest over the data types and layouts
    chosen: float
    worst: float


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Return Spearman's rank correlation; values that are equal count in their order."""
    return float(np.corrcoef(a.argsort().argsort(), b.argsort().argsort())[0, 1])


def count_ordered(predicted: np.ndarray, measured: np.ndarray) -> tuple[int, int]:
    """Return how many pairs are predicted in their order, and how many pairs there are whose times differ by more than a tenth."""
    apart = np.triu(np.abs(np.subtract.outer(np.log(measured), np.log(measured))) > np.log(1.1))
    same = np.sign(np.subtract.outer(predicted, predicted)) == np.sign(np.subtract.outer(measured, measured))
    return int((same & apart).sum()), int(apart.sum())


def predict_unseen(data: Fit) -> np.ndarray:
    """Return the predicted microseconds of every kernel by a fit to the kernels of the other sites."""
    predicted = np.empty(len(data.kernels))
    for site in dict.fromkeys(data.sites):
        unseen = data.sites == site
        predicted[unseen] = data.predict(data.fit(~unseen))[unseen]
    return predicted


def rate(data: Fit, predicted: np.ndarray, least: int = 4) -> dict[tuple[str, str], Quality]:
    """Return the quality of predictions by site and name of the kernel, for those with at least `least` kernels."""
    errors = np.abs(predicted / data.microseconds - 1)
    whole = np.array([kernel.spills == 0 for kernel in data.kernels])
    found = {}
    for site, name in dict.fromkeys(zip(data.sites.tolist(), data.names.tolist(), strict=True)):
        these = (data.sites == site) & (data.names == name)
        if these.sum() < least:
            continue
        ratios, pairs = [], np.zeros(2)
        for problem in dict.fromkeys(data.alike[these]):
            alike = data.alike == problem
            pairs += count_ordered(predicted[alike], data.microseconds[alike])
            times = data.microseconds[alike & whole]
            if len(times) > 1:
                ratios.append(times[predicted[alike & whole].argmin()] / times.min())
        chosen, worst = (float(np.exp(np.mean(np.log(ratios)))), max(ratios)) if ratios else (np.nan, np.nan)
        correlation = rank_correlation(predicted[these], data.microseconds[these])
        median = float(np.median(errors[these]))
        ordered = pairs[0] / pairs[1] if pairs[1] else np.nan
        found[site, name] = Quality(these.sum(), correlation, ordered, median, float((errors[these] < 0.2).mean()), chosen, worst)
    return found


def main() -> None:
    """Print the costs, and the quality at every site."""
    data = Fit(read_kernels())
    costs = data.fit(np.ones(len(data.kernels), bool), PRIOR)
    print("\n".join(f"    {name}={value:.3g}," for name, value in costs._asdict().items()))
    predicted = predict_unseen(data)
    errors = np.abs(predicted / data.microseconds - 1)
    print(f"\n{len(errors)} kernels: median error {np.median(errors):.0%}, {np.mean(errors < 0.2):.0%} within 20 %\n")
    print("| site left out | kernel | kernels | rank correlation | in order | error | within 20 % | chosen / best |\n" + "|---" * 8 + "|")
    for (site, name), quality in rate(data, predicted).items():
        ordered = "" if np.isnan(quality.ordered) else f"{quality.ordered:.0%}"
        figures = f"{quality.rank_correlation:.2f} | {ordered} | {quality.median_error:.0%} | {quality.within:.0%}"
        chosen = "" if np.isnan(quality.chosen) else f"{quality.chosen:.2f} ({quality.worst:.2f})"
        print(f"| {site} | {name} | {quality.kernels} | {figures} | {chosen} |")


if __name__ == "__main__":
    if sys.argv[1:] == ["count"]:
        count_new()
    else:
        main()
