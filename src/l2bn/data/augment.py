"""Augmentation of whole batches in memory: random numbers for each sample, one call for all."""

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
        pixels = images.movedim(1, -1)  # (N, H, W, 3): the pixels of a row lie in one piece
        if self.padding:
            pixels = _windows(F.pad(pixels, [0, 0, *[self.padding] * 4]), row, column, pixels.shape[1:])
        if self.flip:
            both = torch.cat([pixels, pixels.flip(2)])
            pixels = both.index_select(0, torch.arange(len(pixels), device=pixels.device) + mirror * len(pixels))
        return pixels.movedim(-1, 1)


def _windows(padded: Tensor, row: Tensor, column: Tensor, size: torch.Size) -> Tensor:
    """The window of `size` (H, W, 3) at (row, column) of each padded image, by one `index_select`.

    A row of a window is a piece of memory, which may begin at any pixel; so "all pieces of that length" is a view
    of the batch, whose first dimension walks through the memory a byte at a time. Indexing by rows and columns
    instead takes forty times as long.
    """
    count, height, width, channels = padded.shape
    length = size[1] * channels
    pieces = padded.contiguous().view(-1).as_strided((padded.numel() - length + 1, length), (1, 1))
    first = ((torch.arange(count, device=padded.device) * height + row) * width + column) * channels
    rows = torch.arange(size[0], device=padded.device) * (width * channels)
    return pieces.index_select(0, (first[:, None] + rows).flatten()).view(count, *size)
