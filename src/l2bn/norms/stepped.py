"""Batch norm layers that first change their input by a step: L2BN and its controls.

They subclass batch norm. Three designs were weighed by what they break silently:

- Composition, `Sequential(step, bn)`: the state dict gets other keys, and folding, freezing or synchronising the
  inner BN is right. But every weight file, `layer.weight` and timm's fused activations would need a translation.
- A subclass of torch's `_NormBase` alone, which no `isinstance(..., _BatchNorm)` matches: `update_bn` would leave
  the running statistics stale, `SyncBatchNorm.convert_sync_batchnorm` would leave the batch statistics local, and a
  check that refuses layers which mix samples would accept it, each without a word.
- A subclass of batch norm, as here: these work or refuse, and so do state dicts, averages of weights, swaps and
  weight-decay groups (beside `l2bn_mean_norm` not those that take modules without children alone for norms). Code
  that takes the layer for batch norm alone and rebuilds or folds it would drop the step.

What all such code needs, and code that moves, saves, averages or re-estimates a layer does not, is eps. So the
layer keeps it as `epsilon`, and reading `eps` raises an error that says why. Its type is TypeError, as for a wrong
layer, and AttributeError, so that `hasattr` and `inspect.getmembers` go on.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from l2bn.kernels.formulas import Scale, State, batch_norm, check_scale, widened
from l2bn.norms.stock import (
    ESTIMATED_ELSEWHERE,
    Activated,
    check_call,
    check_options,
    count_batch,
    in_place_of,
    state_of,
    stock_name,
    takes_batch_statistics,
)
from l2bn.norms.sync import LeafBatchNorm

logger = logging.getLogger(__name__)

Step = Callable[[Tensor, Scale], Tensor]
"""(N, C, ...), float32 at least, and L2BN's scale to the same shape and type. A module may hold buffers."""


class NotBatchNormError(TypeError, AttributeError):
    """A conversion took the layer for batch norm alone."""


class SteppedBatchNorm(LeafBatchNorm):
    """y = BN(step(x)); the base of L2BN and of the controls' layers."""

    step: Step
    scale: Scale
    epsilon: float
    _version = 3  # of the state dict, which has BN's keys and shapes; BN's is 2

    def _set_eps(self, value: float) -> None:
        self.epsilon = value

    eps = property(fset=_set_eps)
    __constants__ = ["track_running_stats", "momentum", "epsilon", "num_features", "affine"]  # noqa: RUF012
    __jit_unused_properties__ = ("eps",)

    def __getattr__(self, name: str) -> Any:
        if name == "eps":
            raise NotBatchNormError(
                f"{type(self).__name__} is not batch normalization alone: a conversion that reads its eps, to fold "
                "it, freeze it or make another layer of it, would drop the step before it. For statistics that are "
                "joint across ranks use l2bn.norms.sync.convert_sync; to read the value use `epsilon`"
            )
        return nn.Module.__getattr__(self, name)  # each weight of each call passes here; super() would cost more

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: dict[str, Any], strict: bool, missing: Any, *rest: Any
    ) -> None:
        """Load BN's keys; warn where the running statistics among them are estimates of another layer.

        torch's metadata tell it of BN's weights, which loaders like timm's drop; the values themselves often do.
        """
        mean, var = (state_dict.get(f"{prefix}running_{name}") for name in ("mean", "var"))
        if isinstance(mean, Tensor) and isinstance(var, Tensor) and not var.is_meta and var.ne(1).any():
            saved_by_another = local_metadata.get("version", self._version) < self._version
            batches = state_dict.get(f"{prefix}num_batches_tracked", torch.zeros(()))
            if saved_by_another or not self._can_have(mean, var, int(batches)):
                _warn_of_foreign_estimates(missing)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, *rest)

    def _can_have(self, mean: Tensor, var: Tensor, batches: int) -> bool:
        """Tell whether statistics (C,) may be this layer's after that many batches; 0: their number is unknown.

        The step fixes the sum of the channels' mean squares, at most 1 ("unit") or C ("rms"), besides what is left
        of the variances' start at 1. Two values a channel estimate a variance at twice its size.
        """
        if isinstance(self.step, nn.Module) or mean.shape != var.shape:  # the mean norm bounds no norm
            return True
        squares = float((var.float() + mean.float().square()).sum())
        if self.scale == "rms":
            return 0.5 < squares / len(var) < 2.5
        start = (1 - (self.momentum or 1)) ** batches if batches else 0.0
        return squares < 2.5 + start * len(var)

    def reset_running_stats(self) -> None:
        """Forget them, as `update_bn` does before it estimates them anew; those of the step, too."""
        super().reset_running_stats()
        reset = getattr(getattr(self, "step", None), "reset_running_stats", None)  # no step yet in the constructor
        if reset is not None:
            reset()

    def forward(self, input: Any) -> Any:  # noqa: A002 - BN's own name
        """(N, C, ...) to the same shape, type and memory format; statistics are float32 at least."""
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        state = state_of(self)
        check_call(input, state, self.epsilon, training=self.training, joint=self._shares_batch())
        return self._activated(self._normalized(input, state))

    def _normalized(self, x: Tensor, state: State) -> Tensor:
        """Compute the definition itself, by joint statistics where they are on."""
        z = self.step(widened(x), self.scale)
        if self.joint is not None and self._shares_batch():
            return self.joint.batch_norm(self, z, state, self.epsilon).to(x.dtype)
        factor = count_batch(self, state)
        momentum = 0.0 if factor is None else float(factor)
        batch = takes_batch_statistics(state, self.training)
        return batch_norm(z, *state, self.epsilon, momentum, batch).to(x.dtype)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.epsilon}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}, scale={self.scale}{', joint' if self.joint else ''}"
        )


_warned: object = None


def _warn_of_foreign_estimates(missing: object) -> None:
    """Warn once per `load_state_dict`, which gives all layers the same list for missing keys."""
    global _warned
    if missing is _warned:
        return
    _warned = missing
    logger.warning(
        "the weights are those of batch norm, of this layer at another scale, or of an older version of these "
        "layers, and in the last case all is well; else their %s",
        ESTIMATED_ELSEWHERE,
    )


class SteppedBatchNorm1d(SteppedBatchNorm, nn.BatchNorm1d): ...


class SteppedBatchNorm2d(SteppedBatchNorm, nn.BatchNorm2d): ...


class SteppedBatchNorm3d(SteppedBatchNorm, nn.BatchNorm3d): ...


class SteppedBatchNormAct2d(Activated, SteppedBatchNorm2d): ...


COUNTERPARTS: dict[str, type[SteppedBatchNorm]] = {
    "BatchNorm1d": SteppedBatchNorm1d,
    "BatchNorm2d": SteppedBatchNorm2d,
    "BatchNorm3d": SteppedBatchNorm3d,
    "BatchNormAct2d": SteppedBatchNormAct2d,
}


def stepped(
    bn: _BatchNorm,
    counterparts: Mapping[str, type[SteppedBatchNorm]],
    scale: Scale,
    eps: float | None,
    momentum: float | None,
) -> Any:
    """Return bn's counterpart, on everything bn holds. `eps` and `momentum` keep bn's own when None.

    Raises TypeError for a layer that the counterparts can't stand for, ValueError for an unknown scale or an eps or
    momentum out of range.
    """
    check_options(eps, momentum)
    check_scale(scale)
    if isinstance(bn, SteppedBatchNorm):
        raise TypeError(f"{type(bn).__name__} is L2BN or a control already: swap the norm of a model once")
    layer = in_place_of(bn, counterparts[stock_name(bn)])
    own = vars(layer).pop("eps")
    layer.eps = own if eps is None else eps
    layer.momentum = bn.momentum if momentum is None else momentum
    layer.scale = scale
    return layer


def put_before(
    bn: _BatchNorm, step: Step, scale: Scale, eps: float | None = None, momentum: float | None = None
) -> nn.Module:
    """Return a layer on everything bn holds that takes `step` of its input first; raises as `stepped`."""
    layer = stepped(bn, COUNTERPARTS, scale, eps, momentum)
    layer.step = step
    return layer
