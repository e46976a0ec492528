"""The note that a failed run leaves in its folder, so that what failed is found again later, and why."""

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path

from l2bn.errors import UserError
from l2bn.records import write_durably

FAILURE = "failure.txt"


@contextlib.contextmanager
def noted(folder: Path) -> Iterator[None]:
    """Note in a run's folder how what follows fails; a note of an earlier attempt is removed."""
    (folder / FAILURE).unlink(missing_ok=True)
    try:
        yield
    except Exception as error:
        note_failure(folder, error)
        raise


def note_failure(folder: Path, error: Exception) -> None:
    """Write what went wrong: the message, and below it where, if it is not a mistake of the user's.

    A failure may be that nothing can be written here; then there is no note.
    """
    text = describe(error) + "\n"
    if not isinstance(error, UserError):
        text += "\n" + "".join(traceback.format_exception(error))
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(folder / FAILURE, text)


def describe(error: BaseException) -> str:
    """What an exception says, without a traceback."""
    return str(error).strip() if isinstance(error, UserError) else f"{type(error).__name__}: {error}".strip()


def read_failure(folder: Path) -> str | None:
    """The message of the note in a run's folder, or None where there is none."""
    try:
        return (folder / FAILURE).read_text(encoding="utf-8").partition("\n\n")[0].strip()
    except (OSError, UnicodeDecodeError):
        return None
