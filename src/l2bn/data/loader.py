"""Batches as a pure function of (seed, epoch, step).

The order of the samples and their augmentation are drawn anew for each epoch and step, so that a run can start at
any step without making the batches before it, and neither the number of worker processes nor the number of ranks
changes which samples form a batch. A rank takes its slice of the global batch and of its random numbers.
"""

import signal
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from l2bn.data.splits import Augmentation, Images, Split, Splits
from l2bn.errors import UserError
from l2bn.processes import end_with_parent, leave_signals_to_parent
from l2bn.seeding import derive_seed, generator

Batch = tuple[Tensor, Tensor]


class Loader(Protocol):
    """An epoch at a time of normalised batches on the device."""

    batch_size: int  # over all ranks

    def __len__(self) -> int:
        """Batches an epoch."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Batches from step `start` on: (n, 3, H, W) float32, normalised, and (n,) int64, both on the device."""


@runtime_checkable
class ShardedSplit(Protocol):
    """A split kept in files of many samples, which each rank reads a share of: it plans its own epochs."""

    def plan(
        self, generator: torch.Generator, batch_size: int, steps: int, rank: int, world_size: int
    ) -> list[Tensor]:
        """The samples of this rank at each step: `steps` tensors of `batch_size` indices."""


def training_loader(
    split: Split,
    *,
    splits: Splits,
    batch_size: int,
    seed: int,
    device: torch.device | str,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    channels_last: bool = False,
) -> Loader:
    """Random order, augmented; samples that do not fill a last batch are left out of that epoch.

    batch_size: over all ranks. workers: processes that decode images; a split in memory needs none.
    Raises `UserError`, see `check_batch_size`.
    """
    check_batch_size(batch_size, len(split), world_size)
    kind = _MemoryLoader if isinstance(split, Images) else _WorkerLoader
    return kind(split, splits, batch_size, seed, torch.device(device), rank, world_size, workers, channels_last)


def check_batch_size(batch_size: int, images: int, world_size: int = 1) -> None:
    """Raise `UserError` unless the images fill one batch and the batch can be shared out evenly."""
    if not 1 <= batch_size <= images:
        raise UserError(
            f"recipe.batch_size={batch_size}, but there are {images} training images: "
            "give a batch size from 1 to that number"
        )
    if batch_size % world_size:
        raise UserError(
            f"recipe.batch_size={batch_size} is shared out over {world_size} devices: give a multiple of that"
        )


def evaluation_loader(
    split: Split,
    *,
    splits: Splits,
    batch_size: int,
    device: torch.device | str,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    channels_last: bool = False,
) -> Loader:
    """Every sample once, in order, not augmented.

    The last batch may be smaller; a rank whose slice of it is empty makes no batch of it.
    """
    kind = _MemoryLoader if isinstance(split, Images) else _WorkerLoader
    return kind(split, splits, batch_size, None, torch.device(device), rank, world_size, workers, channels_last)


class _Loader(ABC):
    """Which samples make a batch, and what happens to them on the device; subclasses fetch them."""

    def __init__(
        self,
        split: Split,
        splits: Splits,
        batch_size: int,
        seed: int | None,  # None: evaluation
        device: torch.device,
        rank: int,
        world_size: int,
        workers: int,
        channels_last: bool,
    ) -> None:
        self.split = split
        self.batch_size = batch_size
        self.seed = seed
        self.device = device
        self.rank = rank
        self.world_size = world_size
        self.workers = workers
        self.augmentation: Augmentation | None = None if seed is None else splits.augmentation
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        std = torch.tensor(splits.std)
        self.scale = (1 / (255 * std)).view(3, 1, 1).to(device)
        self.shift = (-torch.tensor(splits.mean) / std).view(3, 1, 1).to(device)

    @abstractmethod
    def _fetch(self, epoch: int, steps: list[Tensor]) -> Iterator[Batch]:
        """The samples at the indices of each step as uint8 on the device."""

    def __len__(self) -> int:
        if self.seed is not None:
            return len(self.split) // self.batch_size
        full, rest = divmod(len(self.split), self.batch_size)
        return full + (self._slice(rest).stop > self._slice(rest).start)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        steps = self._plan(epoch)[start:]
        for step, (images, labels) in enumerate(self._fetch(epoch, steps), start):
            if self.augmentation is not None and self.seed is not None:
                numbers = self.augmentation.draw(self.batch_size, generator(self.seed, "augmentation", epoch, step))
                numbers = numbers[self._slice(self.batch_size)].to(self.device, non_blocking=True)
                images = self.augmentation.apply(images, numbers)
            yield self._normalise(images), labels

    def _plan(self, epoch: int) -> list[Tensor]:
        """The indices of this rank's samples at each step of the epoch."""
        if self.seed is None:
            order = torch.arange(len(self.split))
        elif isinstance(self.split, ShardedSplit):
            share = self.batch_size // self.world_size
            random = generator(self.seed, "permutation", epoch)
            return self.split.plan(random, share, len(self), self.rank, self.world_size)
        else:
            order = torch.randperm(len(self.split), generator=generator(self.seed, "permutation", epoch))
        return [batch[self._slice(len(batch))] for batch in torch.split(order, self.batch_size)][: len(self)]

    def _slice(self, count: int) -> slice:
        """This rank's part of a global batch of `count` samples."""
        return slice(count * self.rank // self.world_size, count * (self.rank + 1) // self.world_size)

    def _normalise(self, images: Tensor) -> Tensor:
        images = images.float().mul_(self.scale).add_(self.shift)  # (x / 255 - mean) / std
        return images.contiguous(memory_format=self.memory_format)


class _MemoryLoader(_Loader):
    """Images that live on the device as uint8."""

    @cached_property
    def _resident(self) -> Images:
        assert isinstance(self.split, Images)
        return Images(self.split.images.to(self.device), self.split.labels.to(self.device))

    def _fetch(self, epoch: int, steps: list[Tensor]) -> Iterator[Batch]:
        images, labels = self._resident.images, self._resident.labels
        for indices in steps:
            indices = indices.to(self.device, non_blocking=True)
            yield images.index_select(0, indices), labels.index_select(0, indices)


class _WorkerLoader(_Loader):
    """Images decoded by worker processes, copied to the device while it computes."""

    _loader: DataLoader[Batch | UserError] | None = None

    def _fetch(self, epoch: int, steps: list[Tensor]) -> Iterator[Batch]:
        if self._loader is None:
            # The workers live on between epochs; each epoch finds its own batches in the list.
            self._keys: list[_Key] = []
            self._loader = DataLoader(
                _Reader(self.split, self.seed),
                batch_size=None,  # a key is already a whole batch
                sampler=self._keys,
                collate_fn=_as_is,
                num_workers=self.workers,
                worker_init_fn=_serve,
                persistent_workers=self.workers > 0,
                pin_memory=self.device.type == "cuda",
                generator=torch.Generator(),  # without one it would draw from the global generator
            )
        self._keys[:] = [(epoch, indices.tolist()) for indices in steps]
        # A stream of its own lets the copy run beside the kernels of the step before.
        cuda = self.device.type == "cuda"
        stream = torch.cuda.Stream(self.device) if cuda else None  # type: ignore[no-untyped-call]
        error = None
        try:
            for batch in self._loader:
                if isinstance(batch, UserError):
                    error = batch
                    break
                with torch.cuda.stream(stream):
                    images, labels = (tensor.to(self.device, non_blocking=True) for tensor in batch)
                if stream is not None:
                    current = torch.cuda.current_stream(self.device)
                    current.wait_stream(stream)
                    images.record_stream(current)
                    labels.record_stream(current)
                yield images, labels
        except RuntimeError as failure:
            if "DataLoader worker" not in str(failure):
                raise
            error = UserError(worker_ended(failure))
        if error is not None:
            self._end_workers()  # here; left to the traceback, they would be collected late
            raise error

    def _end_workers(self) -> None:
        """Without an exception for each that was killed, in the middle of whatever runs when its end is noticed."""
        noticing = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._loader = None
        signal.signal(signal.SIGCHLD, noticing)


_Key = tuple[int, list[int]]  # epoch, indices


class _Reader(Dataset[Batch | UserError]):
    """Runs in the workers: a batch a key, each sample with random numbers of its own."""

    def __init__(self, split: Split, seed: int | None) -> None:
        self.split = split
        self.seed = seed

    def __getitem__(self, key: _Key) -> Batch | UserError:
        epoch, indices = key
        samples = []
        with torch.random.fork_rng(devices=[]):
            for index in indices:
                if self.seed is not None:
                    # The index, not the place in the batch: the same whatever the batch size and the ranks.
                    torch.default_generator.manual_seed(derive_seed(self.seed, "sample", epoch, index))
                try:
                    samples.append(self.split[index])
                except UserError as error:
                    return error  # raised there, it would arrive wrapped in the worker's traceback
        images, labels = zip(*samples, strict=True)
        return torch.stack(images), torch.tensor(labels)


def worker_ended(failure: RuntimeError) -> str:
    """In a user's words, what torch says of a worker that was killed."""
    reason = str(failure).strip().rstrip(".")
    return f"a process that decodes images was ended: {reason}; if memory ran short, take fewer compute.workers"


def _serve(_: int) -> None:
    """A worker outlives neither its process nor the signals by which all of a job's processes are told to leave:
    the batches under way are still needed for the step that is finished then."""
    end_with_parent()
    leave_signals_to_parent()


def _as_is(batch: Any) -> Any:
    return batch
