"""The formulas for maps of many positions, in batch norm's own memory traffic; in evaluation for all maps.

The batch statistics of the normalized features follow from the per-sample, per-channel moments of x, so forward is
one reading pass and one read-write pass over the map. Between the passes all tensors are (N, C) or smaller.
Letters: N batch, C channels, P positions, M = N*P. Rows are (N, C, ...) or (N, P, C), see formulas.py.

    x0 = the first position of x;  d = x - x0;  m = mean_p d;  var = mean_p (d - m)^2           (N, C)
    ||x_n||^2 = P sum_c (var + (x0 + m)^2);  s = a / ||x_n||                                    (N, 1)
    zm = s (x0 + m);  mu = mean_n zm;  zc = zm - mu;  v = mean_n (s^2 var + zc^2);  inv = 1 / sqrt(v + eps)
    y = d A + B,  k = inv w,  A = s k,  B = (zc - s m) k + b

    backward, of the gradient g of y, with x0 = mean_p x:
    sg = sum_p g;  sgx = sum_p g d - m sg;  gb = sum_n sg;  gw = sum_n (s sgx + zc sg) inv
    c1 = -k gw inv / M;  c0 = -k gb / M + c1 zc
    r = sum_c (k (sgx + (x0 + m) sg) + P (c0 (x0 + m) + c1 s var)) / ||x_n||^2;  e = s (c1 s - r)
    dx = g A + d e + f,  f = s (c0 - r (x0 + m)) - m e

With a mean far above the spread, mean_p x^2 - (mean_p x)^2 would lose the digits of the spread. So x enters as its
distance from a nearby x0: in forward the first position, which costs no pass over x; in backward the mean rounded
to x's own precision, with the rest in m. Then an element of dx needs x at its own place alone, and a compiled model
writes dx over x. Tensors of (N, C) and smaller are computed in float64.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from l2bn.kernels.formulas import (
    TINY,
    Saved,
    Scalar,
    Scale,
    at_positions,
    materialized,
    over_positions,
    positions_of,
    sample_scale,
    squared_target,
    widened,
)


class Features(NamedTuple):
    """The statistics of the normalized features z, in float64."""

    mean: Tensor  # (N, C) of x over the positions
    norm2: Tensor  # (N, 1) the sample's squared l2 norm
    s: Tensor  # (N, 1) the sample's factor
    zc: Tensor  # (N, C) mean of z over the positions, centred over the samples
    mu: Tensor  # (C,) mean of z over samples and positions
    v: Tensor  # (C,) biased variance of z over samples and positions


def features(x: Tensor, x0: Tensor, m: Tensor, var: Tensor, scale: Scale, axis: int) -> Features:
    """Return the statistics of z = s x from the moments of x, each (N, C)."""
    var = var.double()
    mean = x0.double() + m
    norm2 = positions_of(x, axis) * (var + mean * mean).sum(1, keepdim=True)
    s = sample_scale(norm2, squared_target(x, scale))
    mu = (s * mean).mean(0)
    zc = s * mean - mu
    return Features(mean, norm2, s, zc, mu, (s * s * var + zc * zc).mean(0))


def distance(x: Tensor, x0: Tensor, axis: int) -> Tensor:
    """Return d, in the shape of x."""
    return widened(x) - at_positions(x0, x, axis)


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Scale, eps: Scalar, axis: int
) -> tuple[Tensor, Tensor, Tensor, Saved]:
    """Return y like x, mean and biased variance (C,) of the normalized features, and what backward saves besides
    x."""
    x0, positions = widened(x[:, 0] if axis == 1 else x.flatten(2)[:, :, 0]), positions_of(x, axis)
    # -d, by a subtraction of its own that a compiler doesn't merge with d, and before the first sum: where an
    # activation needs y in backward, a compiled model computes y again only if no sum has read any part of it.
    # Otherwise it stores y, or ReLU6's mask, which takes longer than all of BN.
    back = at_positions(x0, x, axis) - widened(x)
    d = distance(x, x0, axis)
    m = over_positions(d, axis) / positions
    var = (over_positions(d * d, axis) / positions - m * m).clamp_min(0)
    z = features(x, x0, m, var, scale, axis)
    inv = 1 / (z.v + eps).sqrt()
    k = inv if weight is None else inv * weight
    shift = (z.zc - z.s * m) * k
    a = materialized((z.s * k).to(m.dtype))
    b = materialized((shift if bias is None else shift + bias).to(m.dtype))
    y = (at_positions(b, x, axis) - back * at_positions(a, x, axis)).to(x.dtype)
    middle = over_positions(widened(x), axis) / positions  # x0 of backward
    return y, z.mu, z.v, (inv, middle, var)


def backward(
    g: Tensor, x: Tensor, weight: Tensor | None, saved: Saved, scale: Scale, axis: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias."""
    inv, x0, var = saved
    positions = positions_of(x, axis)
    wide, d = widened(g), distance(x, x0, axis)
    sg, m = over_positions(wide, axis), over_positions(d, axis) / positions
    sgx = over_positions(wide * d, axis) - m * sg
    z = features(x, x0, m, var, scale, axis)
    gw, gb = ((z.s * sgx + z.zc * sg) * inv).sum(0), sg.double().sum(0)
    k = inv if weight is None else inv * weight
    count = x.shape[0] * positions
    c1 = -k * gw * inv / count
    c0 = -k * gb / count + c1 * z.zc
    along_x = k * (sgx + z.mean * sg) + positions * (c0 * z.mean + c1 * z.s * var)
    # Below tiny, s does not depend on x.
    r = torch.where(z.norm2 > TINY**2, along_x.sum(1, keepdim=True) / z.norm2, 0.0)
    e = z.s * (c1 * z.s - r)
    terms = z.s * k, e, z.s * (c0 - r * z.mean) - m * e
    a, e, f = [at_positions(materialized(term.to(m.dtype)), x, axis) for term in terms]
    return (wide * a + d * e + f).to(x.dtype), gw, gb


def evaluate(x: Tensor, slope: Tensor, shift: Tensor, scale: Scale, axis: int) -> Tensor:
    """Return slope z + shift, both (C,).

    No tensor of (N, C) stands between a sample's norm and its pass, so that the compiler puts both into one loop
    over the samples: the pass reads from the cache what the norm has read. A sample is one thread's on a CPU; two
    threads gained nothing by sharing one.
    """
    wide = widened(x)
    norm2 = wide.square().sum(tuple(range(1, x.ndim)), keepdim=True)
    # As `sample_scale`, for less: an all-zero sample stays 0 by any factor, and inf - inf is NaN.
    s = (norm2.clamp_min(TINY**2) / squared_target(x, scale)).rsqrt() + (norm2 - norm2)
    slope, shift = (at_positions(materialized(t), x, axis) for t in (slope, shift))
    return (wide * slope * s + shift).to(x.dtype)
