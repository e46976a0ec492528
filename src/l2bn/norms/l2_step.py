"""The l2 step: each sample is divided by the norm of its whole feature.

Wang et al., arXiv:2207.02625; l2bn.py has the equation. Norms are float32 at least.
"""

import math
from typing import Literal, get_args

from torch import Tensor

from l2bn.kernels.formulas import normalized, squared_target, widened

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
    return math.sqrt(squared_target(x, is_rms(scale)))
