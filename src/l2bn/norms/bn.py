"""Batch normalization (arXiv:1502.03167), as the backbones have it: nothing is replaced."""

from torch.nn.modules.batchnorm import _BatchNorm

from l2bn.norms.stepped import SteppedBatchNorm
from l2bn.norms.stock import check_options


def convert(bn: _BatchNorm, eps: float | None = None, momentum: float | None = None) -> _BatchNorm:
    """Return the layer itself, with `eps` and `momentum` set in place if given.

    Raises ValueError for an eps that is not above 0 and a momentum outside [0, 1], TypeError for L2BN and its like:
    they would stay what they are.
    """
    if isinstance(bn, SteppedBatchNorm):
        raise TypeError(
            f"{type(bn).__name__} has replaced batch norm already: build the model anew to have it back"
        )
    check_options(eps, momentum)
    if eps is not None:
        bn.eps = eps
    if momentum is not None:
        bn.momentum = momentum
    return bn
