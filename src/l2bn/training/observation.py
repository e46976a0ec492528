"""Looking into the network of a run: its features every few epochs, and its running statistics at the start.

Nothing here changes what the run computes, so it is no part of its identity.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from l2bn.analysis.probe import Probe, classifier
from l2bn.data.loader import Loader
from l2bn.errors import UserError
from l2bn.records import FeatureRow, Sample, StatisticsRow
from l2bn.training.journal import Journal
from l2bn.training.loop import BeforeBatch, Position, evaluate

MEASURED_EPOCHS = 20


@dataclass(frozen=True, kw_only=True)
class AnalysisPolicy:
    """When a run is looked into.

    every: features are measured after every so many epochs, and after the last (0: never; None: a twentieth).
    sample: whether penultimate features of a few images are kept after the last epoch.
    statistics_until: up to this update, accuracy is measured by running and by batch statistics (0: never),
    statistics_every: every so many updates.
    """

    every: int | None = 0
    sample: bool = True
    statistics_until: int = 0
    statistics_every: int = 10

    def __post_init__(self) -> None:
        for name, least in (("every", 0), ("statistics_until", 0), ("statistics_every", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be {least} or more, not {value}")

    def measures_after(self, epoch: int, epochs: int) -> bool:
        """Whether features are measured after so many of the run's epochs."""
        every = max(1, epochs // MEASURED_EPOCHS) if self.every is None else self.every
        return every > 0 and (epoch == epochs or epoch % every == 0)


def check_observable(policy: AnalysisPolicy, model: nn.Module, classes: int) -> None:
    """Raise UserError where a policy asks for what cannot be seen."""
    if policy.every != 0:
        try:
            classifier(model, classes)
        except ValueError as error:
            raise UserError(f"analysis: {error}; take analysis=off") from error


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network to look into: the names of its norm layers and the number of classes."""

    module: nn.Module
    layers: tuple[str, ...]
    classes: int


@dataclass(kw_only=True)
class Observer:
    """Looks into a run's network as its policy says, and writes what it finds into the run's journal.

    `make_shuffled` gives the test images in an order that mixes the classes: batch statistics depend on the company
    that an image is in. Of several processes only the first has a journal.
    """

    policy: AnalysisPolicy
    fabric: Fabric
    network: Network
    make_shuffled: Callable[[], Loader]
    epochs: int
    steps: int
    journal: Journal | None
    _found: tuple[FeatureRow, Sample] | None = field(default=None, init=False)

    @cached_property
    def _shuffled(self) -> Loader:
        return self.make_shuffled()

    @contextmanager
    def watch(self, epoch: int) -> Iterator[BeforeBatch | None]:
        """Within, the evaluation after so many epochs is looked into, if it is due."""
        if not self.policy.measures_after(epoch, self.epochs):
            yield None
            return
        probe = Probe(self.network.module, self.network.layers, self.network.classes)
        with probe.attached():
            yield probe.expect
        self._found = collect(probe, self.fabric, epoch, epoch * self.steps)

    def after_epoch(self, position: Position) -> None:
        """Write what was found in the evaluation of the epoch; the sample after the last one only."""
        if self._found and self.journal:
            row, sample = self._found
            kept = self.policy.sample and position.epoch == self.epochs
            self.journal.append_features(row, sample if kept else None)
        self._found = None

    def after_step(self, position: Position) -> None:
        """Compare running and batch statistics, if it is due."""
        update = position.epoch * self.steps + position.step
        if update <= self.policy.statistics_until and update % self.policy.statistics_every == 0:
            row = compare_statistics(self.network, self._shuffled, self.fabric, update)
            if self.journal:
                self.journal.append_statistics(row)


@torch.inference_mode()
def collect(probe: Probe, fabric: Fabric, epoch: int, step: int) -> tuple[FeatureRow, Sample]:
    """What a probe has seen in the processes of a run, as a line of the record and a sample."""
    if fabric.world_size > 1:
        probe.join()
    return probe.row(epoch, step), probe.sample()


@torch.inference_mode()
def compare_statistics(network: Network, loader: Loader, fabric: Fabric, update: int) -> StatisticsRow:
    """Loss and accuracy by running and by batch statistics; the network is left as it was, in training mode."""
    row: StatisticsRow = {"step": update}
    layers = [network.module.get_submodule(name) for name in network.layers]
    saved = [(buffer, buffer.clone()) for layer in layers for buffer in layer.buffers()]

    def use_batch_statistics(_: Tensor) -> None:
        for layer in layers:
            layer.train()

    for kind, before_batch in (("running", None), ("batch", use_batch_statistics)):
        loss, top1, _ = evaluate(network.module, loader, network.classes, fabric, before_batch)
        row |= {f"{kind}/loss": loss if math.isfinite(loss) else None, f"{kind}/top1": top1}
    for buffer, content in saved:
        buffer.copy_(content)
    network.module.train()
    return row
