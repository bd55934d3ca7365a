"""Predict the time of a kernel on an H200 from what the emulator counts of its code, and print how good such predictions are.

Call: python tests/support/fit_counted_time.py

The model of tiles/time_model.py counts the work of tiles. This one describes any kernel, also those that sum and have no tile:

    time = norm(issue + load_store, copy) * (1 + few / warps) + launch

- *issue*, *load_store*: the least times to issue the instructions and to load and store, as the emulator gives them, times a cost each.
  Warps that wait for each other use these units in turns.
- *copy*: the time of a device-to-device copy of the least bytes, times a cost.
- *warps*: those that a multiprocessor holds; the fewer they are, the more latency remains.

h200_counts.json has kernels of h200_kernels.json, the fastest tile and one other of each kernel at five problems in four combinations of
data type and memory format. They were compiled as they were measured, with Triton 3.6 and the code of commit afc2b8a, and emulated in part.
A row is [problem, kernel, tile, measured us, issue us, load and store us, copy us, warps].
"""

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from carafepp.kernels.gpu.tiles.time_model import LAUNCH
from scipy.optimize import least_squares

DATA = Path(__file__).with_name("h200_counts.json")


class Counts(NamedTuple):
    """What the time of kernels depends on: numbers of one kernel, or arrays of many."""

    issue: np.ndarray  # microseconds
    load_store: np.ndarray
    copy: np.ndarray
    warps: np.ndarray  # of a multiprocessor


class Costs(NamedTuple):
    """The fitted numbers of the formula."""

    issue: float
    load_store: float
    copy: float
    few: float  # warps


def predict(costs: Costs, counts: Counts) -> np.ndarray:
    """Return the predicted microseconds."""
    units = costs.issue * counts.issue + costs.load_store * counts.load_store
    return np.hypot(units, costs.copy * counts.copy) * (1 + costs.few / counts.warps) + LAUNCH


class Measured(NamedTuple):
    """The measured kernels as arrays."""

    sites: np.ndarray
    names: np.ndarray
    microseconds: np.ndarray
    counts: Counts


def read_counts() -> Measured:
    """Return the kernels of the file."""
    problems, names, _, microseconds, *counts = zip(*json.loads(DATA.read_text()), strict=True)
    sites = np.array([problem.split()[0] for problem in problems])
    return Measured(sites, np.array(names), np.array(microseconds), Counts(*np.array(counts, float)))


def fit(measured: Measured, used: np.ndarray) -> Costs:
    """Return the costs that fit the kernels `used`."""
    counts = Counts(*(values[used] for values in measured.counts))

    def residuals(logarithms):
        return np.log(predict(Costs(*np.exp(logarithms)), counts) / measured.microseconds[used])

    return Costs(*map(float, np.exp(least_squares(residuals, [0, 0, 0, 1], loss="soft_l1", f_scale=0.2).x)))


@cache
def fit_all() -> Costs:
    """Return the costs that fit all kernels."""
    measured = read_counts()
    return fit(measured, np.ones(len(measured.names), bool))


def predict_unseen(measured: Measured, groups: np.ndarray) -> np.ndarray:
    """Return the predicted over the measured time of every kernel, by a fit to the kernels of the other groups."""
    ratios = np.empty(len(groups))
    for group in np.unique(groups):
        unseen = groups == group
        counts = Counts(*(values[unseen] for values in measured.counts))
        ratios[unseen] = predict(fit(measured, ~unseen), counts) / measured.microseconds[unseen]
    return ratios


def main() -> None:
    """Print the costs, and the quality for every site and kernel that is left out."""
    measured = read_counts()
    print(", ".join(f"{name} {value:.3g}" for name, value in fit_all()._asdict().items()), "\n")
    print("| left out | kernels | predicted / measured | error | within 20 % |\n" + "|---" * 5 + "|")
    for groups in (measured.sites, measured.names):
        ratios = predict_unseen(measured, groups)
        for group in (*np.unique(groups), None):
            these = ratios if group is None else ratios[groups == group]
            errors = np.abs(these - 1)
            figures = f"{np.median(these):.2f} | {np.median(errors):.0%} | {np.mean(errors < 0.2):.0%}"
            print(f"| {group or 'each of them'} | {len(these)} | {figures} |")


if __name__ == "__main__":
    main()
