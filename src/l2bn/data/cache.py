"""Files made from other files, kept for the next run, and made again when one of their sources has changed."""

import glob
import hashlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import numpy.typing as npt
from numpy.lib.format import read_array, write_array
from rich.console import Console
from rich.progress import track

from l2bn.errors import UserError

log = logging.getLogger(__name__)

Arrays = list[npt.NDArray[Any]]
T = TypeVar("T")

FORMAT = "2"  # raise it when the same sources give other arrays
DAY = 24 * 60 * 60  # seconds; a temporary file that nobody has written to for so long is left from a killed process


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


def expand(path: str, key: str = "dataset.root") -> Path:
    """The path with `~` replaced. Raises `UserError`, naming the key, for the home of a user who does not exist."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{key}={path}: no home folder is known for {path.split('/')[0]}; give the path") from None


def file_state(files: Iterable[Path]) -> str:
    """A digest over name, size, inode and times of the files.

    The change time and the inode tell files of equal size and modification time apart, as an archive unpacks them.
    """
    digest = hashlib.sha256()
    for file in files:
        found = status(file)
        values = found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns
        digest.update("\0".join([str(file), *map(str, values)]).encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()


def status(file: Path) -> os.stat_result:
    """Size and times of a file. Raises `UserError` for a link to nothing, for example."""
    try:
        return file.stat()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}; restore the file") from error


def cached(folder: str | None, name: str, key: Sequence[str], state: str, make: Callable[[], Arrays]) -> Arrays:
    """The arrays that `make` returns, read from the cache if it holds those of the same key and state.

    Where nothing can be written the arrays stay in memory only, and a warning says so.
    """
    try:
        file = cache_file(folder, name, *key)
        with file.open("rb") as stream:
            arrays = read_arrays(stream, state)
        if arrays is not None:
            return arrays
    except OSError:
        pass  # never made; what is wrong with the folder shows below
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


def write_arrays(stream: BinaryIO, state: str, arrays: Arrays) -> None:
    for array in [np.array([state, str(len(arrays))]), *arrays]:
        write_array(stream, array, allow_pickle=False)


def read_arrays(stream: BinaryIO, state: str) -> Arrays | None:
    """Read the arrays that `write_arrays` wrote for this state; None for another state or a damaged file."""
    try:
        found, count = read_array(stream, allow_pickle=False)
        return [read_array(stream, allow_pickle=False) for _ in range(int(count))] if found == state else None
    except (ValueError, TypeError, EOFError):
        return None


@contextmanager
def replacing(file: Path) -> Iterator[BinaryIO]:
    """A stream whose content becomes `file` when it is complete. Raises OSError where it cannot be written.

    The temporary name is random, because process ids are equal in different containers.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    for remains in file.parent.glob(f"{glob.escape(file.name)}.*"):
        with suppress(OSError):
            if time.time() - remains.stat().st_mtime > DAY:
                remains.unlink()
    temporary = file.with_name(f"{file.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as stream:
            yield stream
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def tracked(items: Iterable[T], text: str, total: int | None = None) -> Iterable[T]:
    """The items, with a progress bar on a terminal."""
    console = Console(stderr=True)
    return track(items, text, total=total, console=console, disable=not console.is_terminal)
