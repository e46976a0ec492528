"""Batch normalization (arXiv:1502.03167), which the backbones are written with: nothing is replaced."""

from torch.nn.modules.batchnorm import _BatchNorm


def convert(bn: _BatchNorm, eps: float | None = None, momentum: float | None = None) -> _BatchNorm:
    """The layer itself; `eps` and `momentum`, if given, are set in place."""
    if eps is not None:
        bn.eps = eps
    if momentum is not None:
        bn.momentum = momentum
    return bn
