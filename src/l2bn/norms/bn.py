"""Batch normalization (arXiv:1502.03167), as the backbones have it: nothing is replaced."""

from torch.nn.modules.batchnorm import _BatchNorm


def convert(bn: _BatchNorm, eps: float | None = None, momentum: float | None = None) -> _BatchNorm:
    """Return the layer itself, with `eps` and `momentum` set in place if given.

    Raises ValueError for an eps that is not above 0 and a momentum outside [0, 1].
    """
    check_options(eps, momentum)
    if eps is not None:
        bn.eps = eps
    if momentum is not None:
        bn.momentum = momentum
    return bn


def check_options(eps: float | None, momentum: float | None) -> None:
    """Raise ValueError for an eps or momentum, other than None, that batch norm can't compute with."""
    if eps is not None and eps <= 0:
        raise ValueError(f"eps must be greater than 0, not {eps}")
    if momentum is not None and not 0 <= momentum <= 1:
        raise ValueError(f"momentum must lie in [0, 1], not {momentum}")
