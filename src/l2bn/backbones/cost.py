"""The cost of a network: its parameters, and the multiply-adds of one image."""

import copy

import torch
from torch import nn


def count_parameters(model: nn.Module) -> int:
    """Scalars in all parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_multiply_adds(model: nn.Module, image_size: int) -> int:
    """Multiply-adds of convolutions and matrix products in the forward pass of one image of 3 channels.

    Counted on the meta device: nothing is computed, and the model stays as it is.
    """
    from torch.utils.flop_counter import FlopCounterMode  # here, for a slow import that runs do not need

    counted = copy.deepcopy(model).to("meta").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        counted(torch.empty(1, 3, image_size, image_size, device="meta"))
    return int(counter.get_total_flops()) // 2
