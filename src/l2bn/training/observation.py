"""Measurements during a run: features every few epochs, and running against batch statistics at the start.

They do not change what the run computes, and are no part of its identity. `l2bn.analysis` is imported where
features are measured: most runs measure none.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import torch
from lightning_fabric import Fabric
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn

from l2bn.data.loader import Batch, Loader
from l2bn.errors import UserError
from l2bn.records import CHECKED, FeatureRow, Sample, StatisticsRow
from l2bn.training.loop import evaluate

if TYPE_CHECKING:
    from l2bn.analysis.probe import Probe

MEASURED_EPOCHS = 20
WIDEST = 8192  # penultimate features


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class AnalysisPolicy:
    """The schedule of the measurements of a run.

    every: epochs between two measurements of features; the last epoch is always measured. 0: never. None: a
    twentieth of the epochs.
    sample: whether the penultimate features of a few images are kept after the last epoch.
    statistics_until: last step at which accuracy is measured with running and with batch statistics; 0: never.
    statistics_every: steps between two such measurements.
    """

    every: Annotated[int, Field(ge=0)] | None = 0
    sample: bool = True
    statistics_until: Annotated[int, Field(ge=0)] = 0
    statistics_every: Annotated[int, Field(ge=1)] = 10

    def measures_after(self, epoch: int, epochs: int) -> bool:
        """Return whether features are measured after an epoch of a run of `epochs` epochs."""
        every = max(1, epochs // MEASURED_EPOCHS) if self.every is None else self.every
        return every > 0 and (epoch == epochs or epoch % every == 0)


def check_observable(
    policy: AnalysisPolicy, model: nn.Module, classes: int, batches: Mapping[nn.Module, set[int]]
) -> None:
    """Raise UserError if features are to be measured and are too many, or have no classifier to find them by.

    batches: the layers that run in an evaluation, with the batch sizes that each puts out for one image.
    """
    if policy.every == 0:
        return
    from l2bn.analysis.probe import classifier

    try:
        found = classifier(model, classes)
    except ValueError as error:
        raise UserError(f"analysis: {error}; leave its features unmeasured (analysis.every=0)") from error
    width: int = found.in_features if isinstance(found, nn.Linear) else getattr(found, "in_channels", 0)
    if width > WIDEST:
        raise UserError(
            f"analysis: the classifier has {width:,} inputs, whose covariance would take gigabytes and minutes; at "
            f"most {WIDEST:,} are measured: pool the features before it, or leave its "
            "features unmeasured (analysis.every=0)"
        )
    fault = "does not run in evaluation" if found not in batches else "gets several rows for an image"
    if batches.get(found) != {1}:
        name = next(name for name, layer in model.named_modules() if layer is found)
        raise UserError(
            f"analysis: {name} would be the classifier, whose input is measured, but {fault}; make it the last "
            "linear layer that runs once for an image, or leave its features unmeasured (analysis.every=0)"
        )


def watched(probe: "Probe", batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield the batches of an evaluation, whose forward passes the probe measures."""
    with probe.attached():
        for images, labels in batches:
            probe.expect(labels)
            yield images, labels


@torch.inference_mode()
def collect(probe: "Probe", fabric: Fabric, epoch: int, step: int) -> tuple[FeatureRow, Sample | None]:
    """Return the measurements of a probe, joined over all processes, as a row and a sample."""
    if fabric.world_size > 1:
        probe.join()
    return probe.row(epoch, step), probe.sample()


@torch.inference_mode()
def compare_statistics(
    network: nn.Module, names: Sequence[str], classes: int, loader: Loader, fabric: Fabric, update: int
) -> StatisticsRow:
    """Return loss and accuracy with running and with batch statistics of the norm layers of these names.

    The network stays as it was.
    """
    row: StatisticsRow = {"step": update}
    layers = [network.get_submodule(name) for name in names]
    saved = [(buffer, buffer.clone()) for layer in layers for buffer in layer.buffers()]

    def by_batch_statistics() -> Iterator[Batch]:
        for layer in layers:
            layer.train()
        yield from loader.epoch(0)

    for kind, batches in (("running", loader.epoch(0)), ("batch", by_batch_statistics())):
        loss, top1, _ = evaluate(network, batches, classes, fabric)
        row |= {f"{kind}/loss": loss if math.isfinite(loss) else None, f"{kind}/top1": top1}
    for buffer, content in saved:
        buffer.copy_(content)
    network.train()
    return row
