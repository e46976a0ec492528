"""Where and how a run computes: devices, precision, kernels."""

import os
from dataclasses import dataclass
from typing import Literal

import torch
from lightning_fabric import Fabric
from torch import nn

from l2bn.norms.selection import select_kernels
from l2bn.norms.sync import convert_sync
from l2bn.training.allocator import keep_freed_memory

MOST = 1024  # threads or workers; far above what any machine here has, far below what brings one down


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Where and how a run computes.

    The number of devices and `sync_bn` say over which images batch statistics are taken; with the precision
    they are part of the run's identity, the rest is not.
    """

    device: Literal["auto", "cpu", "cuda", "mps"]
    devices: int
    sync_bn: bool
    precision: Literal["32-true", "bf16-mixed", "16-mixed"]
    compile: bool
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
        cores = os.cpu_count() or 1
        if not self._is_cuda and self.devices > max(2, cores):
            raise ValueError(f"devices is {self.devices}, but this machine's processor has {cores} cores")
        if self._is_cuda and self.devices > torch.cuda.device_count():
            raise ValueError(f"devices is {self.devices}, but there are {torch.cuda.device_count()} CUDA devices")
        if self.precision == "16-mixed" and not self._is_cuda:
            raise ValueError("precision 16-mixed needs a CUDA device; take precision=bf16-mixed or 32-true")

    @property
    def _is_cuda(self) -> bool:
        return self.device == "cuda" or (self.device == "auto" and torch.cuda.is_available())

    def set_up(self) -> None:
        """Set this process's memory, threads and kernels."""
        keep_freed_memory()
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        elif self.devices > 1:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // self.devices))
        if self.deterministic:  # cuBLAS promises equal bits with a workspace of this kind only
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(self.deterministic)
        torch.backends.cudnn.benchmark = not self.deterministic

    def fabric(self) -> Fabric:
        strategy = "ddp_spawn" if self.devices > 1 else "auto"
        return Fabric(accelerator=self.device, strategy=strategy, devices=self.devices, precision=self.precision)

    def place(self, model: nn.Module, device: torch.device, updates: int) -> tuple[nn.Module, str]:
        """Put a model on its device for a run of so many updates; what is to be run, and on which kernels."""
        network = model.to(device)
        if self.channels_last:
            network.to(memory_format=torch.channels_last)
        if self.sync_bn:
            convert_sync(network)
        kernels = select_kernels(network, device, updates)
        if self.compile:
            return torch.compile(network), f"{kernels}+compiled"  # type: ignore[return-value]
        return network, kernels
