"""When a network is compiled, and how."""

import logging
from typing import Any, Literal

import torch
from torch import nn

from l2bn.errors import UserError
from l2bn.kernels.compiler import DEVICES, compiler_works

log = logging.getLogger(__name__)

Compile = Literal["auto", "graphs"] | bool

UPDATES = {"cpu": 1_000, "cuda": 20_000}
"""So many updates earn back the compilation, where it makes a step faster at all.

cpu: 66 s on two cores for ShuffleNetV2, once for a kind of machine, against 0.1 s saved per update of 128 images.
cuda: not measured yet. 60 s against 3 ms per update, which is what a small network's launches cost.
"""

VECTOR = 16  # float32 values in the widest vector register, AVX-512's


def should_compile(wanted: Compile, model: nn.Module, device: torch.device, updates: int) -> bool:
    """Whether a run of so many updates compiles its network.

    "auto" is decided by network, machine and number of updates alone, so that both norms of a comparison, and a run
    that is resumed, decide alike. Where a compiler works,

    - on CUDA, a run of many updates does;
    - on a CPU also the network must be one whose channels do not fill the vector registers (ShuffleNetV2). The
      kernels of stock batch norm then take up to eight times as long, and the compiler's do not. Elsewhere compiled
      steps are no faster than eager ones: the convolutions, which are the same, take four fifths of the time.

    Figures are in results/benchmarks/train.md. Raises UserError where it is wanted and no compiler works.
    """
    if wanted != "auto":
        if wanted and device.type in DEVICES and not compiler_works(device.type):
            raise UserError(
                f"compute.compile={str(wanted).lower()}, but no compiler works for {device.type} here: "
                "install one (g++, as in Debian's build-essential), or take compute.compile=auto or false"
            )
        return bool(wanted)
    needed = UPDATES.get(device.type)
    if needed is None or (device.type == "cpu" and not _has_odd_channels(model)):
        return False
    if updates < needed:
        log.info("the network is not compiled: %d updates do not earn it back (%d would)", updates, needed)
        return False
    if not compiler_works(device.type):
        log.info("the network is not compiled: no compiler works for %s", device.type)
        return False
    log.info("the network is compiled: about a minute the first time; compute.compile=false leaves it out")
    return True


def _has_odd_channels(model: nn.Module) -> bool:
    """Whether most convolutions have a number of channels that fills no whole vector registers."""
    channels = [layer.out_channels for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    return 2 * sum(count % VECTOR != 0 for count in channels) > len(channels)


def compiled(network: nn.Module, wanted: Compile) -> nn.Module:
    """The network as inductor compiles it at its first call, for batches of one size.

    "graphs" has each step's kernels recorded and launched as one CUDA graph.
    """
    options: dict[str, Any] = {"mode": "reduce-overhead"} if wanted == "graphs" else {}
    return torch.compile(network, dynamic=False, **options)  # type: ignore[return-value]
