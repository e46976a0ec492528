"""Augmentation of whole batches in memory: every sample has its own random numbers, and no sample its own call."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from l2bn.data.splits import Augmentation

MOST_PADDING = 256  # pixels; the padded batch is held in memory


@dataclass(frozen=True)
class CropFlip(Augmentation):
    """Pad with zeros on all sides, crop a random window of the old size, mirror half of the images.

    The usual augmentation of CIFAR (He et al., "Deep Residual Learning for Image Recognition", arXiv:1512.03385,
    section 4.2: padding 4).

    padding: pixels on each side, 0 for none. flip: whether to mirror left and right.
    """

    padding: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.padding <= MOST_PADDING:
            raise ValueError(f"padding={self.padding}: give a number of pixels from 0 to {MOST_PADDING}")

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, 3): row and column of the window's corner, each from 0 to 2 * padding, and 1 to mirror."""
        corner = torch.randint(2 * self.padding + 1, (count, 2), generator=generator)
        mirror = torch.randint(1 + self.flip, (count, 1), generator=generator)
        return torch.cat([corner, mirror], dim=1)

    def apply(self, images: Tensor, numbers: Tensor) -> Tensor:
        row, column, mirror = numbers.unbind(1)
        if self.padding:
            images = _windows(F.pad(images, [self.padding] * 4), row, column, images.shape[-2:])
        if self.flip:
            both = torch.cat([images, images.flip(-1)])
            images = both.index_select(0, torch.arange(len(images), device=images.device) + mirror * len(images))
        return images


def _windows(padded: Tensor, row: Tensor, column: Tensor, size: torch.Size) -> Tensor:
    """The window of `size` at (row, column) of each image, by one `index_select` over all windows.

    Windows overlap, so "all windows of the batch" is a view: its first dimension walks through the memory one
    pixel at a time, the others span a window. Indexing by rows and columns instead takes forty times as long.
    """
    count, channels, height, width = padded.shape
    image, plane = channels * height * width, height * width
    last = (channels - 1) * plane + (size[0] - 1) * width + size[1] - 1  # from a window's first pixel to its last
    view = padded.as_strided((padded.numel() - last, channels, *size), (1, plane, width, 1))
    start = torch.arange(count, device=padded.device) * image + row * width + column
    return view.index_select(0, start)
