"""The training loop, on plain objects: one path for every device, precision and norm.

Shapes: N images in a batch, K classes.
"""

import math
import random
import resource
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn

from l2bn.data.loader import Batch, Loader
from l2bn.records import Metrics
from l2bn.seeding import derive_seed, seed_global
from l2bn.training.optim import Recipe

CHECK_EVERY = 100  # steps between two checks that the loss is finite


class DivergedError(Exception):
    """The loss or a weight is not finite; the message names epoch and step, counted from 1."""


def raise_if_diverged(epoch: int, bad_step: float | None) -> None:
    """Raise DivergedError if `bad_step`, counted from 0, is finite; None and infinity: every loss was finite."""
    if bad_step is not None and math.isfinite(bad_step):
        raise DivergedError(f"the loss is not finite in epoch {epoch + 1}, step {bad_step + 1:.0f}")


class DelayedMin:
    """A min all-reduce whose result is read one call later, so the host never waits for the device.

    All processes call it at the same steps and get the same result, so that they can act on it together.
    """

    def __init__(self) -> None:
        self._pending: tuple[Tensor, torch.cuda.Event | None] | None = None

    def __call__(self, number: Tensor) -> float | None:
        """Start to reduce `number` (); return the minimum of the previous call, None at the first call."""
        previous = None
        if self._pending is not None:
            pending, copied = self._pending
            if copied is not None:
                copied.synchronize()
            previous = float(pending)
        minimum = number.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(minimum, dist.ReduceOp.MIN)
        if minimum.is_cuda:
            host = torch.empty_like(minimum, device="cpu", pin_memory=True)
            host.copy_(minimum, non_blocking=True)
            self._pending = host, torch.cuda.current_stream(minimum.device).record_event()
        else:
            self._pending = minimum, None
        return previous


@dataclass
class Totals:
    """Sums over the images seen by this process, kept on the device."""

    sums: Tensor  # (4,) float64: loss, top-1 correct, top-5 correct, images
    bad_step: Tensor  # () float64: the first step whose loss was not finite, else infinity

    @classmethod
    def zeros(cls, device: torch.device) -> "Totals":
        # float64: in float32 a sum over a million images loses digits.
        zeros = torch.zeros(4, dtype=torch.float64, device=device)
        return cls(zeros, torch.full((), math.inf, dtype=torch.float64, device=device))

    @torch.no_grad()
    def add(self, step: int, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add one batch: its mean loss (), logits (N, K) and labels (N,)."""
        n, k = logits.shape
        correct = (logits.topk(min(5, k)).indices == labels[:, None]).sum(0, dtype=torch.float64)  # (5,), by rank
        images = torch.full_like(self.bad_step, n)
        self.sums += torch.stack([loss.double() * n, correct[0], correct.sum(), images])
        bad_step = torch.where(loss.isfinite(), math.inf, float(step))
        self.bad_step = torch.minimum(self.bad_step, bad_step)

    def joined(self, fabric: Fabric) -> "Totals":
        """Return the sums over all processes."""
        if fabric.world_size == 1:
            return self
        sums, bad = self.sums.clone(), self.bad_step.clone()
        dist.all_reduce(sums)
        dist.all_reduce(bad, dist.ReduceOp.MIN)
        return Totals(sums, bad)

    def means(self, classes: int) -> tuple[float, float, float | None]:
        """Return loss, top-1 and top-5 accuracy in percent (None for fewer than 5 classes)."""
        loss, top1, top5, images = self.sums.tolist()
        return loss / images, 100 * top1 / images, 100 * top5 / images if classes >= 5 else None


@dataclass
class Position:
    """The progress of a run: all of its state besides weights and optimizer."""

    epoch: int = 0  # epochs completed
    step: int = 0  # steps completed in the current epoch
    seconds: float = 0.0  # time spent on these steps
    totals: Totals | None = None  # sums over these steps
    rows: list[Metrics] = field(default_factory=list)  # metrics of the completed epochs


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """Trains a network and evaluates it after every epoch.

    model: the network as Fabric trains it, with its precision and all-reduced gradients.
    test: the batches of the evaluation after so many epochs, such as `Loader.epoch`.
    after_step, after_epoch: called with the position just reached, to write a checkpoint, show progress or leave.
        `after_step` returns the seconds spent on measurements, which do not count as training time.
    """

    fabric: Fabric
    model: nn.Module
    network: nn.Module
    optimizer: torch.optim.Optimizer
    recipe: Recipe
    train: Loader
    test: Callable[[int], Iterable[Batch]]
    classes: int
    seed: int
    after_step: Callable[[Position], float]
    after_epoch: Callable[[Position], None]

    def fit(self, position: Position) -> None:
        """Train from a position to the end of the recipe. Raises DivergedError."""
        while position.epoch < self.recipe.epochs:
            totals = self.train_epoch(position)
            train_loss, train_top1, _ = totals.means(self.classes)
            test_loss, test_top1, test_top5 = evaluate(
                self.network, self.test(position.epoch + 1), self.classes, self.fabric
            )
            broken = first_not_finite(self.network)
            if broken is not None:
                raise DivergedError(f"{broken} is not finite after epoch {position.epoch + 1}")
            if not math.isfinite(test_loss):
                raise DivergedError(f"the test loss is not finite after epoch {position.epoch + 1}")
            position.epoch, position.step, position.totals = position.epoch + 1, 0, None
            position.rows.append(
                {
                    "epoch": position.epoch,
                    "step": position.epoch * len(self.train),
                    "lr": self.optimizer.param_groups[0]["lr"],
                    "train/loss": train_loss,
                    "train/top1": train_top1,
                    "test/loss": test_loss,
                    "test/top1": test_top1,
                    "test/top5": test_top5,
                    "seconds": position.seconds,
                    "images_per_second": len(self.train) * self.recipe.batch_size / position.seconds,
                    "peak_memory_bytes": peak_memory(self.fabric.device),
                }
            )
            position.seconds = 0.0
            self.after_epoch(position)

    def train_epoch(self, position: Position) -> Totals:
        """Train the remaining steps of an epoch; return the sums over the whole epoch.

        The host never waits for the device, unless `after_step` does: losses and accuracies are summed on the
        device and read at the end. Raises DivergedError.
        """
        self.model.train()
        epoch, steps = position.epoch, len(self.train)
        totals = position.totals = position.totals or Totals.zeros(self.fabric.device)
        first_bad_step = DelayedMin()
        clock = time.perf_counter()
        for images, labels in self.train.epoch(epoch, position.step):
            step = position.step
            # Dropout draws from the global generators: make them, too, a function of seed, epoch and step.
            seed_global(derive_seed(self.seed, "step", epoch, step, self.fabric.global_rank), self.fabric.device)
            for group in self.optimizer.param_groups:
                group["lr"] = self.recipe.learning_rate(epoch + step / steps)
            self.optimizer.zero_grad()
            loss, logits, labels = self.forward(images, labels, epoch, step)
            self.fabric.backward(loss)
            self.optimizer.step()
            totals.add(step, loss.detach(), logits.detach(), labels)
            now = time.perf_counter()
            position.step, position.seconds, clock = step + 1, position.seconds + now - clock, now
            if position.step % CHECK_EVERY == 0:
                raise_if_diverged(epoch, first_bad_step(totals.bad_step))
            clock += self.after_step(position)
        totals = totals.joined(self.fabric)
        raise_if_diverged(epoch, float(totals.bad_step))
        position.seconds += time.perf_counter() - clock
        return totals

    def forward(self, images: Tensor, labels: Tensor, epoch: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return cross-entropy (), with the recipe's mixup and label smoothing, logits (N, K) and labels (N,).

        Training accuracy counts these labels: under mixup, those of the images with the larger share.
        """
        smoothing, alpha = self.recipe.label_smoothing, self.recipe.mixup
        if alpha == 0:
            logits = self.model(images)
            return F.cross_entropy(logits, labels, label_smoothing=smoothing), logits, labels
        # Mixup (Zhang et al. 2018, arXiv:1710.09412) with one share per batch. The partners are the batch in
        # reverse, which is as random as any other order, because the batch is drawn at random.
        share = random.Random(derive_seed(self.seed, "mixup", epoch, step)).betavariate(alpha, alpha)
        logits = self.model(share * images + (1 - share) * images.flip(0))
        partners = labels.flip(0)
        own = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        partner = F.cross_entropy(logits, partners, label_smoothing=smoothing)
        return share * own + (1 - share) * partner, logits, labels if share >= 0.5 else partners


@torch.inference_mode()
def evaluate(
    network: nn.Module, batches: Iterable[Batch], classes: int, fabric: Fabric
) -> tuple[float, float, float | None]:
    """Return loss, top-1 and top-5 accuracy in percent (None for fewer than 5 classes) over batches of images.

    The network is in evaluation mode before the first batch is asked for, so that what yields them may observe it.
    """
    if fabric.world_size > 1:  # each process has its own running statistics; those of rank 0 count
        for buffer in network.buffers():
            dist.broadcast(buffer, src=0)
    network.eval()
    totals = Totals.zeros(fabric.device)
    for step, (images, labels) in enumerate(batches):
        with fabric.autocast():
            logits = network(images).float()
        totals.add(step, F.cross_entropy(logits, labels), logits, labels)
    return totals.joined(fabric).means(classes)


def first_not_finite(network: nn.Module) -> str | None:
    """Return the first parameter or running statistic with a NaN or infinity, which need not reach the loss.

    Other buffers may hold infinities that belong there, as a mask of attention does.
    """
    tensors: dict[str, Tensor] = dict(network.named_parameters())
    tensors |= {name: buffer for name, buffer in network.named_buffers() if "running_" in name.rpartition(".")[2]}
    finite = torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).tolist()
    return next((name for name, fine in zip(tensors, finite, strict=True) if not fine), None)


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: of tensors on a CUDA device, else of the whole process since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes, Linux and the BSDs KiB
