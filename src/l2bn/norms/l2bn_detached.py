"""A control of L2BN: its values, but no gradient through the norms.

    z_n = a * x_n / ||x_n||_2, with ||x_n|| a constant to the gradient;  y = BN(z)

In L2BN the gradient loses its part along x_n, so that an update by it cannot make a sample's feature longer or
shorter. What L2BN has over this control comes from that; what this control has over BN, from equal norms alone.
"""

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from l2bn.kernels.formulas import Scale, factors, squared_target
from l2bn.norms.stepped import put_before


def convert(
    bn: _BatchNorm, eps: float | None = None, momentum: float | None = None, scale: Scale = "unit"
) -> nn.Module:
    """Return the layer that takes the place of `bn`, on the same parameters and buffers.

    `scale` is that of L2BN: "unit" (l2 norm 1) or "rms" (root mean square 1).
    """
    return put_before(bn, normalize_detached, scale, eps, momentum)


def normalize_detached(x: Tensor, scale: Scale = "unit") -> Tensor:
    """Divide each sample of (N, ...) by its l2 norm, or root mean square, as by a constant."""
    return x * factors(x.detach(), tuple(range(1, x.ndim)), squared_target(x, scale))
