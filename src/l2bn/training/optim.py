"""How a run learns: the recipe's numbers, its schedule and its optimizer.

A schedule is a pure function of the position in the run, so a resumed run needs no state of it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

LARGEST = torch.finfo(torch.float32).max
LARGEST_MIXUP = 1000  # an alpha at which the share of a beta distribution is 1/2 to two digits

Schedule = Callable[[float, int], float]
"""(epochs done, fractions included; epochs in all) -> factor of the recipe's learning rate."""


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """From 1 to 0 along half a cosine (Loshchilov and Hutter 2017, arXiv:1608.03983), after a linear warm-up.

    `per_epoch` holds the rate still within an epoch, as schedulers that are stepped once an epoch do.
    """

    warmup_epochs: float = 0.0
    per_epoch: bool = False

    def __post_init__(self) -> None:
        _require_not_negative(warmup_epochs=self.warmup_epochs)

    def __call__(self, epoch: float, epochs: int) -> float:
        if epoch < self.warmup_epochs:
            return _warmup(epoch, self.warmup_epochs, start_factor=0.0)
        position = math.floor(epoch) if self.per_epoch else epoch
        start = min(self.warmup_epochs, position)
        return 0.5 * (1 + math.cos(math.pi * (position - start) / max(epochs - start, 1e-9)))


@dataclass(frozen=True, kw_only=True)
class MultiStep:
    """Times `gamma` at each of the milestones (in epochs); `start_factor` during the first `warmup_epochs`."""

    milestones: list[int]
    gamma: float = 0.1
    warmup_epochs: float = 0.0
    start_factor: float = 0.1

    def __post_init__(self) -> None:
        _require_not_negative(warmup_epochs=self.warmup_epochs)
        if not 0 <= self.start_factor <= 1:
            raise ValueError(f"start_factor must lie in [0, 1], not {self.start_factor}")
        if sorted(set(self.milestones)) != self.milestones or any(m < 1 for m in self.milestones):
            raise ValueError(f"milestones must be epochs in rising order, each at least 1, not {self.milestones}")
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma must lie in (0, 1], not {self.gamma}")

    def __call__(self, epoch: float, epochs: int) -> float:
        if epoch < self.warmup_epochs:
            return self.start_factor
        return self.gamma ** sum(epoch >= milestone for milestone in self.milestones)


@dataclass(frozen=True, kw_only=True)
class Exponential:
    """Times `gamma` after each epoch."""

    gamma: float

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma must lie in (0, 1], not {self.gamma}")

    def __call__(self, epoch: float, epochs: int) -> float:
        return self.gamma ** math.floor(epoch)


@dataclass(frozen=True, kw_only=True)
class OneCycle:
    """Linearly from 1/25 up to 1 at the share `peak` of the run, then linearly down to 0 (after Smith and
    Topin 2017, arXiv:1708.07120)."""

    peak: float = 0.25

    def __post_init__(self) -> None:
        if not 0 < self.peak < 1:
            raise ValueError(f"peak must lie between 0 and 1, not {self.peak}")

    def __call__(self, epoch: float, epochs: int) -> float:
        position = epoch / epochs
        if position < self.peak:
            return _warmup(position, self.peak, start_factor=1 / 25)
        return (1 - position) / (1 - self.peak)


def _warmup(position: float, length: float, start_factor: float) -> float:
    """Linearly from `start_factor` to 1."""
    return start_factor + (1 - start_factor) * position / length


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The training of one run, as `configs/recipe/` has it.

    `batch_size` counts the images of an update over all devices, and `lr` belongs to it: the highest value
    that the schedule reaches. `mixup` is the alpha of Zhang et al. 2018 (arXiv:1710.09412), 0 for none.
    """

    epochs: int
    batch_size: int
    lr: float
    momentum: float
    nesterov: bool
    weight_decay: float
    decay_norm_and_bias: bool
    label_smoothing: float
    mixup: float
    schedule: Schedule

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 < self.lr <= LARGEST:
            raise ValueError(f"lr must be greater than 0 and a float32, not {self.lr}")
        _require_not_negative(weight_decay=self.weight_decay, mixup=self.mixup)
        if self.weight_decay > LARGEST:
            raise ValueError(f"weight_decay must be a float32, not {self.weight_decay}")
        if self.mixup > LARGEST_MIXUP:
            raise ValueError(f"mixup must be from 0 to {LARGEST_MIXUP}, not {self.mixup}")
        for name in ("momentum", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), not {getattr(self, name)}")
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum greater than 0; set nesterov=false or a momentum")

    def learning_rate(self, epoch: float) -> float:
        """The learning rate of the update that begins after this many epochs (fractions included)."""
        return self.lr * self.schedule(epoch, self.epochs)

    def optimizer(self, model: nn.Module) -> torch.optim.SGD:
        """SGD over the parameters, with weight decay on all of them or on weights of two or more axes only.

        All parameters are updated by a few kernels: fused ones on CUDA. Those that torch has for CPUs are no
        faster, and compute something else where a gradient or momentum lies in memory in another order than its
        parameter (torch 2.15).
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


def _require_not_negative(**values: float) -> None:
    for name, value in values.items():
        if value < 0:
            raise ValueError(f"{name} must not be negative, not {value}")
