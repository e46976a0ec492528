"""Images of any size, decoded and made smaller once, and kept on disk: where decoding keeps the device waiting.

Two files in the cache: the pixels of all images, one after the other, and an index with the place of each. It is
written last and holds a fingerprint of the files that they were made of, so that both are made anew when one of
those has changed.
"""

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import pil_to_tensor, resize

from l2bn.data.cache import cache_file, fingerprint, replacing
from l2bn.data.decode import read_rgb
from l2bn.data.folder import CHUNK, Tree
from l2bn.data.progress import tracked
from l2bn.data.splits import Transform

FORMAT = "1"  # to be raised when the same files would give other pixels


@dataclass(frozen=True)
class DecodedImages(Dataset[tuple[Tensor, int]]):
    """Images of any size in one file of pixels, read when asked."""

    file: Path
    offset: Tensor  # (N,) of the image's first byte
    height: Tensor  # (N,) in pixels
    width: Tensor  # (N,)
    labels: Tensor  # (N,) int64
    transform: Transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int, /) -> tuple[Tensor, int]:
        shape = int(self.height[index]), int(self.width[index]), 3
        content = bytearray(shape[0] * shape[1] * 3)
        with self.file.open("rb") as file:
            file.seek(int(self.offset[index]))
            file.readinto(content)
        image = torch.frombuffer(content, dtype=torch.uint8).view(shape).permute(2, 0, 1)
        return self.transform(image), int(self.labels[index])

    def select(self, indices: Tensor, like: Any = None) -> "DecodedImages":
        return replace(
            self,
            offset=self.offset[indices],
            height=self.height[indices],
            width=self.width[indices],
            labels=self.labels[indices],
            transform=self.transform if like is None else like.transform,
        )


def decoded(tree: Tree, side: int, cache: str | None, transform: Transform) -> DecodedImages:
    """The images of a tree, their shorter side resized to `side` pixels, from the cache if they are there.

    cache: folder of it; null: `l2bn` in the user's cache folder. Raises `UserError` for a file that cannot be
    decoded, and for a cache that cannot be written.
    """
    index_file = cache_file(cache, f"{tree.folder.name}-{side}", str(tree.folder.resolve()), str(side), FORMAT)
    pixel_file = index_file.with_name(f"{index_file.name}.pixels")
    state = fingerprint(tree.paths())
    sizes = _sizes(index_file, pixel_file, state)
    if sizes is None:
        sizes = _write(tree, side, pixel_file)
        with replacing(index_file) as temporary, temporary.open("wb") as output:
            np.savez(output, fingerprint=np.array(state), sizes=sizes)
    height, width = (torch.from_numpy(column.astype(np.int64)) for column in sizes.T)
    lengths = 3 * height * width
    return DecodedImages(pixel_file, lengths.cumsum(0) - lengths, height, width, tree.labels, transform)


def _sizes(index_file: Path, pixel_file: Path, state: str) -> npt.NDArray[np.int32] | None:
    """Height and width of each image, (N, 2), if all are there and made of the same files."""
    try:
        with index_file.open("rb") as stream, np.load(stream) as stored:
            sizes: npt.NDArray[np.int32] = stored["sizes"]
            whole = pixel_file.stat().st_size == 3 * int(sizes.astype(np.int64).prod(1).sum())
            return sizes if whole and str(stored["fingerprint"]) == state else None
    except (OSError, ValueError, EOFError, KeyError, BadZipFile):
        return None  # never made, or cut short


def _write(tree: Tree, side: int, pixel_file: Path) -> npt.NDArray[np.int32]:
    """Write the pixels; height and width of each image, (N, 2)."""
    paths = tree.paths()
    sizes = np.empty((len(paths), 2), np.int32)
    workers = ProcessPoolExecutor(min(os.cpu_count() or 1, len(paths) // CHUNK + 1))
    with workers, replacing(pixel_file) as temporary, temporary.open("wb") as output:
        images = workers.map(partial(_read, side=side), paths, chunksize=CHUNK)
        try:
            for number, image in enumerate(tracked(images, f"decoding {tree.folder}", len(paths))):
                sizes[number] = image.shape[:2]
                output.write(image.data)
        except BaseException:
            workers.shutdown(cancel_futures=True)
            raise
    return sizes


def _read(path: Path, side: int) -> npt.NDArray[np.uint8]:
    """(height, width, 3), the shorter of both `side`."""
    image = resize(pil_to_tensor(read_rgb(path, str(path))), [side], antialias=True)
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy())
