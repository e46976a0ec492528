"""A feature map (N, C, ...) seen as rows of memory, without a copy: (N, C, P), or for channels_last (N, P, C).

`axis` is that of the positions P in the rows: 2, or 1 if the channels lie innermost.
"""

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
    n, channels = x.shape[:2]
    return x.reshape(n, channels, -1) if axis == 2 else x.movedim(1, -1).reshape(n, -1, channels)


def as_map(rows: Tensor, like: Tensor, axis: int) -> Tensor:
    if axis == 2 or like.stride(-1) == 1:  # the latter: one position, of which both formats may be said
        return rows.reshape(like.shape)
    return rows.reshape(like.movedim(1, -1).shape).movedim(-1, 1)
