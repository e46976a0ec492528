"""The steps of L2BN's definition, and what both ways of summing it share: the factor and the memory layout.

    s_n = a / max(||x_n||_2, tiny);  z_n = s_n x_n;  y = BN(z)          (Wang et al., arXiv:2207.02625)

Letters: N batch, C channels, P positions, D = C*P the size of one sample's feature. The kernels read a feature map
(N, C, ...) as rows of memory, without a copy: (N, C, P), or (N, P, C) for channels_last. `axis` is the axis of the
positions P in the rows: 2, or 1 if the channels lie innermost. Inside a compiled model rows keep the axes of the
map (N, C, ...), because the compiler may store them in channels_last all the same.
"""

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

Saved = tuple[Tensor, ...]
Scalar = float | Tensor
"""A number; a tensor () in a kernel, which then serves any value of it."""

Scale = Literal["unit", "rms"]
"""The target of each sample: an l2 norm of 1, or a root mean square of 1."""

SCALES: tuple[str, ...] = get_args(Scale)

TINY = 1e-12  # as in torch.nn.functional.normalize; its square is above 0 in float32


class State(NamedTuple):
    """The parameters and running statistics that a call uses, each (C,) or None."""

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None
    var: Tensor | None


# ---------------------------------------------------------------------------------------------- the definition


def widened(t: Tensor) -> Tensor:
    """Return t in float32 at least: a sum of squares overflows float16 at values of a few hundred."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def check_scale(scale: str) -> None:
    """Raise ValueError for an unknown scale."""
    if scale not in SCALES:
        raise ValueError(f"scale is {scale!r}; it may be {' or '.join(SCALES)}")


def squared_target(x: Tensor, scale: Scale) -> int:
    """Return a^2, the squared norm that each sample of x (N, ...) gets: 1 or D. Raises as `check_scale`."""
    check_scale(scale)
    return math.prod(x.shape[1:]) if scale == "rms" else 1  # from the shape, so that one kernel serves any size


def sample_scale(norm2: Tensor, a2: float) -> Tensor:
    """Return the factor a / sqrt(norm2): 0 where norm2 is 0, NaN where it is not finite.

    For the kernels, whose backward is written by hand: a compiler computes this form in half a kernel's time.
    """
    s = (a2 / norm2.clamp_min(TINY**2)).sqrt()
    return torch.where(norm2 == 0, 0.0, torch.where(norm2 < math.inf, s, math.nan))


def factors(x: Tensor, axes: tuple[int, ...], a2: float) -> Tensor:
    """Return the factors that give x the squared norm a2 over `axes`: `sample_scale`, in a form for autograd.

    An all-zero sample passes no gradient: the slope a/tiny of the definition would overflow float16. The square
    root never sees a number below tiny^2, so that derivatives of any order are finite.
    """
    norm2 = x.square().sum(axes, keepdim=True) if axes else x.square()
    tiny = norm2 < TINY**2
    s = (torch.where(tiny, 1.0, norm2) / a2).rsqrt() * torch.where(tiny, 1 / TINY, 1.0)
    return torch.where(norm2 == 0, 0.0, torch.where(norm2 < math.inf, s, math.nan))


def normalized(x: Tensor, scale: Scale) -> Tensor:
    """Return z of x (N, ...), which is float32 at least."""
    return x * factors(x, tuple(range(1, x.ndim)), squared_target(x, scale))


def batch_norm(
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    momentum: float,
    training: bool,
) -> Tensor:
    """Return batch norm of z, in the type of its parameters or statistics where it has any."""
    own = next((t.dtype for t in (weight, mean) if t is not None), z.dtype)
    return F.batch_norm(z.to(own), mean, var, weight, bias, training, momentum, eps)


def update_running(
    mean: Tensor | None, var: Tensor | None, mu: Tensor, v: Tensor, factor: Scalar | None, count: Scalar
) -> None:
    """Move the running statistics in place, as batch norm does: towards the mean and the unbiased variance.

    Without them, or without a factor, nothing is moved.
    """
    if mean is None or var is None or factor is None:
        return
    mean.copy_(mean + factor * (mu - mean))
    var.copy_(var + factor * (v * (count / (count - 1)) - var))


# ------------------------------------------------------------------------------------------------- the layout


def materialized(t: Tensor) -> Tensor:
    """Return t; inductor stores it here instead of computing it again for each element of the next pass."""
    import torch._inductor.inductor_prims  # registers the operator; here, because it takes a third of the start-up

    return torch.ops.prims.inductor_force_stride_order(t, t.stride())


def position_axis(x: Tensor) -> int:
    """Return the axis of P when the map x is seen as rows without a copy: 1 if the channels lie innermost."""
    if x.shape[2:].numel() == 1:
        return 1
    return 1 if x.stride(1) == 1 and x.shape[1] > 1 else 2


def dense(x: Tensor, axis: int) -> Tensor:
    """Return x (N, C, ...) itself if its memory is that of dense rows, else a copy that is."""
    if axis == 2:
        return x.contiguous()
    channels_innermost = x.movedim(1, -1)
    return x if channels_innermost.is_contiguous() else channels_innermost.contiguous().movedim(-1, 1)


def as_rows(x: Tensor, axis: int) -> Tensor:
    if axis == 1:
        return x.movedim(1, -1).reshape(x.shape[0], math.prod(x.shape[2:]), x.shape[1])
    return x if torch.compiler.is_compiling() else x.flatten(2)


def as_map(rows: Tensor, like: Tensor, axis: int) -> Tensor:
    # At one position both formats have the same strides. The stride comes first: to ask a size is to fix it.
    if axis == 2 or (like.stride(-1) == 1 and math.prod(like.shape[2:]) == 1):
        return rows.reshape(like.shape)
    return rows.reshape(like.movedim(1, -1).shape).movedim(-1, 1)


def positions_of(rows: Tensor, axis: int) -> int:
    return rows.shape[1] if axis == 1 else math.prod(rows.shape[2:])  # numel() would make a size a constant


def over_positions(rows: Tensor, axis: int) -> Tensor:
    """Sum over the positions, to (N, C)."""
    return rows.sum(1 if axis == 1 else tuple(range(2, rows.ndim)))


def at_positions(t: Tensor, rows: Tensor, axis: int) -> Tensor:
    """Give t (N, C) or (C,) the axes that broadcast with rows."""
    return t.unsqueeze(-2) if axis == 1 else t.view(*t.shape, *[1] * (rows.ndim - 2))
