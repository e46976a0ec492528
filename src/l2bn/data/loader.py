"""Batches as a pure function of (seed, epoch, step).

The random numbers behind order and augmentation depend on seed, epoch and step only. So a run can resume at any
step without making the batches before it, and the samples of a batch depend neither on the number of worker
processes nor on the number of ranks. Each rank takes its slice of the global batch and of the random numbers.

Data sets in memory are kept on the device as uint8; there, a few operations on whole batches select, augment and
normalise the images. On CUDA this runs on a separate stream, one batch ahead of the training step. On a CPU it
takes 1/450 of the time of ResNet-20 (results/benchmarks/data.md against train.md), too little for its own thread.
"""

import signal
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info
from torch.utils.data._utils import signal_handling

from l2bn.data.splits import Augmentation, Images, Split, Splits, describe_value
from l2bn.errors import DECODED_AS_READ, UserError
from l2bn.processes import end_with_parent, leave_signals_to_parent
from l2bn.seeding import derive_seed, generator, seed_global

Batch = tuple[Tensor, Tensor]


def training_loader(
    split: Split,
    *,
    splits: Splits,
    batch_size: int,
    seed: int,
    device: torch.device | str,
    **placing: Any,
) -> "Loader":
    """Batches in random order, augmented; an epoch leaves out the samples that would not fill its last batch.

    batch_size: over all ranks. placing: where and how batches are made (see `Loader`); nothing of it changes a
    sample. Raises `UserError` as `check_batch_size`.
    """
    check_batch_size(batch_size, len(split), placing.get("world_size", 1))
    return _loader_class(split)(split, splits, batch_size, seed, torch.device(device), **placing)


def evaluation_loader(
    split: Split, *, splits: Splits, batch_size: int, device: torch.device | str, **placing: Any
) -> "Loader":
    """Batches of every sample once, in order, not augmented.

    The last batch may be smaller; a rank whose slice of it is empty skips it.
    """
    return _loader_class(split)(split, splits, batch_size, None, torch.device(device), **placing)


def _loader_class(split: Split) -> "type[_MemoryLoader | _WorkerLoader]":
    return _MemoryLoader if isinstance(split, Images) else _WorkerLoader


def check_batch_size(batch_size: int, images: int, world_size: int = 1) -> None:
    """Raise `UserError` unless the images fill one batch and the batch divides evenly among the ranks."""
    if not 1 <= batch_size <= images:
        raise UserError(
            f"recipe.batch_size={batch_size}, but there are {images} training images: "
            "give a batch size from 1 to that number"
        )
    if batch_size % world_size:
        raise UserError(
            f"recipe.batch_size={batch_size} is shared out over {world_size} devices: give a multiple of that"
        )


class Loader(ABC):
    """Plans batches, and augments and normalises them on the device; subclasses fetch the samples."""

    def __init__(
        self,
        split: Split,
        splits: Splits,
        batch_size: int,  # over all ranks
        seed: int | None,  # None: evaluation
        device: torch.device,
        rank: int = 0,  # of this process among `world_size`
        world_size: int = 1,
        workers: int = 0,  # processes that decode images; a split in memory needs none
        channels_last: bool = False,
    ) -> None:
        self.split, self.splits, self.batch_size, self.seed = split, splits, batch_size, seed
        self.device, self.rank, self.world_size, self.workers = device, rank, world_size, workers
        self.augmentation: Augmentation | None = None if seed is None else splits.augmentation
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        # Repeated for a whole row of pixels: three numbers at a time would not fill a vector register.
        std = torch.tensor(splits.std)
        self.scale = (1 / (255 * std)).repeat(splits.image_size).to(device)  # (W * 3,)
        self.shift = (-torch.tensor(splits.mean) / std).repeat(splits.image_size).to(device)

    @abstractmethod
    def _fetch(self, epoch: int, steps: list[Tensor]) -> Iterator[tuple[Batch, list[int]]]:
        """The samples of the steps as uint8 on the device, one or several steps at a time with the size of each."""

    def __len__(self) -> int:
        """Batches per epoch."""
        if self.seed is not None:
            return len(self.split) // self.batch_size
        full, rest = divmod(len(self.split), self.batch_size)
        return full + (self._slice(rest).stop > self._slice(rest).start)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Batches from step `start` on: (n, 3, H, W) float32, normalised, and (n,) int64, both on the device."""
        batches = self._batches(epoch, start)
        return batches if self._stream is None else _made_ahead(batches, self._stream)

    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        step = start
        for (images, labels), sizes in self._fetch(epoch, self._plan(epoch)[start:]):
            if self.augmentation is not None:
                numbers = torch.cat([self._draw(epoch, step + i) for i in range(len(sizes))])
                shape = images.shape
                images = self.augmentation.apply(images, self._send(numbers))
                if images.dtype != torch.uint8 or images.shape != shape:
                    raise UserError(
                        f"{self.splits.label}: the augmentation must return uint8 images of shape {tuple(shape)}, "
                        f"because they are scaled and normalized later; got {describe_value(images)}"
                    )
            step += len(sizes)
            yield from zip(torch.split(self._normalise(images), sizes), torch.split(labels, sizes), strict=True)

    def _plan(self, epoch: int) -> list[Tensor]:
        """The indices of this rank's samples in each step of the epoch."""
        if self.seed is None:
            order = torch.arange(len(self.split))
        else:
            random = generator(self.seed, "permutation", epoch)
            own = getattr(self.split, "order", None)  # see `Split`
            order = own(random) if callable(own) else torch.randperm(len(self.split), generator=random)
            if order.shape != (len(self.split),):
                raise UserError(
                    f"{self.splits.label}: `order` must give {len(self.split)} indices, not {describe_value(order)}"
                )
        batches = torch.split(order, self.batch_size)[: len(self)]
        return [batch[self._slice(len(batch))] for batch in batches]

    def _draw(self, epoch: int, step: int) -> Tensor:
        """The random numbers of this rank's samples of one step, on the CPU."""
        assert self.augmentation is not None
        assert self.seed is not None
        numbers = self.augmentation.draw(self.batch_size, generator(self.seed, "augmentation", epoch, step))
        return numbers[self._slice(self.batch_size)]

    def _slice(self, count: int) -> slice:
        """This rank's part of a global batch of `count` samples."""
        return slice(count * self.rank // self.world_size, count * (self.rank + 1) // self.world_size)

    def _send(self, numbers: Tensor) -> Tensor:
        """Copy to the device without blocking the host."""
        if self.device.type == "cuda":
            numbers = numbers.pin_memory()
        return numbers.to(self.device, non_blocking=True)

    def _normalise(self, images: Tensor) -> Tensor:
        """(x / 255 - mean) / std."""
        pixels = images.movedim(1, -1).contiguous()  # (N, H, W, 3), which a set in memory already is
        rows = pixels.flatten(2).float().mul_(self.scale).add_(self.shift)
        return rows.view(pixels.shape).movedim(-1, 1).contiguous(memory_format=self.memory_format)

    @cached_property
    def _stream(self) -> torch.cuda.Stream | None:
        """The stream on which batches are made while the previous step computes."""
        return torch.cuda.Stream(self.device) if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]


def _made_ahead(batches: Iterator[Batch], stream: torch.cuda.Stream) -> Iterator[Batch]:
    """Yield the batches, each after the next one was launched on the stream."""

    def begin() -> tuple[Batch, torch.cuda.Event] | None:
        with torch.cuda.stream(stream):
            batch = next(batches, None)
            return None if batch is None else (batch, stream.record_event())

    upcoming = begin()
    while upcoming is not None:
        batch, made = upcoming
        upcoming = begin()
        current = torch.cuda.current_stream(stream.device)
        current.wait_event(made)
        for tensor in batch:
            tensor.record_stream(current)  # its memory is not used anew before `current` is done with it
        yield batch


class _MemoryLoader(Loader):
    """Images that live on the device as uint8."""

    @cached_property
    def _resident(self) -> tuple[Tensor, Tensor]:
        """Pixels (N, H, W, 3) and labels."""
        assert isinstance(self.split, Images)
        pixels = self.split.images.movedim(1, -1).contiguous()
        try:
            return pixels.to(self.device), self.split.labels.to(self.device)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{self.splits.label}: {pixels.nbytes / 1e9:.3g} GB of images do not fit on {self.device}; take a "
                "smaller dataset.image_size or dataset.subset, or, for images in folders, decode them as they are "
                f"read: {DECODED_AS_READ}"
            ) from error

    def _fetch(self, epoch: int, steps: list[Tensor]) -> Iterator[tuple[Batch, list[int]]]:
        pixels, labels = self._resident
        together = self._steps_at_a_time(pixels[0].numel())
        for first in range(0, len(steps), together):
            group = steps[first : first + together]
            indices = self._send(torch.cat(group))
            images = pixels.index_select(0, indices).movedim(-1, 1)
            yield (images, labels.index_select(0, indices)), [len(step) for step in group]

    def _steps_at_a_time(self, values: int) -> int:
        """Steps whose batches are made at once; values: of one image.

        Several on CUDA, so that the host launches fewer kernels; one on a CPU, where a batch stays in the cache.
        """
        if self.device.type != "cuda":
            return 1
        batch_bytes = 4 * values * self.batch_size // self.world_size  # float32
        return max(1, min(MOST_STEPS_AT_A_TIME, MOST_BYTES_AT_A_TIME // batch_bytes))


MOST_STEPS_AT_A_TIME, MOST_BYTES_AT_A_TIME = 16, 64 * 2**20


class _WorkerLoader(Loader):
    """Images decoded by worker processes, copied to the device while it computes."""

    _loader: DataLoader[Tensor | UserError] | None = None

    def _fetch(self, epoch: int, steps: list[Tensor]) -> Iterator[tuple[Batch, list[int]]]:
        if self._loader is None:
            # The workers live on between epochs; each epoch finds its own batches in the list.
            self._keys: list[_Key] = []
            self._loader = DataLoader(
                _Reader(self.split, self.splits.label, self.splits.image_size, self.seed),
                batch_size=None,  # a key is already a whole batch
                sampler=self._keys,
                num_workers=self.workers,
                worker_init_fn=_set_up_worker,
                persistent_workers=self.workers > 0,
                pin_memory=self.device.type == "cuda",
                generator=torch.Generator(),  # without one it would draw from the global generator
            )
        self._keys[:] = [(epoch, indices.tolist()) for indices in steps]
        error = None
        try:
            for images, indices in zip(self._workers(), steps, strict=True):
                if isinstance(images, UserError):
                    error = images
                    break
                labels = self._send(self.split.labels[indices])
                yield (images.to(self.device, non_blocking=True), labels), [len(labels)]
        except RuntimeError as failure:
            if "DataLoader worker" not in str(failure):
                raise
            reason = str(failure).strip().rstrip(".")
            error = UserError(
                f"a process that decodes images was ended: {reason}; if memory ran short, take fewer "
                "compute.workers"
            )
        if error is not None:
            self._loader = None  # ends the workers here; left to the traceback, they would be collected late
            raise error

    def _workers(self) -> Iterator[Tensor | UserError]:
        """Start decoding, without torch's handler of SIGCHLD.

        It would raise the error of a killed worker in the middle of any other code; without it, the error is raised
        where the next batch is requested. Another DataLoader of this process may have set it before.
        """
        assert self._loader is not None
        before = signal.getsignal(signal.SIGCHLD)
        batches = iter(self._loader)
        torchs = getattr(before, "__module__", None) == signal_handling.__name__
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if torchs else before)
        return batches


_Key = tuple[int, list[int]]  # epoch, indices


class _Reader(Dataset[Tensor | UserError]):
    """Runs in the workers: makes the images of a key, (n, 3, H, W) uint8, with a random seed for each sample.

    A UserError is returned: raised here, it would arrive wrapped in the worker's traceback.
    """

    def __init__(self, split: Split, name: str, image_size: int, seed: int | None) -> None:
        self.split, self.name, self.shape, self.seed = split, name, (3, image_size, image_size), seed

    def __getitem__(self, key: _Key) -> Tensor | UserError:
        epoch, indices = key
        images = []
        with torch.random.fork_rng(devices=[]):
            for index, label in zip(indices, self.split.labels[indices].tolist(), strict=True):
                if self.seed is not None:
                    # By index, not by place in the batch, so that batch size and ranks do not matter.
                    seed_global(derive_seed(self.seed, "sample", epoch, index), torch.device("cpu"))
                try:
                    images.append(self._checked(*self.split[index], label))
                except UserError as error:
                    return error
        try:
            return default_collate(images)
        except RuntimeError as error:
            if get_worker_info() is None:
                raise
            # A worker makes the batch in shared memory. Moved there later, by a thread of the queue, a batch
            # without room would be lost, and the run would wait for it forever.
            return UserError(
                f"a process that decodes images has no room for a batch in shared memory ({error}): make it larger "
                "(docker run --shm-size=8g), or take fewer compute.workers, 0 for none"
            )

    def _checked(self, image: Tensor, label: int, expected: int) -> Tensor:
        """Return an image. Raises `UserError` unless it is as `Split` has it: floats would be scaled once more."""
        if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.shape != self.shape:
            raise UserError(
                f"{self.name}: an image must be a uint8 tensor of shape {self.shape}, because it is scaled and "
                f"normalized later; got {describe_value(image)}"
            )
        if label != expected:
            raise UserError(f"{self.name}: an image came with the label {label}, but `labels` has {expected}")
        return image


def _set_up_worker(_: int) -> None:
    """Set up a worker: it ends with its parent and leaves the signals that end a job to it.

    The parent still needs the batches in progress for the step that it finishes then.
    """
    end_with_parent()
    leave_signals_to_parent()
