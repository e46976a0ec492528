"""The formulas for maps of few positions, whose (N, C) moments would be as large as the map and their sums short.

The rows (N, C, P) or (N, P, C), see layout.py, are read as a table (N*Q, J) of J adjacent columns: J = C*P and
Q = 1, or for channels_last J = C and Q = P. Every sum runs along the columns, for a sample, or down them, for a
batch statistic: over adjacent memory in both cases. Such a map stays in the cache, so a pass more is cheap.

    s = a / ||x_n||                                                                                 (N, 1)
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

Saved = tuple[Tensor, ...]


def as_table(rows: Tensor, axis: int) -> Tensor:
    """(N*Q, J)."""
    return rows.flatten(1) if axis == 2 else rows.flatten(0, 1)


def over_rows(samples: Tensor, rows: int) -> Tensor:
    """(N, 1) -> (N*Q, 1): each sample's value in each of its rows."""
    own = samples.expand(-1, rows // samples.shape[0])
    return computed_once(own.reshape(rows, 1).contiguous())


def over_columns(channels: Tensor, columns: int) -> Tensor:
    """(C,) -> (J,): each channel's value at each of its columns."""
    own = channels.unsqueeze(1).expand(-1, columns // channels.shape[0])
    return computed_once(own.reshape(columns).contiguous())


def by_channel(columns: Tensor, channels: int) -> Tensor:
    """(J,) -> (C, J / C)."""
    return columns.view(channels, -1)


def by_sample(table: Tensor, samples: int) -> Tensor:
    """(N*Q, J) -> (N, Q*J)."""
    return table.view(samples, -1)


def squared_norm(table: Tensor, samples: int) -> Tensor:
    """(N, 1)."""
    wide = widened(table)
    return by_sample(wide * wide, samples).sum(1, keepdim=True)


def statistics(z: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,), float64, of a table."""
    r = z[0]
    d = z - r
    m = d.mean(0, dtype=torch.float64)
    q = ((d * d).mean(0, dtype=torch.float64) - m * m).clamp_min(0)
    mean = by_channel(r + m, channels)
    mu = mean.mean(1)
    return mu, (by_channel(q, channels) + (mean - mu.unsqueeze(1)).square()).mean(1)


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, rms: bool, eps: float, axis: int
) -> tuple[Tensor, Tensor, Tensor, Saved]:
    """y like x; mean and biased variance (C,) of the normalized features; what backward needs besides x."""
    table, channels = as_table(x, axis), x.shape[3 - axis]
    norm2 = squared_norm(table, x.shape[0])
    z = widened(table) * over_rows(sample_scale(norm2, squared_target(x, rms)), table.shape[0])
    mu, v = statistics(z, channels)
    inv = 1 / (v + eps).sqrt()
    k = inv if weight is None else inv * weight
    near = mu.to(z.dtype)
    shift = (near - mu) * k if bias is None else bias + (near - mu) * k
    of_mean, of_z, of_all = (over_columns(t.to(z.dtype), table.shape[1]) for t in (near, k, shift))
    y = (z - of_mean) * of_z + of_all
    return y.to(x.dtype).view(x.shape), mu, v, (norm2, mu, inv)


def backward(
    g: Tensor, x: Tensor, weight: Tensor | None, saved: Saved, rms: bool, axis: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    norm2, mu, inv = saved
    table, wide_g = as_table(x, axis), widened(as_table(g, axis))
    channels, (lines, columns), a2 = mu.shape[0], table.shape, squared_target(x, rms)
    s = over_rows(sample_scale(norm2, a2), lines)
    z = widened(table) * s
    near = mu.to(z.dtype)
    d = z - over_columns(near, columns)
    gb = by_channel(wide_g.sum(0, dtype=torch.float64), channels).sum(1)
    gd = by_channel((wide_g * d).sum(0, dtype=torch.float64), channels).sum(1)
    gr = gd + (near - mu) * gb
    count = x.numel() // channels
    k = inv if weight is None else inv * weight
    c1 = k * gr * inv * inv / count
    c0 = k * gb / count + c1 * (near - mu)
    of_g, of_d, of_all = (over_columns(t.to(z.dtype), columns) for t in (k, c1, c0))
    dz = wide_g * of_g - d * of_d - of_all
    # Below tiny, s does not depend on x.
    along_z = torch.where(norm2 > TINY**2, by_sample(dz * z, x.shape[0]).sum(1, keepdim=True) / a2, 0.0)
    dx = (dz - z * over_rows(along_z, lines)) * s
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
    s = over_rows(sample_scale(squared_norm(table, x.shape[0]), squared_target(x, rms)), table.shape[0])
    inv = 1 / (widened(var) + eps).sqrt()
    k = inv if weight is None else inv * weight
    shift = -widened(mean) * k if bias is None else bias - widened(mean) * k
    columns = table.shape[1]
    y = widened(table) * s * over_columns(k, columns) + over_columns(shift, columns)
    return y.to(x.dtype).view(x.shape)
