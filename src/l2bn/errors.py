"""The one exception that a user is meant to read, and how a command ends on it.

Hydra goes on with the other runs of a sweep after a `CompactHydraException`, and so after this one.
"""

import os
import select
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from hydra.errors import CompactHydraException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException


class UserError(CompactHydraException):
    """A mistake that the user can mend: the message says what was given, what is accepted and what to do."""


@contextmanager
def told_plainly() -> Iterator[None]:
    """End the command on a mistake of its user's with one message and exit code 1, on Ctrl-C with 130.

    And silently, as `cat` does, if it prints into a pipe (`| head`) whose reader has had enough.

    A mistake is a `UserError`, what the system refuses (a folder that cannot be written), and what a library
    raises before any code of ours has run (a YAML that is none). An error of ours keeps its traceback; with
    HYDRA_FULL_ERROR=1 in the environment all do.
    """
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        yield
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # has Hydra hand an exception on that it would print and swallow
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads_on():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or it would be tried again at the exit
            sys.exit(128 + signal.SIGPIPE)
        message = _message(error)
        if message is None:
            raise
        sys.exit(message)
    finally:
        del os.environ["HYDRA_FULL_ERROR"]


def _nobody_reads_on() -> bool:
    output = select.poll()
    output.register(sys.stdout, 0)  # for no event but that the other end is closed
    return bool(output.poll(0))


def _message(error: Exception) -> str | None:
    """What a user needs to know of an error that is theirs to mend, None for one that is not."""
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
        return f"{error}\nmend this file: it is no YAML"
    if _passed_through_us(error):
        return None
    remedy = ""
    if isinstance(error, UnicodeDecodeError):
        remedy = "\none of the files that are named here is no UTF-8 text"
    elif "Config group" in str(error):
        remedy = "\na group takes the name of one of its choices; scripts/list.py prints them"
    return f"{error}\ngiven: {' '.join(sys.argv[1:])}{remedy}"


def _passed_through_us(error: Exception) -> bool:
    """Whether code of this package ran, other than this file's, when the error was raised."""
    files = {frame.filename for frame in traceback.extract_tb(error.__traceback__)} - {__file__}
    return any(Path(file).is_relative_to(Path(__file__).parent) for file in files)
