"""Checkpoints that survive a crash at any instant.

A checkpoint is written beside the others and renamed, so it is whole or not there; its name carries its place
in the run and a checksum of its content. The last two that are whole are kept, so that a damaged newest one costs
an interval and not the run.
"""

import hashlib
import io
import logging
import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from l2bn.errors import UserError
from l2bn.records import write_durably

log = logging.getLogger(__name__)

_NAME = re.compile(r"epoch(?P<epoch>\d+)-step(?P<step>\d+)\.(?P<digest>[0-9a-f]{16})\.pt")


@dataclass(frozen=True, kw_only=True)
class CheckpointPolicy:
    """When checkpoints are written: after every epoch, and also after every so many updates (0 for never) of a
    long one. Those after the epochs in `keep_epochs` are kept for good."""

    every_steps: int = 1000
    keep_epochs: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.every_steps < 0:
            raise ValueError(f"every_steps must be 0 (after epochs only) or more, not {self.every_steps}")
        if any(epoch < 1 for epoch in self.keep_epochs):
            raise ValueError(f"keep_epochs are counted from 1; got {self.keep_epochs}")

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due after this many updates of an epoch."""
        return self.every_steps > 0 and step % self.every_steps == 0


class Checkpoints:
    """The checkpoints of one run, in their folder."""

    def __init__(self, folder: Path, keep_epochs: list[int]) -> None:
        self.folder = folder
        self.keep_epochs = keep_epochs
        self._last: Path | None = None  # what this process has written or loaded last, and so is whole

    def save(self, epoch: int, step: int, state: dict[str, Any]) -> None:
        """Write the state after `epoch` whole epochs and `step` updates more, then drop those no longer needed.

        What was written or loaded before stays beside it. Those of later places, which `load` has passed over as
        damaged, stay until the run has come to them again.
        """
        self.folder.mkdir(exist_ok=True)
        for cut_off in self.folder.glob(".*.tmp"):  # a kill during an earlier write has left it
            cut_off.unlink()
        buffer = io.BytesIO()
        torch.save(state, buffer)
        data = buffer.getvalue()
        path = self.folder / f"epoch{epoch:04d}-step{step:07d}.{_digest(data)}.pt"
        write_durably(path, data)
        for old in self.paths():
            passed = _place(old) < (epoch, step) and not self._is_kept(old)
            replaced = _place(old) == (epoch, step)
            if (passed or replaced) and old not in (path, self._last):
                old.unlink()
        self._last = path

    def load(self, device: torch.device) -> dict[str, Any] | None:
        """The newest state that is whole, or None where there is none yet.

        Raises UserError, and deletes nothing, if all of the last ones are damaged.
        """
        damaged = []
        for path in reversed(self.paths()):
            try:
                state = self.read(path, device)
            except ValueError as error:
                log.warning("the checkpoint %s is damaged, trying the one before: %s", path, error)
                damaged.append(path)
            else:
                self._last = path
                return state
        if damaged:
            names = "\n".join(f"  {path}" for path in damaged)
            raise UserError(
                f"no checkpoint of this run can be read, all are damaged:\n{names}\n"
                "nothing was deleted; restore one of them, or remove the run's folder to start it anew"
            )
        return None

    @staticmethod
    def read(path: Path, device: torch.device) -> dict[str, Any]:
        """The state in one file. Raises ValueError saying why, if it is damaged."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ValueError(str(error)) from error
        if _digest(data) != _match(path)["digest"]:
            raise ValueError("its checksum is not that of its content")
        try:  # weights_only: tensors and plain values, never a pickled object that could run code
            return torch.load(io.BytesIO(data), map_location=device, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(str(error).splitlines()[0]) from error

    def paths(self) -> list[Path]:
        """All checkpoints, oldest first."""
        found = [path for path in self.folder.glob("*.pt") if _NAME.fullmatch(path.name)]
        return sorted(found, key=_place)

    def _is_kept(self, path: Path) -> bool:
        epoch, step = _place(path)
        return epoch in self.keep_epochs and step == 0


def _place(path: Path) -> tuple[int, int]:
    match = _match(path)
    return int(match["epoch"]), int(match["step"])


def _match(path: Path) -> re.Match[str]:
    match = _NAME.fullmatch(path.name)
    assert match
    return match


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
