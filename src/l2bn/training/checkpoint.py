"""Checkpoints that survive a crash at any instant, and the state of a run that they hold.

A checkpoint is written to a temporary file and renamed, so that it is complete or absent. Its name holds its
position in the run and a checksum of its content. The last two intact ones are kept, so that a damaged newest one
costs one interval and not the run.
"""

import hashlib
import io
import json
import logging
import pickle
import re
from collections.abc import Iterator
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any

import safetensors.torch
import torch
from lightning_fabric import Fabric
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn

from l2bn.errors import UserError
from l2bn.failures import checkpoint_errors, is_out_of_memory
from l2bn.records import CHECKED, METRICS, Fingerprint, write_durably
from l2bn.training.loop import Position, Totals
from l2bn.training.plan import CHECKPOINTS, PlannedRun, check_identity, check_images

log = logging.getLogger(__name__)

KEPT = "keep_epochs"  # in a checkpoint: the epochs whose checkpoints stay
_NAME = re.compile(r"epoch(\d+)-step(\d+)\.([0-9a-f]{16})\.pt")


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class CheckpointPolicy:
    """The schedule of checkpoints: one after every epoch, and one every `every_steps` steps within an epoch.

    every_steps: 0 for none within an epoch.
    keep_epochs: the epochs, counted from 1, whose checkpoints stay, also once a run is resumed without them.
    """

    every_steps: Annotated[int, Field(ge=0)] = 1000
    keep_epochs: list[Annotated[int, Field(ge=1)]] = field(default_factory=list)

    def due(self, step: int) -> bool:
        """Return whether a checkpoint is due after this many steps of an epoch."""
        return self.every_steps > 0 and step % self.every_steps == 0


class Checkpoints:
    """The checkpoint files of one run, in their folder."""

    def __init__(self, folder: Path, keep_epochs: list[int]) -> None:
        self.folder = folder
        self.keep_epochs = set(keep_epochs)
        self._last: Path | None = None  # the last one written or loaded by this process, and therefore intact

    def save(self, epoch: int, step: int, state: dict[str, Any]) -> None:
        """Write the state after `epoch` epochs and `step` more steps, then delete checkpoints no longer needed.

        The one written or loaded before is kept. Damaged ones of later positions, which `load` has skipped, are
        kept until the run reaches these positions again.
        """
        self.folder.mkdir(exist_ok=True)
        for partial in self.folder.glob(".*.tmp"):  # left by a kill during an earlier write
            partial.unlink()
        buffer = io.BytesIO()
        torch.save({**state, KEPT: sorted(self.keep_epochs)}, buffer)
        data = buffer.getvalue()
        path = self.folder / f"epoch{epoch:04d}-step{step:07d}.{_digest(data)}.pt"
        write_durably(path, data)
        for old in self.paths():
            old_epoch, old_step, _ = _parse(old)
            kept = old_step == 0 and old_epoch in self.keep_epochs
            earlier = (old_epoch, old_step) < (epoch, step) and not kept
            replaced = (old_epoch, old_step) == (epoch, step)
            if (earlier or replaced) and old not in (path, self._last):
                old.unlink()
        self._last = path

    def load(self, device: torch.device) -> dict[str, Any] | None:
        """Return the newest intact state, or None if there is no checkpoint.

        Raises UserError, and deletes nothing, if all checkpoints are damaged.
        """
        for path, state in self.intact(device):
            self._last = path
            self.keep_epochs |= set(state.get(KEPT, ()))
            return state
        if damaged := self.paths():
            names = "\n".join(f"  {path}" for path in reversed(damaged))
            raise UserError(
                f"no checkpoint of this run can be read, all are damaged:\n{names}\n"
                "nothing was deleted; restore one of them, or remove the run's folder to start it anew"
            )
        return None

    def intact(self, device: torch.device) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Yield the intact checkpoints and their states, newest first; log the damaged ones."""
        for path in reversed(self.paths()):
            try:
                yield path, self.read(path, device)
            except ValueError as error:
                log.warning("the checkpoint %s is damaged, trying the one before: %s", path, error)

    @staticmethod
    def read(path: Path, device: torch.device) -> dict[str, Any]:
        """Return the state in one file. Raises ValueError with the reason if it is damaged."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ValueError(str(error)) from error
        if _digest(data) != _parse(path)[2]:
            raise ValueError("its checksum does not match its content")
        try:  # weights_only: tensors and plain values, never a pickled object that could run code
            return torch.load(io.BytesIO(data), map_location=device, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            if is_out_of_memory(error):
                raise
            raise ValueError(str(error).splitlines()[0]) from error

    def paths(self) -> list[Path]:
        """Return all checkpoints, oldest first."""
        found = [path for path in self.folder.glob("*.pt") if _NAME.fullmatch(path.name)]
        return sorted(found, key=_parse)


def _parse(path: Path) -> tuple[int, int, str]:
    """Return the epoch, the step and the digest in a file's name."""
    match = _NAME.fullmatch(path.name)
    assert match
    return int(match[1]), int(match[2]), match[3]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


class RunState:
    """The state of a run: saved to its checkpoints, and restored from them."""

    def __init__(
        self,
        fabric: Fabric,
        run: PlannedRun,
        images: Fingerprint,
        policy: CheckpointPolicy,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self._fabric, self._run, self._images = fabric, run, images
        self._network, self._optimizer = network, optimizer
        self._checkpoints = Checkpoints(run.folder / CHECKPOINTS, policy.keep_epochs)

    def save(self, position: Position) -> None:
        """Write a checkpoint at a position. All processes call it; rank 0 writes."""
        totals = None
        if position.totals:  # (processes, 5), by rank
            own = torch.cat([position.totals.sums, position.totals.bad_step[None]])
            totals = self._fabric.all_gather(own).reshape(-1, len(own))  # type: ignore[union-attr]
        if not self._fabric.is_global_zero:
            return
        state = {
            "identity": self._run.identity,
            "images": self._images,
            "model": self._network.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "precision": self._fabric.strategy.precision.state_dict(),
            "position": {**vars(position), "totals": totals},
        }
        self._checkpoints.save(position.epoch, position.step, state)

    def save_weights(self, path: Path) -> None:
        """Write the weights alone, as safetensors.

        The metadata name the run's cell, because BN's and L2BN's weights have the same names and shapes.
        """
        # Copies, because the format refuses names that share memory, as those of a layer that stands in two places.
        state = self._network.state_dict()
        weights = {key: value.clone(memory_format=torch.contiguous_format) for key, value in state.items()}
        run = json.dumps(asdict(self._run.cell) | {"hash": self._run.hash})
        write_durably(path, safetensors.torch.save(weights, {"run": run}))  # one key, because their order is random

    def restore(self) -> Position:
        """Load the newest intact checkpoint and return its position, or the start of the run.

        Raises UserError for a checkpoint of another run or of other images.
        """
        folder, lead = self._run.folder, self._fabric.is_global_zero
        state = self._checkpoints.load(self._fabric.device)
        if state is None:
            metrics = folder / METRICS
            if lead and metrics.exists() and metrics.stat().st_size > 0:
                log.warning("%s has epochs, but the run has no checkpoint: it starts at its first epoch", metrics)
            return Position()
        with checkpoint_errors(folder):
            check_identity(state["identity"], self._run.identity, folder)
            check_images(state.get("images"), self._images, folder)
            self._network.load_state_dict(state["model"])
            flags = [(group["fused"], group["foreach"]) for group in self._optimizer.param_groups]
            self._optimizer.load_state_dict(state["optimizer"])
            for group, (fused, foreach) in zip(self._optimizer.param_groups, flags, strict=True):
                group["fused"], group["foreach"] = fused, foreach  # of this device, not of the checkpoint's
            for parameter, kept in self._optimizer.state.items():
                # In the memory format of the parameters, which may have changed since it was saved.
                if kept.get("momentum_buffer") is not None:
                    kept["momentum_buffer"] = torch.empty_like(parameter).copy_(kept["momentum_buffer"])
            self._fabric.strategy.precision.load_state_dict(state["precision"])
            position = Position(**state["position"])
            if position.totals is not None:
                totals = state["position"]["totals"][self._fabric.global_rank]
                position.totals = Totals(totals[:4], totals[4])
        if lead:
            log.info("resumed after epoch %d, step %d", position.epoch, position.step)
        return position
