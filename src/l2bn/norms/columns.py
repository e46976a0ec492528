"""The formulas for maps of few positions, whose (N, C) moments would be as large as the map and their sums short.

The rows (N, C, ...) or (N, P, C), see layout.py, are read as a table (N, Q, J) of J adjacent columns: J = C*P and
Q = 1, or for channels_last J = C and Q = P. Every sum runs along the columns, for a sample, or down them, for a
batch statistic: over adjacent memory in both cases. Such a map stays in the cache, so a pass more is cheap.

    s = a / ||x_n||                                                                              (N, 1, 1)
    r = s x in the first row;  d = s x - r;  m = mean d and q = mean d^2 - m^2 of a column             (J,)
    mu = mean (r + m);  v = mean (q + (r + m - mu)^2), over a channel's columns                        (C,)
    y = (s x - mu) k + b,  k = inv w,  inv = 1 / sqrt(v + eps)

    backward, of the gradient g of y, with z = s x:
    gb = sum g;  gr = sum g (z - mu);  gw = gr inv
    dz = k (g - gb / M - (z - mu) inv^2 gr / M);  dx = s (dz - z <dz, z> / a^2), the product over a sample

The distance from r keeps the digits of a spread far below the mean, and so do sums down the columns in float64, and
the distance of z from `near`, mu in the map's precision: what mu has beyond it enters with the small terms.
"""

import torch
from torch import Tensor

from l2bn.norms.kernels import computed_once
from l2bn.norms.l2_step import TINY, sample_scale, squared_target, widened
from l2bn.norms.layout import channels_of

Saved = tuple[Tensor, ...]


def as_table(rows: Tensor, axis: int) -> Tensor:
    """(N, Q, J)."""
    return rows.flatten(1).unsqueeze(1) if axis == 2 else rows


def over_columns(channels: Tensor, columns: int) -> Tensor:
    """(C,) -> (J,): each channel's value at each of its columns."""
    own = channels.unsqueeze(1).expand(-1, columns // channels.shape[0])
    return computed_once(own.reshape(columns).contiguous())


def by_channel(columns: Tensor, channels: int) -> Tensor:
    """(J,) -> (C, J / C)."""
    return columns.view(channels, -1)


def squared_norm(table: Tensor) -> Tensor:
    """(N, 1, 1)."""
    wide = widened(table)
    return (wide * wide).sum((1, 2), keepdim=True)


def down(table: Tensor) -> Tensor:
    """(N, Q, J) -> (J,): sums down the columns, in float64 but for groups of a few samples.

    A group is summed along the memory; the sums of all groups, which have to be read across it, are fewer.
    """
    n, _, columns = table.shape
    # A kernel for any size has a SymInt here, of which nothing is known.
    group = next(k for k in (16, 8, 4, 2, 1) if n % k == 0) if isinstance(n, int) else 1
    groups = computed_once(table.reshape(n // group, -1, columns).sum(1))
    return groups.sum(0, dtype=torch.float64)


def statistics(z: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,), float64, of a table."""
    r = z[0, 0]
    d = z - r
    count = z.shape[0] * z.shape[1]
    m = down(d) / count
    q = (down(d * d) / count - m * m).clamp_min(0)
    mean = by_channel(r + m, channels)
    mu = mean.mean(1)
    return mu, (by_channel(q, channels) + (mean - mu.unsqueeze(1)).square()).mean(1)


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, rms: bool, eps: float, axis: int
) -> tuple[Tensor, Tensor, Tensor, Saved]:
    """y in the table of x; mean and biased variance (C,) of the normalized features; what backward needs besides x.

    The table is not seen as rows again, for then a traced layer's output would be a view, which an activation in
    place may not write to.
    """
    table, channels = as_table(x, axis), channels_of(x, axis)
    # Before the first sum, as in rows.py: else an activation's backward has a map more stored in a compiled model.
    back = -widened(table)
    norm2 = squared_norm(table)
    s = computed_once(sample_scale(norm2, squared_target(x, rms)))
    mu, v = statistics(widened(table) * s, channels)
    inv = 1 / (v + eps).sqrt()
    k = inv if weight is None else inv * weight
    near = mu.to(s.dtype)
    shift = (near - mu) * k if bias is None else bias + (near - mu) * k
    of_mean, of_z, of_all = (over_columns(t.to(s.dtype), table.shape[2]) for t in (near, k, shift))
    y = of_all - (back * s + of_mean) * of_z
    return y.to(x.dtype), mu, v, (norm2, mu, inv)


def backward(
    g: Tensor, x: Tensor, weight: Tensor | None, saved: Saved, rms: bool, axis: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    norm2, mu, inv = saved
    table, wide_g = as_table(x, axis), widened(as_table(g, axis))
    channels, columns, a2 = mu.shape[0], table.shape[2], squared_target(x, rms)
    s = computed_once(sample_scale(norm2, a2))
    back = -widened(table) * s  # -z
    near = mu.to(s.dtype)
    d = -(back + over_columns(near, columns))
    gb = by_channel(down(wide_g), channels).sum(1)
    gd = by_channel(down(wide_g * d), channels).sum(1)
    gr = gd + (near - mu) * gb
    count = x.numel() // channels
    k = inv if weight is None else inv * weight
    c1 = k * gr * inv * inv / count
    c0 = k * gb / count + c1 * (near - mu)
    of_g, of_d, of_all = (over_columns(t.to(s.dtype), columns) for t in (k, c1, c0))
    dz = wide_g * of_g - d * of_d - of_all
    # Below tiny, s does not depend on x.
    along_z = torch.where(norm2 > TINY**2, (dz * back).sum((1, 2), keepdim=True) / a2, 0.0)
    dx = (dz - back * computed_once(along_z)) * s
    return dx.to(x.dtype).view(x.shape), gr * inv, gb


def evaluate(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    rms: bool,
    eps: float,
    axis: int,
) -> Tensor:
    """y by the running statistics."""
    table = as_table(x, axis)
    s = computed_once(sample_scale(squared_norm(table), squared_target(x, rms)))
    inv = 1 / (widened(var) + eps).sqrt()
    k = inv if weight is None else inv * weight
    shift = -widened(mean) * k if bias is None else bias - widened(mean) * k
    columns = table.shape[2]
    y = widened(table) * s * over_columns(k, columns) + over_columns(shift, columns)
    return y.to(x.dtype).view(x.shape)
