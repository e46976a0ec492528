"""Any tree of images, `train/<class>/` and `test/<class>/`, that fits into memory.

Every image is decoded once, in parallel, into a cache: one file of uint8 tensors, which is made anew when the
tree has changed (a name, a size or a time of modification). It also holds the digest of the files' contents.
"""

import logging
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

from l2bn.data.cache import cache_file, fingerprint, replacing, status
from l2bn.data.decode import read_rgb
from l2bn.data.progress import tracked
from l2bn.data.splits import Common, Images, Splits, check_image_size, digest, make_splits
from l2bn.errors import UserError

log = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
CACHE_FORMAT = "2"  # to be raised when the same files would give other pixels
CHUNK = 64  # images that a decoding process takes at a time


def image_folder(
    root: str,
    train: str = "train",
    test: str = "test",
    image_size: int | None = None,
    cache: str | None = None,
    counts: list[int] | None = None,
    **common: Unpack[Common],
) -> Splits:
    """The images below `root`/`train`/<class>/ and `root`/`test`/<class>/, as RGB.

    image_size: the centre square of each image is cut out and resized to it; null: the images are squares of
    one size already. cache: folder of the decoded images; null: `l2bn` in the user's cache folder.
    counts: of a published data set, the number of its classes and of the training and test images of each. Where
    the folder holds other numbers, that is logged, the label gives the number of images, and there is no baseline.

    Raises `UserError`, naming the folder or file, for a missing or empty folder, for classes that differ between
    training and test, for sizes that differ, and for a file that cannot be decoded.
    """
    if image_size is not None:  # null keeps the files' own size
        check_image_size(image_size)
    folder = Path(root).expanduser()
    trees = [list_images(folder / train), list_images(folder / test)]
    same_classes(*trees)
    arrays, files = _cached(folder, trees, image_size, cache)
    splits = [Images(pixels, tree.labels) for pixels, tree in zip(arrays, trees, strict=True)]
    if arrays[0].shape[-1] != arrays[1].shape[-1]:
        raise UserError(
            f"{folder}: the images of {train} are {arrays[0].shape[-1]} pixels wide and those of {test} "
            f"{arrays[1].shape[-1]}; set dataset.image_size"
        )
    classes = trees[0].classes
    found = [len(classes), *map(_images_a_class, trees)]
    if counts is not None and counts != found:
        log.warning(
            "%s is not the whole %s: it has %s classes, %s training and %s test images of each, not %d, %d and %d",
            *(folder, common["label"], *("unequal numbers of" if n is None else n for n in found), *counts),
        )
        common["label"] += f", {len(splits[0]):,} and {len(splits[1]):,} images"
        common["baseline"] = None
    return make_splits(splits[0], splits[1], len(classes), arrays[0].shape[-1], classes, files=files, **common)


@dataclass(frozen=True)
class Tree:
    """The image files of one split: their names relative to `folder`, sorted by class and name."""

    folder: Path
    classes: tuple[str, ...]
    names: Sequence[str]
    labels: Tensor  # (N,) int64, index into classes

    def paths(self) -> list[Path]:
        return [self.folder / name for name in self.names]

    def digest(self) -> str:
        """Digest over name, label and size in bytes of each file. Raises `UserError` for a broken link."""
        sizes = torch.tensor([status(path).st_size for path in self.paths()])
        return digest([*self.names, self.labels, sizes])


def _images_a_class(tree: Tree) -> int | None:
    """The number of images that every class has; None where it is not the same."""
    numbers = set(torch.bincount(tree.labels).tolist())
    return numbers.pop() if len(numbers) == 1 else None


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


def _cached(root: Path, trees: list[Tree], image_size: int | None, cache: str | None) -> tuple[list[Tensor], str]:
    """The pixels of both trees, each (N, 3, H, H) uint8, and the digest over names, labels and contents of their
    files; from the cache if it was made of these very files."""
    key = [str(tree.folder.resolve()) for tree in trees] + [str(image_size), CACHE_FORMAT]
    file = cache_file(cache, root.resolve().name, *key)
    state = fingerprint(path for tree in trees for path in tree.paths())
    try:
        with safe_open(file, framework="pt") as stored:
            if stored.metadata().get("fingerprint") == state:
                return [stored.get_tensor("train"), stored.get_tensor("test")], stored.metadata()["files"]
    except (OSError, SafetensorError):
        pass  # never made, or cut short: made anew
    decoded = [_decode(tree, image_size) for tree in trees]
    pixels = [images for images, _ in decoded]
    files = digest(
        [part for tree, (_, content) in zip(trees, decoded, strict=True) for part in (tree.labels, content)]
    )
    with replacing(file) as temporary:
        save_file({"train": pixels[0], "test": pixels[1]}, temporary, {"fingerprint": state, "files": files})
    return pixels, files


def _decode(tree: Tree, image_size: int | None) -> tuple[Tensor, str]:
    """(N, 3, H, H) uint8 from all files of the tree, and the digest over their names and contents."""
    paths = tree.paths()
    shape = _read(paths[0], image_size)[0].shape
    contents: list[str] = []
    pixels = np.empty((len(paths), *shape), dtype=np.uint8)
    # Processes, because most of the time spent on a small image is spent in Python.
    with ProcessPoolExecutor(min(os.cpu_count() or 1, len(paths) // CHUNK + 1)) as workers:
        decoded = workers.map(partial(_read, image_size=image_size), paths, chunksize=CHUNK)
        try:
            for index, (image, content) in enumerate(tracked(decoded, f"decoding {tree.folder}", len(paths))):
                if image.shape != shape:
                    raise UserError(
                        f"{paths[index]} is {image.shape[0]} pixels wide, {paths[0]} is {shape[0]}; "
                        "set dataset.image_size to bring all to one size"
                    )
                pixels[index] = image
                contents.append(content)
        except BaseException:
            workers.shutdown(cancel_futures=True)
            raise
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), digest([*tree.names, *contents])


def _read(path: Path, image_size: int | None) -> tuple[npt.NDArray[np.uint8], str]:
    """The image, (H, H, 3), and the digest of its file's content."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; replace or remove it") from error
    image = read_rgb(content, str(path))
    if image_size is not None:
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)
    elif image.width != image.height:
        raise UserError(
            f"{path} is {image.width} x {image.height} pixels, no square; set dataset.image_size to cut squares out"
        )
    return np.asarray(image), digest([content])
