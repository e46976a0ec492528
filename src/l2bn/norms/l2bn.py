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

from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from l2bn.kernels import autograd
from l2bn.kernels.compiler import DEVICES, Fused, compiler_works, needs_plain_operators
from l2bn.kernels.formulas import Scale, State, check_scale, normalized, widened
from l2bn.norms.stepped import SteppedBatchNorm, stepped
from l2bn.norms.stock import Activated, count_batch, takes_batch_statistics

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
