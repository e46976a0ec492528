"""A network on its device, and its acceleration: torch.compile, CUDA graphs, bfloat16 where a CPU is no slower.

A CUDA graph is the kernels of a training step, recorded once and replayed at every later step. The host needs
longer to launch the kernels of a small network one by one than the GPU to run them; it launches a graph at once.
Figures are in results/benchmarks/README.md.
"""

import gc
import logging
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from l2bn.errors import UserError
from l2bn.kernels.compiler import DEVICES, TRACED, compiler_works, select_kernels
from l2bn.norms.sync import convert_sync
from l2bn.training.compute import Compile, Compute

log = logging.getLogger(__name__)


class Prepared(NamedTuple):
    """A network on its device."""

    network: nn.Module  # the weights, for evaluation and checkpoints
    trained: nn.Module  # the same network, possibly compiled or recorded
    kernels: str  # the kernels it runs on, as in `Record.kernels`


def prepare(
    model: nn.Module, compute: Compute, device: torch.device, updates: int, in_memory: bool = False
) -> Prepared:
    """Move a model to its device for a run of `updates` steps; compile or record it as `compute.compile` has it.

    in_memory: whether its images are all in memory. Raises UserError, see `should_compile`.
    """
    network = model.to(device)
    if compute.channels_last:
        network.to(memory_format=torch.channels_last)
    if compute.sync_bn:
        convert_sync(network)
    if compute.precision == "bf16-mixed" and device.type == "cpu":
        keep_in_float32(network)
    kernels = select_kernels(network, device, updates)
    if uses_cuda_graphs(compute, network, device, in_memory):
        return Prepared(network, GraphedModule(network), f"{kernels}+graphs")
    if should_compile(compute.compile, network, device, updates):
        compiled: Any = torch.compile(network, dynamic=False)  # at its first call, for batches of one size
        traced = kernels if TRACED or kernels == "stock" else "plain"
        return Prepared(network, compiled, f"{traced}+compiled")
    return Prepared(network, network, kernels)


# Compilation.

UPDATES = 1_000
"""Steps from which compilation pays off on a CPU, where it makes a step faster at all.

It takes 66 s on two cores for ShuffleNetV2 and saves 0.04 s per step of 128 images. As it is done once a machine,
the second run of 1,000 steps has repaid it.
"""

VECTOR = 16  # float32 values in the widest vector register, that of AVX-512


def should_compile(wanted: Compile, model: nn.Module, device: torch.device, updates: int) -> bool:
    """Return whether a run of `updates` steps compiles its network.

    "auto" depends only on network, machine and number of steps, so that both norms of a pair, and a resumed run,
    get the same answer: on a CPU, runs of at least `UPDATES` steps of networks whose channels do not fill the
    vector registers (ShuffleNetV2), where PyTorch's batch norm is slow (results/benchmarks/train.md); never on
    CUDA, where it was not measured. Raises UserError if compilation is requested and no compiler works.
    """
    if wanted != "auto":
        if wanted and device.type in DEVICES and not compiler_works(device.type):
            raise UserError(
                f"compute.compile=true, but no compiler works for {device.type} here: "
                "install one (g++, as in Debian's build-essential), or take compute.compile=auto or false"
            )
        return bool(wanted)
    if device.type != "cpu" or not _has_odd_channels(model):
        return False
    if updates < UPDATES:
        log.info("the network is not compiled: it pays off from %d steps, and this run has %d", UPDATES, updates)
        return False
    if not compiler_works(device.type):
        log.info("the network is not compiled: no compiler works for %s", device.type)
        return False
    log.info("the network is compiled, which takes about a minute the first time; compute.compile=false skips it")
    return True


def _has_odd_channels(model: nn.Module) -> bool:
    """Return whether most convolutions have a number of channels that the vector width does not divide."""
    channels = [layer.out_channels for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    return 2 * sum(count % VECTOR != 0 for count in channels) > len(channels)


# CUDA graphs.

KNOWN = ("torch", "torchvision", "timm", "l2bn")
"""Packages whose layers, as far as they were read, do the same at every training step."""

HOOKS = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")


def uses_cuda_graphs(compute: Compute, network: nn.Module, device: torch.device, in_memory: bool) -> bool:
    """Return whether a run replays CUDA graphs; `prepare` has the arguments.

    "auto" does where that was measured to work: on one device, without autocast, for images in memory. Other
    images are copied by a thread, and what it calls may not be called while a graph is recorded.
    """
    if compute.compile != "auto":
        return compute.compile == "graphs"
    if not (device.type == "cuda" and compute.devices == 1 and in_memory):
        return False
    if compute.precision not in ("32-true", "tf32-mixed"):
        return False
    unknown = unsafe_to_capture(network)
    if unknown:
        log.info(
            "this run does not replay CUDA graphs, because %s may do other things at other steps; if not, "
            "compute.compile=graphs is faster",
            ", ".join(unknown),
        )
        return False
    log.info("this run replays CUDA graphs; compute.compile=false launches each kernel by itself")
    return True


class GraphedModule(nn.Module):
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
            self._recordings[x.shape] = _capture(self.network, x)
        return self._recordings.get(x.shape, self.network)(x)


def _capture(network: nn.Module, x: Tensor) -> nn.Module:
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


def unsafe_to_capture(network: nn.Module) -> list[str]:
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


# bfloat16 on a CPU.

BFLOAT16 = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")  # as torch names the instructions of x86 and ARM


def computes_bfloat16() -> bool:
    """Return whether this machine's processor has instructions for bfloat16."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in BFLOAT16)


class Float32Conv2d(nn.Conv2d):
    """A convolution that autocast leaves in float32. It returns the type of its input."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the convolution's own name
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.float()).to(input.dtype)


def keep_in_float32(network: nn.Module) -> None:
    """Make autocast leave in float32 the convolutions whose gradients are slow in bfloat16 on a CPU.

    Those with fewer than eight channels a group and a stride or a kernel above 3 x 3, such as the strided depthwise
    convolutions of MobileNetV2 and ShuffleNetV2; results/benchmarks/README.md has the times. In place: the layers
    change their class. Subclasses of `nn.Conv2d` stay as they are. Warns if the processor has no bfloat16 at all.
    """
    if not computes_bfloat16():
        log.warning("this processor has no bfloat16 instructions; compute.precision=32-true is faster")
    for layer in network.modules():
        if type(layer) is not nn.Conv2d or layer.groups == 1 or layer.in_channels // layer.groups >= 8:
            continue
        if max(layer.stride) > 1 or max(layer.kernel_size) > 3:
            layer.__class__ = Float32Conv2d
