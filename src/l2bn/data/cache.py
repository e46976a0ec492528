"""Files made of other files, kept to be read faster the next time, and made anew when their source has changed."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from l2bn.errors import UserError


def cache_file(folder: str | None, name: str, *key: str) -> Path:
    """Where the result for `key` is kept: in `folder`, null being `l2bn` in the user's cache folder."""
    if folder is None:
        place = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "l2bn"
    else:
        place = Path(folder).expanduser()
    digest = hashlib.sha256("\0".join(key).encode("utf-8", "surrogateescape"))
    return place / f"{name}-{digest.hexdigest()[:16]}"


def fingerprint(files: Iterable[Path]) -> str:
    """Changes with the name, the size or the time of modification of any of the files."""
    digest = hashlib.sha256()
    for file in files:
        found = status(file)
        line = f"{file}\0{found.st_size}\0{found.st_mtime_ns}\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def status(file: Path) -> os.stat_result:
    """Size and times of a file. Raises `UserError` for a link to nowhere, say."""
    try:
        return file.stat()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error}; replace or remove it") from error


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `file` once it is complete. Raises `UserError` if it can't."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(file)
    except (OSError, SafetensorError) as error:  # the latter is how safetensors reports a full disk
        raise UserError(f"nothing can be kept in {file.parent} ({error}); set dataset.cache=FOLDER") from error
    finally:
        if file.parent.is_dir():
            temporary.unlink(missing_ok=True)
