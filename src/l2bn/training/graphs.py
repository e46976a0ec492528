"""CUDA graphs: the kernels of a training step, recorded once and replayed at every later step.

The host needs longer to launch the kernels of a small network one by one than the GPU to run them; it launches a
graph at once. Figures are in results/README.md.
"""

import gc
import warnings

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from l2bn.errors import UserError

KNOWN = ("torch", "torchvision", "timm", "l2bn")
"""Packages whose layers, as far as they were read, do the same at every training step."""

HOOKS = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")


class Recorded(nn.Module):
    """A network that is recorded at its first training batch, as a graph of forward and one of backward.

    The kernels are those of eager code, so nothing is compiled, and the results are the same. Batches of another
    size, and evaluation, run from eager code. A gradient is overwritten by the next step: it cannot be accumulated.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._recordings: dict[torch.Size, nn.Module] = {}  # one; a plain dict, so that it is no submodule

    def forward(self, x: Tensor) -> Tensor:
        """Return the network's logits (N, K). Raises UserError for a network that cannot be recorded."""
        if not (self.training and torch.is_grad_enabled()):
            return self.network(x)
        if not self._recordings:
            self._recordings[x.shape] = _record(self.network, x)
        return self._recordings.get(x.shape, self.network)(x)


def _record(network: nn.Module, x: Tensor) -> nn.Module:
    gc.collect()  # graphs of earlier runs: to free one during a recording would end it
    # Recording takes warm-up steps, which must leave no trace in running statistics and random numbers.
    buffers, random = [b.clone() for b in network.buffers()], torch.cuda.get_rng_state(x.device)
    # A replay runs on another stream than the recording; torch warns of that, once, where it can.
    warn_of_streams = getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", None)
    if warn_of_streams is not None:
        warn_of_streams(False)
    autocast, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    try:
        # Casts of weights must not be cached: a replay would take the weights of the recording.
        with warnings.catch_warnings(), torch.autocast("cuda", dtype, enabled=autocast, cache_enabled=False):
            warnings.filterwarnings("ignore", message="Attempting to run cuBLAS, but there was no current CUDA")
            # allow_unused_input: as in eager code, a parameter that training does not use has no gradient.
            recording: nn.Module = torch.cuda.make_graphed_callables(  # type: ignore[assignment]
                nn.Sequential(network), (x.clone(),), allow_unused_input=True
            )
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise UserError(
            f"this network cannot be recorded as CUDA graphs ({_cause(error)}); take compute.compile=false, and "
            "start the other runs of this command again"
        ) from error
    with torch.no_grad():
        for buffer, before in zip(network.buffers(), buffers, strict=True):
            buffer.copy_(before)
    torch.cuda.set_rng_state(random, x.device)
    return recording


def _cause(error: BaseException) -> str:
    """Return the first line of the error that came first: the end of a failed recording raises one of its own."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error).strip().partition("\n")[0]


def layers_that_may_decide(network: nn.Module) -> list[str]:
    """Return the names of layers that a recording might freeze: what they decide in Python, a replay repeats.

    Such are classes of a user's own, layers with hooks or with another forward or step than their class's, and
    batch norm with cumulative statistics, which reads a count from the device. Hooks of parameters would act twice,
    in the recording and behind it.
    """
    found = set()
    for layer in network.modules():
        name, own = type(layer).__name__, vars(layer)
        step = own.get("step")
        if not _is_known(type(layer)) or (callable(step) and not _is_known(step)):
            found.add(name)
        elif "forward" in own:
            found.add(f"{name} with a forward of its own")
        elif any(own[f"_{hooks}"] for hooks in HOOKS):
            found.add(f"{name} with hooks")
        elif any(parameter._backward_hooks for parameter in layer.parameters(recurse=False)):
            found.add(f"{name} with hooks of its parameters")
        elif isinstance(layer, _BatchNorm) and layer.track_running_stats and layer.momentum is None:
            found.add(f"{name} with momentum null")
    return sorted(found)


def _is_known(something: object) -> bool:
    return getattr(something, "__module__", "").partition(".")[0] in KNOWN
