"""Leaving a run in good order when the machine is needed elsewhere, and keeping others out of it meanwhile."""

import fcntl
import logging
import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from l2bn.errors import UserError
from l2bn.processes import SIGNALS, end_with_parent

log = logging.getLogger(__name__)

EXIT_CODE = 75  # sysexits.h: a temporary failure; the same command goes on where this one stopped
_following = False  # whether this process is one of several of a run, which another one has started


class Interruption:
    """Notes the first signal, so that the step under way can be finished; a second one ends the process.

    A handler that was there before is called at the end: submitit requeues its job on SIGUSR2 by one. A process
    that follows another is told by it, and again where a scheduler tells all of a job's processes at once: it
    ends on no second signal, but when the one that it follows ends.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> "Interruption":
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            if _following:
                return
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.signal = signal.Signals(number)
        for child in multiprocessing.active_children():  # the other processes of a run on several devices
            if child.pid:
                os.kill(child.pid, signal.SIGTERM)

    def leave(self) -> None:
        """End the process with `EXIT_CODE`, once a handler that was there before has done its part."""
        previous = self._previous.get(self.signal) if self.signal else None
        if callable(previous) and previous is not signal.default_int_handler:
            previous(int(self.signal or 0), None)
        raise SystemExit(EXIT_CODE)


def follow_parent() -> None:
    """Make this process one that ends with its parent, and that leaves the terminal's Ctrl-C to it."""
    global _following
    _following = True
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


@contextmanager
def sole_owner(folder: Path) -> Iterator[None]:
    """Hold the run in a folder for this process alone. Raises UserError where another process has it.

    The lock (flock) is the kernel's and goes with the process, however that ends. Over NFS it holds between
    machines only where the server's locking does; where a file system has no locks at all, that is logged.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"another process is at work on {folder}; wait for it, or stop it first") from None
    except OSError as error:
        log.warning("%s: no locks here (%s); see to it that no second process is started on it", folder, error)
    try:
        yield
    finally:
        os.close(descriptor)
