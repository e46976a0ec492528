"""Any tree of images, `train/<class>/` and `test/<class>/`, that fits into memory.

Every image is decoded once, in parallel, into a cache: one file of uint8 tensors, which is made anew when the
tree has changed (a name, a size or a time of modification).
"""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Unpack

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from l2bn.data.cache import cache_file, fingerprint, replacing
from l2bn.data.decode import read_rgb
from l2bn.data.progress import tracked
from l2bn.data.splits import Common, Images, Splits, check_image_size, make_splits
from l2bn.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
CACHE_FORMAT = "1"  # to be raised when the same files would give other pixels
CHUNK = 64  # images that a decoding process takes at a time


def image_folder(
    root: str,
    train: str = "train",
    test: str = "test",
    image_size: int | None = None,
    cache: str | None = None,
    **common: Unpack[Common],
) -> Splits:
    """The images below `root`/`train`/<class>/ and `root`/`test`/<class>/, as RGB.

    image_size: the centre square of each image is cut out and resized to it; null: the images are squares of
    one size already. cache: folder of the decoded images; null: `l2bn` in the user's cache folder.
    label: names the images; where they lie is no part of a run's identity, so other images need another label.

    Raises `UserError`, naming the folder or file, for a missing or empty folder, for classes that differ between
    training and test, for sizes that differ, and for a file that cannot be decoded.
    """
    if image_size is not None:  # null keeps the files' own size
        check_image_size(image_size)
    folder = Path(root).expanduser()
    trees = [list_images(folder / train), list_images(folder / test)]
    same_classes(*trees)
    arrays = _cached(folder, trees, image_size, cache)
    splits = [Images(pixels, tree.labels) for pixels, tree in zip(arrays, trees, strict=True)]
    if arrays[0].shape[-1] != arrays[1].shape[-1]:
        raise UserError(
            f"{folder}: the images of {train} are {arrays[0].shape[-1]} pixels wide and those of {test} "
            f"{arrays[1].shape[-1]}; set dataset.image_size"
        )
    classes = trees[0].classes
    return make_splits(splits[0], splits[1], len(classes), arrays[0].shape[-1], classes, **common)


@dataclass(frozen=True)
class Tree:
    """The image files of one split: their names relative to `folder`, sorted by class and name."""

    folder: Path
    classes: tuple[str, ...]
    names: Sequence[str]
    labels: Tensor  # (N,) int64, index into classes

    def paths(self) -> list[Path]:
        return [self.folder / name for name in self.names]


def list_images(folder: Path) -> Tree:
    """All image files below `folder`/<class>/. Raises `UserError` for a missing folder or a class with no image."""
    if not folder.is_dir():
        raise UserError(
            f"no folder {folder.absolute()}: images are looked for in {folder.name}/<class>/; set dataset.root"
        )
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not _hidden(entry.name))
    if not classes:
        raise UserError(f"no images in {folder}: it has no class folders (expected {folder.name}/<class>/*.jpg)")
    names: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(_images_below(folder / name))
        if not found:
            raise UserError(
                f"no images in {folder / name}: files ending in {', '.join(SUFFIXES)} are looked for; "
                "put some there or remove the folder"
            )
        names += [os.path.relpath(path, folder) for path in found]
        labels += [label] * len(found)
    return Tree(folder, tuple(classes), names, torch.tensor(labels))


def _images_below(folder: Path) -> Iterable[str]:
    for parent, _, files in os.walk(folder, followlinks=True):
        for name in files:
            if name.lower().endswith(SUFFIXES) and not _hidden(name):
                yield str(Path(parent, name))


def _hidden(name: str) -> bool:
    return name.startswith(".")


def same_classes(train: Tree, test: Tree) -> None:
    """Raises `UserError` naming the classes that only one of the two has."""
    for here, there in ((train, test), (test, train)):
        missing = sorted(set(here.classes) - set(there.classes))
        if missing:
            raise UserError(
                f"classes differ: {', '.join(missing)} in {here.folder} but not in {there.folder}; "
                "both need the same folders"
            )


def _cached(root: Path, trees: list[Tree], image_size: int | None, cache: str | None) -> list[Tensor]:
    """The pixels of both trees, each (N, 3, H, H) uint8, from the cache if it was made of these very files."""
    key = [str(tree.folder.resolve()) for tree in trees] + [str(image_size), CACHE_FORMAT]
    file = cache_file(cache, root.resolve().name, *key)
    state = fingerprint(path for tree in trees for path in tree.paths())
    try:
        with safe_open(file, framework="pt") as stored:
            if stored.metadata().get("fingerprint") == state:
                return [stored.get_tensor("train"), stored.get_tensor("test")]
    except (OSError, SafetensorError):
        pass  # never made, or cut short: made anew
    pixels = [_decode(tree, image_size) for tree in trees]
    with replacing(file) as temporary:
        save_file({"train": pixels[0], "test": pixels[1]}, temporary, {"fingerprint": state})
    return pixels


def _decode(tree: Tree, image_size: int | None) -> Tensor:
    """(N, 3, H, H) uint8 from all files of the tree."""
    paths = tree.paths()
    shape = _read(paths[0], image_size).shape
    pixels = np.empty((len(paths), *shape), dtype=np.uint8)
    # Processes, because most of the time spent on a small image is spent in Python.
    with ProcessPoolExecutor(min(os.cpu_count() or 1, len(paths) // CHUNK + 1)) as workers:
        decoded = workers.map(partial(_read, image_size=image_size), paths, chunksize=CHUNK)
        try:
            for index, image in enumerate(tracked(decoded, f"decoding {tree.folder}", len(paths))):
                if image.shape != shape:
                    raise UserError(
                        f"{paths[index]} is {image.shape[0]} pixels wide, {paths[0]} is {shape[0]}; "
                        "set dataset.image_size to bring all to one size"
                    )
                pixels[index] = image
        except BaseException:
            workers.shutdown(cancel_futures=True)
            raise
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _read(path: Path, image_size: int | None) -> npt.NDArray[np.uint8]:
    """(H, H, 3)."""
    image = read_rgb(path, str(path))
    if image_size is not None:
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)
    elif image.width != image.height:
        raise UserError(
            f"{path} is {image.width} x {image.height} pixels, no square; set dataset.image_size to cut squares out"
        )
    return np.asarray(image)
