"""Batch statistics that are joint across the ranks of a data-parallel run, for BN and for L2BN, on CPU and CUDA.

Only sums over samples and positions, a few numbers a channel, pass between the ranks; the l2 step is local to a
sample. Ranks may have different numbers of samples, or none. The stock `SyncBatchNorm` refuses CPU tensors, and its
conversion is refused by L2BN.

The sums pass through a differentiable all-reduce, so derivatives of any order are right. Joint layers compute the
definition in training.
"""

import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from l2bn.kernels.formulas import update_running, widened
from l2bn.norms.l2bn import L2BatchNorm1d, L2BatchNorm2d, L2BatchNorm3d, L2BatchNormAct2d, _L2BatchNorm
from l2bn.norms.stepped import Activated, State, SteppedBatchNorm, check_call, share_of_batch, state_of
from l2bn.norms.swap import stock_name

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

    With it mean, biased variance and number of values of a channel over these samples.
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


class _Sync(_BatchNorm):
    """The base of layers whose batch statistics in training are those of all ranks, if there are several."""

    process_group: Group

    def _is_joint(self) -> bool:
        return self.training and dist.is_initialized() and dist.get_world_size(self.process_group) > 1

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _joint(self, z: Tensor, state: State, eps: float) -> Tensor:
        """Return joint batch norm of z, and move the running statistics."""
        y, mean, variance, count = joint_batch_norm(z, state.weight, state.bias, eps, self.process_group)
        # Of one value in all no rank has more, so that other batches need not wait for the device here.
        if z.numel() <= z.shape[1] and count == 1:
            raise ValueError("Expected more than 1 value per channel when training, got 1 on all ranks together")
        with torch.no_grad():
            update_running(state.mean, state.var, mean, variance, share_of_batch(self, state), count)
        return y


class _SyncBatchNorm(_Sync):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - BN's own name
        if not self._is_joint():
            return self._activated(super().forward(input))
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        state = state_of(self)
        check_call(input, state, self.eps, training=True, joint=True)
        return self._activated(self._joint(widened(input), state, self.eps).to(input.dtype))

    def _activated(self, y: Tensor) -> Tensor:
        return y


class _SyncL2BatchNorm(_Sync, _L2BatchNorm):
    def _normalized(self, x: Tensor, state: State) -> Tensor:
        if not self._is_joint():
            return super()._normalized(x, state)
        return self._joint(self.step(widened(x), self.scale), state, self.epsilon).to(x.dtype)

    def _shares_batch(self) -> bool:
        return self._is_joint()


class SyncBatchNorm1d(_SyncBatchNorm, nn.BatchNorm1d): ...


class SyncBatchNorm2d(_SyncBatchNorm, nn.BatchNorm2d): ...


class SyncBatchNorm3d(_SyncBatchNorm, nn.BatchNorm3d): ...


class SyncBatchNormAct2d(Activated, SyncBatchNorm2d): ...


class SyncL2BatchNorm1d(_SyncL2BatchNorm, L2BatchNorm1d): ...


class SyncL2BatchNorm2d(_SyncL2BatchNorm, L2BatchNorm2d): ...


class SyncL2BatchNorm3d(_SyncL2BatchNorm, L2BatchNorm3d): ...


class SyncL2BatchNormAct2d(SyncL2BatchNorm2d, L2BatchNormAct2d): ...


OF_BATCH_NORM: dict[str, type[_Sync]] = {
    "BatchNorm1d": SyncBatchNorm1d,
    "BatchNorm2d": SyncBatchNorm2d,
    "BatchNorm3d": SyncBatchNorm3d,
    "BatchNormAct2d": SyncBatchNormAct2d,
}
OF_L2BN: dict[type[nn.Module], type[_Sync]] = {
    L2BatchNorm1d: SyncL2BatchNorm1d,
    L2BatchNorm2d: SyncL2BatchNorm2d,
    L2BatchNorm3d: SyncL2BatchNorm3d,
    L2BatchNormAct2d: SyncL2BatchNormAct2d,
}


def convert_sync(model: nn.Module, process_group: Group = None) -> int:
    """Make the batch statistics of each BN and L2BN layer joint across a group's ranks (None: all ranks).

    In place: the layers keep their identity, parameters, hooks and state-dict keys, and change their class; layers
    that are joint already get this group. Returns the number of changed ones.

    Raises:
        TypeError: a batch norm layer is neither, or has behaviour of its own. Nothing is changed then.
    """
    layers = counterparts(model)
    for layer, cls in layers.items():
        layer.__class__ = cls
    for module in model.modules():
        if isinstance(module, _Sync):
            module.process_group = process_group
    if layers:
        logger.info("%s: batch statistics of %d layers are joint across ranks", type(model).__name__, len(layers))
    return len(layers)


def counterparts(model: nn.Module) -> dict[_BatchNorm, type[_Sync]]:
    """Return the class that `convert_sync` would give each layer. Raises TypeError as it does."""
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and not isinstance(m, _Sync)]
    return {layer: _counterpart(layer) for layer in layers}


def _counterpart(layer: _BatchNorm) -> type[_Sync]:
    if type(layer) in OF_L2BN:
        return OF_L2BN[type(layer)]
    if isinstance(layer, SteppedBatchNorm):
        raise TypeError(f"no synchronised form of {type(layer).__name__} is known: controls compute locally")
    try:
        return OF_BATCH_NORM[stock_name(layer)]
    except TypeError as error:
        raise TypeError(f"no synchronised form: {error}") from error
