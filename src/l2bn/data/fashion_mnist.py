"""Fashion-MNIST from its official files: grayscale images of clothes in the IDX format, gzipped or not.

H. Xiao, K. Rasul, R. Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms",
arXiv:1708.07747.
"""

import gzip
import zlib
from pathlib import Path
from typing import Unpack

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import datasets

from l2bn.data.archive import Archive, fetch
from l2bn.data.cache import expand
from l2bn.data.splits import Common, Images, Splits, make_splits
from l2bn.errors import UserError

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist
ARCHIVES = {
    name.removesuffix(".gz"): Archive(datasets.FashionMNIST.mirrors[0] + name, md5)
    for name, md5 in datasets.FashionMNIST.resources
}


def fashion_mnist(root: str, download: bool = True, **common: Unpack[Common]) -> Splits:
    """60,000 training and 10,000 test images in 10 classes, repeated to RGB.

    The 28 x 28 pixels get a border of 2, black as the background, so that they are 32 x 32 and every network that
    halves the size of CIFAR images halves theirs alike.

    Each file is read from `root`, from `root`/FashionMNIST/raw, where torchvision puts it, or from Debian's
    package, and is otherwise downloaded to `root`. Gzipped files are read as they are; it takes half a second.
    """
    place = expand(root)
    train, test = (
        Images(
            _pixels(_find(f"{part}-images-idx3-ubyte", place, download)),
            _read(_find(f"{part}-labels-idx1-ubyte", place, download), dimensions=1).long(),
        )
        for part in ("train", "t10k")
    )
    return make_splits(train, test, 10, 32, tuple(datasets.FashionMNIST.classes), **common)


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


def _pixels(path: Path) -> Tensor:
    """(N, 3, 32, 32)."""
    images = _read(path, dimensions=3)
    if images.shape[1:] != (28, 28):
        raise UserError(f"{path} holds images of {images.shape[1]} x {images.shape[2]} pixels, not 28 x 28")
    return F.pad(images.unsqueeze(1), (2, 2, 2, 2)).repeat(1, 3, 1, 1)


def _read(path: Path, dimensions: int) -> Tensor:
    """The bytes of an IDX file: 0, 0, 8 for unsigned bytes, the number of dimensions, their sizes, the values."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be unpacked: {error}; download it anew") from error
    start = 4 + 4 * dimensions
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4)]
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) != start + int(np.prod(shape)):
        raise UserError(f"{path} is no complete IDX file of unsigned bytes in {dimensions} dimensions")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy())
