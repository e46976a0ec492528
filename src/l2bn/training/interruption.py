"""Requests to stop, which end a run after a checkpoint, and the lock that keeps other processes out of a run."""

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
from l2bn.processes import SIGNALS

log = logging.getLogger(__name__)

EXIT_CODE = 75  # sysexits.h: a temporary failure; the same command resumes the run
LOCK = ".lock"  # the locked file in a run's folder; it is never deleted, because its presence means nothing


class Interruption:
    """Notes the first request to stop, so that the current step can be finished; a second one ends the process.

    The request is passed on to this process's children. A child may get it twice, from its parent and from a
    scheduler that signals all processes of a job, so that a second one does not end a child.
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
            if multiprocessing.parent_process() is not None:
                return
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.signal = number
        for child in multiprocessing.active_children():
            child.terminate()  # SIGTERM, and no error for a child that has just ended

    def leave(self) -> None:
        """End the process with `EXIT_CODE`, or call the handler that was installed before.

        submitit's handler of SIGUSR2 requeues its Slurm job and exits. Its handler of SIGTERM returns, and the run
        goes on: Slurm sends SIGTERM when it begins to preempt a job, and requeues the job if it still runs later.
        """
        number, self.signal = self.signal, None
        previous = self._previous.get(number) if number else None
        if number is None or not callable(previous) or previous is signal.default_int_handler:
            raise SystemExit(EXIT_CODE)
        previous(int(number), None)


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


LOOK = 0.1
"""Seconds after which a run that found its lock held tries again: `is_locked` may have looked."""


class LockedError(UserError):
    """Another process trains this run."""


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Lock the run in a folder for this process. Raises LockedError if another process holds the lock.

    The kernel holds the lock (flock) and drops it when the process ends, for whatever reason. It is on a file,
    because NFS has no locks on folders; there it holds between machines as far as the server's locking does. A file
    system without locks is logged.
    """
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        for attempt in range(2):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt:
                    raise LockedError(
                        f"another process is training the run in {folder}; wait for it, or stop it first"
                    ) from None
                time.sleep(LOOK)
            except OSError as error:
                log.warning("%s: no locks here (%s); see that no second process trains it", folder, error)
                break
        yield
    finally:
        with suppress(OSError):  # the file system has no locks
            # Closing is not enough: a process forked meanwhile has the file open, too.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def is_locked(folder: Path) -> bool:
    """Return whether a process is training the run in a folder, without writing there.

    It holds the lock for much less than LOOK.
    """
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:  # the run was never started
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:  # another than BlockingIOError: the file system has no locks
        return isinstance(error, BlockingIOError)
    finally:
        os.close(descriptor)
    return False
