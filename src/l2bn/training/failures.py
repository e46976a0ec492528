"""Failures of a run: what an exception means to the user, and the note of it in the run's folder."""

import contextlib
import os
import traceback
from collections.abc import Iterator
from pathlib import Path

from l2bn.errors import UserError
from l2bn.records import write_durably

FAILURE = "failure.txt"
RESUMES = "the same command resumes from the last checkpoint"
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")


# What an exception means.


@contextlib.contextmanager
def explained(run: object, folder: Path) -> Iterator[None]:
    """Turn disk-full, out-of-memory and killed-worker errors of a run in a folder into UserError."""
    try:
        yield
    except OSError as error:
        place = os.fsdecode(error.filename) if error.filename else f"in {folder}"
        raise UserError(
            f"{run}: cannot write {place}: {error.strerror or error}; once that is corrected, {RESUMES}"
        ) from error
    except MemoryError as error:
        raise _out_of_memory(run, error) from error
    except RuntimeError as error:
        reason = str(error)
        if any(words in reason for words in OUT_OF_MEMORY):  # torch.OutOfMemoryError is a RuntimeError
            raise _out_of_memory(run, error) from error
        if "DataLoader worker" in reason:
            from l2bn.data.loader import worker_ended  # here, because it loads torch, which `status.py` need not

            raise UserError(f"{run}: {worker_ended(error)}; {RESUMES}") from error
        if "deterministic" in reason:
            raise UserError(f"{run}: {reason}\ntake compute.deterministic=false or another backbone") from error
        raise


def _out_of_memory(run: object, error: BaseException) -> UserError:
    first = str(error).partition(". ")[0] or type(error).__name__
    return UserError(
        f"{run}: out of memory: {first}; take a smaller recipe.batch_size, more compute.devices or "
        "compute.precision=bf16-mixed"
    )


@contextlib.contextmanager
def fitting(folder: Path) -> Iterator[None]:
    """Raise UserError for a checkpoint that is intact but incompatible with this network or version."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"the checkpoint in {folder} does not fit this network and this version of the suite: {reason}\n"
            "env.json names the commit that wrote it; check that out, or move the run's folder away to start anew"
        ) from error


def describe(error: BaseException) -> str:
    """Return the message of an exception, without a traceback."""
    return str(error).strip() if isinstance(error, UserError) else f"{type(error).__name__}: {error}".strip()


# The note in a run's folder.


@contextlib.contextmanager
def noted(folder: Path) -> Iterator[None]:
    """Note a failure in a run's folder; the note of an earlier attempt is removed first."""
    (folder / FAILURE).unlink(missing_ok=True)
    try:
        yield
    except Exception as error:
        note_failure(folder, error)
        raise


def note_failure(folder: Path, error: Exception) -> None:
    """Write the message of an exception, followed by its traceback unless it is a UserError.

    Writes nothing where the folder cannot be written, which may be the failure itself.
    """
    text = describe(error) + "\n"
    if not isinstance(error, UserError):
        text += "\n" + "".join(traceback.format_exception(error))
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(folder / FAILURE, text)


def read_failure(folder: Path) -> str | None:
    """Return the message noted in a run's folder, or None if there is none."""
    try:
        return (folder / FAILURE).read_text(encoding="utf-8").partition("\n\n")[0].strip()
    except (OSError, UnicodeDecodeError):
        return None
