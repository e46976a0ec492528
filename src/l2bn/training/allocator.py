"""Memory of the CPU that a training step has freed, kept for the next one."""

import ctypes

# malloc.h of glibc
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4


def keep_freed_memory() -> bool:
    """Have this process keep what it frees instead of giving it back to the kernel; whether that could be set.

    A block of over 32 MB, which a feature map of a training step easily is, glibc maps anew at each allocation, and
    every one of its pages is then cleared and entered by the kernel at its first touch. That takes longer than the
    arithmetic: forward and backward of batch norm on a 128 x 64 x 32 x 32 map went from 20 to 5 ms on two cores
    without it. The process holds on to the most that it has ever used. Without glibc nothing changes.
    """
    return _set({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1})


def free_as_usual() -> bool:
    """Undo it, for what a benchmark compares with: glibc's thresholds, as high as it lets them grow by itself."""
    return _set({_M_MMAP_MAX: 65536, _M_MMAP_THRESHOLD: 32 << 20, _M_TRIM_THRESHOLD: 64 << 20})


def _set(options: dict[int, int]) -> bool:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(option, value) for option, value in options.items())
