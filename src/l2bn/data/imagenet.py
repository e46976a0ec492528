"""ImageNet (ILSVRC 2012) from its files, decoded by worker processes while the device computes.

O. Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", arXiv:1409.0575. Random crops as in
C. Szegedy et al., "Going Deeper with Convolutions", arXiv:1409.4842, section 6; at evaluation the shorter side is
resized to 8/7 of the image size (256 for 224) and the centre cut out.
"""

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt
import torch
from scipy.io import loadmat
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor

from l2bn.data.decode import read_rgb
from l2bn.data.decoded import decoded
from l2bn.data.folder import SUFFIXES, Tree, list_images, same_classes
from l2bn.data.splits import Common, Split, Splits, Transform, check_image_size, digest, make_splits
from l2bn.errors import UserError

DEVKIT = "ILSVRC2012_devkit_t12"
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"

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
    **common: Unpack[Common],
) -> Splits:
    """`root`/`train`/<wnid>/*.JPEG and either `root`/`val`/<wnid>/*.JPEG or all validation images in `root`/`val`.

    In the second case their classes come from the devkit in `root`/`devkit`. No file is moved or written. Classes
    are numbered by the order of their wnids. The validation images are the test set.

    cache_side: keep the training images decoded in `cache` (a folder; null: `l2bn` in the user's cache folder),
    their shorter side that many pixels long. Random crops are then windows of the smaller images: other pixels, so
    that the label says so and there is no baseline. Test images are read from their files as always.
    """
    check_image_size(image_size)
    trained, tested = list_splits(Path(root).expanduser(), train, val, devkit)
    if cache_side is None:
        images: Split = ImageFiles.of(trained, training_transform(image_size))
    elif cache_side < 1:
        raise UserError(f"dataset.cache_side={cache_side}: give a number of pixels, or null to decode each time")
    else:
        images = decoded(trained, cache_side, cache, training_transform(image_size))
        common = {**common, "label": f"{common['label']}, decoded at {cache_side} pixels", "baseline": None}
    return make_splits(
        images,
        ImageFiles.of(tested, evaluation_transform(image_size)),
        len(trained.classes),
        image_size,
        trained.classes,
        files=digest([trained.digest(), tested.digest()]),
        **common,
    )


def list_splits(folder: Path, train: str, val: str, devkit: str) -> tuple[Tree, Tree]:
    """The training and the validation files of ImageNet; the arguments are those of `imagenet`."""
    if not (folder / train).is_dir() or not (folder / val).is_dir():
        raise UserError(
            f"no ImageNet in {folder.absolute()}: the folders {train} and {val} are looked for. {LICENCE}. "
            "Name the folder that holds both by dataset.root=FOLDER"
        )
    trained = list_images(folder / train)
    _, subfolders, names = next(os.walk(folder / val))
    if not subfolders:
        return trained, _flat(folder / val, names, folder / devkit, trained.classes)
    tested = list_images(folder / val)
    same_classes(trained, tested)
    return trained, tested


def training_transform(image_size: int) -> Transform:
    """A window of 8 to 100 % of the area and 3:4 to 4:3 proportions, resized to a square, half of them mirrored."""
    return v2.Compose([v2.RandomResizedCrop(image_size, antialias=True), v2.RandomHorizontalFlip()])


def evaluation_transform(image_size: int) -> Transform:
    """The centre of the image: `image_size` pixels of a shorter side of 8/7 as many."""
    return v2.Compose([v2.Resize(round(image_size * 8 / 7), antialias=True), v2.CenterCrop(image_size)])


@dataclass(frozen=True)
class ImageFiles(Dataset[tuple[Tensor, int]]):
    """Image files decoded when asked."""

    folder: Path
    names: npt.NDArray[np.bytes_]  # (N,) relative to folder; one array, which worker processes share
    labels: Tensor  # (N,) int64
    transform: Transform

    @classmethod
    def of(cls, tree: Tree, transform: Transform) -> "ImageFiles":
        return cls(tree.folder, np.array([os.fsencode(name) for name in tree.names]), tree.labels, transform)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int, /) -> tuple[Tensor, int]:
        path = self.folder / os.fsdecode(self.names[index])
        return self.transform(pil_to_tensor(read_rgb(path, str(path)))), int(self.labels[index])

    def select(self, indices: Tensor, like: Any = None) -> "ImageFiles":
        transform = self.transform if like is None else like.transform
        return replace(self, names=self.names[indices.numpy()], labels=self.labels[indices], transform=transform)


def _flat(folder: Path, files: list[str], devkit: Path, classes: tuple[str, ...]) -> Tree:
    """Validation images that lie in one folder, with the classes that the devkit gives for their numbers."""
    names = sorted(name for name in files if name.lower().endswith(SUFFIXES))
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
                "unpack ILSVRC2012_devkit_t12.tar.gz there, or set dataset.devkit=FOLDER"
            )
    try:
        synsets = loadmat(meta, squeeze_me=True)["synsets"]
        wnids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
        return [wnids[int(line)] for line in truth.read_text().split()]
    except Exception as error:  # whatever a damaged file makes of the reader
        raise UserError(f"{truth} and {meta} cannot be read ({error!r}); unpack the devkit anew") from error
