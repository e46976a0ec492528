"""L2BN at batch norm's price: what a layer calls, in eager code and inside a model that is itself compiled.

For the definition (Wang et al., arXiv:2207.02625) see l2bn.py. Two ways of summing serve two kinds of map, rows.py
and columns.py; which one is taken is a matter of speed alone. Called from eager code, forward and backward are each
one kernel that is compiled for the kind of map at hand (kernels.py). Inside a compiled model the same formulas are
traced into the model's graph.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from l2bn.norms import columns, rows
from l2bn.norms.kernels import run_kernel
from l2bn.norms.l2_step import sample_scale, squared_target, widened
from l2bn.norms.layout import as_map, as_rows, dense, position_axis, positions_of

FEW_POSITIONS = 16
"""Up to so many, columns.py is faster: for 128 x 512 x 2 x 2 it takes 0.25 (channels_last: 0.65) of the time of
rows.py, for 128 x 320 x 4 x 4 0.9 (1.1), for 128 x 64 x 8 x 8 1.3 (1.2); forward and backward in eager code, two
AVX-512 cores."""


def formulas_for(positions: int) -> ModuleType:
    return columns if positions <= FEW_POSITIONS else rows


def update_running(
    mean: Tensor | None, var: Tensor | None, mu: Tensor, v: Tensor, momentum: float | Tensor, count: float
) -> None:
    """Batch norm's rule, in place: towards the mean and the unbiased variance."""
    if mean is not None and var is not None:
        mean.copy_(mean + momentum * (mu - mean))
        var.copy_(var + momentum * (v * (count / (count - 1)) - var))


# ------------------------------------------------------------------------------------------ for eager callers


def forward_kernel(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    tracked: Tensor | None,
    formulas: ModuleType,
    rms: bool,
    eps: float,
    momentum: float | None,
    axis: int,
) -> tuple[Tensor, ...]:
    y, mu, v, saved = formulas.forward(as_rows(x, axis), weight, bias, rms, eps, axis)
    step = momentum if tracked is None else 1.0 / tracked
    if step is not None:
        update_running(mean, var, mu, v, step, x.numel() / x.shape[1])
    return as_map(y, x, axis), *saved


def backward_kernel(g: Tensor, x: Tensor, weight: Tensor | None, *saved_and_constants: Any) -> tuple[Tensor, ...]:
    *saved, formulas, rms, axis = saved_and_constants
    dx, gw, gb = formulas.backward(as_rows(g, axis), as_rows(x, axis), weight, tuple(saved), rms, axis)
    return as_map(dx, x, axis), gw, gb


def evaluation_kernel(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    formulas: ModuleType,
    rms: bool,
    eps: float,
    axis: int,
) -> Tensor:
    return as_map(formulas.evaluate(as_rows(x, axis), weight, bias, mean, var, rms, eps, axis), x, axis)


class _Training(torch.autograd.Function):
    """Batch statistics, by compiled kernels."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        tracked: Tensor | None,
        rms: bool,
        eps: float,
        momentum: float | None,
    ) -> Tensor:
        ctx.axis, ctx.rms, ctx.eps, ctx.bias = position_axis(x), rms, eps, bias
        ctx.formulas = formulas_for(x.shape[2:].numel())
        tensors = dense(x, ctx.axis), weight, bias, mean, var, tracked
        y, *saved = run_kernel(forward_kernel, tensors, ctx.formulas, rms, eps, momentum, ctx.axis)
        ctx.save_for_backward(x, weight, *saved)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight, *saved = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: the definition has the further derivatives
            return *_graph_of_gradients(g, x, weight, ctx.bias, ctx.rms, ctx.eps), *[None] * 6
        tensors = dense(g, ctx.axis), dense(x, ctx.axis), weight, *saved
        dx, gw, gb = run_kernel(backward_kernel, tensors, ctx.formulas, ctx.rms, ctx.axis)
        return (
            dx,
            None if weight is None else gw.to(weight.dtype),
            None if ctx.bias is None else gb.to(ctx.bias.dtype),
            *[None] * 6,
        )


def _graph_of_gradients(
    g: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, rms: bool, eps: float
) -> list[Tensor | None]:
    inputs = [x, weight, bias]
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    axes = tuple(range(1, x.ndim))
    wide = widened(x)
    s = sample_scale(wide.square().sum(axes, keepdim=True), squared_target(x, rms))
    w, b = (None if t is None else widened(t) for t in (weight, bias))
    y = F.batch_norm(wide * s, None, None, w, b, training=True, eps=eps).to(x.dtype)
    gradients = iter(torch.autograd.grad(y, wanted, g, create_graph=True))
    return [next(gradients) if t is not None and t.requires_grad else None for t in inputs]


class _TracedTraining(torch.autograd.Function):
    """Batch statistics of rows, by formulas that a compiled model takes into its graph."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, rms: bool, eps: float, axis: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, mu, v, saved = formulas_for(positions_of(x, axis)).forward(x, weight, bias, rms, eps, axis)
        ctx.save_for_backward(x, weight, *saved)
        ctx.rms, ctx.axis = rms, axis
        ctx.weight_dtype = None if weight is None else weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mark_non_differentiable(mu, v)
        return y, mu, v

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> Any:
        x, weight, *saved = ctx.saved_tensors
        dx, gw, gb = formulas_for(positions_of(x, ctx.axis)).backward(g, x, weight, tuple(saved), ctx.rms, ctx.axis)
        return (
            dx,
            None if ctx.weight_dtype is None else gw.to(ctx.weight_dtype),
            None if ctx.bias_dtype is None else gb.to(ctx.bias_dtype),
            None,
            None,
            None,
        )


# --------------------------------------------------------------------------------------- what the layer calls


def train(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    tracked: Tensor | None,
    rms: bool,
    eps: float,
    momentum: float | None,
) -> Tensor:
    """L2BN by the batch's statistics, with the running ones moved; `tracked` takes momentum's place if given."""
    if not torch.compiler.is_compiling():
        return _Training.apply(x, weight, bias, mean, var, tracked, rms, eps, momentum)
    axis = position_axis(x)
    # Rows are made out here: inside, Dynamo would have the gradient of a channels_last map copied to (N, C, P).
    y, mu, v = _TracedTraining.apply(as_rows(x, axis), weight, bias, rms, eps, axis)
    step = momentum if tracked is None else 1.0 / tracked
    if step is not None:
        with torch.no_grad():
            update_running(mean, var, mu, v, step, x.numel() / x.shape[1])
    return as_map(y, x, axis)


def evaluate(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, rms: bool, eps: float
) -> Tensor:
    """L2BN by the running statistics; in eager code without gradients."""
    axis = position_axis(x)
    constants = formulas_for(x.shape[2:].numel()), rms, eps, axis
    if torch.compiler.is_compiling():
        return evaluation_kernel(x, weight, bias, mean, var, *constants)
    return run_kernel(evaluation_kernel, (dense(x, axis), weight, bias, mean, var), *constants)[0]
