"""Training of runs, on POSIX systems: it needs their file locks and signals."""

import os

from l2bn.errors import UserError

try:
    import fcntl  # noqa: F401
    import resource  # noqa: F401
except ImportError as error:
    raise UserError(
        f"training needs a POSIX system, Linux or macOS ({error}); on Windows use WSL. "
        "The layer itself, `from l2bn import swap_norm`, works there"
    ) from error

SPINS, SPINS_OF_A_RUN = "GOMP_SPINCOUNT", "1000"

# Threads that wait for each other spin, by GNU OpenMP's default for milliseconds: longer than they wait on a quiet
# machine, but beside a busy process they keep the thread that they wait for from its core, and a step takes 2.4 to
# 3.8 times as long instead of 1.5 to 2.5 (results/benchmarks/waiting.md). The price is a tenth of the speed of
# steps of 8 images on a quiet machine. OpenMP reads this when torch loads it.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault(SPINS, SPINS_OF_A_RUN)
