"""Which kernels compute L2BN."""

import torch
from torch import nn


def select_kernels(model: nn.Module, device: torch.device | str, updates: int) -> str:
    """Decide how the model's L2BN layers are computed in a run of so many updates; for the record."""
    from l2bn.norms.l2bn import _L2BatchNorm  # the layer itself is built on this module

    return "plain" if any(isinstance(layer, _L2BatchNorm) for layer in model.modules()) else "stock"
