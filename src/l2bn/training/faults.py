"""What a machine may do to a run, in words for its user."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from l2bn.data.loader import worker_ended
from l2bn.errors import UserError

AGAIN = "the same command goes on from the last checkpoint"
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")


@contextlib.contextmanager
def explain_faults(run: object, folder: Path) -> Iterator[None]:
    """Say in a user's words what the machine could not do for a run; its last checkpoint stands in every case."""
    try:
        yield
    except OSError as error:
        place = os.fsdecode(error.filename) if error.filename else f"in {folder}"
        raise UserError(f"{run}: cannot write {place}: {error.strerror or error}; that mended, {AGAIN}") from error
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _out_of_memory(run, error) from error
    except RuntimeError as error:
        reason = str(error)
        if any(words in reason for words in OUT_OF_MEMORY):
            raise _out_of_memory(run, error) from error
        if "DataLoader worker" in reason:
            raise UserError(f"{run}: {worker_ended(error)}; {AGAIN}") from error
        if "deterministic" in reason:
            raise UserError(f"{run}: {reason}\ntake compute.deterministic=false or another backbone") from error
        raise


def _out_of_memory(run: object, error: BaseException) -> UserError:
    first = str(error).partition(". ")[0] or type(error).__name__
    return UserError(
        f"{run}: out of memory: {first}; take a smaller recipe.batch_size, more compute.devices or "
        "compute.precision=bf16-mixed"
    )
