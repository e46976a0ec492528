"""Settings of the computation: devices, precision, threads, CPU memory; see `acceleration.prepare`."""

import ctypes
import logging
import os
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.lightning import LightningEnvironment, find_free_network_port

from l2bn.processes import available_cores

log = logging.getLogger(__name__)

Compile = Literal["auto", "graphs"] | bool
Precision = Literal["32-true", "tf32-mixed", "bf16-mixed", "16-mixed"]
GPU_PRECISIONS = ("16-mixed", "tf32-mixed")  # precisions that a CPU lacks

AMPERE = (8, 0)  # the compute capability from which on GPUs have TF32 and bfloat16
MOST = 1024  # threads or workers: far above what a machine has, far below what brings one down


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


def check_numbers(devices: int, threads: int | None, workers: int) -> None:
    """Raise ValueError for numbers that no machine allows."""
    if devices < 1:
        raise ValueError(f"devices must be at least 1, not {devices}")
    if threads is not None and not 1 <= threads <= MOST:
        raise ValueError(f"threads must be at least 1 and at most {MOST}, or null for all cores, not {threads}")
    if not 0 <= workers <= MOST:
        raise ValueError(f"workers must be from 0 to {MOST}, not {workers}")


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Devices, precision and speed of a run.

    Precision, `devices` and `sync_bn` are part of a run's identity, the rest is not: the last two decide over which
    images batch statistics are taken.

    precision: "32-true" is float32 throughout; "tf32-mixed" lets a GPU's tensor cores round the factors of
    convolutions and matrix products to 10 bits of mantissa; the others autocast to bfloat16 or float16. On a CPU
    "bf16-mixed" leaves in float32 the convolutions that bfloat16 makes slower, see `acceleration.keep_in_float32`.
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
        check_numbers(self.devices, self.threads, self.workers)
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device is cuda, but torch finds no CUDA device; take device=cpu or device=auto")
        cores = available_cores()
        if not self._is_cuda and self.devices > max(2, cores):
            raise ValueError(f"devices is {self.devices}, but this machine's processor has {cores} cores")
        if self._is_cuda and self.devices > torch.cuda.device_count():
            raise ValueError(f"devices is {self.devices}, but there are {torch.cuda.device_count()} CUDA devices")
        for key, value in (*(("precision", name) for name in GPU_PRECISIONS), ("compile", "graphs")):
            if getattr(self, key) == value and not self._is_cuda:
                other = "compile=true or auto" if key == "compile" else "precision=bf16-mixed or 32-true"
                raise ValueError(f"{key} {value} needs a CUDA device; take {other}")
        if self.precision == "tf32-mixed" and self._is_before_ampere:
            raise ValueError("precision tf32-mixed needs a GPU of compute capability 8.0 or more; take 32-true")
        if self.compile == "graphs" and self.devices > 1:
            raise ValueError(f"compile graphs serves one device, not {self.devices}; take compile=true or auto")

    @property
    def _is_cuda(self) -> bool:
        return self.device == "cuda" or (self.device == "auto" and torch.cuda.is_available())

    @property
    def _is_before_ampere(self) -> bool:
        return self._is_cuda and torch.cuda.get_device_capability() < AMPERE

    def for_processes(self) -> Self:
        """Return these settings with the threads of this process, which those of several devices share."""
        if self.devices == 1 or self.threads is not None:
            return self
        return replace(self, threads=min(torch.get_num_threads(), available_cores()))

    def set_up(self) -> None:
        """Set memory, threads and kernels of this process."""
        keep_freed_memory()
        if self.precision == "bf16-mixed" and self._is_before_ampere:
            log.warning("this GPU has no units for bfloat16, slower on it than float32; try 16-mixed")
        if self.threads is not None:
            torch.set_num_threads(max(1, self.threads // self.devices))
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
        strategy: Any = "auto"
        if self.devices > 1:
            from l2bn.training.devices import Processes  # here: most runs have one device

            strategy = Processes()
        return Fabric(
            accelerator="cuda" if self._is_cuda else "cpu",
            strategy=strategy,
            devices=self.devices,
            precision="32-true" if self.precision == "tf32-mixed" else self.precision,
            plugins=_ThisMachine(),
        )


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
