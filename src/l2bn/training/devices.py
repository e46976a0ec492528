"""A run on several devices of this machine: a process for each, and what it means when one of them ends."""

import inspect
import os
import pickle
from collections.abc import Callable
from functools import partial
from multiprocessing.reduction import ForkingPickler
from typing import Any

from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException
from torch.nn.parallel import DistributedDataParallel

from l2bn.errors import UserError, optional_output
from l2bn.failures import RESUMES
from l2bn.processes import follow_parent, silence_libraries
from l2bn.training.interruption import EXIT_CODE, Interruption

Task = Callable[[Fabric, Interruption], None]


def check_sendable(built: object) -> None:
    """Raise UserError unless what is trained can be sent to other processes."""
    try:
        ForkingPickler.dumps(built)  # with torch's way to share tensors
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UserError(
            f"several devices are processes, to which the run cannot be sent ({error}): name a function of a "
            "module or functools.partial, not one within a function, open files when first read, or take "
            "compute.devices=1"
        ) from error


class Processes(DDPStrategy):
    """Distributed data parallel on this machine: a process per device."""

    def __init__(self) -> None:
        options: dict[str, Any] = {"gradient_as_bucket_view": True}
        # Each process has its own running statistics, and those of rank 0 are evaluated: broadcast none.
        known = inspect.signature(DistributedDataParallel).parameters
        options["forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"] = False
        super().__init__(start_method="spawn", **options)

    def setup_environment(self) -> None:
        silence_libraries()
        os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # of torchrun; this run has a store of its own
        super().setup_environment()


def launch_processes(fabric: Fabric, task: Task, interruption: Interruption, run: str) -> None:
    """Run a task in a process per device, and turn how one of them has ended into an error of this process.

    interruption: of this process, which passes a request to stop on to the others. run: its name in messages.
    """
    start = f"{UserError.__module__}.{UserError.__qualname__}: "  # of a UserError's line in the traceback there
    try:
        fabric.launch(partial(_serve, task=task))
    except ProcessRaisedException as error:
        if start not in error.msg:
            raise
        raise UserError(error.msg.rpartition(start)[2].strip()) from error
    except ProcessExitedException as error:
        # A request to stop ends processes that cannot handle it yet.
        if error.exit_code == EXIT_CODE or interruption.signal is not None:
            interruption.leave()
            raise SystemExit(EXIT_CODE) from error
        raise UserError(
            f"{run}: the process of device {error.error_index} was ended "
            f"({error.signal_name or f'exit code {error.exit_code}'}); {RESUMES}"
        ) from error


def _serve(fabric: Fabric, task: Task) -> None:
    """Run a task in this process, which is one of several."""
    with Interruption() as interruption, optional_output():
        follow_parent()
        task(fabric, interruption)
