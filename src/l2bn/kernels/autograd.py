"""L2BN at batch norm's cost: the calls of a layer, as autograd functions over the formulas.

Two ways of summing serve two kinds of map in training, rows.py and columns.py; the choice is for speed alone.
Called from eager code, forward and backward are each one kernel, compiled for the kind of map at hand
(compiler.py). Inside a compiled model the same formulas are traced into the model's graph.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from l2bn.kernels import columns, rows
from l2bn.kernels.compiler import needs_plain_operators, run_kernel, scalar
from l2bn.kernels.formulas import (
    Scalar,
    Scale,
    State,
    as_map,
    as_rows,
    batch_norm,
    dense,
    normalized,
    position_axis,
    positions_of,
    update_running,
    widened,
)

FEW_POSITIONS = 16
"""Up to so many, columns.py trains faster: for 128 x 512 x 2 x 2 it takes 0.32 (channels_last: 0.42) of the time of
rows.py, for 128 x 320 x 4 x 4 0.77 (0.96), for 128 x 1280 x 4 x 4 0.80 (1.03), for 128 x 64 x 8 x 8 1.3 (1.2);
forward and backward in eager code, two AVX-512 cores."""


def formulas_for(positions: int) -> ModuleType:
    return columns if positions <= FEW_POSITIONS else rows


# ------------------------------------------------------------------------------------------ for eager callers


def forward_kernel(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    factor: Tensor | None,
    eps: Tensor,
    formulas: ModuleType,
    scale: Scale,
    axis: int,
) -> tuple[Tensor, ...]:
    y, mu, v, saved = formulas.forward(as_rows(x, axis), weight, bias, scale, eps, axis)
    update_running(mean, var, mu, v, factor, x.numel() / x.shape[1])
    return as_map(y, x, axis), *saved


def backward_kernel(g: Tensor, x: Tensor, weight: Tensor | None, *saved_and_constants: Any) -> tuple[Tensor, ...]:
    *saved, formulas, scale, axis = saved_and_constants
    g = g.expand_as(x)  # with sizes left open: they are equal, so that one loop reads both
    dx, gw, gb = formulas.backward(as_rows(g, axis), as_rows(x, axis), weight, tuple(saved), scale, axis)
    return as_map(dx, x, axis), gw, gb


def evaluation_kernel(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: Scalar,
    scale: Scale,
    axis: int,
) -> Tensor:
    inv = 1 / (widened(var) + eps).sqrt()
    slope = inv if weight is None else inv * weight
    shift = -widened(mean) * slope if bias is None else bias - widened(mean) * slope
    return as_map(rows.evaluate(as_rows(x, axis), slope, shift, scale, axis), x, axis)


class _Training(torch.autograd.Function):
    """L2BN by batch statistics, in compiled kernels."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        factor: Tensor | None,
        scale: Scale,
        eps: float,
        strict: bool,
    ) -> Tensor:
        ctx.axis, ctx.scale, ctx.eps, ctx.bias = position_axis(x), scale, eps, bias
        ctx.formulas = formulas_for(x.shape[2:].numel())
        tensors = dense(x, ctx.axis), weight, bias, mean, var, factor, scalar(eps)
        ctx.options = {"strict": strict, "each_size": ctx.formulas is columns}
        y, *saved = run_kernel(forward_kernel, tensors, ctx.formulas, scale, ctx.axis, **ctx.options)
        ctx.save_for_backward(x, weight, *saved)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight, *saved = ctx.saved_tensors
        if torch.is_grad_enabled() or needs_plain_operators(g):

            def definition(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
                z = normalized(widened(x), ctx.scale)
                return batch_norm(z, weight, bias, None, None, ctx.eps, momentum=0.0, training=True).to(x.dtype)

            return *gradients_by_operators(definition, (x, weight, ctx.bias), g), *[None] * 6
        tensors = dense(g, ctx.axis), dense(x, ctx.axis), weight, *saved
        dx, gw, gb = run_kernel(backward_kernel, tensors, ctx.formulas, ctx.scale, ctx.axis, **ctx.options)
        return (
            dx,
            None if weight is None else gw.to(weight.dtype),
            None if ctx.bias is None else gb.to(ctx.bias.dtype),
            *[None] * 6,
        )


def gradients_by_operators(
    function: Callable[..., Tensor], inputs: tuple[Tensor | None, ...], g: Tensor
) -> list[Tensor | None]:
    """Return the gradients of the inputs, g that of function(*inputs), so that they can be differentiated and
    transformed.

    They are taken at aliases of the inputs: at the inputs themselves hooks would run twice, and where one input
    depends on another, as in a layer that is applied twice, the path between them would count twice.
    """
    higher = torch.is_grad_enabled()
    with torch.enable_grad():
        aliases = [t if t is None else t.view_as(t) for t in inputs]
        wanted = [t for t in aliases if t is not None and t.requires_grad]
        gradients = iter(torch.autograd.grad(function(*aliases), wanted, g, create_graph=higher))
    return [next(gradients) if t is not None and t.requires_grad else None for t in inputs]


class _TracedTraining(torch.autograd.Function):
    """L2BN of rows by batch statistics, as formulas that a compiled model takes into its graph."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Scale, eps: float, axis: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, mu, v, saved = formulas_for(positions_of(x, axis)).forward(x, weight, bias, scale, eps, axis)
        ctx.save_for_backward(x, weight, *saved)
        ctx.scale, ctx.axis = scale, axis
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mark_non_differentiable(mu, v)
        return y, mu, v

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> Any:
        x, weight, *saved = ctx.saved_tensors
        formulas = formulas_for(positions_of(x, ctx.axis))
        dx, gw, gb = formulas.backward(g, x, weight, tuple(saved), ctx.scale, ctx.axis)
        return (
            dx,
            None if weight is None else gw.to(weight.dtype),
            None if ctx.bias_dtype is None else gb.to(ctx.bias_dtype),
            None,
            None,
            None,
        )


# ---------------------------------------------------------------------------------------- the calls of a layer


def forward_training(
    x: Tensor, state: State, factor: Scalar | None, scale: Scale, eps: float, strict: bool
) -> Tensor:
    """Return L2BN by the batch's statistics, and move the running ones by `factor`: momentum, or 1 / updates."""
    if not torch.compiler.is_compiling():
        factor = scalar(factor) if isinstance(factor, (int, float)) else factor
        return _Training.apply(x, *state, factor, scale, eps, strict)
    axis = position_axis(x)
    # Rows are made out here: inside, Dynamo would copy the gradient of a channels_last map to (N, C, P).
    y, mu, v = _TracedTraining.apply(as_rows(x, axis), state.weight, state.bias, scale, eps, axis)
    with torch.no_grad():
        update_running(state.mean, state.var, mu, v, factor, x.numel() / x.shape[1])
    return as_map(y, x, axis)


def forward_inference(x: Tensor, state: State, scale: Scale, eps: float, strict: bool) -> Tensor:
    """Return L2BN by the running statistics, which `state` must have; in eager code without gradients."""
    axis = position_axis(x)
    if torch.compiler.is_compiling():
        assert state.mean is not None
        assert state.var is not None
        return evaluation_kernel(x, state.weight, state.bias, state.mean, state.var, eps, scale, axis)
    return run_kernel(evaluation_kernel, (dense(x, axis), *state, scalar(eps)), scale, axis, strict=strict)[0]
