"""The formulas for maps of many positions, in batch norm's own memory traffic.

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
    at_positions,
    computed_once,
    over_positions,
    positions_of,
    sample_scale,
    squared_target,
    widened,
)


class Moments(NamedTuple):
    """The moments of x, from the first pass."""

    x0: Tensor  # (N, C) the origin from which distances are taken
    m: Tensor  # (N, C) mean of that distance over the positions
    var: Tensor  # (N, C) biased variance over the positions


class Features(NamedTuple):
    """The statistics of the normalized features z, in float64."""

    mean: Tensor  # (N, C) of x over the positions
    norm2: Tensor  # (N, 1) the sample's squared l2 norm
    s: Tensor  # (N, 1) the sample's factor
    zc: Tensor  # (N, C) mean of z over the positions, centred over the samples
    mu: Tensor  # (C,) mean of z over samples and positions
    v: Tensor  # (C,) biased variance of z over samples and positions


def origin(x: Tensor, axis: int) -> Tensor:
    """Return x0 of forward, (N, C)."""
    return widened(x[:, 0] if axis == 1 else x.flatten(2)[:, :, 0])


def distance(x: Tensor, x0: Tensor, axis: int) -> Tensor:
    """Return d, in the shape of x."""
    return widened(x) - at_positions(x0, x, axis)


def distance_back(x: Tensor, axis: int) -> Tensor:
    """Return -d by a subtraction of its own, which a compiler doesn't merge with the d of `moments`."""
    return at_positions(origin(x, axis), x, axis) - widened(x)


def moments(x: Tensor, axis: int) -> Moments:
    """Read x once, for its moments."""
    x0, positions = origin(x, axis), positions_of(x, axis)
    d = distance(x, x0, axis)
    m = over_positions(d, axis) / positions
    return Moments(x0, m, (over_positions(d * d, axis) / positions - m * m).clamp_min(0))


def features(x: Tensor, taken: Moments, rms: bool, axis: int) -> Features:
    """Return the statistics of z = s x, from the moments of x."""
    var = taken.var.double()
    mean = taken.x0.double() + taken.m
    norm2 = positions_of(x, axis) * (var + mean * mean).sum(1, keepdim=True)
    s = sample_scale(norm2, squared_target(x, rms))
    mu = (s * mean).mean(0)
    zc = s * mean - mu
    return Features(mean, norm2, s, zc, mu, (s * s * var + zc * zc).mean(0))


def line(
    taken: Moments, z: Features, weight: Tensor | None, bias: Tensor | None, eps: Scalar
) -> tuple[Tensor, Tensor, Tensor]:
    """Return A and B (N, C) of y = d A + B, and the inverse deviation (C,) in both."""
    m = taken.m
    inv = 1 / (z.v + eps).sqrt()
    k = inv if weight is None else inv * weight
    shift = (z.zc - z.s * m) * k
    return (z.s * k).to(m.dtype), (shift if bias is None else shift + bias).to(m.dtype), inv


def apply_line(x: Tensor, slope: Tensor, shift: Tensor, axis: int, back: Tensor | None = None) -> Tensor:
    """Read x and write y; `back` is -d, if it is there already."""
    slope, shift = computed_once(slope), computed_once(shift)
    back = distance_back(x, axis) if back is None else back
    return (at_positions(shift, x, axis) - back * at_positions(slope, x, axis)).to(x.dtype)


def gradient_sums(g: Tensor, x: Tensor, x0: Tensor, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """Read g and x once, for sg, sgx and m of backward, (N, C)."""
    wide, d = widened(g), distance(x, x0, axis)
    sg, m = over_positions(wide, axis), over_positions(d, axis) / positions_of(x, axis)
    return sg, over_positions(wide * d, axis) - m * sg, m


def parameter_gradients(sg: Tensor, sgx: Tensor, z: Features, inv: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of weight and bias, (C,)."""
    return ((z.s * sgx + z.zc * sg) * inv).sum(0), sg.double().sum(0)


def input_gradient_terms(
    sg: Tensor,
    sgx: Tensor,
    gw: Tensor,
    gb: Tensor,
    taken: Moments,
    z: Features,
    inv: Tensor,
    weight: Tensor | None,
    count: float | Tensor,
    positions: int,
) -> tuple[Tensor, Tensor]:
    """Return e and f of dx, (N, C). `count` is M, the number of values in a channel's statistics."""
    m, var = taken.m, taken.var
    k = inv if weight is None else inv * weight
    c1 = -k * gw * inv / count
    c0 = -k * gb / count + c1 * z.zc
    along_x = k * (sgx + z.mean * sg) + positions * (c0 * z.mean + c1 * z.s * var)
    # Below tiny, s does not depend on x.
    r = torch.where(z.norm2 > TINY**2, along_x.sum(1, keepdim=True) / z.norm2, 0.0)
    e = z.s * (c1 * z.s - r)
    return e.to(m.dtype), (z.s * (c0 - r * z.mean) - m * e).to(m.dtype)


def apply_gradient(g: Tensor, x: Tensor, x0: Tensor, slope: Tensor, e: Tensor, f: Tensor, axis: int) -> Tensor:
    """Read g and x and write dx."""
    slope, e, f = [at_positions(computed_once(t), x, axis) for t in (slope, e, f)]
    return (widened(g) * slope + distance(x, x0, axis) * e + f).to(x.dtype)


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, rms: bool, eps: Scalar, axis: int
) -> tuple[Tensor, Tensor, Tensor, Saved]:
    """Return y like x, mean and biased variance (C,) of the normalized features, and what backward saves besides
    x."""
    # Before the first sum: where an activation needs y in backward, a compiled model computes y again only if no
    # sum has read any part of it. Otherwise it stores y, or ReLU6's mask, which takes longer than all of BN.
    back = distance_back(x, axis)
    taken = moments(x, axis)
    z = features(x, taken, rms, axis)
    slope, shift, inv = line(taken, z, weight, bias, eps)
    y = apply_line(x, slope, shift, axis, back)
    middle = over_positions(widened(x), axis) / positions_of(x, axis)  # x0 of backward
    return y, z.mu, z.v, (inv, middle, taken.var)


def backward(
    g: Tensor, x: Tensor, weight: Tensor | None, saved: Saved, rms: bool, axis: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias."""
    inv, x0, var = saved
    sg, sgx, m = gradient_sums(g, x, x0, axis)
    taken = Moments(x0, m, var)
    z = features(x, taken, rms, axis)
    slope = (z.s * (inv if weight is None else inv * weight)).to(m.dtype)
    gw, gb = parameter_gradients(sg, sgx, z, inv)
    n, positions = x.shape[0], positions_of(x, axis)
    e, f = input_gradient_terms(sg, sgx, gw, gb, taken, z, inv, weight, n * positions, positions)
    return apply_gradient(g, x, x0, slope, e, f, axis), gw, gb


def evaluate(x: Tensor, slope: Tensor, shift: Tensor, rms: bool, axis: int) -> Tensor:
    """Return slope z + shift, both (C,); the first pass reads the samples' norms alone."""
    wide = widened(x)
    s = sample_scale(over_positions(wide * wide, axis).sum(1, keepdim=True), squared_target(x, rms))
    slope, shift = computed_once(s * slope), computed_once(shift)
    return (wide * at_positions(slope, x, axis) + at_positions(shift, x, axis)).to(x.dtype)
