"""Forward hooks that sum up the features of a network during an evaluation."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from l2bn.analysis.features import histogram, measure
from l2bn.analysis.moments import Moments, pooled
from l2bn.records import SIDES, FeatureRow, Sample

logger = logging.getLogger(__name__)

SAMPLED_CLASSES = 20
SAMPLED_IMAGES = 50  # of each of them

_PENULTIMATE = "", SIDES[0]  # the name of the network itself, so that of no layer

_Piece = tuple[int, int, Tensor, Tensor]  # batch, rank, features (n, d), labels (n,)


def classifier(network: nn.Module, classes: int) -> nn.Module:
    """The layer whose input are the penultimate features.

    It is the last linear layer, in module order, with one output per class; else such a convolution; else the last
    linear layer. Raises ValueError where there is none.
    """
    linear = [m for m in network.modules() if isinstance(m, nn.Linear)]
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.out_channels == classes]
    found = [m for m in linear if m.out_features == classes] or convolutions or linear
    if not found:
        raise ValueError(f"{type(network).__name__} has no linear layer, so no penultimate features are known")
    return found[-1]


class Probe:
    """Sums of the features at norm layers and before the classifier.

    A norm layer that is used in several places is measured over all of them. One whose rows are not the images, but
    such as their tokens, is left out.
    """

    def __init__(self, network: nn.Module, layers: Sequence[str], classes: int) -> None:
        """`layers` are the names of the norm layers, `classes` the number of classes. Raises ValueError."""
        self._layers = {name: network.get_submodule(name) for name in layers}
        self._classifier = classifier(network, classes)
        self._classes = classes
        self._labels = torch.empty(0, dtype=torch.int64)  # of the batch under way
        self._sums: dict[tuple[str, str], Moments] = {}  # in the order in which the layers run
        self._pieces: list[_Piece] = []
        self._batches = 0
        self._sampled = [0] * classes

    @contextmanager
    def attached(self) -> Iterator["Probe"]:
        """Measure the network's forward passes in this context; call `expect` before each."""
        handles = [layer.register_forward_hook(self._seer(name)) for name, layer in self._layers.items()]
        handles.append(self._classifier.register_forward_hook(self._see_penultimate))
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def expect(self, labels: Tensor) -> None:
        """Set the classes (N,) of the next batch."""
        self._labels = labels
        self._batches += 1

    def _seer(self, name: str) -> Any:
        def see(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            if len(output) != len(self._labels):
                _warn_of_rows()
                return
            for side, features in zip(SIDES, (given[0], output), strict=True):
                self._add((name, side), features)

        return see

    def _see_penultimate(self, _: nn.Module, given: tuple[Tensor, ...], __: Tensor) -> None:
        # (N, d), or (N, ..., d) where the layer runs at several places of an image.
        features = given[0].movedim(-1, 1) if isinstance(self._classifier, nn.Linear) else given[0]
        self._add(_PENULTIMATE, features)
        if min(self._sampled[:SAMPLED_CLASSES]) < SAMPLED_IMAGES:
            self._take_sample(pooled(features), self._labels)

    def _add(self, place: tuple[str, str], features: Tensor) -> None:
        if place not in self._sums:
            self._sums[place] = Moments.zeros(self._classes, features.shape[1], features.device)
        self._sums[place].add(features, self._labels)

    def _take_sample(self, features: Tensor, labels: Tensor) -> None:
        """Keep as many images of each class as this process may have to give."""
        kept = []
        for index, label in enumerate(labels.tolist()):
            if label < SAMPLED_CLASSES and self._sampled[label] < SAMPLED_IMAGES:
                self._sampled[label] += 1
                kept.append(index)
        if not kept:
            return
        rank = dist.get_rank() if dist.is_initialized() else 0
        self._pieces.append((self._batches, rank, features[kept].float().cpu(), labels[kept].cpu()))

    def join(self) -> None:
        """Sum up over all processes of a run; each must have had an image."""
        for sums in self._sums.values():
            sums.join()
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, self._pieces)
        self._pieces = [piece for pieces in gathered for piece in pieces]

    def row(self, epoch: int, step: int) -> FeatureRow:
        """The measures so far, as a line of `features.jsonl`. Raises ValueError if the classifier has not run."""
        if _PENULTIMATE not in self._sums:
            raise ValueError("the layer that would be the classifier does not run in evaluation")
        last = self._sums[_PENULTIMATE]
        names = [name for name, side in self._sums if side == SIDES[0] and name]
        return {
            "epoch": epoch,
            "step": step,
            "images": int(last.counts.sum()),
            "layers": [self._layer(name) for name in names],
            "penultimate": _rounded(measure(last)),
        }

    def _layer(self, name: str) -> dict[str, Any]:
        sides = {side: self._sums[name, side] for side in SIDES}
        return {
            "name": name,
            "shrink": shrink(self._layers[name]),
            "norms": histogram(sides["input"]),
            **{side: _rounded(measure(sums)) for side, sums in sides.items()},
        }

    def sample(self) -> Sample | None:
        """Penultimate features of the first images of each of the first classes, in the order of the test set.

        None if the test set has no image of these classes.
        """
        if not self._pieces:
            return None
        pieces = sorted(self._pieces, key=lambda piece: piece[:2])
        features, labels = torch.cat([piece[2] for piece in pieces]), torch.cat([piece[3] for piece in pieces])
        places = torch.cat([(labels == k).nonzero()[:SAMPLED_IMAGES] for k in range(SAMPLED_CLASSES)])
        kept = places.flatten().sort().values
        return Sample(features[kept].numpy(), labels[kept].numpy())


@cache
def _warn_of_rows() -> None:
    logger.warning(
        "norm layers that get another number of rows than images, such as one for each token, are not measured; "
        "L2BN gives each row the same norm there, not each image"
    )


def shrink(layer: nn.Module) -> float | None:
    """Mean over the channels of sqrt(v / (v + eps)), v the running variance; None without one. In [0, 1].

    The factor by which eps shrinks the deviation of the normalized output. In L2BN v is the variance of the
    l2-normalized features. Early in a run v still contains BN's initial 1.
    """
    variance = getattr(layer, "running_var", None)
    eps = getattr(layer, "epsilon", getattr(layer, "eps", None))  # L2BN does not have the attribute of batch norm
    if not isinstance(variance, Tensor) or eps is None or not variance.isfinite().all():
        return None
    v = variance.double().clamp_min(0)
    return _significant(float((v / (v + eps)).sqrt().nan_to_num(nan=0.0).mean()))


def _rounded(measures: Any) -> dict[str, float | None]:
    return {name: None if value is None else _significant(value) for name, value in measures.items()}


def _significant(value: float) -> float:
    """Five digits, which is what float32 features carry through a deep network."""
    return float(f"{value:.5g}")
