"""Advice on runs of L2BN and its controls: features of unit norm have small variances, beside which eps and the
start of the running variance at 1 are large.
"""

import logging
import math
from collections.abc import Mapping

from torch import nn

from l2bn.norms.stepped import SteppedBatchNorm

logger = logging.getLogger(__name__)


def updates_needed(momentum: float | None) -> float:
    """Return the training updates after which a unit layer's running variance has forgotten its start at 1.

    The variance of z is about 1/D, so the start must have decayed far below that. 200 updates at momentum 0.1
    leave 0.9^200 = 7e-10 of it, small against 1/D for the largest maps in use (D = 64x112x112: 1.2e-6); other
    momenta need what leaves as much. A cumulative average (None) forgets its start at once, momentum 0 never.
    """
    if momentum is None or momentum >= 1:
        return 1
    return math.ceil(200 * math.log(0.9) / math.log1p(-momentum)) if momentum > 0 else math.inf


def _needed(layer: nn.Module) -> float:
    """Return the updates that a layer needs, 0 if it has no running variance of unit features."""
    if not isinstance(layer, SteppedBatchNorm) or layer.scale != "unit" or not layer.track_running_stats:
        return 0
    return updates_needed(layer.momentum)


LARGE_EPS = 1e-5
"""The eps above which `swap_norm` warns: PyTorch's default.

The variance v of z is about 1/D, and eps leaves sqrt(v / (v + eps)) of the output's standard deviation: 1e-5 leaves
0.98 at 64x8x8 and 0.33 at 64x112x112; 1e-3, the next larger eps in torchvision and timm, 0.44 and 0.04.
"""

MANY_UPDATES = 2_100
"""The updates needed above which `swap_norm` warns: those at momentum 0.01, half an epoch of ImageNet.

The smaller momenta of torchvision, 0.001 (S3D) and 0.0003 (MNASNet), need 21,000 and 70,000, so that evaluation is
wrong for epochs.
"""


def warn_of_options(layers: Mapping[nn.Module, nn.Module]) -> None:
    """Log, for batch norm layers and their replacements, an eps and a momentum that do not suit unit features.

    An eps other than the replaced layer's is left alone.
    """
    unit = {o: bn for bn, o in layers.items() if isinstance(o, SteppedBatchNorm) and o.scale == "unit"}
    eps = [o.epsilon for o, bn in unit.items() if o.epsilon == getattr(bn, "eps", None) and o.epsilon > LARGE_EPS]
    if eps:
        logger.warning(
            "norm layers: %d have the network's eps of %g, which shrinks their output where it is large beside the "
            "variance of features of unit norm, 1/D for D values a sample; for new runs give the norm eps=1e-5 or "
            "scale=rms",
            len(eps),
            max(eps),
        )
    slow = [o for o in unit if _needed(o) > MANY_UPDATES]
    if slow:
        slowest = max(slow, key=_needed)
        needed = _needed(slowest)
        logger.warning(
            "norm layers: %d have a momentum of %g, and evaluation %s: the running variance starts at 1, far above "
            "that of features of unit norm; for new runs give the norm momentum=0.1 or scale=rms",
            len(slow),
            slowest.momentum,
            f"lags behind training until about {needed:,} updates" if math.isfinite(needed) else "never catches up",
        )


def warn_if_few_updates(model: nn.Module, updates: int) -> bool:
    """Log once, and return True, if so many updates are too few for the running variance of L2BN or a control.

    Layers that need more than `MANY_UPDATES` don't count: `swap_norm` has warned of them.
    """
    needed = max((n for n in map(_needed, model.modules()) if n <= MANY_UPDATES), default=0)
    if updates >= needed:
        return False
    logger.warning(
        "a run of %d updates is short for features of unit norm: the running variance starts at 1, far above "
        "the variance of unit features, and evaluation lags behind training until about %s updates",
        updates,
        needed,
    )
    return True
