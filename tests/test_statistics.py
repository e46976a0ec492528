"""The statistics against textbook values, independent formulas and simulation."""

from math import sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from l2bn.reporting.statistics import (
    estimate,
    fixed_estimate,
    holm,
    paired_differences,
    pooled_estimate,
    pooled_spread,
    power,
    seeds_needed,
)

# Gosset's own example (Student 1908, after Cushny and Peebles): additional hours of sleep under two drugs.
DRUG_1 = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
DRUG_2 = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]

finite = st.floats(-100, 100).map(lambda x: round(x, 3))


def test_students_sleep_data_give_the_values_in_the_textbooks() -> None:
    differences = paired_differences(dict(enumerate(DRUG_1)), dict(enumerate(DRUG_2)))
    result = estimate(differences)
    assert result.n == 10
    assert result.mean == pytest.approx(1.58)
    assert result.std == pytest.approx(1.2300, abs=5e-5)
    assert result.p == pytest.approx(0.002833, abs=5e-7)
    assert (result.low, result.high) == pytest.approx((0.7001142, 2.4598858), abs=5e-8)


@given(st.lists(finite, min_size=3, max_size=8), st.lists(finite, min_size=3, max_size=8))
def test_the_paired_difference_is_scipys_paired_t_test(a: list[float], b: list[float]) -> None:
    n = min(len(a), len(b))
    differences = [y - x for x, y in zip(a[:n], b[:n], strict=True)]
    result = estimate(paired_differences(dict(enumerate(a)), dict(enumerate(b))))
    if np.std(differences) < 1e-6:
        assert result.p is None
        return
    other = stats.ttest_rel(b[:n], a[:n])
    assert result.p == pytest.approx(other.pvalue, rel=1e-6, abs=1e-12)
    interval = other.confidence_interval(0.95)
    assert (result.low, result.high) == pytest.approx((interval.low, interval.high), rel=1e-6, abs=1e-9)


def test_only_seeds_of_both_arms_are_paired() -> None:
    assert paired_differences({0: 90.0, 1: 91.0, 5: 92.0}, {1: 92.0, 5: 92.5, 7: 99.0}) == [1.0, 0.5]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([], "n too small"),
        ([1.0], "n too small"),
        ([1.0, 2.0], "n too small"),
        ([0.1 + 0.2, 0.3, 0.3], "no spread"),
    ],
)
def test_no_interval_without_enough_values_or_spread(values: list[float], reason: str) -> None:
    result = estimate(values)
    assert (result.low, result.high, result.p) == (None, None, None)
    assert result.reason == reason
    assert result.n == len(values)


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ([], "n too small"),
        ([[], []], "n too small"),
        ([[0.1, 0.2, 0.6], [], [0.4, 0.5]], "a cell has no pair"),
        ([[], [1.0, 2.0]], "a cell has no pair"),
        ([[0.1], [0.2], [0.6]], "n too small"),  # no cell in which to measure a spread
        ([[0.1, 0.1], [0.2, 0.2]], "no spread"),
        ([[0.1, 0.2], [0.2]], ""),
    ],
    ids=str,
)
def test_an_estimate_about_cells_says_why_it_has_no_interval(cells: list[list[float]], reason: str) -> None:
    found, overall = fixed_estimate(cells)
    assert (overall.reason, overall.low is None, overall.p is None) == (reason, bool(reason), bool(reason))
    assert (overall.mean is None) is (not cells or not all(cells))
    assert (overall.n, [one.n for one in found]) == (sum(map(len, cells)), list(map(len, cells)))


def test_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        estimate([1.0, float("nan"), 2.0])


def test_holm_gives_the_worked_example() -> None:
    """p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm") of R."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@given(st.lists(st.none() | st.floats(0, 1), max_size=12))
def test_holm_rejects_what_its_definition_rejects(p_values: list[float | None]) -> None:
    corrected = holm(p_values)
    known = sorted(p for p in p_values if p is not None)
    for alpha in (0.01, 0.05, 0.2):
        rejected = 0
        # The definition: step down from the smallest until one exceeds alpha / (number left).
        while rejected < len(known) and known[rejected] * (len(known) - rejected) <= alpha:
            rejected += 1
        assert sum(p is not None and p <= alpha for p in corrected) == rejected
    assert [p is None for p in corrected] == [p is None for p in p_values]
    assert all(a is None or b is None or 1 >= b >= a for a, b in zip(p_values, corrected, strict=True))


def test_the_pooled_estimate_takes_the_cell_as_its_unit() -> None:
    cells = [[0.1, 0.3], [0.6], [], [-0.2, 0.0, 0.2]]
    result, means = pooled_estimate(cells), np.array([0.2, 0.6, 0.0])
    assert result.n == 3
    assert result.mean == pytest.approx(means.mean())
    reach = 4.302653 * means.std(ddof=1) / sqrt(3)  # t(0.975) at 2 degrees of freedom
    assert (result.low, result.high) == pytest.approx((means.mean() - reach, means.mean() + reach), abs=1e-6)


@pytest.mark.parametrize(("between", "seeds"), [(0.0, (3, 3, 3, 3, 3, 3)), (0.2, (1, 3, 3, 3, 5, 5))])
def test_the_pooled_interval_covers_the_truth_as_often_as_it_says(between: float, seeds: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    covered, runs = 0, 2000
    for _ in range(runs):
        cells = [rng.normal(0.1 + between * rng.normal(), 0.25, n).tolist() for n in seeds]
        result = pooled_estimate(cells)
        assert result.low is not None
        assert result.high is not None
        covered += result.low <= 0.1 <= result.high
    # 95 %, give or take four standard errors of the simulation, and a little for cells of unequal size.
    assert 0.93 < covered / runs < 0.975


CELLS = [[0.3, 0.5, 0.1], [-0.2, 0.4], [0.6, 0.7, 0.2, 0.9]]


def test_the_estimate_of_these_cells_is_that_of_least_squares() -> None:
    """A regression on one dummy variable per cell, by its normal equations, and the contrast with equal weights."""
    x = np.repeat(np.eye(3), [len(cell) for cell in CELLS], axis=0)
    y = np.concatenate(CELLS)
    means, residual, *_ = np.linalg.lstsq(x, y, rcond=None)
    df = len(y) - 3
    covariance = np.linalg.inv(x.T @ x) * residual[0] / df
    cells, overall = fixed_estimate(CELLS)
    for contrast, result in [*zip(np.eye(3), cells, strict=True), (np.full(3, 1 / 3), overall)]:
        mean, error = contrast @ means, sqrt(contrast @ covariance @ contrast)
        assert result.mean == pytest.approx(mean)
        assert (result.low, result.high) == pytest.approx(stats.t.interval(0.95, df, mean, error))
        assert result.p == pytest.approx(2 * stats.t.cdf(-abs(mean) / error, df))
    assert [one.std for one in cells] == pytest.approx([np.std(cell, ddof=1) for cell in CELLS])
    assert overall.std == pytest.approx(sqrt(residual[0] / df))
    assert [one.n for one in (*cells, overall)] == [3, 2, 4, 9]


@given(st.lists(finite, min_size=3, max_size=6))
def test_one_cell_alone_is_students_estimate(values: list[float]) -> None:
    (cell,), overall = fixed_estimate([values])
    expected = estimate(values)
    for result in (cell, overall):
        assert (result.n, result.mean, result.std) == pytest.approx((expected.n, expected.mean, expected.std))
        assert (result.low is None) is (expected.low is None)
        if expected.low is not None:
            assert (result.low, result.high, result.p) == pytest.approx((expected.low, expected.high, expected.p))


@pytest.mark.parametrize(("between", "seeds"), [(0.0, (3, 3, 3, 3)), (2.0, (1, 2, 3, 5))])
def test_the_interval_of_these_cells_covers_their_own_mean(between: float, seeds: tuple[int, ...]) -> None:
    """As often as it says, however much the cells differ from each other."""
    rng, covered, each, runs = np.random.default_rng(0), 0, 0, 800
    for _ in range(runs):
        truth = 0.1 + between * rng.normal(size=len(seeds))
        cells, overall = fixed_estimate(
            [rng.normal(t, 0.25, n).tolist() for t, n in zip(truth, seeds, strict=True)]
        )
        assert overall.low is not None
        assert overall.high is not None
        covered += overall.low <= truth.mean() <= overall.high
        each += sum((c.low or 0.0) <= t <= (c.high or 0.0) for c, t in zip(cells, truth, strict=True))
    # 95 %, give or take four standard errors of the simulation.
    assert covered / runs == pytest.approx(0.95, abs=4 * sqrt(0.95 * 0.05 / runs))
    assert each / runs / len(seeds) == pytest.approx(0.95, abs=4 * sqrt(0.95 * 0.05 / runs))


def test_the_spread_is_pooled_over_degrees_of_freedom() -> None:
    spread = pooled_spread([[0.0, 2.0], [1.0], [0.0, 3.0, 6.0], []])
    assert spread is not None
    assert spread.degrees == 3
    assert spread.std == pytest.approx(sqrt((1 * 2 + 2 * 9) / 3))
    # Chi-squared quantiles at 3 degrees of freedom: 0.2158 and 9.3484.
    assert spread.low == pytest.approx(sqrt(20 / 9.3484), rel=1e-4)
    assert spread.high == pytest.approx(sqrt(20 / 0.21580), rel=1e-4)
    assert pooled_spread([[1.0], []]) is None


@pytest.mark.parametrize(("effect", "pairs"), [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10)])
def test_sample_sizes_are_those_of_the_tables(effect: float, pairs: int) -> None:
    """Paired t-test, two-sided 5 %, power 80 %: the numbers that G*Power prints (Faul et al. 2007)."""
    assert seeds_needed(1.0, effect) == pairs


def test_power_is_that_of_a_simulated_test() -> None:
    rng = np.random.default_rng(0)
    p = stats.ttest_1samp(rng.normal(0.3, 0.25, (20_000, 6)), 0.0, axis=1).pvalue
    assert power(6, 0.25, 0.3) == pytest.approx((p < 0.05).mean(), abs=0.015)


@pytest.mark.parametrize("std", [1e-9, 1e-6, 0.01, 0.1, 0.3, 1.0, 10.0])
def test_the_number_of_seeds_is_the_smallest_that_does(std: float) -> None:
    n = seeds_needed(std, 0.3)
    assert power(n, std, 0.3) >= 0.8
    assert n == 3 or power(n - 1, std, 0.3) < 0.8
