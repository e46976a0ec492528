"""Which kernels the L2BN layers of a run take, and what its record says of them."""

import logging

import torch
from torch import nn

from l2bn.norms.kernels import DEVICES, compiler_works
from l2bn.norms.l2bn import _L2BatchNorm

logger = logging.getLogger(__name__)

UPDATES_A_CHANNEL_COUNT = 100
"""So many updates earn back what is compiled for one channel count: 3 kernels, about 2.5 s the first time, against
28 ms saved per update (ResNet-20, batch 128, 3 channel counts, two cores: 0.44 of BN's 194 ms)."""


def select_kernels(model: nn.Module, device: torch.device | str, updates: int) -> str:
    """Decide, for a run of so many updates, how the L2BN layers left at fused="auto" are computed.

    Returns what belongs into the run's record: "fused", "plain", or "stock" for a model without L2BN. One line is
    logged with the reason.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, _L2BatchNorm)]
    if not layers:
        return "stock"
    undecided = [layer for layer in layers if layer.fused == "auto"]
    if undecided:
        needed = UPDATES_A_CHANNEL_COUNT * len({layer.num_features for layer in undecided})
        works = updates >= needed and compiler_works(torch.device(device).type)
        if updates < needed:
            logger.info(
                "L2BN takes the plain composition: %d updates do not earn back the compilation (%d would)",
                updates,
                needed,
            )
        elif works:
            logger.info("L2BN takes fused kernels in %d layers", len(undecided))
        for layer in undecided:
            layer.fused = "on" if works else "off"
    # Asked for on another device, they are not to be had: the layers compute plainly there.
    fused = torch.device(device).type in DEVICES and any(layer.fused == "on" for layer in layers)
    return "fused" if fused else "plain"
