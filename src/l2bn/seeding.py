"""Randomness as a pure function of (seed, purpose, position): a checkpoint has none to carry.

A permutation, an augmentation or a dropout mask is drawn from a generator made for its place in the run. A resumed
run therefore draws the same numbers as an uninterrupted one, whatever the number of data workers or the order in
which they finish.
"""

import hashlib
import random

import numpy as np
import torch


def derive_seed(seed: int, purpose: str, *position: int) -> int:
    """Return a 63-bit seed for one purpose ("permutation", ...) at one position (epoch, step, ...)."""
    text = ":".join([str(seed), purpose, *map(str, position)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int, purpose: str, *position: int) -> torch.Generator:
    """Return a CPU generator seeded by `derive_seed`; drawing on the CPU gives every device the same numbers."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose, *position))


def seed_global(seed: int, device: torch.device) -> None:
    """Seed the generators that weights, dropout and the like are drawn from: Python's, NumPy's, torch's.

    Of torch's the CPU's and this device's alone: `torch.manual_seed` seeds all, which takes ten times as long. A
    network of the user's own may draw from Python's and NumPy's.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(seed)
