"""Statistics: mean and spread, paired differences, pooled estimates, corrections and sample sizes.

BN and L2BN start from the same weights and see the same batches when they share a seed, so a comparison is
paired: the difference is taken seed by seed, and its spread, not that of the two arms, decides.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, isfinite, sqrt
from statistics import fmean, stdev

import numpy as np
import pandas as pd
from scipy import stats

MIN_PAIRS = 3
"""With fewer differences there is no interval and no p-value: for two, Student's t is 12.7."""

LEVEL = 0.95
"""Coverage of every interval; 1 minus it is the error that tests and sample sizes assume."""

POWER = 0.8
"""The power for which `seeds_needed` is computed."""

NO_SPREAD = 1e-9
"""Differences this close are equal: accuracies are counts, and Student's t needs a spread."""


@dataclass(frozen=True)
class Estimate:
    """A mean with an interval and p-value by Student's t, None where n or the spread is too small for them.

    Over several cells, one of which has no value, there is an n, but no mean.

    `low`, `high` bound the mean at `LEVEL`; `p` is two-sided against a mean of zero. All in the unit of the
    values.
    """

    n: int
    mean: float | None = None
    std: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None

    @property
    def side(self) -> int:
        """1 or -1 where the whole interval lies above or below 0; 0 where it contains 0, or there is none."""
        return int(self.low is not None and self.low > 0) - int(self.high is not None and self.high < 0)

    @property
    def reason(self) -> str:
        """The reason for a missing interval; empty where there is one."""
        if self.low is not None:
            return ""
        if self.n and self.mean is None:  # over all cells (`fixed_estimate`)
            return "a cell has no pair"
        return "n too small" if self.n < MIN_PAIRS or self.std is None else "no spread"


def estimate(values: Sequence[float]) -> Estimate:
    """Mean, sample standard deviation (n - 1), and from `MIN_PAIRS` values on Student's interval and p-value.

    Equal values have no spread to measure an error by: no interval and no p-value then, however many they
    are.
    """
    n = len(values)
    if n == 0:
        return Estimate(0)
    if not all(map(isfinite, values)):
        raise ValueError(f"values must be finite, got {list(values)}; leave diverged runs out and count them")
    mean = fmean(values)
    if n == 1:
        return Estimate(1, mean)
    std = stdev(values)
    if n < MIN_PAIRS or std < NO_SPREAD:
        return Estimate(n, mean, std)
    return _student(n, mean, std, std / sqrt(n), n - 1)


def _student(n: int, mean: float, std: float | None, error: float, degrees: int) -> Estimate:
    """The estimate of a mean with this standard error: Student's interval and p-value."""
    reach = float(stats.t.ppf((1 + LEVEL) / 2, degrees)) * error
    return Estimate(n, mean, std, mean - reach, mean + reach, 2 * float(stats.t.sf(abs(mean) / error, degrees)))


def paired_differences(reference: Mapping[int, float], other: Mapping[int, float]) -> list[float]:
    """`other - reference` for each seed that both have, in the order of the seeds."""
    return [other[seed] - reference[seed] for seed in sorted(reference.keys() & other.keys())]


def across(curves: Sequence[Mapping[int, float]]) -> dict[int, list[float]]:
    """The values of all curves at each place that every one of them has, in the order of the places."""
    shared = set.intersection(*map(set, curves)) if curves else set[int]()
    return {place: [curve[place] for curve in curves] for place in sorted(shared)}


def pooled_estimate(cells: Sequence[Sequence[float]]) -> Estimate:
    """One mean difference over many cells, each given by its paired differences; empty cells are left out.

    The model: the true difference varies from cell to cell around the mean that is sought, and a cell's own
    mean adds the noise of its seeds. The cell is the unit: its mean difference is one observation, all
    weigh alike, and Student's interval runs over the cells (a random-effects estimate with equal weights
    and the variance of Hartung and Knapp, Statistics in Medicine 20 (2001) 1771 and 3875; recommended over
    the older DerSimonian-Laird interval for few cells by IntHout et al., BMC Med. Res. Methodol. 14 (2014)
    25). Weighting by inverse variance is left out on purpose: a variance estimated from 3 to 5 seeds would
    make the weights noise. It speaks about cells like these, not only about these, so a grid of one or two
    cells gives no interval.
    """
    return estimate([fmean(cell) for cell in cells if cell])


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction over the p-values that exist; None stays None and does not count.

    Source: S. Holm, Scandinavian Journal of Statistics 6 (1979) 65-70. Controls the probability of one or
    more false rejections whatever the dependence, which matters here: cells share a test set.
    """
    known = pd.Series(list(p_values), dtype="float64").dropna().sort_values()
    corrected = (known * np.arange(len(known), 0, -1)).clip(upper=1).cummax()
    return [corrected.get(place) for place in range(len(p_values))]


@dataclass(frozen=True)
class Spread:
    """A standard deviation pooled over cells, its degrees of freedom, and its own interval at `LEVEL`."""

    std: float
    degrees: int
    low: float
    high: float


def pooled_spread(cells: Sequence[Sequence[float]]) -> Spread | None:
    """Standard deviation of a paired difference within a cell, pooled over cells; None without any pair.

    Assumes that the spread is the same in all cells; the interval is that of a chi-squared variance.
    """
    degrees = sum(max(len(cell) - 1, 0) for cell in cells)
    if degrees == 0:
        return None
    squares = sum((len(cell) - 1) * stdev(cell) ** 2 for cell in cells if len(cell) > 1)
    low, high = stats.chi2.ppf([(1 + LEVEL) / 2, (1 - LEVEL) / 2], degrees)
    return Spread(sqrt(squares / degrees), degrees, sqrt(squares / low), sqrt(squares / high))


def fixed_estimate(cells: Sequence[Sequence[float]]) -> tuple[list[Estimate], Estimate]:
    """Estimates about these cells alone: the mean difference of each, and the mean over all, each weighing alike.

    The model: one spread within all cells, estimated over them together: s^2 = sum (d - cell mean)^2 / df with
    df = sum (n - 1). A cell's mean has the interval +- t(df) s / sqrt(n), the mean of the k cell means
    +- t(df) s sqrt(sum 1/n) / k (a fixed-effects analysis of variance). Unlike `pooled_estimate` it does not speak
    about other cells. In the estimates of cells, `std` is the cell's own; the last one's is the pooled s, its n the
    number of all pairs. No intervals without a spread; no mean over all where a cell is empty.
    """
    spread = pooled_spread(cells)

    def with_interval(n: int, mean: float, std: float | None, root: float) -> Estimate:
        """With interval and p-value where there is a spread; `root` is the mean's error in units of s."""
        if spread is None or spread.std < NO_SPREAD:
            return Estimate(n, mean, std)
        return _student(n, mean, std, spread.std * root, spread.degrees)

    found = [
        with_interval(len(cell), fmean(cell), stdev(cell) if len(cell) > 1 else None, sqrt(1 / len(cell)))
        if cell
        else Estimate(0)
        for cell in cells
    ]
    n = sum(len(cell) for cell in cells)
    if not cells or not all(cells):
        return found, Estimate(n)
    root = sqrt(sum(1 / len(cell) for cell in cells)) / len(cells)
    return found, with_interval(n, fmean(map(fmean, cells)), spread.std if spread else None, root)


def power(n: int, std: float, difference: float) -> float:
    """Probability that a paired t-test of n pairs at `LEVEL` sees a true `difference`; noncentral t.

    `std` is that of a paired difference, above 0, in the unit of `difference`.
    """
    critical = float(stats.t.ppf((1 + LEVEL) / 2, n - 1))
    shift = difference * sqrt(n) / std
    # Beyond this shift the tail is 1 to all digits, and the noncentral distribution loses its own.
    if shift > 10 * critical:
        return 1.0
    return float(stats.nct.sf(critical, n - 1, shift) + stats.nct.cdf(-critical, n - 1, shift))


def seeds_needed(std: float, difference: float) -> int:
    """Fewest pairs whose t-test sees `difference` with probability `POWER` (see `power`); at least `MIN_PAIRS`."""
    quantiles = stats.norm.ppf((1 + LEVEL) / 2) + stats.norm.ppf(POWER)
    # The normal approximation is never above the t-test's number, so the search starts just under it.
    n = max(MIN_PAIRS, ceil((quantiles * std / difference) ** 2))
    while power(n, std, difference) < POWER:
        n += 1
    return n
