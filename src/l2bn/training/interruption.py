"""Leaving a run in good order when the machine is needed elsewhere, and keeping others out of it meanwhile."""

import fcntl
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from l2bn.errors import UserError
from l2bn.processes import SIGNALS, end_with_parent

log = logging.getLogger(__name__)

EXIT_CODE = 75  # sysexits.h: a temporary failure; the same command goes on where this one stopped
LOCK = ".lock"  # the file in a run's folder that is locked; it stays, since its being there says nothing
LOOKS = (0.05, 0.2)  # seconds after which a lock that is held is tried again: a look at it holds it for an instant
_following = False  # whether this process is one of several of a run, which another one has started


class Interruption:
    """Notes the first signal, so that the step under way can be finished; a second one ends the process.

    A process that follows another is told by it, and again where a scheduler tells all of a job's processes at
    once: it ends on no second signal, but when the one that it follows ends.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> "Interruption":
        for number in SIGNALS:
            # Ignored signals stay ignored (nohup, a parent that decides); None is the handler of a C library.
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
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
        self.signal = number
        for child in multiprocessing.active_children():  # the other processes of a run on several devices
            if child.pid:
                os.kill(child.pid, signal.SIGTERM)

    def leave(self) -> None:
        """End the process with `EXIT_CODE`, or leave it to the handler that was there before.

        Of submitit's, that of SIGUSR2 puts its job back into Slurm's queue and exits, and that of SIGTERM returns:
        Slurm says so first when it preempts a job, and requeues it later if it still runs. Then the run goes on.
        """
        number, self.signal = self.signal, None
        previous = self._previous.get(number) if number else None
        if number is None or not callable(previous) or previous is signal.default_int_handler:
            raise SystemExit(EXIT_CODE)
        previous(int(number), None)


def follow_parent() -> None:
    """Make this process one that ends with its parent, and that leaves the terminal's Ctrl-C to it."""
    global _following
    _following = True
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


RANKS = (  # the variables in which a launcher of several processes numbers them, and their count
    ("RANK", "WORLD_SIZE"),  # torchrun, accelerate, deepspeed
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),  # mpirun of Open MPI
    ("PMI_RANK", "PMI_SIZE"),  # mpiexec of MPICH
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),  # srun
)


def refuse_copies() -> None:
    """Refuse to be one of several copies of a command, as torchrun starts them. Only the first one says so.

    Raises UserError in the first copy and ends the others, with exit code 0: the launcher would kill the first one
    before it has printed, if another failed.
    """
    for rank, count in RANKS:
        if os.environ.get(count, "1") not in ("", "0", "1"):
            if os.environ.get(rank, "0") != "0":
                raise SystemExit(0)
            raise UserError(
                f"this command was started as {os.environ[count]} processes ({count}), as torchrun, mpirun or srun "
                "do; start it once, without them: compute.devices=N trains one run on N devices, and "
                "launcher=joblib trains the runs of a sweep side by side"
            )


@contextmanager
def sole_owner(folder: Path) -> Iterator[None]:
    """Hold the run in a folder for this process alone. Raises UserError where another process has it.

    The lock (flock) is the kernel's and goes with the process, however that ends. It is that of a file, since NFS
    has none of folders: there it holds between machines as far as the server's locking does. Where a file system
    has no locks at all, that is logged.
    """
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            alone = any(_lock(descriptor, fcntl.LOCK_EX, wait) for wait in (0, *LOOKS))
        except OSError as error:
            log.warning("%s: no locks here (%s); see to it that no second process is started on it", folder, error)
            alone = True
        if not alone:
            raise UserError(f"another process is at work on {folder}; wait for it, or stop it first")
        yield
    finally:
        with suppress(OSError):  # there are no locks
            # Closing is not enough while a process that was forked meanwhile has the file open too.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def is_owned(folder: Path) -> bool:
    """Whether a process is at work on the run in a folder; nothing is written there."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:  # nobody has been
        return False
    try:
        return not _lock(descriptor, fcntl.LOCK_SH)
    except OSError:  # there are no locks
        return False
    finally:
        os.close(descriptor)


def _lock(descriptor: int, kind: int, wait: float = 0) -> bool:
    time.sleep(wait)
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
