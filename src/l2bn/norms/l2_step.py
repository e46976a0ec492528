"""The l2 step: each sample is divided by the norm of its whole feature.

Wang et al., arXiv:2207.02625; l2bn.py has the equation. Norms are taken in float32 at least: a sum of squares
overflows float16 at values of a few hundred.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

Scale = Literal["unit", "rms"]

TINY = 1e-12  # as in torch.nn.functional.normalize; in float32 its square is no zero


def l2_normalize(x: Tensor, scale: Scale = "unit") -> Tensor:
    """Divide each sample by its l2 norm over all axes but the first ("rms": by its root mean square).

    x and the result are (N, ...), in the same type; norms are taken in float32 at least. Raises ValueError for
    another scale.
    """
    wide = widened(x)
    return (wide * factors(wide, tuple(range(1, x.ndim)), target_norm(x, scale))).to(x.dtype)


def target_norm(x: Tensor, scale: Scale) -> float:
    """The l2 norm that each sample of x (N, ...) is given. Raises ValueError for a scale that there is not."""
    if scale not in get_args(Scale):
        raise ValueError(f"scale is {scale!r}; it may be {' or '.join(get_args(Scale))}")
    return math.sqrt(x.shape[1:].numel()) if scale == "rms" else 1.0


def factors(x: Tensor, axes: tuple[int, ...], length: float) -> Tensor:
    """What makes the l2 norm of x over some axes this long: 0 where it is all zero, NaN where it is not finite.

    An all-zero slice passes no gradient.
    """
    norm = torch.linalg.vector_norm(x, dim=axes, keepdim=True) if axes else x.abs()
    factor = torch.where(norm == 0, 0.0, length / norm.clamp_min(TINY))
    return torch.where(norm.isinf(), torch.nan, factor)


def widened(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def squared_target(x: Tensor, rms: bool) -> int:
    """a^2: the squared norm that each sample of x (N, ...) is given, D for a root mean square of 1.

    Taken from the shape, so that a kernel for any size need not be told.
    """
    return math.prod(x.shape[1:]) if rms else 1


def sample_scale(norm2: Tensor, a2: int) -> Tensor:
    """What each sample is multiplied with: 0 if it is all zero, NaN if its norm is not finite."""
    s = (a2 / norm2.clamp_min(TINY**2)).sqrt()
    return torch.where(norm2 == 0, 0.0, torch.where(norm2 < math.inf, s, math.nan))
