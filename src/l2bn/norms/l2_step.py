"""The l2 step: each sample is divided by the norm of its whole feature.

Wang et al., arXiv:2207.02625; l2bn.py has the equation. Norms are float32 at least.
"""

import math
from typing import Literal, get_args

from torch import Tensor

from l2bn.kernels.formulas import differentiable_scale, normalized, widened

Scale = Literal["unit", "rms"]
SCALES: tuple[str, ...] = get_args(Scale)


def l2_normalize(x: Tensor, scale: Scale = "unit") -> Tensor:
    """Divide each sample by its l2 norm over all axes but the first ("rms": by its root mean square).

    x and the result are (N, ...), in the same type; norms are taken in float32 at least. Raises ValueError for
    another scale, TypeError for x of a type that is not floating-point.
    """
    if not x.is_floating_point():  # the result would be cut down to whole numbers
        raise TypeError(f"l2_normalize takes floating-point values, not {x.dtype}: convert them first")
    return normalized(widened(x), is_rms(scale)).to(x.dtype)


def is_rms(scale: Scale) -> bool:
    """Return whether samples get a root mean square of 1. Raises ValueError for an unknown scale."""
    if scale not in SCALES:
        raise ValueError(f"scale is {scale!r}; it may be {' or '.join(SCALES)}")
    return scale == "rms"


def target_norm(x: Tensor, scale: Scale) -> float:
    """Return the l2 norm that each sample of x (N, ...) gets. Raises ValueError for an unknown scale."""
    return math.sqrt(x.shape[1:].numel()) if is_rms(scale) else 1.0


def factors(x: Tensor, axes: tuple[int, ...], length: float) -> Tensor:
    """Return the factors that give x this l2 norm over `axes`: 0 where it is all zero, NaN where it is not finite.

    An all-zero slice passes no gradient.
    """
    norm2 = x.square().sum(axes, keepdim=True) if axes else x.square()
    return differentiable_scale(norm2, length**2)
