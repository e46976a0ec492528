"""Atomic replacement of files: after a crash a file has its old content or its new one."""

import os
from pathlib import Path


def write_durably(path: Path, data: bytes | str) -> None:
    """Replace a file atomically: write a temporary file beside it, flush it to the disk, rename it.

    After a crash or a power cut the path holds the old content or the new one, never a mixture. Raises
    OSError (disk full, read-only folder); then the old file stays and the temporary one is removed.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    content = data.encode() if isinstance(data, str) else data
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    """Flush a folder to the disk, and with it the renames in it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
