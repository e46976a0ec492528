"""All that a checkpoint holds of a run: gathered from its processes, and put back."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
import torch
from lightning_fabric import Fabric
from torch import nn

from l2bn.errors import UserError
from l2bn.records import write_durably
from l2bn.training.checkpoint import CheckpointPolicy, Checkpoints
from l2bn.training.identity import Config, check_images, differences
from l2bn.training.loop import Position, Totals

log = logging.getLogger(__name__)


class State:
    """All that a checkpoint holds, gathered and put back."""

    def __init__(
        self,
        fabric: Fabric,
        folder: Path,
        identity: Config,
        images: dict[str, str | None],
        policy: CheckpointPolicy,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self._fabric, self._identity, self._network, self._optimizer = fabric, identity, network, optimizer
        self._images = images
        self._checkpoints = Checkpoints(folder / "checkpoints", policy.keep_epochs)

    def save(self, position: Position) -> None:
        """Write a checkpoint of the position just reached."""
        totals = None
        if position.totals:  # every process's own, in the order of their ranks: (processes, 5)
            own = torch.cat([position.totals.sums, position.totals.bad_step[None]])
            totals = self._fabric.all_gather(own).reshape(-1, len(own))  # type: ignore[union-attr]
        if not self._fabric.is_global_zero:
            return
        state = {
            "identity": self._identity,
            "images": self._images,
            "model": self._network.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "precision": self._fabric.strategy.precision.state_dict(),
            "position": {**vars(position), "totals": totals},
        }
        self._checkpoints.save(position.epoch, position.step, state)

    def save_weights(self, path: Path) -> None:
        """Write the weights alone, in a format that anything can read."""
        weights = {key: value.contiguous() for key, value in self._network.state_dict().items()}
        write_durably(path, safetensors.torch.save(weights))

    def restore(self) -> Position:
        """Put the newest whole checkpoint back and return its position, or the start of the run.

        Raises UserError for a checkpoint of another run or of other images.
        """
        state = self._checkpoints.load(self._fabric.device)
        if state is None:
            return Position()
        with fitting(self._checkpoints.folder):
            changed = differences(state["identity"], self._identity)
            if changed:
                raise UserError(
                    f"{self._checkpoints.folder} is of another run, which differs (there against here) in\n"
                    + "".join(f"  {line}\n" for line in changed)
                    + "give this one another runs_dir, or move the old folder away"
                )
            check_images(state.get("images"), self._images, self._checkpoints.folder.parent)
            self._network.load_state_dict(state["model"])
            self._optimizer.load_state_dict(state["optimizer"])
            self._lay_out_momentum()
            self._fabric.strategy.precision.load_state_dict(state["precision"])
            position = Position(**state["position"])
            if position.totals is not None:
                own = state["position"]["totals"][self._fabric.global_rank]
                position.totals = Totals(own[:4], own[4])
        if self._fabric.is_global_zero:
            log.info("resumed after epoch %d, step %d", position.epoch, position.step)
        return position

    def _lay_out_momentum(self) -> None:
        """In memory as the parameters lie, which may be in another format than when the state was saved."""
        for parameter, kept in self._optimizer.state.items():
            if kept.get("momentum_buffer") is not None:
                kept["momentum_buffer"] = torch.empty_like(parameter).copy_(kept["momentum_buffer"])


@contextmanager
def fitting(folder: Path) -> Iterator[None]:
    """Say so where the state of a checkpoint in a folder is whole, but not one that this version can put back."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"the checkpoint in {folder} does not fit this network and this version of the suite: {reason}\n"
            "env.json names the commit that wrote it; check that out, or move the run's folder away to start anew"
        ) from error
