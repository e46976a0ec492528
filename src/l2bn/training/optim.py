"""Recipe, learning rate schedules and optimizer of a run.

A schedule is a pure function of the position in the run, so that checkpoints need not hold its state.
"""

import logging
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Annotated

import torch
from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass
from torch import nn

from l2bn.errors import UserError
from l2bn.failures import describe
from l2bn.records import CHECKED

log = logging.getLogger(__name__)

LARGEST = 1_000_000  # of a learning rate and a weight decay, far above any that trains
NEARLY_0 = 0.1  # a decay has taken its course below this factor
LARGEST_MIXUP = 1000  # from this alpha on, the share drawn from the beta distribution is 1/2 to two digits

Schedule = Callable[[float, int], float]
"""(completed epochs, with fractions; all epochs) -> factor of the recipe's learning rate."""


def _rising(epochs: list[int]) -> list[int]:
    if sorted(set(epochs)) != epochs or any(epoch < 1 for epoch in epochs):
        raise ValueError("must be epochs in rising order, each at least 1")
    return epochs


RisingEpochs = Annotated[list[int], AfterValidator(_rising)]
Decay = Annotated[float, Field(gt=0, le=1)]  # a factor per epoch or milestone


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class Cosine:
    """Decay from 1 to 0 along half a cosine (Loshchilov and Hutter 2017, arXiv:1608.03983), after a linear warm-up.

    per_epoch: keep the rate constant within an epoch, as schedulers do that are stepped once per epoch.
    """

    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    per_epoch: bool = False

    def __call__(self, epoch: float, epochs: int) -> float:
        if epoch < self.warmup_epochs:
            return epoch / self.warmup_epochs
        position = math.floor(epoch) if self.per_epoch else epoch
        start = min(self.warmup_epochs, position)
        return 0.5 * (1 + math.cos(math.pi * (position - start) / max(epochs - start, 1e-9)))


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class CosineRestarts:
    """Decay from 1 to 0 along half a cosine, anew after each of `restarts` (epochs).

    Loshchilov and Hutter 2017, arXiv:1608.03983. The last decay ends with the run, whatever its length;
    restarts that it does not reach are ignored.
    """

    restarts: RisingEpochs

    def __call__(self, epoch: float, epochs: int) -> float:
        bounds = [0, *(restart for restart in self.restarts if restart < epochs), epochs]
        start, end = next(bound for bound in reversed(list(pairwise(bounds))) if bound[0] <= epoch)
        return Cosine()(epoch - start, end - start)


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class MultiStep:
    """Decay by `gamma` at each milestone (in epochs); constant `start_factor` during the first `warmup_epochs`."""

    milestones: RisingEpochs
    gamma: Decay = 0.1
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    start_factor: Annotated[float, Field(ge=0, le=1)] = 0.1

    def __call__(self, epoch: float, epochs: int) -> float:
        if epoch < self.warmup_epochs:
            return self.start_factor
        return self.gamma ** sum(epoch >= milestone for milestone in self.milestones)


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class Exponential:
    """Decay by `gamma` after each epoch."""

    gamma: Decay

    def __call__(self, epoch: float, epochs: int) -> float:
        return self.gamma ** math.floor(epoch)


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class OneCycle:
    """Linear rise from 1/25 to 1 in the first `peak` of the run, then linear decay to 0.

    After Smith and Topin 2017, arXiv:1708.07120. peak: a fraction of the run, between 0 and 1.
    """

    peak: Annotated[float, Field(gt=0, lt=1)] = 0.25

    def __call__(self, epoch: float, epochs: int) -> float:
        position = epoch / epochs
        if position < self.peak:
            return 1 / 25 + (1 - 1 / 25) * position / self.peak
        return (1 - position) / (1 - self.peak)


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class Recipe:
    """The hyper-parameters of training, as in `configs/recipe/`.

    batch_size: images per step over all devices.
    lr: the learning rate at the schedule's factor of 1, for this batch size.
    mixup: the alpha of Zhang et al. 2018 (arXiv:1710.09412); 0 for none.
    """

    epochs: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)]
    lr: Annotated[float, Field(gt=0, le=LARGEST)]
    momentum: Annotated[float, Field(ge=0, lt=1)]
    nesterov: bool
    weight_decay: Annotated[float, Field(ge=0, le=LARGEST)]
    decay_norm_and_bias: bool
    label_smoothing: Annotated[float, Field(ge=0, lt=1)]
    mixup: Annotated[float, Field(ge=0, le=LARGEST_MIXUP)]
    schedule: Schedule

    def __post_init__(self) -> None:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum greater than 0; set nesterov=false or a momentum")
        self.learning_rate(0.0)

    def learning_rate(self, epoch: float) -> float:
        """Return the learning rate of the step that begins after `epoch` epochs, with fractions.

        Raises UserError where the schedule is of the user's own and gives no factor.
        """
        try:
            factor: object = self.schedule(epoch, self.epochs)
        except Exception as error:
            raise UserError(
                f"recipe.schedule fails after {epoch:g} of {self.epochs} epochs: {describe(error)}"
            ) from error
        try:
            # Numpy's own numbers would make a checkpoint unreadable.
            value = math.nan if isinstance(factor, str) else float(factor)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError, RuntimeError):
            value = math.nan
        if not 0 <= value < math.inf:
            raise UserError(
                f"recipe.schedule gives {factor} after {epoch:g} of {self.epochs} epochs; it must give a factor of "
                "recipe.lr, a number of 0 or more"
            )
        return self.lr * value

    def warn_if_cut_off(self) -> None:
        """Log where the run ends before its learning rate has taken its course."""
        reason = _cut_off(self.schedule, self.epochs)
        if reason:
            log.warning(
                "the run ends after %d epochs, before its learning rate has taken its course (%s): give "
                "a recipe.schedule for a run of this length",
                self.epochs,
                reason,
            )

    def optimizer(self, model: nn.Module) -> torch.optim.SGD:
        """Return SGD over the parameters, with weight decay on all or only on weights of two or more axes.

        CUDA uses PyTorch's fused kernels. Those for CPUs are no faster, and wrong where a gradient or momentum has
        another memory format than its parameter (torch 2.15).
        """
        groups: dict[float, list[nn.Parameter]] = {}
        for p in model.parameters():
            decay = self.weight_decay if self.decay_norm_and_bias or p.ndim > 1 else 0.0
            groups.setdefault(decay, []).append(p)
        on_cuda = all(p.is_cuda for p in model.parameters())
        return torch.optim.SGD(
            [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items()],
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            fused=on_cuda,
            foreach=not on_cuda,
        )


def _cut_off(schedule: Schedule, epochs: int) -> str:
    """The part of the schedule that a run of so many epochs leaves out; empty for none."""
    late = [epoch for epoch in schedule.milestones if epoch >= epochs] if isinstance(schedule, MultiStep) else []
    if late:
        return f"milestones {', '.join(map(str, late))}"
    if isinstance(schedule, MultiStep | Cosine) and schedule.warmup_epochs >= epochs:
        return "it is still warming up"
    if isinstance(schedule, CosineRestarts):
        before, last = [0, 0, *(restart for restart in schedule.restarts if restart < epochs)][-2:]
        if epochs - last < last - before:
            return f"from its restart after epoch {last} on it decays in fewer epochs than before"
    if isinstance(schedule, Exponential | Cosine):
        factor = schedule(epochs - 1e-6, epochs)
        if factor > NEARLY_0 and (factor < 1 or isinstance(schedule, Cosine)):
            return f"in the last epoch it is {factor:.2g} of recipe.lr"
    return ""
