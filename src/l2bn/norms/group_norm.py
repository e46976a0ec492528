"""Group normalization (Wu and He 2018, arXiv:1803.08494): a reference from outside, without batch statistics.

Each sample is normalized over groups of its channels, which removes the norm of a sample's features as L2BN does,
but without a batch. A group has 16 channels, the paper's setting, or the next smaller number that divides the
layer's channels. Weight and bias are the batch norm's own; there are no running statistics.
"""

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from l2bn.norms.stock import check_options, in_place_of, stock_name

BN_SHAPED = False


def convert(bn: _BatchNorm, eps: float | None = None, channels: int = 16) -> nn.Module:
    """Return the layer that takes the place of `bn`, on the same weight and bias.

    `channels` is the most channels of a group; `eps` keeps bn's own when None. Raises ValueError for fewer than one
    channel, an eps that is not above 0, and groups of one value, TypeError for a layer that it can't stand for.
    """
    if channels < 1:
        raise ValueError(f"channels must be at least 1, not {channels}")
    check_options(eps, None)
    size = max(n for n in range(1, channels + 1) if bn.num_features % n == 0)
    if size == 1 < channels and isinstance(bn, nn.BatchNorm1d):  # which may get vectors
        raise ValueError(
            f"{bn.num_features} features have no equal groups of 2 to {channels}, and of a vector the norm of one "
            "value is its bias, whatever the value; take another width, or more `channels` (1 for sequences)"
        )
    layer = in_place_of(bn, GroupNormAct if stock_name(bn) == "BatchNormAct2d" else nn.GroupNorm)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        layer._buffers.pop(name, None)
    layer.num_groups, layer.num_channels = bn.num_features // size, bn.num_features
    layer.eps = bn.eps if eps is None else eps
    return layer


class GroupNormAct(nn.GroupNorm):
    """In place of timm's `BatchNormAct2d`, whose dropout and activation it takes over."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the stock layer's own name
        return self.act(self.drop(super().forward(input)))
