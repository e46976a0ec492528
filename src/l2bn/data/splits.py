"""`Splits`, which every data set returns, and the choices that all offer: subset, validation, normalisation.

Letters: N images, H = W = `image_size` pixels. Pixels are uint8 until the loader normalises them on the device.
"""

import hashlib
import logging
import math
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import NoneType
from typing import Any, Protocol, Self, TypedDict, Unpack

import torch
from torch import Tensor

from l2bn.errors import UserError
from l2bn.records import Fingerprint
from l2bn.seeding import generator

log = logging.getLogger(__name__)

# Classes, training and test images of published data sets, by their labels and by the keys of their baselines.
PUBLISHED = {
    **dict.fromkeys(("CIFAR-10", "CIFAR-10 (JPEG)", "cifar10"), (10, 50_000, 10_000)),
    **dict.fromkeys(("CIFAR-100", "cifar100"), (100, 50_000, 10_000)),
    "Fashion-MNIST": (10, 60_000, 10_000),
    **dict.fromkeys(("ImageNet", "imagenet"), (1_000, 1_281_167, 50_000)),
    "Imagenette (128 pixels)": (10, 9_469, 3_925),
    "TAU 2020": (10, 13_962, 2_968),
}

# `_classes_digest` of the official files, by baseline, where folders of converted images are common.
CONTENTS = {"cifar100": "a68833fedbf5a4532486bcfce4491844"}

# A subset and a validation split are part of the data set, not of a run: every seed trains on the same images.
SPLIT_SEED = 0
LARGEST_IMAGE = 4096  # pixels; far above what any network here takes


Transform = Callable[[Tensor], Tensor]
"""Of an image decoded on access: (3, any, any) uint8 -> (3, image_size, image_size) uint8."""

Counts = tuple[int, int, int]
"""Classes, training images and test images of a data set."""


class Split(Protocol):
    """One part of a data set: `Images` in memory, or a map-style dataset that decodes images on access.

    Such a dataset's `__getitem__(index)` returns ((3, H, W) uint8, class) and draws its randomness, if any, from
    torch's global CPU generator, which the loader seeds for each sample. It may have a method `order(generator)`
    that returns all indices in a random order, another in each epoch, in which its samples are fast to read.
    """

    @property
    def labels(self) -> Tensor:
        """(N,) int64."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Tensor, int]: ...

    def select(self, indices: Tensor, like: Any = None) -> Self:
        """The samples at `indices`; like: another split to read them like, for example without random crops."""


@dataclass(frozen=True)
class Images:
    """A split that lives in memory."""

    images: Tensor  # (N, 3, H, W) uint8
    labels: Tensor  # (N,) int64

    def __post_init__(self) -> None:
        shape = tuple(self.images.shape)
        if self.images.dtype != torch.uint8 or len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3]:
            raise ValueError(f"images must be uint8 of shape (N, 3, H, H), got {describe_value(self.images)}")
        if self.labels.dtype != torch.int64 or self.labels.shape != shape[:1]:
            raise ValueError(
                f"labels must be int64, one for each of the {shape[0]} images, got {describe_value(self.labels)}"
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int, /) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])

    def select(self, indices: Tensor, like: Any = None) -> "Images":
        return Images(self.images[indices], self.labels[indices])


class Augmentation(ABC):
    """A random change of training images in two steps: draw numbers for each sample, apply a pure function of them.

    Drawing is separate so that every device gets the same numbers, and so that each of several processes can draw
    for the whole batch and apply its own rows.
    """

    @abstractmethod
    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Random numbers on the CPU, one row per sample: (count, as many as `apply` needs)."""

    @abstractmethod
    def apply(self, images: Tensor, numbers: Tensor) -> Tensor:
        """Change images (N, 3, H, W), uint8 in any memory format, by their N rows of numbers on the same device."""

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        return self.apply(images, self.draw(len(images), generator).to(images.device))


DIGESTED = 1024  # rows of a tensor that are made contiguous at a time


def digest(parts: Iterable[str | bytes | Tensor]) -> str:
    """32 hexadecimal digits over texts, bytes and tensors of rows (type, shape and values), in their order."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            total.update(f"{part.dtype} {tuple(part.shape)} ".encode())
            content = hashlib.sha256()
            for start in range(0, max(1, len(part)), DIGESTED):  # a copy of all may not fit in memory
                content.update(part[start : start + DIGESTED].contiguous().numpy().data)
        else:
            content = hashlib.sha256(part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part)
        total.update(content.digest())  # of fixed length, so that no part runs into the next
    return total.hexdigest()[:32]


def describe_value(value: object) -> str:
    """Return, for a message, the type and shape of a tensor, or the type of another value."""
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _check_labels(label: str, train: Split, test: Split) -> None:
    """Raise `UserError` unless both splits have images, and `labels` as `Split` has it."""
    for name, split in (("training", train), ("test", test)):
        labels = getattr(split, "labels", None)
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.shape != (len(split),):
            raise UserError(
                f"{label}: `labels` must be an int64 tensor, one for each of the {len(split)} {name} images, "
                f"got {describe_value(labels)}"
            )
        if not len(labels):
            raise UserError(f"{label} has no {name} images: give at least one of each class")


@dataclass(frozen=True)
class Splits:
    """A data set, ready to train on.

    Raises `UserError` for a single class, no images, labels outside the classes, images in memory of another size,
    and a mean or std that is not of pixels scaled to [0, 1].
    """

    train: Split
    test: Split
    num_classes: int
    image_size: int
    mean: tuple[float, ...]  # of each of the 3 channels of the training pixels scaled to [0, 1]
    std: tuple[float, ...]
    augmentation: Augmentation | None
    label: str  # its name in tables
    baseline: str | None  # the row of published accuracies that it may be compared with
    fingerprint: Fingerprint
    classes: tuple[str, ...] = ()  # names in the order of the labels, if known

    def __post_init__(self) -> None:
        if self.num_classes < 2:
            raise UserError(f"{self.label} has one class: every answer would be right; give images of two or more")
        _check_labels(self.label, self.train, self.test)
        for name, split in (("training", self.train), ("test", self.test)):
            least, most = int(split.labels.min()), int(split.labels.max())
            if not 0 <= least <= most < self.num_classes:
                raise UserError(
                    f"{self.label}: labels of {name} images are from {least} to {most}; "
                    f"for {self.num_classes} classes give 0 to {self.num_classes - 1}"
                )
            if isinstance(split, Images) and split.images.shape[-1] != self.image_size:
                raise UserError(
                    f"{self.label}: {name} images are {split.images.shape[-1]} pixels wide, image_size is "
                    f"{self.image_size}; bring all to one size, for a folder by dataset.image_size"
                )
        lengths = len(self.mean), len(self.std)
        if lengths != (3, 3) or not all(0 <= m <= 1 for m in self.mean) or not all(0 < s <= 1 for s in self.std):
            raise UserError(
                f"dataset.mean={list(self.mean)}, dataset.std={list(self.std)}: give three numbers each, of pixels "
                "scaled to [0, 1], with every std above 0"
            )


class Common(TypedDict, total=False):
    """The keys that the YAML of every data set may have."""

    label: str | None  # null where the data set has a name by itself
    baseline: str | None
    subset: int | None  # number of training images, stratified; a larger subset contains each smaller one
    validation: float  # stratified share of the training images that replaces the test set
    mean: list[float] | None  # null: computed from the training images
    std: list[float] | None
    augmentation: Augmentation | None


KINDS: Mapping[str, tuple[type, ...]] = {
    "label": (str,),
    "baseline": (str,),
    "subset": (int,),
    "validation": (float, int),
    "mean": (list, tuple),
    "std": (list, tuple),
    "augmentation": (Augmentation,),
}
"""Of the values of `Common`; a data set of the user's own may pass on whatever its YAML holds."""


def _check_common(common: Mapping[str, object]) -> None:
    """Raise UserError for a key that no data set has, and for a value of another kind."""
    for key, value in common.items():
        if key not in KINDS:
            raise UserError(f"unknown key dataset.{key}; accepted by every data set: {', '.join(KINDS)}")
        if isinstance(value, bool) or not isinstance(value, (*KINDS[key], NoneType)):
            kinds = " or ".join(kind.__name__ for kind in KINDS[key])
            raise UserError(f"dataset.{key} is {value!r}, but must be of type {kinds}")


def make_splits(
    train: Split,
    test: Split,
    num_classes: int,
    image_size: int,
    classes: tuple[str, ...] = (),
    *,
    files: str | None = None,
    whole: Counts | None = None,
    intact: bool = True,
    variant: str = "",
    groups: Tensor | None = None,
    **common: Unpack[Common],
) -> Splits:
    """The data set after its common choices.

    files: digest over the files that the images come from (`Fingerprint`). Without one, the pixels in memory stand
    for them, and of images decoded on access, with a warning, the labels. whole: classes, training and test
    images of the published data set; None: those of `PUBLISHED`, if the label or the baseline occurs there. intact:
    False if checksums show that the files are not the published ones. variant: what was done to the images. groups:
    (training images,), a number for each; `validation` holds out whole groups, as the clips of one recording, which
    are alike.

    With `validation`, the held-out share is taken first and `subset` from what remains, so that it is the same for
    every subset. These choices, a variant, and a data set that is not the published one are added to the label and
    drop the baseline: no published accuracy belongs beside theirs. So are the number of classes that they leave
    without training or without test images, and of test images that are training images too in a data set that is
    not a published one.

    Raises `UserError` for a choice that the data cannot fulfil.
    """
    _check_common(common)
    label, baseline = common.get("label") or "", common.get("baseline")
    if not label.strip():
        raise UserError("dataset.label is empty: give the name that tables call the data by")
    _check_labels(label, train, test)
    if untrained := _only_in(test, train, classes):
        raise UserError(
            f"classes differ: the class {untrained[0]} has test images and no training images; "
            "add some, or remove it"
        )
    fingerprint = _fingerprint(train, test, files)
    if files is None and fingerprint["pixels"] is None:
        log.warning(
            "%s: labels alone tell its images from others, and a run would go on with others of equal labels; give "
            "make_splits their files, as in files=digest(f'{p.name} {p.stat().st_size}' for p in paths)",
            label,
        )
    whole = whole or PUBLISHED.get(label) or PUBLISHED.get(baseline or "")
    contents = None if variant else CONTENTS.get(baseline or "")
    change, reason = _unlike_published(num_classes, train, test, whole, intact, contents)
    if change:
        log.warning(
            "%s %s. The label says so, and no published accuracy will stand beside the result", label, reason
        )
    subset, validation = common.get("subset"), common.get("validation", 0.0)
    if validation:
        train, test = _hold_out(train, test, validation, groups)
    if subset is not None:
        if not 1 <= subset <= len(train):
            raise UserError(f"dataset.subset={subset}: give a number from 1 to {len(train)} (training images)")
        train = train.select(stratified_order(train.labels, "subset")[:subset].sort().values)
    choices = [change, variant]
    choices += [f"validation {validation:g}"] if validation else []
    choices += [f"{subset:,} images"] if subset is not None else []
    label = ", ".join([label, *filter(None, choices)])
    if untrained := _only_in(test, train, classes):
        log.warning(
            "%s: %s of %s classes have test images and no training images, %s among them, and are always answered "
            "wrong. The label says so; take a larger dataset.subset or a smaller dataset.validation",
            *(label, len(untrained), num_classes, untrained[0]),
        )
        label += f", {len(untrained)} of {num_classes} classes untrained"
    if validation and (untested := _only_in(train, test, classes)):
        log.warning(
            "%s: of %s of %s classes, %s among them, no image is held out, and accuracy says nothing of them. The "
            "label says so; take a larger dataset.validation",
            *(label, len(untested), num_classes, untested[0]),
        )
        label += f", {len(untested)} of {num_classes} classes untested"
    if (change or whole is None) and (known := _known(train, test)):
        log.warning(
            "%s: %s of %s test images are training images too, pixel for pixel, and accuracy counts them as if "
            "they were new. The label says so; remove them from one side",
            *(label, f"{known:,}", f"{len(test):,}"),
        )
        label += f", {known:,} of {len(test):,} test images known from training"
    mean, std = _normalisation(train, common.get("mean"), common.get("std"))
    return Splits(
        train=_channels_innermost(train),
        test=_channels_innermost(test),
        num_classes=num_classes,
        image_size=image_size,
        mean=mean,
        std=std,
        augmentation=common.get("augmentation"),
        label=label,
        baseline=None if any(choices) else baseline,
        fingerprint=fingerprint,
        classes=classes,
    )


def _only_in(one: Split, other: Split, classes: Sequence[str]) -> list[str]:
    """Return the classes, by name or number, that one split has images of and the other has not."""
    numbers = sorted(set(one.labels.tolist()) - set(other.labels.tolist()))
    return [classes[number] if 0 <= number < len(classes) else str(number) for number in numbers]


def _unlike_published(
    num_classes: int, train: Split, test: Split, whole: Counts | None, intact: bool, contents: str | None
) -> tuple[str, str]:
    """Return what tells the data from the published set, for the label and for a warning, or two empty texts."""
    if whole is not None and whole != (num_classes, len(train), len(test)):
        counts = f"{len(train):,} and {len(test):,} images"
        return f"{num_classes:,} classes" if whole[1:] == (len(train), len(test)) else counts, (
            f"is not the whole published data set, which has {whole[1]:,} training and {whole[2]:,} test images in "
            f"{whole[0]:,} classes; here are {len(train):,} and {len(test):,} in {num_classes:,}"
        )
    if whole is not None and not (intact and _is_even(num_classes, train, test)):
        return "other files", "has as many images as the published data set, but other files or classes"
    if contents is not None and contents != _classes_digest(train, test):
        return "other pixels", "has other pixels than the official files: re-encoded, resized or in other classes"
    return "", ""


def _hold_out(train: Split, test: Split, share: float, groups: Tensor | None) -> tuple[Split, Split]:
    """Return the training images less a stratified share, in whole groups, and the share, read like `test`."""
    if not 0 <= share < 1:
        raise UserError(f"dataset.validation={share}: give a share of the training images, 0 <= share < 1")
    order = stratified_order(train.labels, "validation")
    labels = train.labels[order].tolist()
    owners = (order if groups is None else groups[order]).tolist()  # without groups, each image is its own
    sizes, room = Counter(owners), Counter(labels[: round(share * len(labels))])  # room: by class
    held: set[int] = set()
    for owner, label in zip(owners, labels, strict=True):
        if owner not in held and sizes[owner] <= room[label]:
            held.add(owner)
            room[label] -= sizes[owner]
    chosen = torch.tensor([owner in held for owner in owners])
    if chosen.all() or not chosen.any():
        why = "" if groups is None else " (clips of one recording stay together)"
        raise UserError(
            f"dataset.validation={share} would hold out {int(chosen.sum())} of {len(chosen)} training images{why}; "
            "give a share that leaves images on both sides"
        )
    return train.select(order[~chosen].sort().values), train.select(order[chosen].sort().values, test)


def _is_even(num_classes: int, *splits: Split) -> bool:
    """Tell whether each class has equally many images, where their number is a multiple of that of the classes."""
    counts = (torch.bincount(split.labels, minlength=num_classes) for split in splits)
    return all(int(count.sum()) % num_classes or bool((count == count[0]).all()) for count in counts)


def _known(train: Split, test: Split) -> int:
    """Return the number of test images that are training images too; 0 where images are not held in memory."""
    if not (isinstance(train, Images) and isinstance(test, Images)):
        return 0
    learnt = set(map(_image_digest, train.images))
    return sum(_image_digest(image) in learnt for image in test.images)


def _image_digest(image: Tensor) -> bytes:
    return hashlib.blake2b(image.contiguous().numpy().data, digest_size=16).digest()


def _classes_digest(*splits: Split) -> str | None:
    """A digest over the images of each class, whatever the order of images and classes; None for images on disk."""
    parts = []
    for split in splits:
        if not isinstance(split, Images):
            return None
        classes: dict[int, list[bytes]] = defaultdict(list)
        for image, label in zip(split.images, split.labels.tolist(), strict=True):
            classes[label].append(_image_digest(image))
        parts += sorted(b"".join(sorted(images)) for images in classes.values())
    return digest(parts)


def _fingerprint(train: Split, test: Split, files: str | None) -> Fingerprint:
    labels = digest([train.labels, test.labels])
    pixels = None
    if isinstance(train, Images) and isinstance(test, Images):
        pixels = digest([train.images, test.images, labels])
    return Fingerprint(files=files or pixels or labels, pixels=pixels)


def check_image_size(size: int) -> None:
    """Raise UserError for a number of pixels that no image can have."""
    if not 1 <= size <= LARGEST_IMAGE:
        raise UserError(f"dataset.image_size={size}: give a number of pixels from 1 to {LARGEST_IMAGE}")


def _channels_innermost(split: Split) -> Split:
    """Images in memory in the layout of the loader, which then needs no copy of its own."""
    if isinstance(split, Images):
        return replace(split, images=split.images.contiguous(memory_format=torch.channels_last))
    return split


def stratified_order(labels: Tensor, purpose: str) -> Tensor:
    """A fixed random order of all samples in which every prefix holds each class in proportion, up to rounding.

    The k-th of a class's n samples, in random order, stands at (k + 1/2) / n of the way.
    """
    place = torch.empty(len(labels), dtype=torch.float64)
    shuffle = torch.randperm(len(labels), generator=generator(SPLIT_SEED, purpose))
    for label in set(labels.tolist()):
        members = shuffle[labels[shuffle] == label]
        place[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    return shuffle[place[shuffle].argsort(stable=True)]


def pixel_statistics(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of (N, 3, H, W) uint8, with pixels scaled to [0, 1].

    Exact, because it counts how often each of the 256 values occurs.
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for channel in range(3):
        counts = torch.zeros(256, dtype=torch.int64)
        for chunk in torch.split(images[:, channel], 4096):  # bincount works on an int64 copy
            counts += torch.bincount(chunk.flatten(), minlength=256)
        share = counts.double() / counts.sum()
        mean.append(float(share @ values))
        std.append(math.sqrt(float(share @ (values - mean[-1]) ** 2)))
    return mean, std


def _normalisation(
    train: Split, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if mean is None and std is None:
        if not isinstance(train, Images):
            raise UserError("dataset.mean and dataset.std must be given for images that are not held in memory")
        mean, std = pixel_statistics(train.images)
        std = [value or 1.0 for value in std]  # a constant channel is only centred
    if mean is None or std is None:
        raise UserError("dataset.mean and dataset.std go together: give both, or null for both to compute them")
    return tuple(mean), tuple(std)
