"""The one exception that a user is meant to read.

Hydra prints a `CompactHydraException` without a traceback and goes on with the other runs of a sweep.
"""

from hydra.errors import CompactHydraException


class UserError(CompactHydraException):
    """A mistake that the user can mend: the message says what was given, what is accepted and what to do."""
