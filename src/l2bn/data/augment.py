"""Augmentation of whole batches in memory: random numbers for each sample, one call for all."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from l2bn.data.splits import LARGEST_IMAGE, Augmentation

MOST_PADDING = 256  # pixels; the padded batch is held in memory
RANDOM = 2**31  # random integers below it give remainders that are equally likely to within 1 in 250,000


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


@dataclass(frozen=True)
class ShiftMask(Augmentation):
    """Shift a spectrogram in time, then mask a stretch of its time and a band of its frequencies.

    The masks are those of SpecAugment (Park et al., arXiv:1904.08779): every width up to the widest is equally
    likely, and what is masked becomes the mean of the clip. The shift is circular, a crop in time of the repeated
    clip. Time runs along the rows of the image.

    shift: most frames by which a clip is shifted, either way. time: most frames that are masked. frequency: most
    bands that are masked. 0 is none.
    """

    shift: int
    time: int
    frequency: int

    def __post_init__(self) -> None:
        for name in ("shift", "time", "frequency"):
            if not 0 <= getattr(self, name) <= LARGEST_IMAGE:
                raise ValueError(f"{name}={getattr(self, name)}: give a number of pixels from 0 to {LARGEST_IMAGE}")

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, 5): the shift, then width and place of either mask; `apply` takes remainders of them."""
        return torch.randint(RANDOM, (count, 5), generator=generator)

    def apply(self, images: Tensor, numbers: Tensor) -> Tensor:
        shift, frames, frame, bands, band = numbers.unbind(1)
        pixels = images.movedim(1, -1)  # (N, H, W, 3)
        height, width = pixels.shape[1:3]
        if self.shift:
            column = (shift % (2 * self.shift + 1) - self.shift) % width
            pixels = _windows(torch.cat([pixels, pixels], 2), torch.zeros_like(column), column, pixels.shape[1:])
        time = _stretch(frames, frame, self.time, width)[:, None, :, None]
        frequency = _stretch(bands, band, self.frequency, height)[:, :, None, None]
        total = pixels.sum((1, 2), keepdim=True, dtype=torch.int64)  # integers give every device the same mean
        area = height * width
        mean = ((total + area // 2) // area).to(torch.uint8)
        return torch.where(time | frequency, mean, pixels).movedim(-1, 1)


def _stretch(length: Tensor, start: Tensor, longest: int, size: int) -> Tensor:
    """(N, size): True in one stretch of up to `longest` places, by the remainders of two random integers each."""
    length = length % (min(longest, size) + 1)
    first = start % (size - length + 1)
    place = torch.arange(size, device=length.device)
    return (place >= first[:, None]) & (place < (first + length)[:, None])


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
