"""ImageNet, or any set too large for one disk, from WebDataset shards: tar files of some thousand images each.

A. Aizman, G. Maltby, T. Breuel, "High Performance I/O For Large Scale Deep Learning", arXiv:2001.01858. A sample is
two members that share their name up to the first dot: the image and `.cls`, its class number in decimal. The tar
headers are read once, into a cached index. After that a shard is read like a folder, by position and length, so
random crops, resuming at a step, the shares of several ranks, and evaluation work as with single files. Only the
order differs: it is drawn from a few shards at a time.
"""

import glob
import logging
import math
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor
from webdataset import ShardWriter

from l2bn.data.cache import Arrays, cached, file_state, status, temporary_folder, tracked
from l2bn.data.decode import read_rgb
from l2bn.data.folder import IMAGES, Tree, scan
from l2bn.data.imagenet import (
    DEVKIT,
    LICENCE,
    OnDisk,
    Version,
    evaluation_transform,
    list_splits,
    read_bytes,
    training_transform,
    version,
)
from l2bn.data.splits import Common, Splits, Transform, check_image_size, digest, make_splits
from l2bn.errors import UserError, expand
from l2bn.seeding import generator

log = logging.getLogger(__name__)

WINDOW = 16  # shards whose samples are shuffled together
PADDING = 2**20  # bytes of zeros that a tar file may end in; tools write 10 KiB
MOST_CLASSES = 10**6
UNEVEN = 0.1  # squared relative deviation of the classes' shares from shard to shard that a batch may have


def imagenet_wds(
    root: str,
    train: str = "train-*.tar",
    val: str = "val-*.tar",
    image_size: int = 224,
    cache: str | None = None,
    **common: Unpack[Common],
) -> Splits:
    """The shards in `root` whose names match `train` and `val`; the latter are the test set.

    cache: folder of the index; null: `l2bn` in the user's cache folder. The names of the classes are read from
    `root`/classes.txt if it exists; otherwise the classes are those that occur, numbered from 0 without a gap.
    """
    check_image_size(image_size)
    folder = expand(root)
    trained = _open(folder, train, training_transform(image_size), cache)
    tested = _open(folder, val, evaluation_transform(image_size), cache)
    if not trained.mixed:
        log.warning(
            "%s in %s: the shards hold different classes, so each batch is drawn from all shards, which takes "
            "longer on hard disks; samples packed in random order are read from %s shards at a time",
            train,
            folder,
            WINDOW,
        )
    both = set(trained.files) & set(tested.files)
    if both and not common.get("validation"):
        raise UserError(f"{min(both)} matches both dataset.train={train} and dataset.val={val}: give two patterns")
    names = folder / "classes.txt"
    classes: tuple[str, ...] = ()
    if names.is_file():
        text = names.read_text(encoding="utf-8", errors="surrogateescape")
        classes = tuple(line.strip() for line in text.rstrip().split("\n"))
    counts = torch.bincount(torch.cat([trained.labels, tested.labels]), minlength=len(classes))
    if classes and len(counts) > len(classes):
        raise UserError(
            f"{names} names {len(classes)} classes, but a sample has the class number {len(counts) - 1}"
        )
    if not classes and not counts.all():
        unused = counts.eq(0).nonzero().flatten().tolist()
        raise UserError(
            f"{folder}: the class numbers go up to {len(counts) - 1}, but no sample has {unused[0]}: number the "
            f"classes from 0 without a gap, or name all of them, one in each line, in {names}"
        )
    files = digest([trained.digest(), tested.digest(), *classes])
    return make_splits(trained, tested, len(counts), image_size, classes, files=files, **common)


@dataclass(frozen=True)
class Shards(OnDisk):
    """Samples in tar files, found by an index and decoded when asked; sorted by shard.

    mixed: each shard holds the classes in about the shares of all shards.
    """

    files: tuple[Path, ...]
    versions: tuple[Version, ...]  # of the files
    shard: Tensor  # (N,) index into files
    offset: Tensor  # (N,) of the image's first byte in its file
    size: Tensor  # (N,) of the image, in bytes
    labels: Tensor  # (N,) int64
    names: npt.NDArray[np.bytes_]  # (N,) of the image within its file
    transform: Transform
    mixed: bool = True

    def digest(self) -> str:
        """Digest over the shards' names and the name, the size in bytes and the label of each sample."""
        return digest(
            [*(file.name for file in self.files), *self.names.tolist(), self.shard, self.size, self.labels]
        )

    def __getitem__(self, index: int, /) -> tuple[Tensor, int]:
        shard = int(self.shard[index])
        path = self.files[shard]
        content = read_bytes(path, self.versions[shard], int(self.offset[index]), int(self.size[index]))
        image = read_rgb(content, f"{path}: {self.names[index].decode(errors='replace')}")
        return self.transform(pil_to_tensor(image)), int(self.labels[index])

    def order(self, generator: torch.Generator) -> Tensor:
        """All samples: the shards in random order, shuffled within each window of them.

        Shards that are not mixed would give batches of few classes: there the window holds all.
        """
        counts = torch.bincount(self.shard, minlength=len(self.files)).tolist()
        members = torch.split(torch.arange(len(self)), counts)
        dealt = torch.randperm(len(counts), generator=generator).tolist()
        size = WINDOW if self.mixed else len(counts)
        windows = [torch.cat([members[i] for i in dealt[at : at + size]]) for at in range(0, len(dealt), size)]
        return torch.cat([window[torch.randperm(len(window), generator=generator)] for window in windows])


def pack(tree: Tree, folder: Path, prefix: str, samples: int = 1000) -> int:
    """Write the files of a tree, as they are and in random order, to `folder`/`prefix`-000000.tar and so on.

    The order matters: a batch is mixed from a few shards only. Also writes `folder`/classes.txt. All shards appear
    in `folder` at once when they are complete. Returns the number of shards. Raises `UserError` if the folder
    already has such shards, and for a file that cannot be read or written.
    """
    _refuse_packed(folder, prefix)
    order = torch.randperm(len(tree.names), generator=generator(0, "pack")).tolist()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with temporary_folder(folder, ".packing-") as place:
            pattern = str(place / prefix).replace("%", "%%") + "-%06d.tar"
            with ShardWriter(pattern, maxcount=samples, verbose=0) as writer:
                for index in tracked(order, f"packing {tree.folder}"):
                    path = tree.folder / tree.names[index]
                    key = f"{index:08}-{path.stem.replace('.', '_')}"
                    suffix = path.suffix.lower().replace("jpeg", "jpg")[1:]
                    writer.write({"__key__": key, suffix: path.read_bytes(), "cls": int(tree.labels[index])})
            names = "".join(f"{name}\n" for name in tree.classes)
            (folder / "classes.txt").write_text(names, encoding="utf-8", errors="surrogateescape")
            shards = sorted(place.iterdir())
            for shard in shards:
                shard.replace(folder / shard.name)
    except OSError as error:
        raise UserError(
            f"{tree.folder} cannot be packed into {folder}: {error}; no {prefix}-*.tar was written"
        ) from error
    return len(shards)


def _refuse_packed(folder: Path, prefix: str) -> None:
    if any(folder.glob(f"{prefix}-*.tar")):
        raise UserError(f"{folder} holds {prefix}-*.tar already; remove them first or choose another folder")


def pack_imagenet(source: Path, folder: Path) -> None:
    """Write the files of ImageNet in `source` (see `imagenet`) as the shards that `imagenet_wds` reads.

    The few validation files come first: what is wrong with them shows before hours of packing. Raises `UserError`
    as `pack`.
    """
    for prefix in ("val", "train"):
        _refuse_packed(folder, prefix)
    trained, tested = list_splits(source, "train", "val", DEVKIT, option="--pack FOLDER")
    pack(tested, folder, "val")
    pack(trained, folder, "train")


def _open(folder: Path, pattern: str, transform: Transform, cache: str | None) -> Shards:
    found = glob.glob(pattern, root_dir=folder)  # noqa: PTH207 (Path.glob takes no absolute pattern)
    files = tuple(sorted(folder / name for name in found))
    if not files:
        if folder.is_dir():
            scan(folder)  # names the reason where the folder cannot be listed
        raise UserError(
            f"no shards in {folder.absolute()}: {pattern} is looked for. Name their folder by dataset.root=FOLDER, "
            f"or pack them from ImageNet's files by scripts/fetch_data.py imagenet_wds --pack FOLDER. {LICENCE}"
        )
    resolved = [file.resolve() for file in files]
    parent = resolved[0].parent
    versions = tuple(version(status(file)) for file in files)  # before they are read
    state = file_state(Path(), map(str, resolved))
    *columns, names = cached(cache, parent.name, [*map(str, resolved)], state, lambda: _index(files))
    shard, offset, size, labels = map(torch.from_numpy, columns)
    return Shards(files, versions, shard, offset, size, labels, names, transform, _are_mixed(shard, labels))


def _are_mixed(shard: Tensor, labels: Tensor) -> bool:
    """Tell whether the classes are spread over the shards as at random, or nearly so.

    Pearson's chi-square of the table of shards and classes may exceed what chance explains by `UNEVEN` for each
    sample: by the mean squared relative deviation of a class's share in one shard from its share in all.
    """
    shards, classes = torch.bincount(shard), torch.bincount(labels)
    cells, counts = torch.unique(shard * len(classes) + labels, return_counts=True)  # the table's entries above 0
    expected = shards[cells // len(classes)].double() * classes[cells % len(classes)] / len(labels)
    chi_square = float((counts**2 / expected).sum()) - len(labels)
    freedom = (int((shards > 0).sum()) - 1) * (int((classes > 0).sum()) - 1)
    return chi_square <= freedom + 5 * math.sqrt(2 * freedom) + UNEVEN * len(labels)


def _index(files: tuple[Path, ...]) -> Arrays:
    """Shard, offset, size, class and name of every sample, an array each."""
    shards = tracked(files, f"listing {files[0].parent}")
    rows = [(number, *sample) for number, shard in enumerate(shards) for sample in _samples(shard)]
    return [np.array(column) for column in zip(*rows, strict=True)]


Sample = tuple[int, int, int, bytes]
"""Offset and size of its image in the shard, in bytes; its class; the name of the image."""


def _samples(file: Path) -> list[Sample]:
    """The samples of a shard. Raises `UserError` for a file that is no shard."""
    try:
        with tarfile.open(file, "r:") as tar:
            members = _members(file, tar)
            _check_end(file, tar)
            found = [_sample(file, tar, key, parts) for key, parts in members.items()]
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as an uncompressed tar file of samples: {error}") from error
    samples = [sample for sample in found if sample is not None]
    if not samples:
        raise UserError(f"no samples in {file}; remove the file or pack it anew")
    return samples


def _members(file: Path, tar: tarfile.TarFile) -> dict[str, dict[str, tarfile.TarInfo]]:
    """The files of a shard but hidden ones, by the name up to its first dot and by the rest in lower case."""
    found: dict[str, dict[str, tarfile.TarInfo]] = {}
    for member in tar:
        folder, _, name = member.name.rpartition("/")
        key, _, kind = name.partition(".")
        if not member.isfile() or not key:
            continue
        parts = found.setdefault(f"{folder}/{key}".lstrip("/"), {})
        if f".{kind.lower()}" in parts:
            raise UserError(
                f"{file} holds {member.name} twice, and one sample would replace the other; "
                "pack it again with a key for each sample"
            )
        parts[f".{kind.lower()}"] = member
    return found


def _sample(file: Path, tar: tarfile.TarFile, key: str, parts: dict[str, tarfile.TarInfo]) -> Sample | None:
    """The sample of these members; None if they are none, such as README.md."""
    image = next((parts[suffix] for suffix in IMAGES.suffixes if suffix in parts), None)
    labels = [kind for kind in parts if kind.endswith(".cls")]
    if image is None and not labels:
        return None
    label = tar.extractfile(parts[".cls"]) if labels == [".cls"] else None
    if image is None or label is None:
        raise UserError(
            f"{file}: the sample {key} needs an image ({', '.join(IMAGES.suffixes)}) and its class number (.cls), "
            f"but has {', '.join(sorted(parts))}; pack it again (its name ends at its first dot)"
        )
    text = label.read()
    if not text.strip().isdigit() or int(text) >= MOST_CLASSES:
        raise UserError(
            f"{file}: the class of the sample {key} is {text[:40]!r}; "
            f".cls must hold a number from 0 to {MOST_CLASSES - 1}"
        )
    return image.offset_data, image.size, int(text), image.name.encode(errors="surrogateescape")


def _check_end(file: Path, tar: tarfile.TarFile) -> None:
    """Raise UserError unless a shard that was read to its end ends as a tar file does, in a block of zeros.

    tarfile takes a damaged header for the end, and so the first block of zeros between two files in one.
    """
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    rest = tar.fileobj.read(PADDING + 1)
    if not tarfile.BLOCKSIZE <= len(rest) <= PADDING or rest.strip(b"\0"):
        raise UserError(
            f"{file} is cut short or damaged after {len(tar.getmembers()):,} files, or is several tar files in "
            "one: fetch it or pack it again"
        )
