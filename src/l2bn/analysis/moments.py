"""Sums over images from which every measure of their features is computed, in one pass over the images.

Letters: N images of a batch, K classes, d features, B bins of a histogram.

Plain float64 sums, so those of several processes add up. A variance is a difference of two of them; the digits
lost to cancellation are ones that float32 features lack as well.
"""

from dataclasses import dataclass
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from l2bn.records import BINS_PER_OCTAVE

OCTAVES = 64  # norms are resolved from 2^-64 to 2^64


@dataclass(frozen=True)
class Moments:
    """Sums over the images of each class, of a feature's pooled values z (d,) and of its whole l2 norm r."""

    counts: Tensor  # (K,) images
    sums: Tensor  # (K, d) of z
    directions: Tensor  # (K, d) of z / ||z||, 0 for z = 0
    squares: Tensor  # (K,) of ||z||^2
    products: Tensor  # (d, d) of z z^T, over all classes
    norms: Tensor  # (K,) of r
    squared_norms: Tensor  # (K,) of r^2
    histogram: Tensor  # (B,) images by log2 r

    @classmethod
    def zeros(cls, classes: int, size: int, device: torch.device) -> Self:
        k, d, bins = classes, size, 2 * OCTAVES * BINS_PER_OCTAVE
        shapes = ((k,), (k, d), (k, d), (k,), (d, d), (k,), (k,), (bins,))
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Add the features of a batch, (N, d) or maps (N, d, ...), and their classes (N,)."""
        z = pooled(features).double()
        r = l2_norms(features).double()
        one = torch.ones_like(r)
        length = torch.linalg.vector_norm(z, dim=1)
        self.counts.index_add_(0, labels, one)
        self.sums.index_add_(0, labels, z)
        self.directions.index_add_(0, labels, z / torch.where(length > 0, length, one)[:, None])
        self.squares.index_add_(0, labels, length.square())
        self.products.addmm_(z.T, z)
        self.norms.index_add_(0, labels, r)
        self.squared_norms.index_add_(0, labels, r.square())
        half = OCTAVES * BINS_PER_OCTAVE
        place = (r.log2() * BINS_PER_OCTAVE).floor().clamp(-half, half - 1).nan_to_num(nan=0.0)
        self.histogram.index_add_(0, place.long() + half, r.isfinite().double())

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The sums, in the order of their names."""
        return tuple(vars(self).values())

    def join(self) -> None:
        """Add up the sums of all processes, in each of them."""
        for total in self.tensors:
            dist.all_reduce(total)


def pooled(features: Tensor) -> Tensor:
    """(N, d, ...) to (N, d) float32 at least: the mean over the positions."""
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    return wide.mean(dim=tuple(range(2, wide.ndim))) if wide.ndim > 2 else wide


def l2_norms(features: Tensor) -> Tensor:
    """(N, ...) to (N,) float32 at least: the l2 norm over everything but the images."""
    dtype = torch.promote_types(features.dtype, torch.float32)
    return torch.linalg.vector_norm(features, dim=tuple(range(1, features.ndim)), dtype=dtype)
