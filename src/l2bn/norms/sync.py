"""Batch statistics that are joint across the ranks of a data-parallel run, for BN and for L2BN, on CPU and CUDA.

Only sums over samples and positions, a few numbers a channel, pass between the ranks; the l2 step is local to a
sample. The formulas are those of rows.py with the collectives between them, and BN is their case s = 1. The stock
`SyncBatchNorm` refuses CPU tensors, and its conversion would drop the l2 step.
"""

import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from l2bn.norms import rows
from l2bn.norms.fused import update_running
from l2bn.norms.kernels import compiler_works, listed, run_kernel
from l2bn.norms.l2bn import (
    L2BatchNorm1d,
    L2BatchNorm2d,
    L2BatchNorm3d,
    L2BatchNormAct2d,
    _L2BatchNorm,
)
from l2bn.norms.layout import as_map, as_rows, dense, position_axis, positions_of

logger = logging.getLogger(__name__)


class _JointNorm(torch.autograd.Function):
    """y, and over the samples of all ranks the mean, the biased variance and the number of values."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        rms: bool | None,
        eps: float,
        group: dist.ProcessGroup | None,
        compiled: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        axis = position_axis(x)
        x_rows = as_rows(dense(x, axis), axis)
        taken = rows.Moments(*_run(compiled, rows.moments, (x_rows,), axis))
        own = rows.features(x_rows, taken, rms, axis)
        sent = torch.cat([own.mu, own.v, own.mu.new_tensor([x.numel() / x.shape[1]])])
        gathered = sent.new_empty(dist.get_world_size(group) * len(sent))
        dist.all_gather_into_tensor(gathered, sent, group=group)
        mus, vs, counts = gathered.view(-1, len(sent)).tensor_split((len(own.mu), len(sent) - 1), dim=1)
        count = counts.sum()
        mu = (mus * counts).sum(0) / count
        v = ((vs + (mus - mu).square()) * counts).sum(0) / count
        z = own._replace(zc=own.zc + (own.mu - mu), mu=mu, v=v)

        slope, shift, inv = rows.line(taken, z, weight, bias, eps)
        (y,) = _run(compiled, rows.apply_line, (x_rows, slope, shift), axis)
        ctx.save_for_backward(x, weight, slope, inv, count, taken.x0, taken.var, *z)
        ctx.axis, ctx.group, ctx.compiled, ctx.has_bias = axis, group, compiled, bias is not None
        ctx.mark_non_differentiable(mu, v, count)
        # `.data`, because autograd forbids an in-place ReLU on what a Function returns as a view.
        return as_map(y, x, axis).data, mu, v, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> Any:
        x, weight, slope, inv, count, x0, var, *statistics = ctx.saved_tensors
        z = rows.Features(*statistics)
        axis, compiled = ctx.axis, ctx.compiled
        x_rows, g_rows = (as_rows(dense(t, axis), axis) for t in (x, g))
        sg, sgx, m = _run(compiled, rows.gradient_sums, (g_rows, x_rows, x0), axis)
        taken = rows.Moments(x0, m, var)
        gw, gb = rows.parameter_gradients(sg, sgx, z, inv)
        joint = torch.cat([gw, gb])
        dist.all_reduce(joint, group=ctx.group)
        joint_gw, joint_gb = joint.chunk(2)
        e, f = rows.input_gradient_terms(
            sg, sgx, joint_gw, joint_gb, taken, z, inv, weight, count, positions_of(x_rows, axis)
        )
        (dx,) = _run(compiled, rows.apply_gradient, (g_rows, x_rows, x0, slope, e, f), axis)
        return (
            as_map(dx, x, axis),
            None if weight is None else gw.to(weight.dtype),
            gb.to(x.dtype if weight is None else weight.dtype) if ctx.has_bias else None,
            *[None] * 4,
        )


def _run(compiled: bool, function: Any, tensors: tuple[Tensor, ...], axis: int) -> list[Tensor]:
    return run_kernel(function, tensors, axis) if compiled else listed(function(*tensors, axis))


class _Sync(_BatchNorm):
    """In training with several ranks, batch statistics over all of them; else what the layer does anyway."""

    process_group: dist.ProcessGroup | None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - BN's own name
        alone = not dist.is_initialized() or dist.get_world_size(self.process_group) == 1
        return super().forward(input) if alone or not self.training else self._joint(input)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _joint(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)  # type: ignore[no-untyped-call]
        rms, compiled = None, False
        if isinstance(self, _L2BatchNorm):
            rms = self.scale == "rms"
            compiled = self.fused == "on" or (self.fused == "auto" and compiler_works(x.device.type))
        y, mu, v, count = _JointNorm.apply(x, self.weight, self.bias, rms, self.eps, self.process_group, compiled)
        if self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            momentum = 1.0 / self.num_batches_tracked if self.momentum is None else self.momentum
            with torch.no_grad():
                update_running(self.running_mean, self.running_var, mu, v, momentum, count)
        return y


class SyncBatchNorm1d(_Sync, nn.BatchNorm1d): ...


class SyncBatchNorm2d(_Sync, nn.BatchNorm2d): ...


class SyncBatchNorm3d(_Sync, nn.BatchNorm3d): ...


class SyncL2BatchNorm1d(_Sync, L2BatchNorm1d): ...


class SyncL2BatchNorm2d(_Sync, L2BatchNorm2d): ...


class SyncL2BatchNorm3d(_Sync, L2BatchNorm3d): ...


class SyncL2BatchNormAct2d(L2BatchNormAct2d, SyncL2BatchNorm2d): ...


class SyncBatchNormAct2d(SyncBatchNorm2d):
    """timm's `BatchNormAct2d`: the norm, then dropout and activation."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - BN's own name
        return self.act(self.drop(super().forward(input)))


COUNTERPARTS: dict[type[nn.Module], type[_Sync]] = {
    nn.BatchNorm1d: SyncBatchNorm1d,
    nn.BatchNorm2d: SyncBatchNorm2d,
    nn.BatchNorm3d: SyncBatchNorm3d,
    L2BatchNorm1d: SyncL2BatchNorm1d,
    L2BatchNorm2d: SyncL2BatchNorm2d,
    L2BatchNorm3d: SyncL2BatchNorm3d,
    L2BatchNormAct2d: SyncL2BatchNormAct2d,
}


def convert_sync(model: nn.Module, process_group: dist.ProcessGroup | None = None) -> int:
    """Make the batch statistics of each BN and L2BN layer joint across a group's ranks (None: all ranks).

    In place: the layers keep their identity, parameters and state-dict keys, and change their class. Returns
    their number; a model that has none is left as it is.

    Raises:
        TypeError: a batch norm layer has a `forward` of its own. Nothing is changed then.
    """
    layers = counterparts(model)
    for layer, cls in layers.items():
        layer.__class__ = cls
        layer.process_group = process_group  # type: ignore[assignment]
    logger.info("%s: batch statistics of %d layers are joint across ranks", type(model).__name__, len(layers))
    return len(layers)


def counterparts(model: nn.Module) -> dict[_BatchNorm, type[_Sync]]:
    """What `convert_sync` would make of each layer. Raises TypeError for one that has no synchronised form."""
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and not isinstance(m, _Sync)]
    return {layer: _counterpart(layer) for layer in layers}


def _counterpart(layer: _BatchNorm) -> type[_Sync]:
    if type(layer) in COUNTERPARTS:
        return COUNTERPARTS[type(layer)]
    from timm.layers.norm_act import BatchNormAct2d  # here, for a slow import that few models need

    if type(layer) is BatchNormAct2d:
        return SyncBatchNormAct2d
    raise TypeError(
        f"no synchronised form of {type(layer).__module__}.{type(layer).__qualname__} is known: accepted are "
        "nn.BatchNorm1d, 2d and 3d, their L2BN counterparts and timm's BatchNormAct2d"
    )
