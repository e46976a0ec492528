"""L2BN in every batch norm layer but the last of the network, which stays plain BN.

The authors' acoustic code has this structure: its last BN before pooling is a plain one (without weight and bias,
which the backbones here keep). Whether the image networks had it is not known. Last means last in the order in
which the network's modules were constructed; in the backbones here this is the last layer before the pooling.
"""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from l2bn.kernels.compiler import Fused
from l2bn.kernels.formulas import Scale
from l2bn.norms import bn as batch_norm
from l2bn.norms import l2bn


def convert(
    bn: _BatchNorm,
    eps: float | None = None,
    momentum: float | None = None,
    scale: Scale = "unit",
    fused: Fused = "auto",
    last: bool | None = None,
) -> nn.Module:
    """Return `bn` itself if it is the network's last batch norm layer, else the L2BN layer in its place.

    `swap_norm` gives `last`, which therefore is no option of a configuration. The other options are those of L2BN.
    Raises ValueError without `last`, and what `l2bn.convert` raises.
    """
    if last is None:
        raise ValueError(
            "l2bn_but_last needs to know whether a layer is the network's last: give swap_norm its name, its "
            "function or a functools.partial of that, or pass `last` yourself"
        )
    if last:
        return batch_norm.convert(bn, eps, momentum)
    return l2bn.convert(bn, eps, momentum, scale, fused)
