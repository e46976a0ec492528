"""Any tree of images, `train/<class>/` and `test/<class>/`, that fits into memory.

Every file is decoded once, in parallel, into a cache: for each tree one file of uint8 arrays, which is made again
when a file of the tree has changed. It also holds the digest of each file's content.
"""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor

from l2bn.data.cache import Arrays, cached, content_of, file_state, status, tracked
from l2bn.data.decode import read_all, read_rgb
from l2bn.data.splits import Common, Counts, Images, Splits, check_image_size, digest, make_splits
from l2bn.errors import UserError, expand

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FileType:
    """A kind of file: its name in messages, and how the names of its files end."""

    name: str
    suffixes: tuple[str, ...]

    def fits(self, file: str) -> bool:
        return file.lower().endswith(self.suffixes)


IMAGES = FileType(
    "images",
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".avif", ".ppm", ".pgm", ".tif", ".tiff"),
)
# Folders that storage systems and archivers leave everywhere; hidden ones (`.Trash-1000`) are left out as well.
SYSTEM_FOLDERS = frozenset(
    {"@eaDir", "@Recycle", "#recycle", "#snapshot", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
    | {"__MACOSX", "__pycache__"}
)
PARTS = frozenset({"train", "training", "test", "testing", "val", "valid", "validation", "eval"})


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
    counts: of a published data set, the number of its classes and of the training and test images of each.
    label: null: the name of the root folder.
    `train` and `test` may be the same folder, "." for example, if `validation` holds out a share of it.

    Raises `UserError`, naming the folder or file, for a missing or empty folder, for classes that differ between
    training and test, for sizes that differ, and for a file that cannot be decoded.
    """
    if image_size is not None:  # null keeps the files' own size
        check_image_size(image_size)
    if counts is not None and len(counts) != 3:
        raise UserError(
            f"dataset.counts={list(counts)}: give three numbers, of classes and of training and test images of each"
        )
    whole = None if counts is None else (counts[0], counts[0] * counts[1], counts[0] * counts[2])
    read = partial(_read, image_size=image_size)
    decoded = partial(decode_tree, read=read, cache=cache, key=[f"{image_size} pixels"])
    return split_folder(expand(root), train, test, IMAGES, decoded, whole, **common)


def split_folder(
    folder: Path,
    train: str,
    test: str,
    kind: FileType,
    decoded: "Callable[[Tree], Decoded]",
    whole: Counts | None = None,
    **common: Unpack[Common],
) -> Splits:
    """The files of a kind below `folder`/`train`/<class>/ and `folder`/`test`/<class>/, each tree as `decoded`."""
    trees = list_parts(folder, train, test, common, kind)
    images: list[Images] = []
    files: list[str | Tensor] = []
    for tree in trees:
        part, contents, _ = decoded(tree)
        images.append(part)
        files += [tree.labels, digest([*tree.names, *contents])]
    if common.get("label") is None:
        common["label"] = Path(os.path.abspath(folder)).name  # noqa: PTH100 (a link's own name)
    size, classes = images[0].images.shape[-1], trees[0].classes
    ends = images[0], images[-1]
    return make_splits(*ends, len(classes), size, classes, files=digest(files), whole=whole, **common)


def list_parts(folder: Path, train: str, test: str, common: Common, kind: FileType) -> "list[Tree]":
    """The files below `folder`/`train`/<class>/ and `folder`/`test`/<class>/; one tree if both are one folder.

    Raises `UserError` for a folder that is missing or has one class, for classes that differ between the two, for
    parts in the place of classes, and for one folder as both unless `validation` holds out a share of it.
    """
    for part in (train, test):
        if not (folder / part).is_dir():
            found = _listing(scan(folder)[0]) if folder.is_dir() else ""
            raise UserError(
                f"no folder {(folder / part).absolute()}; folders in {folder.absolute()}: {found or 'none'}. Name "
                "the one that holds train/<class>/ and test/<class>/ by dataset.root=FOLDER, or its parts by "
                "dataset.train=NAME dataset.test=NAME; a single folder of classes (. is the root) can be both with "
                "dataset.validation=0.2"
            )
    trees = [list_files(folder / train, kind)]
    if not (folder / train).samefile(folder / test):
        trees.append(list_files(folder / test, kind))
        same_classes(*trees)
    elif not common.get("validation"):
        raise UserError(
            f"dataset.train={train} and dataset.test={test} are one folder in {folder.absolute()}: accuracy would "
            f"be measured on training {kind.name}; name another folder, or hold {kind.name} out by "
            "dataset.validation=0.2"
        )
    classes = trees[0].classes
    if len(classes) == 1:
        inner = scan(folder / train / classes[0])[0]
        meant = f"; if {_listing(inner)} are the classes, set dataset.train={train}/{classes[0]}" if inner else ""
        raise UserError(
            f"only one class in {folder / train}, {classes[0]}: every answer would be right; give two{meant}"
        )
    if all(name.lower() in PARTS and scan(folder / train / name)[0] for name in classes):
        raise UserError(
            f"{_listing(classes)} in {folder / train} are parts of a data set, not classes: set "
            f"dataset.root={folder / train} without dataset.train and dataset.test"
        )
    return trees


def _listing(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


@dataclass(frozen=True)
class Tree:
    """The files of one split: their names relative to `folder`, sorted by class and name."""

    folder: Path
    classes: tuple[str, ...]
    names: Sequence[str]
    labels: Tensor  # (N,) int64, index into classes

    def paths(self) -> list[Path]:
        return [self.folder / name for name in self.names]

    def digest(self) -> str:
        """Digest over name, label and size in bytes of each file. Raises `UserError` for a broken link."""
        paths = tracked(self.paths(), f"checking {self.folder}")
        sizes = torch.tensor([status(path).st_size for path in paths])
        return digest([*self.names, self.labels, sizes])


def scan(folder: Path) -> tuple[list[str], list[str]]:
    """The names of the folders and of the files in a folder, sorted, without hidden and system folders and files.

    Raises `UserError` for a folder that cannot be listed and for a link to nothing.
    """
    folders, files = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name in SYSTEM_FOLDERS:
                    continue
                if entry.is_dir():
                    folders.append(entry.name)
                else:
                    if entry.is_symlink():
                        entry.stat()  # fails if the link names nothing, such as a disk that is not mounted
                    files.append(entry.name)
    except OSError as error:
        path = error.filename or folder
        raise UserError(
            f"{path} cannot be read: {error.strerror}; mount or restore it, or give this user the right to read it"
        ) from error
    return sorted(folders), sorted(files)


def list_files(folder: Path, kind: FileType = IMAGES) -> Tree:
    """All files of a kind below `folder`/<class>/, in folders of any depth.

    A folder that several links lead to is listed once. Files of another kind by name are left out, and a log
    line counts them. Raises `UserError` for a folder that cannot be listed, for a class without files, and for two
    classes that are one folder.
    """
    classes, loose = scan(folder)
    if not classes:
        raise UserError(
            f"no {kind.name} in {folder}: it has no class folders "
            f"(expected {folder.name}/<class>/*{kind.suffixes[0]})"
        )
    places = {_place(folder): folder.name}
    for name in classes:
        same = places.setdefault(_place(folder / name), name)
        if same != name:
            raise UserError(
                f"{folder / name} is the same folder as {same}: {kind.name} of one class cannot be of another"
            )
    left_out = Counter(f"{suffix_of(name)} outside the class folders" for name in loose)
    seen = set(places)
    names: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(_files_below(folder / name, kind, seen, left_out))
        if not found:
            raise UserError(
                f"no {kind.name} in {folder / name}: files ending in {', '.join(kind.suffixes)} are looked for; "
                "put some there, or remove the class from all parts of the data set"
            )
        names += [os.path.relpath(path, folder) for path in found]
        labels += [label] * len(found)
    report_left_out(folder, left_out)
    return Tree(folder, tuple(classes), names, torch.tensor(labels))


def _place(folder: Path) -> tuple[int, int]:
    """The identity of a folder, equal for all links to it."""
    status = folder.stat()
    return status.st_dev, status.st_ino


def _files_below(folder: Path, kind: FileType, seen: set[tuple[int, int]], left_out: Counter[str]) -> Iterator[str]:
    folders, files = scan(folder)
    for name in files:
        if kind.fits(name):
            yield str(folder / name)
        else:
            left_out[suffix_of(name)] += 1
    for name in folders:
        place = _place(folder / name)
        if place in seen:
            left_out[f"link to a folder that is listed already ({folder.name}/{name})"] += 1
        else:
            seen.add(place)
            yield from _files_below(folder / name, kind, seen, left_out)


def suffix_of(name: str) -> str:
    """The suffix of a file's name in lower case, or words for none, for a log line."""
    return Path(name).suffix.lower() or "without a suffix"


def report_left_out(folder: Path, left_out: Counter[str]) -> None:
    """Log one line that counts the files and links that are left out, if there are any."""
    if left_out:
        kinds = [f"{count:,} {kind}" for kind, count in left_out.most_common()]
        log.warning("%s: left out: %s", folder, _listing(kinds))


def same_classes(train: Tree, test: Tree) -> None:
    """Raise `UserError` naming the classes that only one of the two has."""
    for here, there in ((train, test), (test, train)):
        missing = sorted(set(here.classes) - set(there.classes))
        if missing:
            raise UserError(
                f"classes differ: {', '.join(missing)} in {here.folder} but not in {there.folder}; "
                "both need the same folders, each with files: add them, or remove the class from both"
            )


Decoded = tuple[Images, list[str], npt.NDArray[np.floating[Any]]]
"""The images of a tree, the digest of each file's content, and the numbers that were read with each, (N, any)."""


def decode_tree(
    tree: Tree, read: Callable[[Path], tuple[Any, ...]], cache: str | None, key: Sequence[str]
) -> Decoded:
    """The files of a tree, decoded in parallel or read from the cache.

    read: returns of a file its image, (H, H, 3) uint8, the digest of its content, and any numbers. key: what
    decides about the images beside the files. Raises `UserError` for images of different sizes, and as `read`.
    """
    paths, folder = tree.paths(), tree.folder.resolve()

    def decode() -> Arrays:
        contents, facts = [], []
        with closing(read_all(paths, read, f"decoding {tree.folder}")) as results:
            for index, (image, content, *numbers) in enumerate(results):
                if index == 0:
                    pixels = np.empty((len(paths), *image.shape), np.uint8)
                if image.shape != pixels.shape[1:]:
                    raise UserError(
                        f"{paths[index]} is {image.shape[0]} pixels wide, {paths[0]} is {pixels.shape[1]}; "
                        "set dataset.image_size to bring all to one size"
                    )
                pixels[index] = image
                contents.append(content)
                facts.append(numbers)
        return [pixels, np.array(contents), np.array(facts)]

    state = file_state(tree.folder, tree.names)
    name = f"{folder.parent.name}-{folder.name}".strip("-")
    pixels, contents, facts = cached(cache, name, [str(folder), *key], state, decode)
    return Images(torch.from_numpy(pixels).permute(0, 3, 1, 2), tree.labels), contents.tolist(), facts


def _read(path: Path, image_size: int | None) -> tuple[npt.NDArray[np.uint8], str]:
    """The image, (H, H, 3), and the digest of its file's content."""
    content = content_of(path)
    image = read_rgb(content, str(path), upright=True)
    if image_size is not None:
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)
    elif image.width != image.height:
        raise UserError(
            f"{path} is {image.width} x {image.height} pixels, no square; set dataset.image_size to cut squares out"
        )
    return np.asarray(image), digest([content])
