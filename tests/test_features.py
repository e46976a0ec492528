"""The measures against numpy on explicit features and against closed forms; the sums against what they add up."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from l2bn.analysis.features import ABOUT_ORIGIN, histogram, measure
from l2bn.analysis.moments import Moments
from l2bn.records import BINS_PER_OCTAVE, CLASS_MEASURES, MEASURES

Array = NDArray[np.float64]


def summed(features: Tensor, labels: Tensor, classes: int, batch: int = 7) -> Moments:
    """The moments of features that come in batches."""
    moments = Moments.zeros(classes, features.shape[1], features.device)
    for x, y in zip(features.split(batch), labels.split(batch), strict=True):
        moments.add(x, y)
    return moments


def some_features(
    *shape: int, classes: int = 4, images: int = 60, apart: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Features of classes of unequal size, each about a mean and with a spread of its own, never all alike."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (images,), generator=generator)
    means = apart * torch.randn(classes, *shape, generator=generator)
    spread = 0.5 + torch.rand(classes, *[1] * len(shape), generator=generator)
    return means[labels] + spread[labels] * torch.randn(images, *shape, generator=generator), labels


# ---- An independent computation, from all features at once --------------------------------------------------


def by_numpy(features: Tensor, labels: Tensor) -> dict[str, float]:
    """Every measure from the definitions in analysis/features.py, image by image and pair by pair."""
    x = features.double().numpy()
    z = x.reshape(*x.shape[:2], -1).mean(2)
    r = np.sqrt((x.reshape(len(x), -1) ** 2).sum(1))
    y = labels.numpy()
    kinds = np.unique(y)
    share = {k: (y == k).mean() for k in kinds}
    mean = z.mean(0)
    means = {k: z[y == k].mean(0) for k in kinds}
    spread = {k: ((z[y == k] - means[k]) ** 2).sum(1).mean() for k in kinds}
    within = sum(share[k] * np.cov(z[y == k].T, bias=True).reshape(z.shape[1], -1) for k in kinds)
    between = sum(share[k] * np.outer(means[k] - mean, means[k] - mean) for k in kinds)
    total = np.cov(z.T, bias=True).reshape(z.shape[1], -1)
    pairs = [(k, other) for k in kinds for other in kinds if k < other]
    apart = {(k, m): np.linalg.norm(means[k] - means[m]) for k, m in pairs}
    angles = [angle(means[k], means[m]) for k, m in pairs]
    sigma = np.linalg.svd(z - mean, compute_uv=False)
    p = sigma / sigma.sum()
    return {
        "norm_mean": r.mean(),
        "norm_cv": r.std() / r.mean(),
        "norm_cv_within": math.sqrt(sum(share[k] * r[y == k].var() for k in kinds)) / r.mean(),
        "norm_cv_between": np.array([r[y == k].mean() for k in y]).std() / r.mean(),
        "class_cosine": float(np.mean([cosine(z[i], means[y[i]]) for i in range(len(z))])),
        "within_share": np.trace(within) / np.trace(total),
        "angle_mean": float(np.mean(angles)),
        "angle_min": min(angles),
        "centred_angle_min": min(angle(means[k] - mean, means[m] - mean) for k, m in pairs),
        "distance": float(np.mean([apart[k, m] / math.sqrt((spread[k] + spread[m]) / 2) for k, m in pairs])),
        "nc1": np.trace(within @ np.linalg.pinv(between, rcond=1e-10)) / len(kinds),
        "cdnv": float(np.mean([(spread[k] + spread[m]) / (2 * apart[k, m] ** 2) for k, m in pairs])),
        "fisher": np.trace(np.linalg.solve(within, between)),
        "effective_rank": math.exp(-sum(v * math.log(v) for v in p if v > 0)),
    }


def cosine(a: Array, b: Array) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def angle(a: Array, b: Array) -> float:
    return math.degrees(math.acos(cosine(a, b)))


@pytest.mark.parametrize("shape", [(5,), (5, 7), (5, 4, 3), (1,), (20, 2, 2)], ids=str)
def test_every_measure_is_what_numpy_finds_in_all_features_at_once(shape: tuple[int, ...]) -> None:
    features, labels = some_features(*shape)
    expected = by_numpy(features, labels)
    assert tuple(expected) == MEASURES
    assert measure(summed(features, labels, 4)) == pytest.approx(expected, rel=1e-5)


def test_a_class_without_an_image_does_not_count() -> None:
    features, labels = some_features(5)
    assert measure(summed(features, labels, 4)) == measure(summed(features, 2 * labels, 9))


def test_features_whose_mean_is_a_thousand_times_their_spread_keep_their_digits() -> None:
    """Against float64 on the same float32 features, which have themselves no more than four digits of it."""
    features, labels = some_features(6, 4)
    far = features + 1000
    found, expected = measure(summed(far, labels, 4)), by_numpy(far, labels)
    assert {name: found[name] for name in CLASS_MEASURES} == pytest.approx(
        {name: expected[name] for name in CLASS_MEASURES}, rel=1e-4
    )
    assert found["norm_cv"] == pytest.approx(expected["norm_cv"], rel=1e-3)


def test_half_precision_neither_overflows_nor_loses_the_norm() -> None:
    features, labels = some_features(6, 40)
    half = (features * 1000).half()  # sums of squares overflow float16
    found, expected = measure(summed(half, labels, 4)), by_numpy(half, labels)
    assert found == pytest.approx(expected, rel=1e-4)


# ---- Closed forms -------------------------------------------------------------------------------------------

K, D, R, S = 5, 8, 3.0, 0.7


def orthogonal_classes() -> tuple[Tensor, Tensor]:
    """K class means of length R on axes of their own, each with 2 D images at S along every axis, to both sides."""
    steps = torch.cat([S * torch.eye(D), -S * torch.eye(D)])
    labels = torch.arange(K).repeat_interleave(2 * D)
    return (R * torch.eye(D)[:K])[labels] + steps.repeat(K, 1), labels


def test_orthogonal_classes_with_round_clouds_have_closed_forms() -> None:
    found = measure(summed(*orthogonal_classes(), K))
    between = R**2 / K  # the eigenvalue of S_B in K - 1 dimensions; S_W is S^2/D in all
    sigma = [math.sqrt(S**2 / D + between)] * (K - 1) + [math.sqrt(S**2 / D)] * (D - K + 1)
    p = [s / sum(sigma) for s in sigma]
    expected = {
        "within_share": S**2 / (S**2 + R**2 * (1 - 1 / K)),
        "angle_mean": 90.0,
        "angle_min": 90.0,
        "centred_angle_min": math.degrees(math.acos(-1 / (K - 1))),
        "distance": math.sqrt(2) * R / S,
        "cdnv": S**2 / (2 * R**2),
        "nc1": (K - 1) * S**2 / D / between / K,
        "fisher": (K - 1) * between / (S**2 / D),
        "effective_rank": math.exp(-sum(v * math.log(v) for v in p)),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-6)


def test_norms_of_two_classes_have_closed_forms() -> None:
    """Norms 1 and 3 in one class, 4 and 8 in the other: mean 4, variances 1 and 4, between 4."""
    features = torch.tensor([1.0, 3.0, 4.0, 8.0])[:, None, None] * torch.tensor([[[0.6, 0.8]]])
    found = measure(summed(features, torch.tensor([0, 0, 1, 1]), 2))
    assert found["norm_mean"] == pytest.approx(4)
    assert found["norm_cv_within"] == pytest.approx(math.sqrt(2.5) / 4)
    assert found["norm_cv_between"] == pytest.approx(2 / 4)
    assert found["norm_cv"] == pytest.approx(math.sqrt(6.5) / 4)


def test_collapsed_classes_reach_the_ends_of_the_ranges() -> None:
    labels = torch.arange(3).repeat(4)
    found = measure(summed((2 * torch.eye(3))[labels], labels, 3))
    assert found["within_share"] == pytest.approx(0)
    assert found["nc1"] == pytest.approx(0, abs=1e-12)
    assert found["cdnv"] == pytest.approx(0, abs=1e-12)
    assert found["class_cosine"] == pytest.approx(1)
    assert found["norm_cv"] == pytest.approx(0, abs=1e-7)
    assert found["effective_rank"] == pytest.approx(2)
    assert found["distance"] is None  # infinite
    assert found["fisher"] is None


@pytest.mark.parametrize(
    ("features", "labels", "defined"),
    [
        (torch.randn(6, 3), torch.zeros(6, dtype=torch.int64), {"norm_mean", "within_share", "effective_rank"}),
        (torch.zeros(6, 3), torch.arange(6) % 2, {"norm_mean", "class_cosine"}),
        (torch.ones(1000, 1) * torch.randn(300), torch.arange(1000) % 2, {"norm_mean", *ABOUT_ORIGIN}),
        (torch.randn(1, 3), torch.zeros(1, dtype=torch.int64), {"norm_mean", "class_cosine"}),
        (torch.tensor([[1.0], [math.nan]]), torch.arange(2), set()),
        (torch.tensor([[1.0], [math.inf]]), torch.arange(2), set()),
    ],
    ids=["one class", "all zero", "all equal", "one image", "nan", "infinite"],
)
def test_what_is_not_defined_is_none_and_nothing_raises(
    features: Tensor, labels: Tensor, defined: set[str]
) -> None:
    found = measure(summed(features, labels, 2))
    assert found.keys() == set(MEASURES)
    assert defined <= {name for name, value in found.items() if value is not None}
    assert all(value is None or math.isfinite(value) for value in found.values())
    assert found["angle_mean"] is None or defined >= set(ABOUT_ORIGIN)
    assert found["nc1"] is None
    assert found["within_share"] is None or "within_share" in defined


# ---- Properties ---------------------------------------------------------------------------------------------

SHIFTED = tuple(name for name in CLASS_MEASURES if name not in ABOUT_ORIGIN)


def rotated(features: Tensor) -> Tensor:
    q, _ = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))
    return features @ q


CHANGES: dict[str, tuple[Callable[[Tensor], Tensor], tuple[str, ...]]] = {
    "shifted": (lambda x: x + torch.arange(6.0), SHIFTED),
    "scaled": (lambda x: 1e-3 * x, (*CLASS_MEASURES, "norm_cv", "norm_cv_within", "norm_cv_between")),
    "rotated": (rotated, MEASURES),
    "stretched": (lambda x: x * torch.linspace(0.1, 10, 6) + x[:, [1, 0, 3, 2, 5, 4]], ("fisher",)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_measures_do_not_change_by_what_they_do_not_measure(name: str) -> None:
    change, kept = CHANGES[name]
    features, labels = some_features(6)
    before, after = (measure(summed(x, labels, 4)) for x in (features, change(features)))
    assert {key: after[key] for key in kept} == pytest.approx({key: before[key] for key in kept}, rel=1e-3)
    if name != "rotated":
        assert any(after[key] != pytest.approx(before[key], rel=1e-2) for key in MEASURES)


@settings(max_examples=30)
@given(
    seed=st.integers(0, 10**6),
    classes=st.integers(2, 6),
    d=st.integers(1, 8),
    apart=st.sampled_from([0.0, 0.1, 1.0, 30.0]),
    batch=st.integers(1, 60),
)
def test_ranges_hold_and_batches_do_not_matter(seed: int, classes: int, d: int, apart: float, batch: int) -> None:
    features, labels = some_features(d, classes=classes, apart=apart, seed=seed)
    n = len(features)
    found = measure(summed(features, labels, classes, batch))
    assert found == pytest.approx(measure(summed(features, labels, classes, n)), rel=1e-6)
    high = {"norm_cv": math.sqrt(n - 1), "class_cosine": 1, "within_share": 1, "effective_rank": d}
    high |= {"angle_mean": 180, "angle_min": 180, "centred_angle_min": 180}
    for name, value in found.items():
        assert value is not None
        low = {"class_cosine": -1, "effective_rank": 1}.get(name, 0)
        assert low - 1e-6 <= value <= high.get(name, math.inf) + 1e-6
    assert found["norm_cv"] ** 2 == pytest.approx(found["norm_cv_within"] ** 2 + found["norm_cv_between"] ** 2)
    assert found["angle_min"] <= found["angle_mean"] + 1e-9


# ---- The sums -----------------------------------------------------------------------------------------------


def test_the_histogram_counts_each_image_in_the_bin_of_its_norm() -> None:
    norms = torch.tensor([1.0, 1.04, 1.05, 2.0, 1e-30, 1e30, 0.0])
    found = histogram(summed(norms[:, None], torch.zeros(7, dtype=torch.int64), 1))
    assert sum(found["counts"]) == 7
    drawn = {found["first"] + i: count for i, count in enumerate(found["counts"]) if count}
    lowest, highest = min(drawn), max(drawn)
    assert drawn[0] == 2  # 1.0 and 1.04 in [1, 2^(1/16))
    assert drawn[1] == 1
    assert drawn[BINS_PER_OCTAVE] == 1
    assert drawn[lowest] == 2  # below 2^-64, zero too
    assert drawn[highest] == 1
    assert (lowest, highest) == (-64 * BINS_PER_OCTAVE, 64 * BINS_PER_OCTAVE - 1)
