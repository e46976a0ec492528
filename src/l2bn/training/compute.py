"""Where and how a run computes: devices, precision, kernels."""

import inspect
import logging
import os
import warnings
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.strategies.ddp import DDPStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from l2bn.kernels.compiler import select_kernels
from l2bn.norms.sync import convert_sync
from l2bn.training.allocator import keep_freed_memory
from l2bn.training.compilation import Compile, compiled, should_compile


def quieten() -> None:
    """Leave out what libraries say that a user can do nothing about."""
    for name, level in (("lightning_fabric", logging.WARNING), ("torch.utils.cpp_extension", logging.ERROR)):
        logging.getLogger(name).setLevel(level)
    warnings.filterwarnings("ignore", module="lightning_fabric")


class _Processes(DDPStrategy):
    """Processes of this machine, each with a device."""

    def __init__(self) -> None:
        options: dict[str, Any] = {"gradient_as_bucket_view": True}
        # Batch norm's buffers are each process's own, and the first one's are evaluated: none to send around.
        known = inspect.signature(DistributedDataParallel).parameters
        options["forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"] = False
        super().__init__(start_method="spawn", **options)

    def setup_environment(self) -> None:
        quieten()
        super().setup_environment()


class Placed(NamedTuple):
    """A network on its device."""

    network: nn.Module  # with the weights, as it is evaluated and saved
    trained: nn.Module  # the same, compiled if it is to be
    kernels: str  # what it runs on, as a record has it


MOST = 1024  # threads or workers; far above what any machine here has, far below what brings one down


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Where and how a run computes.

    The number of devices and `sync_bn` say over which images batch statistics are taken; with the precision
    they are part of the run's identity, the rest is not.

    precision: "32-true" is float32 throughout; "tf32-mixed" lets a GPU's tensor cores round the factors of
    convolutions and matrix products to 10 bits of mantissa; the others are autocast to bfloat16 or float16.
    """

    device: Literal["auto", "cpu", "cuda", "mps"]
    devices: int
    sync_bn: bool
    precision: Literal["32-true", "tf32-mixed", "bf16-mixed", "16-mixed"]
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
        cores = os.cpu_count() or 1
        if not self._is_cuda and self.devices > max(2, cores):
            raise ValueError(f"devices is {self.devices}, but this machine's processor has {cores} cores")
        if self._is_cuda and self.devices > torch.cuda.device_count():
            raise ValueError(f"devices is {self.devices}, but there are {torch.cuda.device_count()} CUDA devices")
        for key, value in (("precision", "16-mixed"), ("precision", "tf32-mixed"), ("compile", "graphs")):
            if getattr(self, key) == value and not self._is_cuda:
                other = "compile=true or auto" if key == "compile" else "precision=bf16-mixed or 32-true"
                raise ValueError(f"{key} {value} needs a CUDA device; take {other}")

    @property
    def _is_cuda(self) -> bool:
        return self.device == "cuda" or (self.device == "auto" and torch.cuda.is_available())

    def set_up(self) -> None:
        """Set this process's memory, threads and kernels."""
        keep_freed_memory()
        if self.threads is not None or self.devices > 1:
            torch.set_num_threads(max(1, (self.threads or os.cpu_count() or 1) // self.devices))
        if self.deterministic:  # cuBLAS promises equal bits with a workspace of this kind only
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(self.deterministic)
        torch.backends.cudnn.benchmark = not self.deterministic
        # torch's own default is true for convolutions.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = self.precision == "tf32-mixed"

    def fabric(self) -> Fabric:
        """The devices, one process each where there are several.

        This process starts the others itself, also where a cluster's scheduler has started this one: of the
        scheduler's environment, which Fabric would follow, nothing is read.
        """
        return Fabric(
            accelerator=self.device,
            strategy=_Processes() if self.devices > 1 else "auto",
            devices=self.devices,
            precision="32-true" if self.precision == "tf32-mixed" else self.precision,
            plugins=LightningEnvironment(),
        )

    def place(self, model: nn.Module, device: torch.device, updates: int) -> Placed:
        """Put a model on its device for a run of so many updates. Raises UserError, see `should_compile`."""
        network = model.to(device)
        if self.channels_last:
            network.to(memory_format=torch.channels_last)
        if self.sync_bn:
            convert_sync(network)
        kernels = select_kernels(network, device, updates)
        if should_compile(self.compile, network, device, updates):
            return Placed(network, compiled(network, self.compile), f"{kernels}+compiled")
        return Placed(network, network, kernels)
