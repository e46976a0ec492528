"""Settings of the computation: devices, precision, compilation, CPU memory."""

import ctypes
import inspect
import logging
import os
import warnings
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.lightning import LightningEnvironment, find_free_network_port
from lightning_fabric.strategies.ddp import DDPStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from l2bn.errors import UserError
from l2bn.kernels.compiler import DEVICES, TRACED, compiler_works, select_kernels
from l2bn.norms.sync import convert_sync
from l2bn.processes import available_cores
from l2bn.training.graphs import Recorded, layers_that_may_decide

log = logging.getLogger(__name__)

Compile = Literal["auto", "graphs"] | bool
Precision = Literal["32-true", "tf32-mixed", "bf16-mixed", "16-mixed"]
OF_GPUS = ("16-mixed", "tf32-mixed")  # precisions that a CPU lacks

MOST = 1024  # threads or workers: far above what a machine has, far below what brings one down


def quieten() -> None:
    """Silence library messages users cannot act on."""
    for name, level in (("lightning_fabric", logging.WARNING), ("torch.utils.cpp_extension", logging.ERROR)):
        logging.getLogger(name).setLevel(level)
    warnings.filterwarnings("ignore", module="lightning_fabric")


class _Processes(DDPStrategy):
    """Distributed data parallel on this machine: a process per device."""

    def __init__(self) -> None:
        options: dict[str, Any] = {"gradient_as_bucket_view": True}
        # Each process has its own running statistics, and those of rank 0 are evaluated: broadcast none.
        known = inspect.signature(DistributedDataParallel).parameters
        options["forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"] = False
        super().__init__(start_method="spawn", **options)

    def setup_environment(self) -> None:
        quieten()
        os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # of torchrun; this run has a store of its own
        super().setup_environment()


class _ThisMachine(LightningEnvironment):
    """The processes of one run, on this machine: addresses and ranks in its environment are a scheduler's."""

    @property
    def main_address(self) -> str:
        return "127.0.0.1"

    @property
    def main_port(self) -> int:
        if self._main_port == -1:
            self._main_port = find_free_network_port()
        return self._main_port

    def node_rank(self) -> int:
        return 0


class Placed(NamedTuple):
    """A network on its device."""

    network: nn.Module  # the weights, for evaluation and checkpoints
    trained: nn.Module  # the same network, possibly compiled or recorded
    kernels: str  # the kernels it runs on, as in `Record.kernels`


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Devices, precision and speed of a run.

    Precision, `devices` and `sync_bn` are part of a run's identity, the rest is not: the last two decide over which
    images batch statistics are taken.

    precision: "32-true" is float32 throughout; "tf32-mixed" lets a GPU's tensor cores round the factors of
    convolutions and matrix products to 10 bits of mantissa; the others autocast to bfloat16 or float16. On a CPU
    "bf16-mixed" leaves in float32 the convolutions that bfloat16 makes slower, see `keep_in_float32`.
    """

    device: Literal["auto", "cpu", "cuda"]
    devices: int
    sync_bn: bool
    precision: Precision
    compile: Compile
    channels_last: bool
    deterministic: bool
    threads: int | None
    workers: int

    def __post_init__(self) -> None:
        if self.devices < 1:
            raise ValueError(f"devices must be at least 1, not {self.devices}")
        if self.threads is not None and not 1 <= self.threads <= MOST:
            raise ValueError(
                f"threads must be at least 1 and at most {MOST}, or null for all cores, not {self.threads}"
            )
        if not 0 <= self.workers <= MOST:
            raise ValueError(f"workers must be from 0 to {MOST}, not {self.workers}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device is cuda, but torch finds no CUDA device; take device=cpu or device=auto")
        cores = available_cores()
        if not self._is_cuda and self.devices > max(2, cores):
            raise ValueError(f"devices is {self.devices}, but this machine's processor has {cores} cores")
        if self._is_cuda and self.devices > torch.cuda.device_count():
            raise ValueError(f"devices is {self.devices}, but there are {torch.cuda.device_count()} CUDA devices")
        for key, value in (*(("precision", name) for name in OF_GPUS), ("compile", "graphs")):
            if getattr(self, key) == value and not self._is_cuda:
                other = "compile=true or auto" if key == "compile" else "precision=bf16-mixed or 32-true"
                raise ValueError(f"{key} {value} needs a CUDA device; take {other}")
        if self.compile == "graphs" and self.devices > 1:
            raise ValueError(f"compile graphs serves one device, not {self.devices}; take compile=true or auto")

    @property
    def _is_cuda(self) -> bool:
        return self.device == "cuda" or (self.device == "auto" and torch.cuda.is_available())

    def set_up(self) -> None:
        """Set memory, threads and kernels of this process."""
        keep_freed_memory()
        if self.threads is not None:
            torch.set_num_threads(max(1, self.threads // self.devices))
        elif self.devices > 1:
            torch.set_num_threads(max(1, min(torch.get_num_threads(), available_cores()) // self.devices))
        elif "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > available_cores():
            torch.set_num_threads(available_cores())  # torch does not see the limit of a container
        if self.deterministic:  # cuBLAS is deterministic only with such a workspace
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(self.deterministic)
        torch.backends.cudnn.benchmark = not self.deterministic
        # PyTorch's default is true for convolutions.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = self.precision == "tf32-mixed"

    def fabric(self) -> Fabric:
        """Return Fabric for the devices, with a process per device if there are several.

        This process starts the others itself, also under a cluster's scheduler.
        """
        return Fabric(
            accelerator="cuda" if self._is_cuda else "cpu",
            strategy=_Processes() if self.devices > 1 else "auto",
            devices=self.devices,
            precision="32-true" if self.precision == "tf32-mixed" else self.precision,
            plugins=_ThisMachine(),
        )

    def place(self, model: nn.Module, device: torch.device, updates: int, in_memory: bool = False) -> Placed:
        """Move a model to its device for a run of `updates` steps.

        in_memory: whether its images are all in memory. Raises UserError, see `should_compile`.
        """
        network = model.to(device)
        if self.channels_last:
            network.to(memory_format=torch.channels_last)
        if self.sync_bn:
            convert_sync(network)
        if self.precision == "bf16-mixed" and device.type == "cpu":
            keep_in_float32(network)
            if not computes_bfloat16():
                log.warning("this processor has no bfloat16 instructions; compute.precision=32-true is faster")
        kernels = select_kernels(network, device, updates)
        if self.replays_graphs(network, device, in_memory):
            return Placed(network, Recorded(network), f"{kernels}+graphs")
        if should_compile(self.compile, network, device, updates):
            compiled: Any = torch.compile(network, dynamic=False)  # at its first call, for batches of one size
            traced = kernels if TRACED or kernels == "stock" else "plain"
            return Placed(network, compiled, f"{traced}+compiled")
        return Placed(network, network, kernels)

    def replays_graphs(self, network: nn.Module, device: torch.device, in_memory: bool) -> bool:
        """Return whether a run replays CUDA graphs; `place` has the arguments.

        "auto" does where that was measured to work: on one device, without autocast, for images in memory. Other
        images are copied by a thread, and what it calls may not be called while a graph is recorded.
        """
        if self.compile != "auto":
            return self.compile == "graphs"
        if not (device.type == "cuda" and self.devices == 1 and in_memory):
            return False
        if self.precision not in ("32-true", "tf32-mixed"):
            return False
        unknown = layers_that_may_decide(network)
        if unknown:
            log.info(
                "this run does not replay CUDA graphs, because %s may do other things at other steps; if not, "
                "compute.compile=graphs is faster",
                ", ".join(unknown),
            )
            return False
        log.info("this run replays CUDA graphs; compute.compile=false launches each kernel by itself")
        return True


# Compilation.

UPDATES = 1_000
"""Steps from which compilation pays off on a CPU, where it makes a step faster at all.

It takes 66 s on two cores for ShuffleNetV2 and saves 0.04 s per step of 128 images. As it is done once a machine,
the second run of 1,000 steps has repaid it.
"""

VECTOR = 16  # float32 values in the widest vector register, that of AVX-512


def should_compile(wanted: Compile, model: nn.Module, device: torch.device, updates: int) -> bool:
    """Return whether a run of `updates` steps compiles its network.

    "auto" depends only on network, machine and number of steps, so that both norms of a comparison, and a resumed
    run, get the same answer. On a CPU with a compiler, runs of at least `UPDATES` steps are compiled, but only
    networks whose channels do not fill the vector registers (ShuffleNetV2): PyTorch's batch norm is slow there, and
    compiled kernels are not. Other networks gain nothing, or 18 % (MobileNetV2 with L2BN): the convolutions, which
    are the same, take four fifths of the time. On CUDA "auto" never compiles: compiled networks were not
    measured there, and those with images in memory replay CUDA graphs instead.

    Figures are in results/benchmarks/train.md. Raises UserError if compilation is requested and no compiler works.
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
    convolutions of MobileNetV2 and ShuffleNetV2; results/README.md has the times. In place: the layers change their
    class. Subclasses of `nn.Conv2d` stay as they are.
    """
    for layer in network.modules():
        if type(layer) is not nn.Conv2d or layer.groups == 1 or layer.in_channels // layer.groups >= 8:
            continue
        if max(layer.stride) > 1 or max(layer.kernel_size) > 3:
            layer.__class__ = Float32Conv2d


# CPU memory.

# malloc.h of glibc
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4


def keep_freed_memory() -> bool:
    """Make malloc keep freed memory instead of returning it to the kernel; return whether that was possible.

    glibc maps a block of more than 32 MB, such as a feature map, anew at each allocation, and the kernel clears
    each page at its first touch. That takes longer than the arithmetic: forward and backward of batch norm on a
    128 x 64 x 32 x 32 map went from 20 to 5 ms on two cores. The process keeps its peak memory. Does nothing
    without glibc.
    """
    return _set({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1})


def free_as_usual() -> bool:
    """Undo `keep_freed_memory`, for a benchmark's baseline: the highest thresholds glibc sets by itself."""
    return _set({_M_MMAP_MAX: 65536, _M_MMAP_THRESHOLD: 32 << 20, _M_TRIM_THRESHOLD: 64 << 20})


def _set(options: dict[int, int]) -> bool:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(option, value) for option, value in options.items())
