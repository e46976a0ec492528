"""Helper processes end with the one that started them, and leave signals to it; cores and libraries' messages."""

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import warnings

_OTHER = (
    *("SIGKILL", "SIGSTOP"),  # cannot be handled
    *("SIGILL", "SIGTRAP", "SIGABRT", "SIGBUS", "SIGFPE", "SIGSEGV", "SIGSYS", "SIGEMT", "SIGSTKFLT"),  # a crash
    *("SIGCHLD", "SIGCONT", "SIGTSTP", "SIGTTIN", "SIGTTOU", "SIGURG", "SIGWINCH", "SIGINFO"),  # end no process
    *("SIGPIPE", "SIGXFSZ"),  # Python raises OSError instead
)
SIGNALS = sorted(signal.valid_signals() - {getattr(signal, name) for name in _OTHER if hasattr(signal, name)})
"""The requests to stop: every signal whose default ends a process, except those of crashes and SIGKILL.

Terminals send SIGINT, SIGHUP and SIGQUIT; schedulers SIGTERM, SIGUSR1, SIGUSR2, SIGXCPU or one of their own.
"""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends, for whatever reason.

    Otherwise the helpers of a killed process keep its lock, memory and device. Does nothing outside Linux.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    # Another parent than this: it ended before, or a fork server stands between the two.
    if parent is not None and parent.pid != os.getppid() and not parent.is_alive():
        os.kill(os.getpid(), signal.SIGKILL)


def follow_parent() -> None:
    """Make this process end with its parent, and leave the terminal's Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def leave_signals_to_parent() -> None:
    """Ignore requests to stop: they reach a whole process group, and the parent decides for its helpers."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def silence_libraries() -> None:
    """Silence library messages users cannot act on."""
    for name, level in (("lightning_fabric", logging.WARNING), ("torch.utils.cpp_extension", logging.ERROR)):
        logging.getLogger(name).setLevel(level)
    warnings.filterwarnings("ignore", module="lightning_fabric")


def available_cores() -> int:
    """Return the number of CPU cores that this process may use, within the limits of a container."""
    from joblib import cpu_count  # here, because few programs that import this module need it

    return int(cpu_count())
