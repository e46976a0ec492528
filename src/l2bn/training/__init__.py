"""Training of runs, on POSIX systems: it needs their file locks and signals."""

from l2bn.errors import UserError

try:
    import fcntl  # noqa: F401
    import resource  # noqa: F401
except ImportError as error:
    raise UserError(
        f"training needs a POSIX system, Linux or macOS ({error}); on Windows use WSL. "
        "The layer itself, `from l2bn import swap_norm`, works there"
    ) from error
