"""Fashion-MNIST from its official files: grayscale images of clothes in the IDX format, gzipped or not.

H. Xiao, K. Rasul, R. Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms",
arXiv:1708.07747.
"""

import gzip
import hashlib
import logging
import math
import zlib
from pathlib import Path
from typing import Unpack

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import datasets

from l2bn.data.archive import Archive, fetch
from l2bn.data.splits import Common, Images, Splits, make_splits
from l2bn.errors import UserError, expand

log = logging.getLogger(__name__)

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist
ARCHIVES = {
    name.removesuffix(".gz"): Archive(datasets.FashionMNIST.mirrors[0] + name, md5)
    for name, md5 in datasets.FashionMNIST.resources
}


MD5 = {  # of the unpacked files, which Debian packs anew
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
}
COUNTS = 60_000, 10_000  # training and test images


def fashion_mnist(root: str, download: bool = True, **common: Unpack[Common]) -> Splits:
    """60,000 training and 10,000 test images in 10 classes, repeated to RGB.

    The 28 x 28 pixels get a border of 2, black as the background, so that they are 32 x 32 and every network that
    halves the size of CIFAR images halves theirs alike.

    Each file is read from `root`, from `root`/FashionMNIST/raw, where torchvision puts it, or from Debian's
    package, and is otherwise downloaded to `root`. Gzipped files are read as they are; it takes half a second.
    """
    values, changed = {}, []
    for name in MD5:
        path = _find(name, expand(root), download)
        content = _content(path)
        values[name] = _values(content, path, (28, 28) if "idx3" in name else ())
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != MD5[name]:
            changed.append(str(path))
    if changed:
        log.warning(
            "by their md5 sums these are not the official files of Fashion-MNIST: %s; those of MNIST, KMNIST and "
            "EMNIST have the same names",
            ", ".join(changed),
        )
    train, test = (
        Images(_rgb(values[f"{part}-images-idx3-ubyte"]), values[f"{part}-labels-idx1-ubyte"].long())
        for part in ("train", "t10k")
    )
    classes = tuple(datasets.FashionMNIST.classes)
    return make_splits(train, test, 10, 32, classes, whole=(10, *COUNTS), intact=not changed, **common)


def _find(name: str, root: Path, download: bool) -> Path:
    for folder in (root, root / "FashionMNIST" / "raw", DEBIAN):
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    archive = ARCHIVES[name]
    return fetch(
        archive,
        root,
        download,
        f"Looked for {name}, gzipped or not, in {root.absolute()}, in FashionMNIST/raw below it and in {DEBIAN}. "
        f"Either download {archive.url} (md5 {archive.md5}) by hand and put it there, or name the folder of "
        "all four by dataset.root=FOLDER, or install Debian's package dataset-fashion-mnist",
    )


def _content(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be unpacked: {error}; download it again") from error


def _values(content: bytes, path: Path, shape: tuple[int, ...]) -> Tensor:
    """The images (N, 28, 28) or the labels (N,) of an IDX file; shape: of one of them.

    Its bytes are 0, 0, 8 for unsigned bytes, the number of dimensions, their sizes, and the values.
    """
    sizes = int.from_bytes(content[4:8], "big"), *shape
    header = bytes([0, 0, 8, len(sizes)]) + b"".join(size.to_bytes(4, "big") for size in sizes)
    if not content.startswith(header) or len(content) != len(header) + math.prod(sizes):
        kind = "images of 28 x 28 pixels" if shape else "labels"
        raise UserError(f"{path} is no complete IDX file of {kind}; download it again")
    values = torch.from_numpy(np.frombuffer(content, np.uint8, offset=len(header)).reshape(sizes).copy())
    if not shape and values.numel() and int(values.max()) > 9:
        raise UserError(
            f"{path} holds labels up to {int(values.max())}, not 0 to 9: it is of another data set, perhaps "
            "EMNIST; name the folder of Fashion-MNIST by dataset.root=FOLDER"
        )
    return values


def _rgb(images: Tensor) -> Tensor:
    """(N, 28, 28) -> (N, 3, 32, 32)."""
    return F.pad(images.unsqueeze(1), (2, 2, 2, 2)).repeat(1, 3, 1, 1)
