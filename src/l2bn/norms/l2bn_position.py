"""A control of L2BN: the l2 step at every position by itself, over the channels.

    z_np = b * x_np / ||x_np||_2    per sample n and position p, the norm over the C channels;  y = BN(z)

It makes samples equal in their norm as L2BN does, and besides takes away how strong a position is against the
others. `b` gives each sample the norm that L2BN gives it, so that eps weighs the same: 1/sqrt(P) over P positions
("unit"), or sqrt(C) ("rms"). On features without positions it is L2BN itself.
"""

import math

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from l2bn.kernels.formulas import Scale, factors, squared_target
from l2bn.norms.stepped import put_before


def convert(
    bn: _BatchNorm, eps: float | None = None, momentum: float | None = None, scale: Scale = "unit"
) -> nn.Module:
    """Return the layer that takes the place of `bn`, on the same parameters and buffers.

    `scale` is that of L2BN: each sample gets l2 norm 1 ("unit") or root mean square 1 ("rms").
    """
    return put_before(bn, normalize_positions, scale, eps, momentum)


def normalize_positions(x: Tensor, scale: Scale = "unit") -> Tensor:
    """Divide (N, C, ...) at each position by its l2 norm over the channels; one factor more for all."""
    return x * factors(x, (1,), squared_target(x, scale) / math.prod(x.shape[2:]))
