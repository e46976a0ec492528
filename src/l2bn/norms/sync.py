"""Batch statistics that are joint across the ranks of a data-parallel run, for BN and for L2BN, on CPU and CUDA.

Only sums over samples and positions, a few numbers a channel, pass between the ranks; the l2 step is local to a
sample. Ranks may have different numbers of samples, or none. The stock `SyncBatchNorm` refuses CPU tensors, and its
conversion is refused by L2BN.

The definition sums with a differentiable all-reduce, so derivatives of any order are right. L2BN's kernels use the
formulas of rows.py with the collectives between them; their second derivatives are those of the definition.
"""

import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from l2bn.kernels import rows
from l2bn.kernels.autograd import gradients_by_operators
from l2bn.kernels.compiler import Fused, compiler_works, listed, run_kernel
from l2bn.kernels.formulas import (
    as_map,
    as_rows,
    dense,
    normalized,
    position_axis,
    positions_of,
    update_running,
    widened,
)
from l2bn.norms.l2_step import is_rms
from l2bn.norms.l2bn import (
    L2BatchNorm1d,
    L2BatchNorm2d,
    L2BatchNorm3d,
    L2BatchNormAct2d,
    _L2BatchNorm,
    check_fused,
)
from l2bn.norms.stepped import Activated, State, SteppedBatchNorm, check_call, share_of_batch, state_of
from l2bn.norms.swap import stock_name

logger = logging.getLogger(__name__)

Group = dist.ProcessGroup | None
Joint = tuple[Tensor, Tensor, Tensor, Tensor]
"""y, and over the samples of all ranks mean, biased variance and number of values of a channel."""


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


def joint_batch_norm(z: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: Group) -> Joint:
    """Return batch norm of z (N, C, ...), float32 at least, by statistics over the samples of all ranks."""
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


class _JointL2BN(torch.autograd.Function):
    """L2BN by statistics over the samples of all ranks.

    Every rank calls the same collectives, whether or not its own passes are compiled.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        rms: bool,
        eps: float,
        group: Group,
        fused: Fused,
    ) -> Joint:
        axis = position_axis(x)
        x_rows = as_rows(dense(x, axis), axis)
        taken = rows.Moments(*_run(rows.moments, (x_rows,), axis, fused))
        own = rows.features(x_rows, taken, rms, axis)
        sent = torch.cat([own.mu, own.v, own.mu.new_tensor([x.numel() / x.shape[1]])])
        gathered = sent.new_empty(dist.get_world_size(group) * len(sent))
        dist.all_gather_into_tensor(gathered, sent, group=group)
        mus, vs, counts = gathered.view(-1, len(sent)).tensor_split((len(own.mu), len(sent) - 1), dim=1)
        mus, vs = (torch.where(counts > 0, t, 0.0) for t in (mus, vs))  # a rank without samples has no mean
        count = counts.sum()
        mu = (mus * counts).sum(0) / count
        v = ((vs + (mus - mu).square()) * counts).sum(0) / count
        z = own._replace(zc=own.zc + (own.mu - mu), mu=mu, v=v)

        slope, shift, inv = rows.line(taken, z, weight, bias, eps)
        (y,) = _run(rows.apply_line, (x_rows, slope, shift), axis, fused)
        ctx.save_for_backward(x, weight, slope, inv, count, taken.x0, taken.var, *z)
        ctx.axis, ctx.group, ctx.fused, ctx.bias, ctx.rms, ctx.eps = axis, group, fused, bias, rms, eps
        ctx.mark_non_differentiable(mu, v, count)
        # `.data`, because autograd forbids an in-place ReLU on a view that a Function returns.
        return as_map(y, x, axis).data, mu, v, count

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> Any:
        x, weight, slope, inv, count, x0, var, *statistics = ctx.saved_tensors
        if torch.is_grad_enabled():

            def definition(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
                z = normalized(widened(x), ctx.rms)
                return joint_batch_norm(z, weight, bias, ctx.eps, ctx.group)[0].to(x.dtype)

            return *gradients_by_operators(definition, (x, weight, ctx.bias), g), *[None] * 4
        z = rows.Features(*statistics)
        axis, fused = ctx.axis, ctx.fused
        x_rows, g_rows = (as_rows(dense(t, axis), axis) for t in (x, g))
        sg, sgx, m = _run(rows.gradient_sums, (g_rows, x_rows, x0), axis, fused)
        taken = rows.Moments(x0, m, var)
        gw, gb = rows.parameter_gradients(sg, sgx, z, inv)
        joint = torch.cat([gw, gb])
        dist.all_reduce(joint, group=ctx.group)
        joint_gw, joint_gb = joint.chunk(2)
        e, f = rows.input_gradient_terms(
            sg, sgx, joint_gw, joint_gb, taken, z, inv, weight, count, positions_of(x_rows, axis)
        )
        (dx,) = _run(rows.apply_gradient, (g_rows, x_rows, x0, slope, e, f), axis, fused)
        return (
            as_map(dx, x, axis),
            None if weight is None else gw.to(weight.dtype),
            None if ctx.bias is None else gb.to(ctx.bias.dtype),
            *[None] * 4,
        )


def _run(function: Any, tensors: tuple[Tensor, ...], axis: int, fused: Fused) -> list[Tensor]:
    """Run a pass over this rank's samples, compiled unless there are none."""
    if fused == "off" or tensors[0].numel() == 0:
        return listed(function(*tensors, axis))
    return run_kernel(function, tensors, axis, strict=fused == "on")


class _Sync(_BatchNorm):
    """The base of layers whose batch statistics in training are those of all ranks, if there are several."""

    process_group: Group

    def _is_joint(self) -> bool:
        return self.training and dist.is_initialized() and dist.get_world_size(self.process_group) > 1

    def _moved(self, joint: Joint, state: State) -> Tensor:
        """Move the running statistics, and return y."""
        y, mu, v, count = joint
        with torch.no_grad():
            update_running(state.mean, state.var, mu, v, share_of_batch(self, state), count)
        return y


class _SyncBatchNorm(_Sync):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - BN's own name
        return self._activated(self._joint(input) if self._is_joint() else super().forward(input))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _joint(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)  # type: ignore[no-untyped-call]
        state = state_of(self)
        check_call(x, state, self.eps, training=True, joint=True)
        joint = joint_batch_norm(widened(x), state.weight, state.bias, self.eps, self.process_group)
        return self._moved(joint, state).to(x.dtype)

    def _activated(self, y: Tensor) -> Tensor:
        return y


class _SyncL2BatchNorm(_Sync, _L2BatchNorm):
    def _normalized(self, x: Tensor, state: State) -> Tensor:
        return self._joint(x, state) if self._is_joint() else super()._normalized(x, state)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _joint(self, x: Tensor, state: State) -> Tensor:
        check_fused(self.fused)
        compiled = self.fused == "on" or (self.fused == "auto" and compiler_works(x.device.type))
        fused = self.fused if compiled else "off"
        options = is_rms(self.scale), self.epsilon, self.process_group, fused
        return self._moved(_JointL2BN.apply(x, state.weight, state.bias, *options), state)

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
