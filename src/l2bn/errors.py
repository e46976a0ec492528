"""The exception whose message is for the user, and how a command ends and prints.

Hydra prints a `CompactHydraException` without a traceback; `UserError` is one.
"""

import io
import os
import select
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, TextIO

import yaml
from hydra.errors import CompactHydraException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException


class UserError(CompactHydraException):
    """A mistake that the user can correct: the message says what was given, what is accepted and what to do."""


@contextmanager
def told_plainly() -> Iterator[None]:
    """End a command on a user's mistake with one message and exit code 1, on Ctrl-C with 130.

    A command that prints into a pipe without a reader (`| head`) ends silently, as `cat` does.

    A mistake is a `UserError`, an error of the system with a file's name (a folder that cannot be written), and an
    error that a library raises before any code of this package has run (invalid YAML). Other errors keep their
    traceback; with HYDRA_FULL_ERROR=1 in the environment all errors do.
    """
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        yield
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise exceptions that it would print and swallow
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads_on():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would flush it again at exit
            sys.exit(128 + signal.SIGPIPE)
        message = _message(error)
        if message is None:
            raise
        sys.exit(message)
    finally:
        del os.environ["HYDRA_FULL_ERROR"]


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


def _nobody_reads_on() -> bool:
    output = select.poll()
    output.register(sys.stdout, 0)  # the only event is that the other end is closed
    return bool(output.poll(0))


def _message(error: Exception) -> str | None:
    """Return the message for a user's mistake, None for another error."""
    if isinstance(error, OverrideParseException):
        key, _, value = error.override.partition("=")
        quoted = value.replace('"', '\\"')
        return (
            f"{error.override} cannot be read: a value with blanks, or with signs other than ASCII letters, digits "
            f"and / . - _ : % + @, needs quotes, and another pair for the shell, as in '{key}=\"{quoted}\"'"
        )
    if isinstance(error, CompactHydraException):
        cause = error.__cause__
        return f"{error}\n{cause}" if isinstance(cause, OmegaConfBaseException) else str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}; name another place, or make room for it there"
    if isinstance(error, yaml.YAMLError):
        return f"{error}\ncorrect this file: it is not valid YAML"
    if _passed_through_us(error):
        return None
    remedy = ""
    if isinstance(error, UnicodeDecodeError):
        remedy = "\none of the files named here is not UTF-8 text"
    elif "Config group" in str(error):
        remedy = "\na group takes the name of one of its choices; scripts/list.py prints them"
    return f"{error}\ngiven: {' '.join(sys.argv[1:])}{remedy}"


def _passed_through_us(error: Exception) -> bool:
    """Return whether the traceback of an error has code of this package outside this file."""
    files = {frame.filename for frame in traceback.extract_tb(error.__traceback__)} - {__file__}
    return any(Path(file).is_relative_to(Path(__file__).parent) for file in files)
