"""The training loop, on plain objects: one path for every device, precision and norm.

Shapes: N images of a batch, K classes.
"""

import math
import random
import resource
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn

from l2bn.data.loader import Loader
from l2bn.records import Metrics
from l2bn.seeding import derive_seed, seed_global
from l2bn.training.agreement import Agreement
from l2bn.training.optim import Recipe

CHECK_EVERY = 100  # updates between two looks at whether the loss is still finite


class DivergedError(Exception):
    """The loss or a weight is no longer a finite number; the message names epoch and step, counted from 1."""

    @classmethod
    def at(cls, epoch: int, step: float) -> "DivergedError":
        """Both counted from 0."""
        return cls(f"the loss is not finite in epoch {epoch + 1}, step {step + 1:.0f}")


@dataclass
class Totals:
    """Sums over the images that this process has seen, kept on the device."""

    sums: Tensor  # (4,) float64: loss, right within the first, right within the first five, images
    bad_step: Tensor  # () float64: the first step whose loss was not finite, else infinity

    @classmethod
    def zeros(cls, device: torch.device) -> "Totals":
        # In float64, because a sum over a million images loses digits in float32.
        zeros = torch.zeros(4, dtype=torch.float64, device=device)
        return cls(zeros, torch.full((), math.inf, dtype=torch.float64, device=device))

    @torch.no_grad()
    def add(self, step: int, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add one batch: its mean loss (), logits (N, K) and labels (N,)."""
        n, k = logits.shape
        right = (logits.topk(min(5, k)).indices == labels[:, None]).sum(0, dtype=torch.float64)  # by rank
        images = torch.full_like(self.bad_step, n)
        self.sums += torch.stack([loss.double() * n, right[0], right.sum(), images])
        here = torch.where(loss.isfinite(), math.inf, float(step))
        self.bad_step = torch.minimum(self.bad_step, here)

    def joined(self, fabric: Fabric) -> "Totals":
        """The sums over all processes."""
        if fabric.world_size == 1:
            return self
        sums, bad = self.sums.clone(), self.bad_step.clone()
        torch.distributed.all_reduce(sums)
        torch.distributed.all_reduce(bad, torch.distributed.ReduceOp.MIN)
        return Totals(sums, bad)

    def raise_if_diverged(self, epoch: int) -> None:
        step = float(self.bad_step)
        if math.isfinite(step):
            raise DivergedError.at(epoch, step)

    def means(self, classes: int) -> tuple[float, float, float | None]:
        """Loss, top-1 and top-5 accuracy in percent (None under 5 classes)."""
        loss, top1, top5, images = self.sums.tolist()
        return loss / images, 100 * top1 / images, 100 * top5 / images if classes >= 5 else None


@dataclass
class Position:
    """Where a run stands: all that changes, besides weights and optimizer."""

    epoch: int = 0  # epochs done
    step: int = 0  # updates done in the epoch under way
    seconds: float = 0.0  # spent on them
    totals: Totals | None = None  # sums over them
    rows: list[Metrics] = field(default_factory=list)  # metrics of the epochs done


BeforeBatch = Callable[[Tensor], None]
"""Called with the labels (N,) of the images that the network is given next."""


def unwatched(epoch: int) -> AbstractContextManager[BeforeBatch | None]:
    """An evaluation that nobody looks into."""
    return nullcontext()


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """What a run is made of.

    `model` is `network` as it is trained: on its device, with its precision, its gradients shared by all
    processes. `after_step` and `after_epoch` are called with the position just reached: where a checkpoint can
    be written, progress be shown, or the run be left. Within `watch`, which is given the epochs done, the network
    is evaluated: where its features can be looked into.
    """

    fabric: Fabric
    model: nn.Module
    network: nn.Module
    optimizer: torch.optim.Optimizer
    recipe: Recipe
    train: Loader
    test: Loader
    classes: int
    seed: int
    after_step: Callable[[Position], None]
    after_epoch: Callable[[Position], None]
    watch: Callable[[int], AbstractContextManager[BeforeBatch | None]] = unwatched

    def fit(self, position: Position) -> None:
        """Train from a position to the end of the recipe. Raises DivergedError."""
        while position.epoch < self.recipe.epochs:
            totals = self.train_epoch(position)
            train_loss, train_top1, _ = totals.means(self.classes)
            with self.watch(position.epoch + 1) as before_batch:
                test_loss, test_top1, test_top5 = evaluate(
                    self.network, self.test, self.classes, self.fabric, before_batch
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
        """Make the updates of an epoch that are still to be made; the sums over the whole of it.

        The host never waits for the device in between, unless `after_step` makes it: losses and accuracies are
        summed there and read at the end. Raises DivergedError.
        """
        self.model.train()
        epoch, steps = position.epoch, len(self.train)
        totals = position.totals = position.totals or Totals.zeros(self.fabric.device)
        finite = Agreement()
        clock = time.perf_counter()
        for images, labels in self.train.epoch(epoch, position.step):
            step = position.step
            # Dropout and the like draw from the global generators: these, too, become a function of the place.
            seed_global(derive_seed(self.seed, "step", epoch, step, self.fabric.global_rank), self.fabric.device)
            for group in self.optimizer.param_groups:
                group["lr"] = self.recipe.learning_rate(epoch + step / steps)
            self.optimizer.zero_grad()
            loss, logits = self.forward(images, labels, epoch, step)
            self.fabric.backward(loss)
            self.optimizer.step()
            totals.add(step, loss.detach(), logits.detach(), labels)
            now = time.perf_counter()
            position.step, position.seconds, clock = step + 1, position.seconds + now - clock, now
            if position.step % CHECK_EVERY == 0:
                bad_step = finite.ask(totals.bad_step)
                if bad_step is not None and math.isfinite(bad_step):
                    raise DivergedError.at(epoch, bad_step)
            self.after_step(position)
        totals = totals.joined(self.fabric)
        totals.raise_if_diverged(epoch)
        position.seconds += time.perf_counter() - clock
        return totals

    def forward(self, images: Tensor, labels: Tensor, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """Cross-entropy () and logits (N, K), with the recipe's mixup and label smoothing."""
        smoothing, alpha = self.recipe.label_smoothing, self.recipe.mixup
        if alpha == 0:
            logits = self.model(images)
            return F.cross_entropy(logits, labels, label_smoothing=smoothing), logits
        # Mixup (Zhang et al. 2018, arXiv:1710.09412) with one share for the batch. The partners are the batch
        # in reverse: as random as any other order, since the batch itself is drawn at random.
        share = random.Random(derive_seed(self.seed, "mixup", epoch, step)).betavariate(alpha, alpha)
        logits = self.model(share * images + (1 - share) * images.flip(0))
        own = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        partner = F.cross_entropy(logits, labels.flip(0), label_smoothing=smoothing)
        return share * own + (1 - share) * partner, logits


@torch.inference_mode()
def evaluate(
    network: nn.Module, loader: Loader, classes: int, fabric: Fabric, before_batch: BeforeBatch | None = None
) -> tuple[float, float, float | None]:
    """Loss, top-1 and top-5 accuracy in percent (None under 5 classes) over all images of a loader."""
    if fabric.world_size > 1:  # each process has updated its own running statistics; the first one's count
        for buffer in network.buffers():
            torch.distributed.broadcast(buffer, src=0)
    network.eval()
    totals = Totals.zeros(fabric.device)
    for step, (images, labels) in enumerate(loader.epoch(0)):
        if before_batch is not None:
            before_batch(labels)
        with fabric.autocast():
            logits = network(images).float()
        totals.add(step, F.cross_entropy(logits, labels), logits, labels)
    return totals.joined(fabric).means(classes)


def first_not_finite(network: nn.Module) -> str | None:
    """The first parameter or buffer that holds a NaN or an infinity, which need not reach the loss."""
    tensors = {name: tensor for name, tensor in network.state_dict().items() if tensor.is_floating_point()}
    finite = torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).tolist()
    return next((name for name, fine in zip(tensors, finite, strict=True) if not fine), None)


def peak_memory(device: torch.device) -> int:
    """Return the peak memory so far in bytes: of tensors on a CUDA device, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes, Linux and the BSDs KiB
