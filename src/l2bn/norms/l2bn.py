"""L2BN: make the features of a batch equal in their l2 norm, then normalize the batch.

Wang et al., "L2BN: Enhancing Batch Normalization by Equalizing the L2 Norms of Features", arXiv:2207.02625.

    z_n = a * x_n / max(||x_n||_2, tiny)    per sample n, the norm over everything but the batch
    y   = BN(z)                             with BN's own eps, momentum, weight, bias, running statistics

Letters: N batch, C channels, P = H*W positions, D = C*P the size of one sample's feature.

`a = 1` ("unit") is what the authors' acoustic code does. Then the mean square of z is 1/D, and BN's eps is no
longer small against it. `a = sqrt(D)` ("rms") gives every sample a root mean square of 1 and eps its usual
weight. No parameter and no buffer is added: the state dict has BN's keys and shapes. The running statistics are
those of z, so a BN model's must be estimated anew before they serve here, and the layer cannot be folded into a
convolution.

The definition leaves two choices: an all-zero sample gives z = 0 and passes no gradient (the
slope a/tiny of the definition would overflow float16), and a sample whose norm is not finite gives NaN.
"""

import logging
import math
from collections.abc import Mapping
from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from l2bn.kernels import autograd
from l2bn.kernels.compiler import DEVICES, Fused, compiler_works, needs_plain_operators
from l2bn.kernels.formulas import Scale, State, check_scale, normalized, widened
from l2bn.norms.stepped import SteppedBatchNorm, stepped
from l2bn.norms.stock import Activated, count_batch, takes_batch_statistics

logger = logging.getLogger(__name__)

FUSED: tuple[str, ...] = get_args(Fused)


def l2_normalize(x: Tensor, scale: Scale = "unit") -> Tensor:
    """Divide each sample by its l2 norm over all axes but the first ("rms": by its root mean square).

    x and the result are (N, ...), in the same type; norms are taken in float32 at least. Raises ValueError for
    another scale, TypeError for x of a type that is not floating-point.
    """
    if not x.is_floating_point():  # the result would be cut down to whole numbers
        raise TypeError(f"l2_normalize takes floating-point values, not {x.dtype}: convert them first")
    return normalized(widened(x), scale).to(x.dtype)


class _L2BatchNorm(SteppedBatchNorm):
    """The base of the three layers; see the module's docstring for the equation."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        scale: Scale = "unit",
        fused: Fused = "auto",
    ) -> None:
        check_scale(scale)
        check_fused(fused)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        self.scale = scale
        self.fused = fused

    def step(self, x: Tensor, scale: Scale) -> Tensor:
        return normalized(x, scale)

    def _normalized(self, x: Tensor, state: State) -> Tensor:
        if not self._has_kernels_for(x, state):
            return super()._normalized(x, state)
        check_scale(self.scale)  # here, because a kernel's error would count as a failed compilation
        strict = self.fused == "on"
        if not self.training and state.mean is not None and state.var is not None:
            return autograd.forward_inference(x, state, self.scale, self.epsilon, strict)
        return autograd.forward_training(x, state, count_batch(self, state), self.scale, self.epsilon, strict)

    def _has_kernels_for(self, x: Tensor, state: State) -> bool:
        """Return whether the fused formulas serve this call; otherwise the definition does."""
        check_fused(self.fused)
        if self.fused == "off" or x.device.type not in DEVICES or self._shares_batch():
            return False
        tensors = [x, *[t for t in state if t is not None]]
        needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        if needs_grad and not takes_batch_statistics(state, self.training):
            return False  # evaluation's kernels have no backward
        if needs_plain_operators(*tensors) or x.numel() == 0:
            return False
        return torch.compiler.is_compiling() or self.fused == "on" or compiler_works(x.device.type)

    def extra_repr(self) -> str:
        kernels = {"on": "fused", "off": "plain", "auto": "auto"}[self.fused]
        return f"{super().extra_repr()}, kernels={kernels}"


class L2BatchNorm1d(_L2BatchNorm, nn.BatchNorm1d):
    """L2BN over (N, C) or (N, C, L), in place of `nn.BatchNorm1d`."""


class L2BatchNorm2d(_L2BatchNorm, nn.BatchNorm2d):
    """L2BN over (N, C, H, W), in place of `nn.BatchNorm2d`.

    The constructor is that of `nn.BatchNorm2d` and two keywords more: `scale`, "unit" (each sample gets l2 norm
    1) or "rms" (root mean square 1), and `fused`, "auto", "on" or "off": see `l2bn.kernels.compiler.Fused`.
    """


class L2BatchNorm3d(_L2BatchNorm, nn.BatchNorm3d):
    """L2BN over (N, C, D, H, W), in place of `nn.BatchNorm3d`."""


class L2BatchNormAct2d(Activated, L2BatchNorm2d):
    """L2BN, then dropout and activation, in place of timm's `BatchNormAct2d`."""


COUNTERPARTS: dict[str, type[SteppedBatchNorm]] = {
    "BatchNorm1d": L2BatchNorm1d,
    "BatchNorm2d": L2BatchNorm2d,
    "BatchNorm3d": L2BatchNorm3d,
    "BatchNormAct2d": L2BatchNormAct2d,
}


def convert(
    bn: _BatchNorm,
    eps: float | None = None,
    momentum: float | None = None,
    scale: Scale = "unit",
    fused: Fused = "auto",
) -> nn.Module:
    """Return the L2BN layer that takes the place of `bn`, on everything `bn` holds, running statistics included.

    So `bn` must not be called any more; to keep both, convert a deep copy. `eps` and `momentum` keep bn's own when
    None.

    Raises:
        TypeError: `bn` is no batch norm layer, or has behaviour that L2BN would lose.
        ValueError: `eps` is not above 0, `momentum` outside [0, 1], or another option unknown.
    """
    check_fused(fused)
    layer: _L2BatchNorm = stepped(bn, COUNTERPARTS, scale, eps, momentum)
    layer.fused = fused
    return layer


def check_fused(fused: str) -> None:
    if fused not in FUSED:
        raise ValueError(f"fused is {fused!r}; it may be {', '.join(FUSED)}")


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
