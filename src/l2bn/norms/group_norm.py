"""Group normalization (Wu and He 2018, arXiv:1803.08494): a reference from outside, without batch statistics.

Each sample is normalized over groups of its channels, so that it, too, takes the norm of a sample's features
away, but a batch plays no part in it. The paper's setting of 16 channels a group; where 16 does not divide a
layer's channels, the next smaller number that does. Weight and bias are the batch norm's own; there are no
running statistics.
"""

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from l2bn.norms.swap import stock_class

BN_SHAPED = False


def convert(bn: _BatchNorm, eps: float | None = None, channels: int = 16) -> nn.Module:
    """The layer that stands in the place of `bn`, on the same weight and bias.

    `channels` are those of a group, at most; `eps` keeps bn's own when None. Raises ValueError for fewer than one
    channel, TypeError for a layer that it cannot stand for.
    """
    if channels < 1:
        raise ValueError(f"channels must be at least 1, not {channels}")
    fused_activation = stock_class(bn) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    size = max(n for n in range(1, channels + 1) if bn.num_features % n == 0)
    cls = GroupNormAct if fused_activation else nn.GroupNorm
    layer = cls(bn.num_features // size, bn.num_features, bn.eps if eps is None else eps, bn.affine, device="meta")
    layer._parameters.update(bn._parameters)
    layer._modules.update(bn._modules)
    return layer.train(bn.training)


class GroupNormAct(nn.GroupNorm):
    """In place of timm's `BatchNormAct2d`, whose dropout and activation it takes over."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the stock layer's own name
        return self.act(self.drop(super().forward(input)))
