"""L2BN (arXiv:2207.02625): batch normalization of features that are first made equal in their l2 norm.

The names below are the public interface. They are imported on first use, so that a light import such as
`import l2bn.errors` does not load torch.
"""

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from l2bn.norms.l2bn import L2BatchNorm1d, L2BatchNorm2d, L2BatchNorm3d, l2_normalize
    from l2bn.norms.swap import swap_norm

__all__ = ["L2BatchNorm1d", "L2BatchNorm2d", "L2BatchNorm3d", "l2_normalize", "swap_norm"]

__version__ = metadata.version("l2bn")

_HOMES = {**dict.fromkeys(__all__, "l2bn.norms.l2bn"), "swap_norm": "l2bn.norms.swap"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
