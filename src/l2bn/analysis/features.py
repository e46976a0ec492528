"""Measures of features: spread of the norms, compactness of classes, separation of classes.

Each measure is a pure function of the `Moments` of the features at one place of a network. N images, n_k of class k
of the K that occur, d features. A map enters by its mean over the positions, z; its norm r is taken over all of it.
With class means mu_k = mean z, s_k^2 = mean ||z - mu_k||^2 over the images of class k, and mu = mean z over all:

    S_W = sum_k n_k/N cov_k      within-class covariance (d, d), cov_k = mean (z - mu_k)(z - mu_k)^T
    S_B = sum_k n_k/N (mu_k - mu)(mu_k - mu)^T      between-class covariance
    S_T = S_W + S_B      total covariance

    measure             formula                                                           range
    norm_mean           mean r                                                            [0, inf)
    norm_cv             std(r) / mean(r), the coefficient of variation                    [0, sqrt(N - 1)]
    norm_cv_within      sqrt(sum_k n_k/N var_k(r)) / mean(r)                              [0, norm_cv]
    norm_cv_between     std of the classes' mean r, weighted by n_k, / mean(r)            [0, norm_cv]
    class_cosine        mean of cos(z, mu_k), k the class of z                            [-1, 1]
    within_share        tr S_W / tr S_T                                                   [0, 1]
    angle_mean          mean angle between mu_k and mu_l over the pairs k < l, degrees    [0, 180]
    angle_min           smallest of these angles                                          [0, 180]
    centred_angle_min   smallest angle between mu_k - mu and mu_l - mu                    [0, 180]
    distance            mean of ||mu_k - mu_l|| / sqrt((s_k^2 + s_l^2) / 2) over pairs    [0, inf)
    nc1                 tr(S_W S_B^+) / K, S_B^+ the pseudo-inverse                       [0, inf)
    cdnv                mean of (s_k^2 + s_l^2) / (2 ||mu_k - mu_l||^2) over pairs        [0, inf)
    fisher              tr(S_W^+ S_B)                                                     [0, inf)
    effective_rank      exp(-sum_i p_i log p_i), p_i = sigma_i / sum sigma,               [1, d]
                        sigma_i the singular values of the centred features

Small is compact: within_share, nc1, cdnv (and a class_cosine near 1). Large is separated: the angles, distance,
fisher. All variances are biased (1/N). norm_cv^2 = norm_cv_within^2 + norm_cv_between^2. Of CLASS_MEASURES all but
those ABOUT_ORIGIN stay as they are when the features are shifted, all of them when they are multiplied by a number;
fisher under every invertible linear map. nc1 and fisher mean little where N - K is not far above d.

Sources: nc1 Papyan, Han and Donoho, PNAS 117 (2020) 24652, arXiv:2008.08186; cdnv Galanti, György and Hutter,
arXiv:2112.15121; fisher, the trace criterion of discriminant analysis, Fukunaga, Introduction to Statistical
Pattern Recognition (1990), ch. 10, after Fisher, Annals of Eugenics 7 (1936) 179; effective_rank Roy and
Vetterli, EUSIPCO 2007; within_share is 1 less the correlation ratio eta^2 of the analysis of variance, with traces
for variances; coefficient of variation and angles are textbook; class_cosine and distance, a mean over pairs of the
sensitivity index d', are chosen here. Papyan et al. have classes of equal size, where the weights n_k/N are their
1/K. A mean angle about mu is left out: centred means add up to 0, so that with K of equal length it is near
arccos(-1/(K - 1)) whatever the network.
"""

import math
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from l2bn.analysis.moments import OCTAVES, Moments
from l2bn.records import BINS_PER_OCTAVE, CLASS_MEASURES, MEASURES, Measures

RANK_TOLERANCE = 1e-10
"""Eigenvalues of a covariance below this share of the largest count as 0 where one is inverted."""

ABOUT_ORIGIN = ("class_cosine", "angle_mean", "angle_min")

LEAST_SPREAD = 1e-12
"""tr S_T below this share of mean ||z||^2, a deviation of 17 roundings of float32, is taken for 0."""


def measure(moments: Moments) -> Measures:
    """All measures; None for one that is not defined (one class, no spread) or not finite."""
    if not all(tensor.isfinite().all() for tensor in moments.tensors):
        return dict.fromkeys(MEASURES)
    geometry = Geometry(moments)
    values = {name: float(_FORMULAS[name](geometry)) for name in MEASURES}
    # As of a network that puts out the same for all images.
    if geometry.total <= LEAST_SPREAD * geometry.mean_square:
        values |= {name: math.nan for name in CLASS_MEASURES if name not in ABOUT_ORIGIN}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def histogram(moments: Moments) -> dict[str, object]:
    """Histogram of the norms: count k is of norms in [2^(i/16), 2^((i+1)/16)), i = first + k."""
    occupied = moments.histogram.nonzero().flatten().tolist() or [0]
    low, high = occupied[0], occupied[-1] + 1
    counts = [int(count) for count in moments.histogram[low:high].tolist()]
    return {"first": low - OCTAVES * BINS_PER_OCTAVE, "counts": counts}


class Geometry:
    """Class means, spreads and covariances; a class without an image is left out."""

    def __init__(self, moments: Moments) -> None:
        m = Moments(*(tensor.cpu() for tensor in moments.tensors))
        there = m.counts > 0
        self.counts = m.counts[there]  # (K,)
        self.norms, self.squared_norms = m.norms[there], m.squared_norms[there]  # (K,)
        self.means = m.sums[there] / self.counts[:, None]  # (K, d)
        self.directions = m.directions[there]  # (K, d)
        self.products = m.products
        self.n = self.counts.sum()
        self.shares = self.counts / self.n  # (K,)
        self.mean = self.shares @ self.means  # (d,)
        self.centred = self.means - self.mean  # (K, d)
        spread = m.squares[there] / self.counts - self.means.square().sum(1)
        self.spreads = spread.clamp_min(0)  # (K,) s_k^2
        self.total = self.shares @ (self.spreads + self.centred.square().sum(1))  # tr S_T
        self.mean_square = m.squares.sum() / self.n  # mean ||z||^2

    @cached_property
    def within(self) -> Tensor:
        """S_W, (d, d)."""
        return self.products / self.n - (self.means * self.shares[:, None]).T @ self.means

    @cached_property
    def between(self) -> Tensor:
        """S_B, (d, d)."""
        return (self.centred * self.shares[:, None]).T @ self.centred

    @cached_property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """||mu_k - mu_l||^2 and (s_k^2 + s_l^2) / 2 of all pairs k < l."""
        i, j = torch.triu_indices(len(self.means), len(self.means), 1)
        return torch.pdist(self.means).square(), (self.spreads[i] + self.spreads[j]) / 2


NOT_DEFINED = torch.tensor(math.nan)


# ---- Norms ------------------------------------------------------------------------------------------------


def norm_mean(g: Geometry) -> Tensor:
    return g.norms.sum() / g.n


def norm_cv_within(g: Geometry) -> Tensor:
    variances = g.squared_norms / g.counts - (g.norms / g.counts).square()
    return (g.shares @ variances.clamp_min(0)).sqrt() / norm_mean(g)


def norm_cv_between(g: Geometry) -> Tensor:
    means = g.norms / g.counts
    return (g.shares @ (means - norm_mean(g)).square()).sqrt() / norm_mean(g)


def norm_cv(g: Geometry) -> Tensor:
    return torch.hypot(norm_cv_within(g), norm_cv_between(g))


# ---- Compactness ------------------------------------------------------------------------------------------


def class_cosine(g: Geometry) -> Tensor:
    length = torch.linalg.vector_norm(g.means, dim=1, keepdim=True)
    return (g.directions * g.means / torch.where(length > 0, length, 1.0)).sum() / g.n


def within_share(g: Geometry) -> Tensor:
    return g.shares @ g.spreads / g.total


# ---- Separation -------------------------------------------------------------------------------------------


def angles(means: Tensor) -> Tensor:
    """Degrees between the rows of (K, d), each pair once; rows of length 0 have none."""
    length = torch.linalg.vector_norm(means, dim=1, keepdim=True)
    unit = (means / length)[length.squeeze(1) > 0]
    # Half the chord is the sine of half the angle; a cosine would lose the digits of small angles.
    return torch.rad2deg(2 * torch.asin((torch.pdist(unit) / 2).clamp_max(1)))


def angle_mean(g: Geometry) -> Tensor:
    return angles(g.means).mean()


def smallest(angles: Tensor) -> Tensor:
    return angles.min() if len(angles) else NOT_DEFINED


def angle_min(g: Geometry) -> Tensor:
    return smallest(angles(g.means))


def centred_angle_min(g: Geometry) -> Tensor:
    return smallest(angles(g.centred))


def distance(g: Geometry) -> Tensor:
    apart, spread = g.pairs
    return (apart / spread).sqrt().mean()


# ---- Neural collapse and discriminant analysis ------------------------------------------------------------


def nc1(g: Geometry) -> Tensor:
    # S_B = A^T A with the K rows of A, so that its pseudo-inverse needs no (d, d) decomposition.
    _, s, directions = torch.linalg.svd(g.centred * g.shares.sqrt()[:, None], full_matrices=False)
    if not s.max() > 0:
        return NOT_DEFINED
    kept = s.square() > RANK_TOLERANCE * s.max().square()
    u = directions[kept]  # (rank, d)
    return ((u @ g.within * u).sum(1) / s[kept].square()).sum() / len(g.means)


def cdnv(g: Geometry) -> Tensor:
    apart, spread = g.pairs
    return (spread / apart).mean()


def fisher(g: Geometry) -> Tensor:
    # In units of each feature's own deviation, which changes nothing but the rounding.
    deviation = (g.within.diagonal() + g.between.diagonal()).clamp_min(0).sqrt()
    alive = deviation > 0
    if not alive.any():
        return NOT_DEFINED
    scale = 1 / deviation[alive]
    within, between = (s[alive][:, alive] * scale[:, None] * scale for s in (g.within, g.between))
    inverse = torch.linalg.pinv(within, rtol=RANK_TOLERANCE, hermitian=True)
    return (inverse * between).sum() if within.diagonal().max() > 0 else NOT_DEFINED


def effective_rank(g: Geometry) -> Tensor:
    sigma = torch.linalg.eigvalsh(g.within + g.between).clamp_min(0).sqrt()
    return torch.special.entr(sigma / sigma.sum()).sum().exp()  # not a number without a spread


_FORMULAS: dict[str, Callable[[Geometry], Tensor]] = {
    formula.__name__: formula
    for formula in (
        *(norm_mean, norm_cv, norm_cv_within, norm_cv_between, class_cosine, within_share),
        *(angle_mean, angle_min, centred_angle_min, distance, nc1, cdnv, fisher, effective_rank),
    )
}
assert tuple(_FORMULAS) == MEASURES
