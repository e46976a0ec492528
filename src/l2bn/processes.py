"""Processes that serve another one: they end with it, and leave to it what it is told."""

import ctypes
import multiprocessing
import os
import signal
import sys

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""By which a process is asked to leave: of a scheduler, of a terminal, of Slurm."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent() -> None:
    """Have the kernel end this process when the one that started it ends, however that comes about.

    Otherwise what a killed process has left behind keeps its lock, its memory and its device. On other systems
    than Linux nothing changes.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid != os.getppid():  # it ended before
        os.kill(os.getpid(), signal.SIGKILL)


def leave_signals_to_parent() -> None:
    """Ignore what a whole group of processes is told: the process that this one works for will see to it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
