"""The exception whose message is for the user, paths as a user writes them, and output that may fail.

Hydra prints a `CompactHydraException` without a traceback; `UserError` is one. `l2bn.failures` turns other
exceptions into it.
"""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, TextIO

from hydra.errors import CompactHydraException


class UserError(CompactHydraException):
    """A mistake that the user can correct: the message says what was given, what is accepted and what to do."""


DECODED_AS_READ = (
    "dataset=imagenet +dataset.upright=true dataset.val=test dataset.label=NAME dataset.baseline=null, with random "
    "crops and a recipe of its own"
)
"""The options that train on images in class folders without holding them in memory."""


def expand(path: str, key: str = "dataset.root") -> Path:
    """The path with `~` replaced. Raises `UserError`, naming the key, for the home of a user who does not exist."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{key}={path}: no home folder is known for {path.split('/')[0]}; give the path") from None


@contextmanager
def optional_output() -> Iterator[None]:
    """Ignore errors of stdout and stderr: a closed pipe, a full disk, a closed terminal, a missing character.

    For training, whose result is in files: what is printed must never end it. Holds for this process only.
    """
    out, err = _OptionalStream(sys.stdout), _OptionalStream(sys.stderr)
    with redirect_stdout(out), redirect_stderr(err):
        try:
            yield
        finally:
            out.settle()
            err.settle()


class _OptionalStream:
    """A text stream that drops what it cannot write."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream or open(os.devnull, "w")  # noqa: SIM115, PTH123 (None: the command began without it)
        if isinstance(self._stream, io.TextIOWrapper):
            self._stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def settle(self) -> None:
        """Flush for the last time, so that Python's own flush at exit cannot fail and change the exit code."""
        try:
            self._stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
