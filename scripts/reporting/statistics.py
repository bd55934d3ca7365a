"""Mean and standard deviation over seeds, and paired differences with a confidence interval."""

import math
import statistics
from collections.abc import Mapping
from typing import NamedTuple


def t_quantile(degrees: int, confidence: float = 0.95) -> float:
    """Return the t for which the share `confidence` of Student's distribution with `degrees` of freedom lies between -t and t."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _mass(middle, degrees) < confidence else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _mass(angle: float, degrees: int) -> float:
    """Return P(|T| < sqrt(degrees) * tan(angle)), by the finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    sine, cosine, odd = math.sin(angle), math.cos(angle), degrees % 2
    term, total = cosine**odd, 0.0
    for power in range(odd, degrees - 1, 2):
        total += term
        term *= cosine**2 * (power + 1) / (power + 2)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


class Scores(NamedTuple):
    """Mean over seeds and standard deviation, which is None for one seed."""

    mean: float
    deviation: float | None


def summarize(values: Mapping[int, float]) -> Scores | None:
    """Return the mean and standard deviation of values by seed, or None if there are no values."""
    if not values:
        return None
    found = list(values.values())
    return Scores(statistics.fmean(found), _deviation(found))


class Difference(NamedTuple):
    """Mean difference over the common seeds, and half the width of its confidence interval, which is None for one seed."""

    mean: float
    half: float | None
    seeds: int


def compare_paired(values: Mapping[int, float], baseline: Mapping[int, float], confidence: float = 0.95) -> Difference | None:
    """Compare values by seed with those of a baseline; return None if they have no common seed.

    The confidence interval is Student's and assumes that the differences are independent samples of one normal distribution.
    """
    differences = [value - baseline[seed] for seed, value in values.items() if seed in baseline]
    if not differences:
        return None
    half = None
    if (deviation := _deviation(differences)) is not None:
        half = t_quantile(len(differences) - 1, confidence) * deviation / math.sqrt(len(differences))
    return Difference(statistics.fmean(differences), half, len(differences))


def _deviation(values: list[float]) -> float | None:
    if len(values) < 2:
        return None
    # an undefined metric, such as the AP of object sizes that do not occur, is NaN
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan
