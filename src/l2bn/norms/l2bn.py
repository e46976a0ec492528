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

Two points where the definition leaves a choice: an all-zero sample gives z = 0 and passes no gradient (the
slope a/tiny of the definition would overflow float16), and a sample whose norm is not finite gives NaN.
"""

import logging
import math
from typing import Any, Literal, NoReturn, Self, get_args

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _BatchNorm

from l2bn.norms import fused, kernels
from l2bn.norms.bn import check_options
from l2bn.norms.l2_step import Scale, l2_normalize, widened

Fused = Literal["auto", "on", "off"]

logger = logging.getLogger(__name__)


class _L2BatchNorm(_BatchNorm):
    """What the three layers share; see the module's docstring for the equation."""

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
        if scale not in get_args(Scale):
            raise ValueError(f"scale is {scale!r}; it may be {' or '.join(get_args(Scale))}")
        if fused not in get_args(Fused):
            raise ValueError(f"fused is {fused!r}; it may be {', '.join(get_args(Fused))}")
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        self.scale = scale
        self.fused = fused

    @classmethod
    def standing_for(cls, bn: _BatchNorm, scale: Scale = "unit", fused: Fused = "auto") -> Self:
        """A layer on bn's own parameters and buffers, with its eps, momentum, mode and inner modules."""
        layer = cls(
            bn.num_features,
            bn.eps,
            bn.momentum,
            bn.affine,
            bn.track_running_stats,
            device="meta",
            scale=scale,
            fused=fused,
        )
        layer._parameters.update(bn._parameters)
        layer._buffers.update(bn._buffers)
        layer._modules.update(bn._modules)
        return layer.train(bn.training)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - BN's own name
        """(N, C, ...) to the same shape, type and memory format; statistics are float32 at least."""
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        return self._by_kernels(input) if self._has_kernels_for(input) else self._plain(input)

    def _plain(self, x: Tensor) -> Tensor:
        """The definition itself: the reference for the fused kernels."""
        wide = widened(x)
        own = next((t.dtype for t in (self.weight, self.running_mean) if t is not None), wide.dtype)
        return super().forward(l2_normalize(wide, self.scale).to(own)).to(x.dtype)

    def _has_kernels_for(self, x: Tensor) -> bool:
        """Whether the fused formulas serve this call; what batch norm refuses is left to it to refuse."""
        if self.fused == "off" or x.shape[1] != self.num_features or not x.is_floating_point():
            return False
        if x.device.type not in kernels.DEVICES or x.numel() <= (
            x.shape[1] if self._takes_batch_statistics() else 0
        ):
            return False
        if not self._takes_batch_statistics() and self._needs_grad(x):
            return False  # evaluation's kernels have no backward
        if torch.compiler.is_compiling():
            return not torch.compiler.is_exporting()  # an exported graph shows the definition
        return (
            type(x) in (Tensor, nn.Parameter)
            and not _is_transformed()
            and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
            and (self.fused == "on" or kernels.compiler_works(x.device.type))
        )

    def _needs_grad(self, x: Tensor) -> bool:
        return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))

    def _takes_batch_statistics(self) -> bool:
        return self.training or self.running_mean is None

    def _by_kernels(self, x: Tensor) -> Tensor:
        rms = self.scale == "rms"
        weight, bias, mean, var = self.weight, self.bias, self.running_mean, self.running_var
        if not self.training and mean is not None and var is not None:
            return fused.evaluate(x, weight, bias, mean, var, rms, self.eps)
        tracked = None
        if not self.training or not self.track_running_stats:
            mean = var = None
        elif self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            tracked = self.num_batches_tracked if self.momentum is None else None
        return fused.train(x, weight, bias, mean, var, tracked, rms, self.eps, self.momentum)

    def extra_repr(self) -> str:
        stock = super().extra_repr()  # type: ignore[no-untyped-call]
        kernels = {"on": "fused", "off": "plain", "auto": "auto"}[self.fused]
        return f"{stock}, scale={self.scale}, kernels={kernels}"

    @property
    def qconfig(self) -> NoReturn:
        """Asked for by `SyncBatchNorm.convert_sync_batchnorm`, which would make this layer a plain BN."""
        raise TypeError(
            f"{type(self).__name__} has no stock synchronised or quantised form: the conversion would "
            "silently drop the l2 step. For statistics that are joint across ranks use "
            "l2bn.norms.sync.convert_sync."
        )


def _is_transformed() -> bool:
    """Within torch.func or forward-mode differentiation, of which kernels know nothing."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


class L2BatchNorm1d(_L2BatchNorm, nn.BatchNorm1d):
    """L2BN over (N, C) or (N, C, L), in place of `nn.BatchNorm1d`."""


class L2BatchNorm2d(_L2BatchNorm, nn.BatchNorm2d):
    """L2BN over (N, C, H, W), in place of `nn.BatchNorm2d`.

    The constructor is that of `nn.BatchNorm2d` and two keywords more: `scale`, "unit" (each sample gets l2 norm
    1) or "rms" (root mean square 1), and `fused`, "auto", "on" or "off": which kernels compute it.
    """


class L2BatchNorm3d(_L2BatchNorm, nn.BatchNorm3d):
    """L2BN over (N, C, D, H, W), in place of `nn.BatchNorm3d`."""


class L2BatchNormAct2d(L2BatchNorm2d):
    """L2BN, then dropout and activation, in place of timm's `BatchNormAct2d`, whose modules it takes over."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - BN's own name
        return self.act(self.drop(super().forward(input)))


def convert(
    bn: _BatchNorm,
    eps: float | None = None,
    momentum: float | None = None,
    scale: Scale = "unit",
    fused: Fused = "auto",
) -> nn.Module:
    """The L2BN layer that stands in the place of `bn`, on the same parameters and buffers.

    `eps` and `momentum` keep bn's own when None.

    Raises:
        TypeError: `bn` is no batch norm layer, or one with a `forward` of its own that L2BN would not keep.
        ValueError: `eps` is not above 0, or `momentum` outside [0, 1].
    """
    check_options(eps, momentum)
    layer = _counterpart(bn).standing_for(bn, scale, fused)
    layer.eps = bn.eps if eps is None else eps
    layer.momentum = bn.momentum if momentum is None else momentum
    return layer


def _counterpart(bn: Any) -> type[_L2BatchNorm]:
    name = f"{type(bn).__module__}.{type(bn).__qualname__}"
    if isinstance(bn, _L2BatchNorm):
        raise TypeError(f"{type(bn).__name__} is L2BN already: swap the norm of a model once")
    if isinstance(bn, nn.modules.lazy.LazyModuleMixin):
        raise TypeError(f"{name} has no shape yet: run the model once, then swap its norm")
    for stock, ours in (
        (nn.BatchNorm1d, L2BatchNorm1d),
        (nn.BatchNorm2d, L2BatchNorm2d),
        (nn.BatchNorm3d, L2BatchNorm3d),
    ):
        if isinstance(bn, stock) and type(bn).forward is stock.forward:
            return ours
    from timm.layers.norm_act import BatchNormAct2d  # here, for a slow import that few models need

    if type(bn) is BatchNormAct2d:
        return L2BatchNormAct2d
    raise TypeError(
        f"L2BN cannot stand for {name}: accepted are nn.BatchNorm1d, 2d and 3d, subclasses that keep their "
        "forward, and timm's BatchNormAct2d. Give swap_norm a callable that handles this layer; statistics "
        "joint across ranks come after the swap, by l2bn.norms.sync.convert_sync"
    )


def updates_needed(momentum: float | None) -> float:
    """Training updates after which a unit layer's running variance has forgotten its start at 1.

    The variance of z is about 1/D, so the start must have decayed far below that. 200 updates at momentum 0.1
    leave 0.9^200 = 7e-10 of it, small against 1/D for the largest maps in use (D = 64x112x112: 1.2e-6); other
    momenta need what leaves as much. A cumulative average (None) forgets its start at once, momentum 0 never.
    """
    if momentum is None or momentum >= 1:
        return 1
    return math.ceil(200 * math.log(0.9) / math.log1p(-momentum)) if momentum > 0 else math.inf


def warn_if_few_updates(model: nn.Module, updates: int) -> bool:
    """Log once, and return True, if so many updates are too few for the running variance of L2BN or a control."""
    needed = max(
        (
            updates_needed(layer.momentum)
            for layer in model.modules()
            if isinstance(layer, _BatchNorm)
            and getattr(layer, "scale", "rms") == "unit"
            and layer.track_running_stats
        ),
        default=0,
    )
    if updates >= needed:
        return False
    logger.warning(
        "a run of %d updates is short for features of unit norm: the running variance starts at 1, far above "
        "the variance of unit features, and evaluation lags behind training until about %s updates",
        updates,
        needed,
    )
    return True
