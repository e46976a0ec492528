"""Batch statistics that are joint across the ranks of a data-parallel run, for BN, L2BN and its controls.

Only sums over samples and positions, a few numbers a channel, pass between the ranks, on CPU and CUDA; the step
before is local to a sample, but for that of `l2bn_mean_norm`, which sums over all ranks by itself. Ranks may have
different numbers of samples, or none. The stock `SyncBatchNorm` refuses CPU tensors, and its conversion is refused
by L2BN.

The sums pass through a differentiable all-reduce, so derivatives of any order are right. Joint layers compute the
definition in training.
"""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.fx.proxy import Proxy
from torch.nn.modules.batchnorm import _BatchNorm

from l2bn.kernels.formulas import State, update_running, widened
from l2bn.norms.stock import Activated, check_call, count_batch, state_of, stock_name

logger = logging.getLogger(__name__)

Group = dist.ProcessGroup | None


class _SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over the ranks; so is the sum's gradient, since every rank's result depends on it."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, group: Group) -> Tensor:
        ctx.group = group
        total = t.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return _SumOverRanks.apply(g.contiguous(), ctx.group), None


def joint_batch_norm(
    z: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: Group
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return batch norm of z (N, C, ...), float32 at least, by statistics over the samples of all ranks.

    Also returns, per channel over these samples, the mean, the biased variance and the number of values.
    """
    axes, shape = [d for d in range(z.ndim) if d != 1], (1, -1, *[1] * (z.ndim - 2))
    own = z.new_tensor([z.numel() / z.shape[1]], dtype=torch.float64)
    sums = _SumOverRanks.apply(torch.cat([z.sum(axes, dtype=torch.float64), own]), group)
    count = sums[-1].detach()
    mean = sums[:-1] / count
    centred = z - mean.to(z.dtype).view(shape)
    squares = torch.stack([centred.square().sum(axes, dtype=torch.float64), centred.sum(axes, dtype=torch.float64)])
    variance, rest = _SumOverRanks.apply(squares, group) / count  # the rest is the rounding of the mean
    inverse = (variance - rest.square() + eps).rsqrt()
    y = (centred - rest.to(z.dtype).view(shape)) * inverse.to(z.dtype).view(shape)
    if weight is not None:
        y = y * weight.view(shape)
    if bias is not None:
        y = y + bias.view(shape)
    return y, (mean + rest).detach(), (variance - rest.square()).detach(), count


@dataclass(frozen=True)
class Joint:
    """Batch norm by statistics over the samples of all ranks of a group (None: of all there are)."""

    group: Group

    def is_active(self, layer: nn.Module) -> bool:
        """Return whether the batch statistics of a layer are those of several ranks now: in training alone."""
        return layer.training and dist.is_initialized() and dist.get_world_size(self.group) > 1

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def batch_norm(self, layer: _BatchNorm, z: Tensor, state: State, eps: float) -> Tensor:
        """Return joint batch norm of z, and move the running statistics of the layer."""
        y, mean, variance, count = joint_batch_norm(z, state.weight, state.bias, eps, self.group)
        # Of one value in all no rank has more, so that other batches need not wait for the device here.
        if z.numel() <= z.shape[1] and count == 1:
            raise ValueError("Expected more than 1 value per channel when training, got 1 on all ranks together")
        with torch.no_grad():
            update_running(state.mean, state.var, mean, variance, count_batch(layer, state), count)
        return y


class LeafBatchNorm(_BatchNorm):
    """Batch norm whose statistics may be joint across ranks.

    torch.fx records it as one node, as it does torch's own layers; torch.jit.script is refused.
    """

    joint: Joint | None = None  # set by `convert_sync`

    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        # Here, because the hooks, which run at each call of the node, must not run while it is recorded.
        for x in args or kwargs.values():
            if isinstance(x, Proxy):
                path = x.tracer.path_of_module(self)  # type: ignore[attr-defined]
                return x.tracer.create_proxy("call_module", path, args, kwargs)
        return super()._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]

    def __prepare_scriptable__(self) -> None:  # torch.jit.script calls it
        raise TypeError(f"{type(self).__name__} can't be scripted: use torch.jit.trace or torch.export")

    def _activated(self, y: Tensor) -> Tensor:
        return y

    def _shares_batch(self) -> bool:
        """Return whether the batch statistics are taken over more than this process's samples."""
        return self.joint is not None and self.joint.is_active(self)


class _SyncBatchNorm(LeafBatchNorm):
    """A stock layer whose batch statistics are joint."""

    def forward(self, input: Any) -> Any:  # noqa: A002 - BN's own name
        if self.joint is None or not self._shares_batch():
            return super().forward(input)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        state = state_of(self)
        check_call(input, state, self.eps, training=True, joint=True)
        return self._activated(self.joint.batch_norm(self, widened(input), state, self.eps).to(input.dtype))


class SyncBatchNorm1d(_SyncBatchNorm, nn.BatchNorm1d): ...


class SyncBatchNorm2d(_SyncBatchNorm, nn.BatchNorm2d): ...


class SyncBatchNorm3d(_SyncBatchNorm, nn.BatchNorm3d): ...


@functools.cache
def _with_activation() -> type[_SyncBatchNorm]:
    """Return the form of timm's `BatchNormAct2d`, as which timm's own conversions have to know it."""
    from timm.layers.norm_act import BatchNormAct2d  # imported already where a model has one

    class SyncBatchNormAct2d(Activated, _SyncBatchNorm, BatchNormAct2d): ...

    SyncBatchNormAct2d.__qualname__ = SyncBatchNormAct2d.__name__
    return SyncBatchNormAct2d


def __getattr__(name: str) -> type[_SyncBatchNorm]:
    """Give pickle the class that is made where it is needed."""
    if name == "SyncBatchNormAct2d":
        return _with_activation()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


OF_STOCK: dict[str, Callable[[], type[_SyncBatchNorm]]] = {
    "BatchNorm1d": lambda: SyncBatchNorm1d,
    "BatchNorm2d": lambda: SyncBatchNorm2d,
    "BatchNorm3d": lambda: SyncBatchNorm3d,
    "BatchNormAct2d": _with_activation,
}


def convert_sync(model: nn.Module, process_group: Group = None) -> int:
    """Make the batch statistics of each BN layer, L2BN or control joint across a group's ranks (None: all ranks).

    In place: the layers keep their identity, parameters, hooks and state-dict keys; stock layers change their
    class. Layers that are joint already get this group. The running norm of `l2bn_mean_norm` is that of all ranks,
    whatever the group. Returns the number of changed layers.

    Raises:
        TypeError: a batch norm layer has behaviour of its own. Nothing is changed then.
    """
    for layer, cls in counterparts(model).items():
        layer.__class__ = cls
    layers = [m for m in model.modules() if isinstance(m, LeafBatchNorm)]
    changed = sum(layer.joint is None for layer in layers)
    for layer in layers:
        layer.joint = Joint(process_group)
    if changed:
        logger.info("%s: batch statistics of %d layers are joint across ranks", type(model).__name__, changed)
    return changed


def counterparts(model: nn.Module) -> dict[_BatchNorm, type[_SyncBatchNorm]]:
    """Return the class that `convert_sync` would give each stock layer. Raises TypeError as it does."""
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and not _can_be_joint(m)]
    try:
        return {layer: OF_STOCK[stock_name(layer)]() for layer in layers}
    except TypeError as error:
        raise TypeError(f"no synchronised form: {error}") from error


def _can_be_joint(layer: nn.Module) -> bool:
    """Tell whether a layer is one of this package's and computes as these do, as FSDP's subclasses of them do."""
    methods = [getattr(type(layer), name, None) for name in ("forward", "_normalized")]
    own = any(method is not None and not method.__module__.startswith("l2bn.norms.") for method in methods)
    return isinstance(layer, LeafBatchNorm) and not own
