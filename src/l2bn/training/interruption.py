"""Leaving a run in good order when the machine is needed elsewhere, and keeping others out of it meanwhile."""

import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from l2bn.errors import UserError

EXIT_CODE = 75  # sysexits.h: a temporary failure, "the same command may succeed later"; it resumes
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
_DEFAULTS = (signal.SIG_DFL, signal.SIG_IGN, signal.default_int_handler, None)


class Interruption:
    """Notes the first signal, so that the step under way can be finished; a second one ends the process.

    A handler that was there before is called as well: submitit requeues its job on SIGUSR2 by one.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "Interruption":
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.signal = signal.Signals(number)

    def leave(self) -> None:
        """End the process with `EXIT_CODE`, or hand over to the handler that was there before."""
        assert self.signal
        previous = self._previous[self.signal]
        if previous not in _DEFAULTS and callable(previous):
            previous(self.signal, None)
        raise SystemExit(EXIT_CODE)


@contextmanager
def sole_owner(folder: Path) -> Iterator[None]:
    """Hold the run in a folder for this process alone. Raises UserError where another process has it.

    The lock (flock) is the kernel's and goes with the process, however that ends. Over NFS it holds between
    machines only where the server's locking does, and some parallel file systems are mounted without it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"another process is at work on {folder}; wait for it, or stop it first") from None
    try:
        yield
    finally:
        os.close(descriptor)
