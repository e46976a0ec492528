"""A process that makes the runs of a sweep side by side with others on one machine, as joblib starts it.

joblib divides the threads of the CPU; here each process gets a GPU of its own, and leaves when it is told.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import current_process

from l2bn.training.interruption import follow_parent

VISIBLE = "CUDA_VISIBLE_DEVICES"

_told_to_leave = False


class RunLeftError(Exception):
    """The run was left in good order, because this process was told to leave."""


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if VISIBLE in os.environ:
        return [name for name in os.environ[VISIBLE].split(",") if name.strip()]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def is_worker() -> bool:
    """Whether this process makes runs side by side with others."""
    return _number() is not None


def _number() -> int | None:
    """Which of joblib's processes this one is, counted from 0; None if it is none."""
    found = re.fullmatch(r"LokyProcess-(\d+)", current_process().name)
    return int(found[1]) - 1 if found else None


@contextmanager
def side_by_side() -> Iterator[None]:
    """Make a run in this process, if it is one of joblib's, as one among several on the machine.

    It dies with the process that started it, and takes one of the GPUs, whichever of its processes' numbers it
    has. Raises RunLeftError where the run ends the process, since joblib would end all the others with it;
    also for the runs that it is given afterwards.
    """
    global _told_to_leave
    number = _number()
    if number is None:
        yield
        return
    if _told_to_leave:
        raise RunLeftError("not started: this process was told to leave")
    follow_parent()
    if VISIBLE in os.environ:
        gpus = os.environ[VISIBLE].split(",")
        os.environ[VISIBLE] = gpus[number % len(gpus)]
    try:
        yield
    except SystemExit as error:
        _told_to_leave = True
        raise RunLeftError("left in good order") from error
