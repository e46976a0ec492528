"""Files made from other files, kept for the next run, and made again when one of their sources has changed."""

import fcntl
import glob
import hashlib
import logging
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import numpy.typing as npt
from numpy.lib.format import read_array, write_array
from rich.console import Console
from rich.progress import track

from l2bn.errors import UserError, expand

log = logging.getLogger(__name__)

Arrays = list[npt.NDArray[Any]]
T = TypeVar("T")

FORMAT = "3"  # raise it when the same sources give other arrays
LOCK = ".lock"
HOUR = 60 * 60  # seconds; a temporary file that nobody has written to for so long is left from a killed process


def cache_file(folder: str | None, name: str, *key: str) -> Path:
    """The file for `key` in `folder`; null: in `l2bn` in the user's cache folder. Raises OSError without a home."""
    if folder is not None:
        place = expand(folder, "dataset.cache")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME", ""))
        try:
            place = (base if base.is_absolute() else Path.home() / ".cache") / "l2bn"
        except RuntimeError as error:
            raise OSError("this user has no home folder") from error
    digest = hashlib.sha256("\0".join([*key, FORMAT]).encode("utf-8", "surrogateescape"))
    return place / f"{name}-{digest.hexdigest()[:16]}"


def file_state(folder: Path, names: Iterable[str]) -> str:
    """A digest over name, size, inode and times of files in a folder, however the path of the folder is written.

    The change time and the inode tell files of equal size and modification time apart, as an archive unpacks them.
    """
    digest = hashlib.sha256()
    for name in names:
        found = status(folder / name)
        values = found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns
        digest.update("\0".join([name, *map(str, values)]).encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()


def status(file: Path) -> os.stat_result:
    """Size and times of a file. Raises `UserError` for a link to nothing, for example."""
    try:
        return file.stat()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}; restore the file") from error


def content_of(file: Path) -> bytes:
    """The bytes of a file. Raises `UserError` for one that is gone, for example."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}; restore the file") from error


def cached(folder: str | None, name: str, key: Sequence[str], state: str, make: Callable[[], Arrays]) -> Arrays:
    """The arrays that `make` returns, read from the cache if it holds those of the same key and state.

    One process makes them, and others wait for it. Where nothing can be written the arrays stay in memory only, and
    a warning says so.
    """

    def read() -> Arrays | None:
        try:
            with cache_file(folder, name, *key).open("rb") as stream:
                return read_arrays(stream, state)
        except OSError:
            return None  # never made; what is wrong with the folder shows below

    arrays = read()
    if arrays is not None:
        return arrays
    with ExitStack() as stack:
        with suppress(OSError):
            stack.enter_context(making(cache_file(folder, name, *key)))
        arrays = read()
        if arrays is not None:
            return arrays
        arrays = make()
        try:
            with replacing(cache_file(folder, name, *key)) as stream:
                write_arrays(stream, state, arrays)
        except OSError as error:
            log.warning(
                "%s is kept in memory only and made again by the next run, the cache cannot be written (%s); "
                "set dataset.cache=FOLDER",
                name,
                error,
            )
    return arrays


@contextmanager
def making(file: Path) -> Iterator[None]:
    """Keep other processes from making a file until it is made; they wait, and then find it.

    Where files cannot be locked, as on some network file systems, all make it. Raises OSError where the file's
    folder cannot be made.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    path = file.with_name(f"{file.name}{LOCK}")
    with ExitStack() as stack:
        with suppress(OSError):
            lock = stack.enter_context(path.open("a"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("waiting for another process, which makes %s", file)
                fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink()  # who has it open already finds the file made, or makes it


def write_arrays(stream: BinaryIO, state: str, arrays: Arrays) -> None:
    for array in [np.array([state, str(len(arrays))]), *arrays]:
        write_array(stream, array, allow_pickle=False)


def read_arrays(stream: BinaryIO, state: str) -> Arrays | None:
    """Read the arrays that `write_arrays` wrote for this state; None for another state or a damaged file."""
    try:
        found, count = read_array(stream, allow_pickle=False)
        return [read_array(stream, allow_pickle=False) for _ in range(int(count))] if found == state else None
    except OSError:
        raise
    except Exception:  # whatever a damaged file makes of the reader
        return None


@contextmanager
def replacing(file: Path, made: Callable[[], bool] = lambda: False) -> Iterator[BinaryIO]:
    """A stream whose content becomes `file` when it is complete. Raises OSError where it cannot be written.

    made: tells whether another process has made the file meanwhile and may be reading it; it then stays.

    The temporary name is random, because process ids are equal in different containers.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    for remains in file.parent.glob(f"{glob.escape(file.name)}.*"):
        with suppress(OSError):
            if remains.suffix != LOCK and time.time() - remains.stat().st_mtime > HOUR:
                remains.unlink()
    temporary = file.with_name(f"{file.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())  # a rename may reach the disk before the content does
        if not made():
            temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def temporary_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder that is gone at the end, and with it those that a killed process left an hour ago or before."""
    for remains in parent.glob(f"{prefix}*"):
        with suppress(OSError):
            # Of an unpacked file the archive gives the time of its content, so the change of the entry counts.
            if time.time() - max(path.stat().st_ctime for path in (remains, *remains.rglob("*"))) > HOUR:
                shutil.rmtree(remains)
    with tempfile.TemporaryDirectory(dir=parent, prefix=prefix) as place:
        yield Path(place)


def tracked(items: Iterable[T], text: str, total: int | None = None) -> Iterable[T]:
    """The items, with a progress bar on a terminal."""
    console = Console(stderr=True)
    return track(items, text, total=total, console=console, disable=not console.is_terminal)
