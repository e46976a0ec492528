"""ImageNet (ILSVRC 2012) from its image files, decoded by worker processes while the device computes.

O. Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", arXiv:1409.0575. Random crops as in
C. Szegedy et al., "Going Deeper with Convolutions", arXiv:1409.4842, section 6; at evaluation the shorter side is
resized to 8/7 of the image size (256 for 224) and the centre cut out.
"""

import logging
import math
import os
import re
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self, Unpack

import numpy as np
import numpy.typing as npt
import torch
from scipy.io import loadmat
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor, resize

from l2bn.data.cache import cache_file, file_state, making, read_arrays, replacing, write_arrays
from l2bn.data.decode import read_all, read_rgb
from l2bn.data.folder import IMAGES, Tree, list_files, report_left_out, same_classes, scan, suffix_of
from l2bn.data.splits import Common, Split, Splits, Transform, check_image_size, digest, make_splits
from l2bn.errors import UserError, expand

log = logging.getLogger(__name__)

DEVKIT = "ILSVRC2012_devkit_t12"
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"

IMAGENET = "ImageNet"  # the label of the whole data set
LICENCE = (
    "ImageNet may not be passed on, so it is not downloaded for you: register at https://image-net.org, accept "
    "the terms, download ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz, and "
    "unpack them to train/<wnid>/*.JPEG (the training archive holds one tar file for each wnid), val/*.JPEG and "
    "ILSVRC2012_devkit_t12/; val/<wnid>/*.JPEG does without the devkit"
)


def imagenet(
    root: str,
    train: str = "train",
    val: str = "val",
    devkit: str = DEVKIT,
    image_size: int = 224,
    cache_side: int | None = None,
    cache: str | None = None,
    upright: bool = False,
    **common: Unpack[Common],
) -> Splits:
    """`root`/`train`/<wnid>/*.JPEG and either `root`/`val`/<wnid>/*.JPEG or all validation images in `root`/`val`.

    In the second case their classes come from the devkit in `root`/`devkit`. Nothing is written there. Classes
    are numbered by the order of their wnids. The validation images are the test set. One name for both is to try
    things out: unless `validation` holds images out, a warning and the label say so.

    cache_side: keep the training images decoded in `cache` (a folder; null: `l2bn` in the user's cache folder),
    their shorter side resized to that many pixels. Random crops of these smaller images have other pixels: the
    label states it, and there is no baseline. Test images are still read from their files; those that `validation`
    holds out come from the cache too.

    upright: turn photographs as their EXIF orientation says. ImageNet's are taken as they lie in their files, as
    other trainers take them.
    """
    check_image_size(image_size)
    trained, tested = list_splits(expand(root), train, val, devkit, common.get("label") or "images")
    variants = [f"decoded at {cache_side} pixels"] if cache_side is not None else []
    if train == val and not common.get("validation"):
        log.warning("dataset.train and dataset.val are %s: accuracy is measured on training images", train)
        variants.append("tested on its training images")
    if cache_side is None:
        images: Split = ImageFiles.of(trained, training_transform(image_size), upright)
    elif cache_side < 1:
        raise UserError(f"dataset.cache_side={cache_side}: give a number of pixels, or null to decode each time")
    else:
        images = decode_once(trained, cache_side, cache, training_transform(image_size), upright)
    return make_splits(
        images,
        ImageFiles.of(tested, evaluation_transform(image_size), upright),
        len(trained.classes),
        image_size,
        trained.classes,
        files=digest([trained.digest(), tested.digest()]),
        variant=", ".join(variants),
        **common,
    )


def list_splits(
    folder: Path, train: str, val: str, devkit: str, label: str = IMAGENET, option: str = "dataset.root=FOLDER"
) -> tuple[Tree, Tree]:
    """The training and the validation files of ImageNet; the arguments are those of `imagenet`.

    option: the one that names the folder, for a message.
    """
    if not (folder / train).is_dir() or not (folder / val).is_dir():
        raise UserError(
            f"no {label} in {folder.absolute()}: the folders {train} and {val} are looked for. "
            f"{f'{LICENCE}. ' if label == IMAGENET else ''}Name the folder that holds both by {option}"
        )
    if train != val and (folder / train).samefile(folder / val):
        raise UserError(f"{folder / train} and {folder / val} are one folder: no accuracy can be measured on it")
    trained = list_files(folder / train)
    subfolders, names = scan(folder / val)
    images = list(filter(IMAGES.fits, names))
    if images and subfolders:
        raise UserError(
            f"{folder / val} holds {len(images):,} images and folders ({', '.join(subfolders[:3])}): images are "
            "either all in class folders or all beside each other; move the images, or remove the folders"
        )
    if not subfolders:
        report_left_out(folder / val, Counter(suffix_of(name) for name in names if not IMAGES.fits(name)))
        return trained, _flat(folder / val, images, folder / devkit, trained.classes)
    tested = list_files(folder / val)
    same_classes(trained, tested)
    return trained, tested


def training_transform(image_size: int) -> Transform:
    """A random window of 8 to 100 % of the area, 3:4 to 4:3 in proportion, resized to a square, mirrored or not."""
    return v2.Compose([v2.RandomResizedCrop(image_size, antialias=True), v2.RandomHorizontalFlip()])


def evaluation_transform(image_size: int) -> Transform:
    """The centre of the image: `image_size` pixels of a shorter side of 8/7 as many."""
    return v2.Compose([v2.Resize(round(image_size * 8 / 7), antialias=True), v2.CenterCrop(image_size)])


class OnDisk(Dataset[tuple[Tensor, int]]):
    """A split of images that are decoded when asked: a frozen data class with an entry per image in each array."""

    labels: Tensor  # (N,) int64
    transform: Transform

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: Tensor, like: Any = None) -> Self:
        chosen = indices.numpy()
        values = {key: value[chosen] for key, value in vars(self).items() if isinstance(value, Tensor | np.ndarray)}
        transform = self.transform if like is None else like.transform
        return replace(self, **values, transform=transform)  # type: ignore[type-var]


@dataclass(frozen=True)
class ImageFiles(OnDisk):
    """Image files decoded when asked."""

    folder: Path
    names: npt.NDArray[np.bytes_]  # (N,) relative to folder; one array, which worker processes share
    labels: Tensor  # (N,) int64
    transform: Transform
    upright: bool

    @classmethod
    def of(cls, tree: Tree, transform: Transform, upright: bool = False) -> "ImageFiles":
        names = np.array([os.fsencode(name) for name in tree.names])
        return cls(tree.folder, names, tree.labels, transform, upright)

    def __getitem__(self, index: int, /) -> tuple[Tensor, int]:
        path = self.folder / os.fsdecode(self.names[index])
        image = read_rgb(path, str(path), upright=self.upright)
        return self.transform(pil_to_tensor(image)), int(self.labels[index])


@dataclass(frozen=True)
class DecodedImages(OnDisk):
    """Images of any size in one file of pixels, read when asked."""

    file: Path
    version: "Version"
    offset: Tensor  # (N,) of the image's first byte
    height: Tensor  # (N,) in pixels
    width: Tensor  # (N,)
    labels: Tensor  # (N,) int64
    transform: Transform

    def __getitem__(self, index: int, /) -> tuple[Tensor, int]:
        shape = int(self.height[index]), int(self.width[index]), 3
        content = read_bytes(self.file, self.version, int(self.offset[index]), math.prod(shape))
        image = torch.frombuffer(content, dtype=torch.uint8).view(shape).permute(2, 0, 1)
        return self.transform(image), int(self.labels[index])


Version = tuple[int, int, int]
"""Inode, size and time of the last change: equal as long as a file is the same."""


def version(found: os.stat_result) -> Version:
    return found.st_ino, found.st_size, found.st_mtime_ns


def read_bytes(file: Path, at_start: Version, offset: int, size: int) -> bytearray:
    """A part of a file. Raises `UserError` for a file that was removed, replaced or changed since the run began."""
    content = bytearray(size)
    try:
        with file.open("rb") as stream:
            same = version(os.fstat(stream.fileno())) == at_start
            stream.seek(offset)
            found = stream.readinto(content)
    except OSError as error:
        raise UserError(f"{file} cannot be read any more: {error.strerror}; restore it") from error
    if not same or found != size:
        raise UserError(
            f"{file} was changed or replaced during the run, and other images may stand where its images stood; "
            "restore the images that the run began with; where machines with copies of their own share one cache, "
            "give each its own by dataset.cache=FOLDER"
        )
    return content


def decode_once(
    tree: Tree, side: int, cache: str | None, transform: Transform, upright: bool = False
) -> DecodedImages:
    """The images of a tree, their shorter side resized to `side` pixels, from the cache if they are there.

    One file holds the pixels of all images, one after the other, then their sizes and the state of the source
    files, and in its last 8 bytes where these begin. cache: folder of it; null: `l2bn` in the user's cache folder.
    Raises `UserError` for a file that cannot be decoded, and for a cache that cannot be written.
    """
    state = file_state(tree.folder, tree.names)
    try:
        file = cache_file(
            cache, f"{tree.folder.name}-{side}", str(tree.folder.resolve()), str(side), *["upright"] * upright
        )
        index = _read_index(file, state)
        if index is None:
            with making(file):
                if _read_index(file, state) is None:
                    _write_decoded(tree, side, file, state, upright)
            index = _read_index(file, state)
        if index is None:
            raise OSError(f"{file} was replaced as soon as it was written: its images change")
    except OSError as error:
        raise UserError(
            f"the decoded images cannot be kept ({error}); set dataset.cache=FOLDER to a place with room for them, "
            "or dataset.cache_side=null to decode them each time"
        ) from error
    at_start, sizes = index
    height, width = (torch.from_numpy(column.astype(np.int64)) for column in sizes.T)
    lengths = 3 * height * width
    return DecodedImages(file, at_start, lengths.cumsum(0) - lengths, height, width, tree.labels, transform)


def _read_index(file: Path, state: str) -> tuple[Version, npt.NDArray[np.int32]] | None:
    """The file's version, and height and width of each image, (N, 2), if it is whole and made of the same files."""
    try:
        with file.open("rb") as stream:
            found = version(os.fstat(stream.fileno()))
            stream.seek(-8, os.SEEK_END)
            stream.seek(int.from_bytes(stream.read(8), "little"))
            arrays = read_arrays(stream, state)
    except (OSError, OverflowError):
        return None  # never made, or damaged
    return (found, arrays[0]) if arrays else None


def _write_decoded(tree: Tree, side: int, file: Path, state: str, upright: bool) -> None:
    """Write the file of the decoded images."""
    paths = tree.paths()
    sizes = np.empty((len(paths), 2), np.int32)
    decoded = read_all(paths, partial(_read_resized, side=side, upright=upright), f"decoding {tree.folder}")
    with closing(decoded), replacing(file, lambda: _read_index(file, state) is not None) as stream:
        for number, image in enumerate(decoded):
            sizes[number] = image.shape[:2]
            stream.write(image.data)
        end = stream.tell()
        write_arrays(stream, state, [sizes])
        stream.write(end.to_bytes(8, "little"))


def _read_resized(path: Path, side: int, upright: bool) -> npt.NDArray[np.uint8]:
    """(height, width, 3), the shorter of both `side`."""
    image = resize(pil_to_tensor(read_rgb(path, str(path), upright=upright)), [side], antialias=True)
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy())


def _flat(folder: Path, names: list[str], devkit: Path, classes: tuple[str, ...]) -> Tree:
    """Validation images that lie in one folder, with the classes that the devkit gives for their numbers."""
    if not names:
        raise UserError(f"no images in {folder}: neither {folder.name}/<wnid>/*.JPEG nor {folder.name}/*.JPEG")
    wnids = _validation_wnids(devkit)
    index = {wnid: label for label, wnid in enumerate(classes)}
    labels = []
    for name in names:
        number = re.fullmatch(r"ILSVRC2012_val_(\d{8})\.\w+", name)
        if number is None or not 1 <= int(number[1]) <= len(wnids):
            raise UserError(
                f"{folder / name}: not the name of a validation image (ILSVRC2012_val_00000001.JPEG to "
                f"ILSVRC2012_val_{len(wnids):08}.JPEG)"
            )
        wnid = wnids[int(number[1]) - 1]
        if wnid not in index:
            raise UserError(f"classes differ: {folder / name} is of {wnid}, which has no training folder")
        labels.append(index[wnid])
    return Tree(folder, classes, names, torch.tensor(labels))


def _validation_wnids(devkit: Path) -> list[str]:
    """The wnid of each validation image, in the order of their numbers."""
    truth, meta = devkit / "data" / GROUND_TRUTH, devkit / "data" / "meta.mat"
    for file in (truth, meta):
        if not file.is_file():
            raise UserError(
                f"no {file.absolute()}: validation images that are not sorted into val/<wnid>/ need the devkit; "
                "unpack ILSVRC2012_devkit_t12.tar.gz there (a run can also take dataset.devkit=FOLDER)"
            )
    try:
        synsets = loadmat(meta, squeeze_me=True)["synsets"]
        wnids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
        return [wnids[int(line)] for line in truth.read_text().split()]
    except Exception as error:  # whatever a damaged file makes of the reader
        raise UserError(f"{truth} and {meta} cannot be read ({error!r}); unpack the devkit anew") from error
