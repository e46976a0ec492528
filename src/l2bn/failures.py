"""Failures: what an exception means to a user, how a command ends on one, and the note of it in a run's folder."""

import contextlib
import errno
import os
import re
import select
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from hydra.errors import CompactHydraException, HydraException, InstantiationException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from l2bn.errors import DECODED_AS_READ, UserError
from l2bn.records import write_durably

FAILURE = "failure.txt"
RESUMES = "the same command resumes from the last checkpoint"
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")


# Commands.


@contextlib.contextmanager
def exit_with_message() -> Iterator[None]:
    """End a command on a user's mistake with one message and exit code 1, on Ctrl-C with 130.

    A command that prints into a pipe without a reader (`| head`) ends silently, as `cat` does.

    A mistake is a `UserError`, an error of the system with a file's name (a folder that cannot be written), a lack
    of memory, and an error that a library raises before any code of this package has run (invalid YAML). Other
    errors keep their traceback; with HYDRA_FULL_ERROR=1 in the environment all errors do.
    """
    if sys.stdout is None:  # the command began without it
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123
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
        if isinstance(error, BrokenPipeError) and _is_closed(sys.stdout.fileno()):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would flush it again at exit
            sys.exit(128 + signal.SIGPIPE)
        message = explain(error)
        if message is None:
            raise
        sys.exit(message)
    finally:
        del os.environ["HYDRA_FULL_ERROR"]


def _is_closed(descriptor: int) -> bool:
    """Tell whether the other end of a pipe is closed."""
    output = select.poll()
    output.register(descriptor, 0)  # the only event is that the other end is closed
    return bool(output.poll(0))


def explain(error: Exception) -> str | None:
    """Return the message for a user's mistake, None for another error."""
    if isinstance(error, OverrideParseException):
        reasons = [line for line in str(error).splitlines() if not line.startswith("Error parsing override ")]
        message = f"{error.override} cannot be read: {reasons[0]}"
        key, equals, value = error.override.partition("=")
        if not equals or value.endswith(",") or re.match(r"[\[{]|(choice|range|interval|glob)\(", value):
            return message
        quoted = value.replace('"', '\\"')
        return (
            f"{message}\na value with blanks, or with signs other than ASCII letters, digits and / . - _ : % + @, "
            f"needs quotes, and another pair for the shell, as in '{key}=\"{quoted}\"'"
        )
    if isinstance(error, CompactHydraException):
        cause = error.__cause__
        if isinstance(error, InstantiationException) and isinstance(cause, UserError):  # of a launcher
            return str(cause)
        return f"{error}\n{cause}" if isinstance(cause, OmegaConfBaseException) else str(error)
    if is_out_of_memory(error):
        return (
            f"out of memory: {_first_sentence(error)}; take smaller images or fewer, decode images in folders as "
            f"they are read ({DECODED_AS_READ}), or take another device"
        )
    if isinstance(error, OSError) and error.filename is not None:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "make room there, or name another place" if full else "correct the path or its permissions"
        return f"{os.fsdecode(error.filename)}: {error.strerror}; {remedy}"
    if isinstance(error, yaml.YAMLError):
        return f"{error}\ncorrect this file: it is not valid YAML"
    return None if _passed_through_us(error) else _about(error, sys.argv[1:])


def _passed_through_us(error: Exception) -> bool:
    """Return whether the traceback of an error has code of this package outside this file."""
    files = {frame.filename for frame in traceback.extract_tb(error.__traceback__)} - {__file__}
    return any(Path(file).is_relative_to(Path(__file__).parent) for file in files)


def _about(error: Exception, given: Sequence[str]) -> str:
    """Return what a library says about the values of a command, with the remedy."""
    remedy = ""
    if isinstance(error, UnicodeDecodeError):
        remedy = "\none of the files named here is not UTF-8 text"
    elif "Config group" in str(error):
        remedy = "\na group takes the name of one of its choices; scripts/list.py prints them"
    return f"{error}\ngiven: {' '.join(given)}{remedy}"


@contextlib.contextmanager
def override_errors(overrides: Sequence[str]) -> Iterator[None]:
    """Turn what Hydra and OmegaConf raise on a user's mistake in the overrides into UserError."""
    try:
        yield
    except CompactHydraException:
        raise
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UserError(_about(error, overrides)) from error


# Runs.


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    said = isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
    return said or isinstance(error, MemoryError)


def _first_sentence(error: BaseException) -> str:
    return str(error).partition(". ")[0] or type(error).__name__


@contextlib.contextmanager
def run_errors(run: object, folder: Path) -> Iterator[None]:
    """Turn errors of files, lack of memory, missing deterministic kernels and batches of one value into UserError.

    An OSError without a number is no error of the system but of a library, and stays as it is.
    """
    try:
        yield
    except (OSError, MemoryError, RuntimeError, ValueError) as error:  # torch.OutOfMemoryError is a RuntimeError
        reason = str(error)
        if "more than 1 value per channel" in reason:  # batch norm's own words
            raise UserError(
                f"{run}: {reason}\ntake a larger recipe.batch_size, or fewer compute.devices"
            ) from error
        if "allocate shared memory" in reason:  # of torch, whose processes exchange tensors there
            raise UserError(
                f"{run}: {reason.splitlines()[0]}; enlarge /dev/shm, as by docker run --shm-size=8g, or take "
                "compute.devices=1"
            ) from error
        if is_out_of_memory(error):
            raise UserError(
                f"{run}: out of memory: {_first_sentence(error)}; take a smaller "
                "recipe.batch_size, more compute.devices or compute.precision=bf16-mixed, for all norms that are "
                "compared: these are other runs; with CUDA graphs also compute.compile=false helps"
            ) from error
        if isinstance(error, OSError) and error.errno is not None:
            place = os.fsdecode(error.filename) if error.filename else f"in {folder}"
            raise UserError(f"{run}: {place}: {error.strerror}; once that is corrected, {RESUMES}") from error
        if "deterministic" in reason:
            raise UserError(f"{run}: {reason}\ntake compute.deterministic=false or another backbone") from error
        raise


@contextlib.contextmanager
def checkpoint_errors(folder: Path) -> Iterator[None]:
    """Raise UserError for a checkpoint that is intact but incompatible with this network or version."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"the checkpoint in {folder} does not fit this network and this version of the suite: {reason}\n"
            "env.json names the commit that wrote it; check that out, or move the run's folder away to start anew"
        ) from error


def describe(error: BaseException) -> str:
    """Return the message of an exception, without a traceback."""
    return str(error).strip() if isinstance(error, UserError) else f"{type(error).__name__}: {error}".strip()


# The note in a run's folder.


def note_failure(folder: Path, error: Exception) -> None:
    """Write the message of an exception, followed by its traceback unless it is a UserError."""
    text = describe(error) + "\n"
    if not isinstance(error, UserError):
        text += "\n" + "".join(traceback.format_exception(error))
    folder.mkdir(parents=True, exist_ok=True)
    write_durably(folder / FAILURE, text)


def read_failure(folder: Path) -> str | None:
    """Return the message noted in a run's folder, or None if there is none."""
    try:
        return (folder / FAILURE).read_text(encoding="utf-8").partition("\n\n")[0].strip()
    except (OSError, UnicodeDecodeError):
        return None
