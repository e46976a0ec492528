"""ImageNet, or any set too large for one disk, from WebDataset shards: tar files of some thousand images each.

A. Aizman, G. Maltby, T. Breuel, "High Performance I/O For Large Scale Deep Learning", arXiv:2001.01858. A sample is
two members that share their name up to the first dot: the image and `.cls`, its class number in decimal. The tar
headers are read once, into a cached index. After that a shard is read like a folder, by position and length, so
that all else (random crops, resuming at a step, shares of several ranks, evaluation) is that of single files. Only
the order differs: it keeps to a few shards at a time.
"""

import tarfile
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Unpack
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import pil_to_tensor
from webdataset import ShardWriter

from l2bn.data.cache import cache_file, fingerprint, replacing
from l2bn.data.decode import read_rgb
from l2bn.data.folder import SUFFIXES, Tree
from l2bn.data.imagenet import DEVKIT, LICENCE, evaluation_transform, list_splits, training_transform
from l2bn.data.progress import tracked
from l2bn.data.splits import Common, Splits, Transform, check_image_size, digest, make_splits
from l2bn.errors import UserError
from l2bn.seeding import generator

# A batch comes from one of LANES sequences of shards, the next batch from the next. A number of workers that
# divides LANES therefore splits the shards among the workers, and any number makes the same batches.
LANES = 24
WINDOW = 4  # shards of a lane whose samples are shuffled together
COLUMNS = ("shard", "offset", "size", "label", "name")  # of the index


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
    `root`/classes.txt if it is there; otherwise the highest class number says how many there are.
    """
    check_image_size(image_size)
    folder = Path(root).expanduser()
    trained = _open(folder, train, training_transform(image_size), cache)
    tested = _open(folder, val, evaluation_transform(image_size), cache)
    names = folder / "classes.txt"
    classes = tuple(names.read_text().split("\n")[:-1]) if names.is_file() else ()
    count = 1 + int(torch.cat([trained.labels, tested.labels]).max())
    if classes and count > len(classes):
        raise UserError(f"{names} names {len(classes)} classes, but a sample has the class number {count - 1}")
    files = digest([trained.digest(), tested.digest(), *classes])
    return make_splits(trained, tested, len(classes) or count, image_size, classes, files=files, **common)


@dataclass(frozen=True)
class Shards(Dataset[tuple[Tensor, int]]):
    """Samples in tar files, found by an index and decoded when asked; sorted by shard."""

    files: tuple[Path, ...]
    shard: Tensor  # (N,) index into files
    offset: Tensor  # (N,) of the image's first byte in its file
    size: Tensor  # (N,) of the image, in bytes
    labels: Tensor  # (N,) int64
    names: npt.NDArray[np.bytes_]  # (N,) of the image within its file
    transform: Transform

    def __len__(self) -> int:
        return len(self.labels)

    def digest(self) -> str:
        """Digest over the shards' names and the name, the size in bytes and the label of each sample."""
        return digest(
            [*(file.name for file in self.files), *self.names.tolist(), self.shard, self.size, self.labels]
        )

    def __getitem__(self, index: int, /) -> tuple[Tensor, int]:
        path = self.files[int(self.shard[index])]
        with path.open("rb") as file:
            file.seek(int(self.offset[index]))
            content = file.read(int(self.size[index]))
        image = read_rgb(content, f"{path}: {self.names[index].decode(errors='replace')}")
        return self.transform(pil_to_tensor(image)), int(self.labels[index])

    def select(self, indices: Tensor, like: Any = None) -> "Shards":
        return replace(
            self,
            shard=self.shard[indices],
            offset=self.offset[indices],
            size=self.size[indices],
            labels=self.labels[indices],
            names=self.names[indices.numpy()],
            transform=self.transform if like is None else like.transform,
        )

    def plan(self, generator: torch.Generator, batch_size: int) -> list[Tensor]:
        """The samples at each step of an epoch; the shards are dealt out anew in each."""
        counts = torch.bincount(self.shard, minlength=len(self.files)).tolist()
        members = torch.split(torch.arange(len(self)), counts)
        dealt = torch.randperm(len(self.files), generator=generator).tolist()
        filled = [shard for shard in dealt if counts[shard]]
        lanes = [filled[lane::LANES] for lane in range(min(LANES, len(filled)))]
        mixed = [self._mixed([members[shard] for shard in lane], generator) for lane in lanes]
        pieces = [torch.split(lane, batch_size) for lane in mixed]
        turns = [piece for turn in zip_longest(*pieces) for piece in turn if piece is not None]
        full = [piece for piece in turns if len(piece) == batch_size]
        rest = torch.cat([torch.empty(0, dtype=torch.int64), *(p for p in turns if len(p) < batch_size)])
        shuffled = rest[torch.randperm(len(rest), generator=generator)]
        return [*full, *torch.split(shuffled, batch_size)[: len(rest) // batch_size]]

    def _mixed(self, shards: list[Tensor], generator: torch.Generator) -> Tensor:
        """All samples of the shards, shuffled within each window of shards."""
        windows = [torch.cat(shards[start : start + WINDOW]) for start in range(0, len(shards), WINDOW)]
        return torch.cat([window[torch.randperm(len(window), generator=generator)] for window in windows])


def pack(tree: Tree, folder: Path, prefix: str, samples: int = 1000) -> int:
    """Write the files of a tree, as they are and in random order, to `folder`/`prefix`-000000.tar and so on.

    The order matters: a batch is mixed from a few shards only. Also writes `folder`/classes.txt. Returns the
    number of shards. Raises `UserError` if there are such shards already.
    """
    if any(folder.glob(f"{prefix}-*.tar")):
        raise UserError(f"{folder} holds {prefix}-*.tar already; remove them first or choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    order = torch.randperm(len(tree.names), generator=generator(0, "pack")).tolist()
    pattern = str(folder / prefix).replace("%", "%%") + "-%06d.tar"
    with ShardWriter(pattern, maxcount=samples, verbose=0) as writer:
        for index in tracked(order, f"packing {tree.folder}"):
            path = tree.folder / tree.names[index]
            suffix = path.suffix.lower().replace("jpeg", "jpg")
            key = f"{index:08}-{path.stem.replace('.', '_')}"
            writer.write({"__key__": key, suffix[1:]: path.read_bytes(), "cls": int(tree.labels[index])})
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in tree.classes))
    return -(-len(order) // samples)


def pack_imagenet(source: Path, folder: Path) -> None:
    """Write the files of ImageNet in `source` (see `imagenet`) as the shards that `imagenet_wds` reads."""
    for tree, prefix in zip(list_splits(source, "train", "val", DEVKIT), ("train", "val"), strict=True):
        pack(tree, folder, prefix)


def _open(folder: Path, pattern: str, transform: Transform, cache: str | None) -> Shards:
    files = tuple(sorted(folder.glob(pattern)))
    if not files:
        raise UserError(
            f"no shards in {folder.absolute()}: {pattern} is looked for. Name their folder by dataset.root=FOLDER, "
            f"or pack them from ImageNet's files by scripts/fetch_data.py imagenet_wds --pack FOLDER. {LICENCE}"
        )
    index = _index(files, cache)
    shard, offset, size, labels = (torch.from_numpy(index[key]) for key in COLUMNS[:4])
    return Shards(files, shard, offset, size, labels, index["name"], transform)


def _index(files: tuple[Path, ...], cache: str | None) -> dict[str, npt.NDArray[Any]]:
    """Arrays with one entry a sample, from the cache if the shards are still the same."""
    resolved = [file.resolve() for file in files]
    file = cache_file(cache, files[0].parent.resolve().name, *map(str, resolved))
    state = fingerprint(resolved)
    try:
        with file.open("rb") as stream, np.load(stream) as stored:
            if str(stored["fingerprint"]) == state:
                return {key: stored[key] for key in COLUMNS}
    except (OSError, ValueError, EOFError, KeyError, BadZipFile):
        pass  # never made, or cut short: made anew
    shards = tracked(files, f"listing {files[0].parent}")
    rows = [(number, *sample) for number, shard in enumerate(shards) for sample in _samples(shard)]
    index: dict[str, Any] = {
        key: np.array(column) for key, column in zip(COLUMNS, zip(*rows, strict=True), strict=True)
    }
    with replacing(file) as temporary, temporary.open("wb") as output:
        np.savez(output, fingerprint=np.array(state), **index)
    return index


def _samples(file: Path) -> list[tuple[int, int, int, bytes]]:
    """Offset, size, class and name of each image of a shard. Raises `UserError` for a file that is none."""
    found: dict[str, dict[str, tarfile.TarInfo]] = {}
    samples = []
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                key, _, kind = name.partition(".")
                if member.isfile():
                    found.setdefault(f"{folder}/{key}", {})[f".{kind.lower()}"] = member
            for key, parts in found.items():
                image = next((parts[suffix] for suffix in SUFFIXES if suffix in parts), None)
                label = tar.extractfile(parts[".cls"]) if ".cls" in parts else None
                if image is None or label is None:
                    raise UserError(
                        f"{file}: the sample {key.removeprefix('/')} needs an image ({', '.join(SUFFIXES)}) and "
                        f"its class number (.cls), but has {', '.join(sorted(parts))}"
                    )
                number = int(label.read())
                if number < 0:
                    raise ValueError(f"{parts['.cls'].name} holds the class number {number}")
                image_name = image.name.encode(errors="surrogateescape")
                samples.append((image.offset_data, image.size, number, image_name))
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as an uncompressed tar file of samples: {error}") from error
    if not samples:
        raise UserError(f"no samples in {file}; remove the file or pack it anew")
    return samples
