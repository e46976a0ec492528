"""A feature map (N, C, ...) seen as rows of memory, without a copy: (N, C, P), or for channels_last (N, P, C).

`axis` is that of the positions P in the rows: 2, or 1 if the channels lie innermost. Inside a compiled model rows
(N, C, ...) keep the axes of the map, for the compiler may choose to store them in channels_last all the same.
"""

import math

import torch
from torch import Tensor


def position_axis(x: Tensor) -> int:
    """Where P stands when the map x is seen as rows without a copy: 1 if the channels lie innermost."""
    if x.shape[2:].numel() == 1:
        return 1
    return 1 if x.stride(1) == 1 and x.shape[1] > 1 else 2


def dense(x: Tensor, axis: int) -> Tensor:
    """x (N, C, ...) itself if its memory is that of dense rows, else a copy that is."""
    if axis == 2:
        return x.contiguous()
    channels_innermost = x.movedim(1, -1)
    return x if channels_innermost.is_contiguous() else channels_innermost.contiguous().movedim(-1, 1)


def as_rows(x: Tensor, axis: int) -> Tensor:
    if axis == 1:
        return x.movedim(1, -1).reshape(x.shape[0], -1, x.shape[1])
    return x if torch.compiler.is_compiling() else x.flatten(2)


def as_map(rows: Tensor, like: Tensor, axis: int) -> Tensor:
    if axis == 2 or like.stride(-1) == 1:  # the latter: one position, of which both formats may be said
        return rows.reshape(like.shape)
    return rows.reshape(like.movedim(1, -1).shape).movedim(-1, 1)


def positions_of(rows: Tensor, axis: int) -> int:
    return rows.shape[1] if axis == 1 else math.prod(rows.shape[2:])  # numel() would make a size a constant


def over_positions(rows: Tensor, axis: int) -> Tensor:
    """(N, C): sums over the positions."""
    return rows.sum(1 if axis == 1 else tuple(range(2, rows.ndim)))


def first_position(rows: Tensor, axis: int) -> Tensor:
    """(N, C)."""
    return rows[:, 0] if axis == 1 else rows.flatten(2)[:, :, 0]


def at_positions(t: Tensor, rows: Tensor, axis: int) -> Tensor:
    """(N, C) or (C,), to broadcast with rows."""
    return t.unsqueeze(-2) if axis == 1 else t.view(*t.shape, *[1] * (rows.ndim - 2))
