"""The formulas for training on maps of few positions, whose (N, C) moments would be as large as the map.

The rows (N, C, ...) or (N, P, C), see formulas.py, are read as a table: a column for each channel and position, or
in channels_last for each channel. A sum for a sample runs along the table's row, a sum for a batch statistic down
its columns, in both cases over adjacent memory. Such a map stays in the cache, so one more pass is cheap.

    s = a / ||x_n||                                                                                 of a sample
    r = s x in the first row;  d = s x - r;  m = mean d;  q = mean d^2 - m^2                        of a column
    mu = mean (r + m);  v = mean (q + (r + m - mu)^2), over a channel's columns                        (C,)
    y = (s x - mu) k + b,  k = inv w,  inv = 1 / sqrt(v + eps)

    backward, of the gradient g of y, with z = s x:
    gb = sum g;  gr = sum g (z - mu);  gw = gr inv
    dz = k (g - gb / M - (z - mu) inv^2 gr / M);  dx = s (dz - z <dz, z> / a^2), the product over a sample

Three steps keep the digits of a spread far below the mean: the distance from r, sums down the columns in float64,
and the distance of z from `near`, which is mu in the map's precision; the rest of mu enters with the small terms.
"""

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from l2bn.kernels.formulas import (
    TINY,
    Saved,
    Scalar,
    Scale,
    at_positions,
    materialized,
    sample_scale,
    squared_target,
    widened,
)


def at_columns(channels: Tensor, rows: Tensor, axis: int) -> Tensor:
    """Give channels (C,) the axes that broadcast with rows."""
    if axis == 2 and not torch.compiler.is_compiling():  # a model's layout is not known before it is compiled
        return materialized(at_positions(channels, rows, axis).expand(rows.shape[1:]).contiguous())
    return at_positions(materialized(channels), rows, axis)


def by_channel(columns: Tensor) -> Tensor:
    """View columns (J,) as (C, J / C)."""
    return columns.reshape(columns.shape[0], -1)


def along(rows: Tensor) -> Tensor:
    """Sum over each sample, to (N, 1, ...)."""
    return rows.sum(tuple(range(1, rows.ndim)), keepdim=True)


def down(rows: Tensor, axis: int) -> Tensor:
    """Sum down the columns, to (C, ...) or (C,), in float64 but for groups of a few samples.

    A group is summed along the memory; the sums of the groups, which are read across it, are fewer.
    """
    n = rows.shape[0]
    # Of a size left open nothing is known, and nothing is asked: the answer would compile a graph for each kind of
    # it.
    group = next((k for k in (16, 8, 4, 2) if statically_known_true(n % k == 0)), 1)
    groups = rows.view(n // group, group, *rows.shape[1:]).sum((1, 2) if axis == 1 else 1)
    return materialized(groups).sum(0, dtype=torch.float64)


def statistics(z: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance (C,), in float64."""
    r = z[0, 0] if axis == 1 else z[0]
    d = z - r
    count = z.shape[0] * (z.shape[1] if axis == 1 else 1)
    m = down(d, axis) / count
    q = (down(d * d, axis) / count - m * m).clamp_min(0)
    mean = by_channel(r + m)
    mu = mean.mean(1)
    return mu, (by_channel(q) + (mean - mu.unsqueeze(1)).square()).mean(1)


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Scale, eps: Scalar, axis: int
) -> tuple[Tensor, Tensor, Tensor, Saved]:
    """Return y like x, mean and biased variance (C,) of the normalized features, and what backward saves besides
    x."""
    # Before the first sum, as in rows.py: otherwise a compiled model stores one more map for an activation's
    # backward.
    back, wide = -widened(x), widened(x)
    norm2 = along(wide * wide)
    s = materialized(sample_scale(norm2, squared_target(x, scale)))
    mu, v = statistics(wide * s, axis)
    inv = 1 / (v + eps).sqrt()
    k = inv if weight is None else inv * weight
    near = mu.to(s.dtype)
    shift = (near - mu) * k if bias is None else bias + (near - mu) * k
    of_mean, of_z, of_all = [at_columns(t.to(s.dtype), x, axis) for t in (near, k, shift)]
    y = of_all - (back * s + of_mean) * of_z
    return y.to(x.dtype), mu, v, (norm2, mu, inv)


def backward(
    g: Tensor, x: Tensor, weight: Tensor | None, saved: Saved, scale: Scale, axis: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias."""
    norm2, mu, inv = saved
    wide_g, a2 = widened(g), squared_target(x, scale)
    s = materialized(sample_scale(norm2, a2))
    back = -widened(x) * s  # -z
    near = mu.to(s.dtype)
    d = -(back + at_columns(near, x, axis))
    gb = by_channel(down(wide_g, axis)).sum(1)
    gd = by_channel(down(wide_g * d, axis)).sum(1)
    gr = gd + (near - mu) * gb
    count = x.numel() // mu.shape[0]
    k = inv if weight is None else inv * weight
    c1 = k * gr * inv * inv / count
    c0 = k * gb / count + c1 * (near - mu)
    of_g, of_d, of_all = [at_columns(t.to(s.dtype), x, axis) for t in (k, c1, c0)]
    dz = wide_g * of_g - d * of_d - of_all
    # Below tiny, s does not depend on x.
    along_z = torch.where(norm2 > TINY**2, along(dz * back) / a2, 0.0)
    dx = (dz - back * materialized(along_z)) * s
    return dx.to(x.dtype), gr * inv, gb
