"""L2BN at batch norm's memory traffic: one reading pass and one read-write pass, forward and backward.

For the definition (Wang et al., arXiv:2207.02625) see l2bn.py. With the per-sample, per-channel moments of x,
everything between the two passes is small. Letters: N batch, C channels, P positions, M = N*P. Maps are rows here,
(N, C, P) or for channels_last (N, P, C), with `axis` that of P.

    x0 = the first position of x;  d = x - x0;  m = mean_p d;  var = mean_p (d - m)^2           (N, C)
    ||x_n||^2 = P sum_c (var + (x0 + m)^2);  s = a / ||x_n||                                    (N, 1)
    zm = s (x0 + m);  mu = mean_n zm;  zc = zm - mu;  v = mean_n (s^2 var + zc^2);  inv = 1 / sqrt(v + eps)
    y = d A + B,  k = inv w,  A = s k,  B = (zc - s m) k + b

    backward, of the gradient g of y:
    sg = sum_p g;  sgx = sum_p g d - m sg;  gb = sum_n sg;  gw = sum_n (s sgx + zc sg) inv
    c1 = -k gw inv / M;  c0 = -k gb / M + c1 zc
    r = sum_c (k (sgx + (x0 + m) sg) + P (c0 (x0 + m) + c1 s var)) / ||x_n||^2;  e = s (c1 s - r)
    dx = g A + d e + f,  f = s (c0 - r (x0 + m)) - m e

A mean far above the spread would cancel the digits of the spread away. So x enters as its distance from x0, a shift
that costs no pass over x, and what is small, (N, C) and below, is computed in float64.

Called from eager code, forward and backward are each one kernel that inductor compiles for the kind of map at hand.
Dynamo takes no part, so there are no guards to check at every call and no recompile limit to fall over. Inside a
model that is itself compiled, the same formulas are traced into the model's graph.
"""

import logging
import math
import threading
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
import torch._inductor.inductor_prims  # registers the operator that `computed_once` calls
from torch import Tensor, nn
from torch.nn import functional as F

logger = logging.getLogger(__name__)

DEVICES = ("cpu", "cuda")  # where inductor's kernels are tried and float64 exists
TINY = 1e-12  # as in torch.nn.functional.normalize; norms are float32 at least, where its square is no zero


# ------------------------------------------------------------------------------------------------ formulas on rows


class Moments(NamedTuple):
    """What the first pass leaves of x: small, and kept for backward."""

    m: Tensor  # (N, C) mean over the positions, as distance from the first of them
    var: Tensor  # (N, C) biased variance over the positions


class Features(NamedTuple):
    """The normalized features z, as the batch statistics see them; in float64."""

    mean: Tensor  # (N, C) of x over the positions
    norm2: Tensor  # (N, 1) the sample's squared l2 norm; 0 where no norm is taken, in BN
    s: Tensor  # (N, 1) what the sample is multiplied with
    zc: Tensor  # (N, C) mean of z over the positions, centred over the samples
    mu: Tensor  # (C,) mean of z over samples and positions
    v: Tensor  # (C,) biased variance of z over samples and positions


class Line(NamedTuple):
    """y = d A + B, and the inverse deviation that both hold."""

    slope: Tensor  # (N, C)
    shift: Tensor  # (N, C)
    inv: Tensor  # (C,)


def widened(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def computed_once(t: Tensor) -> Tensor:
    """t; inductor stores it here instead of computing it anew for each element of the pass that follows."""
    return torch.ops.prims.inductor_force_stride_order(t, t.stride())


def origin(x: Tensor, axis: int) -> Tensor:
    """x0, (N, C)."""
    return widened(x.select(axis, 0))


def distance(x: Tensor, axis: int) -> Tensor:
    """d, in the shape of x."""
    return widened(x) - origin(x, axis).unsqueeze(axis)


def moments(x: Tensor, axis: int) -> Moments:
    """The reading pass."""
    d = distance(x, axis)
    m = d.sum(axis) / x.shape[axis]
    return Moments(m, ((d * d).sum(axis) / x.shape[axis] - m * m).clamp_min(0))


def squared_target(x: Tensor, rms: bool) -> int:
    """a^2: the squared norm that each sample of x (N, ...) is given, D for a root mean square of 1.

    Taken from the shape, so that a kernel for any size need not be told.
    """
    return math.prod(x.shape[1:]) if rms else 1


def sample_scale(norm2: Tensor, a2: int) -> Tensor:
    """What each sample is multiplied with: 0 if it is all zero, NaN if its norm is not finite."""
    s = (a2 / norm2.clamp_min(TINY**2)).sqrt()
    return torch.where(norm2 == 0, 0.0, torch.where(norm2 < math.inf, s, math.nan))


def features(x: Tensor, taken: Moments, rms: bool | None, axis: int) -> Features:
    """Statistics of z = s x; with `rms` None the sample's norm is left as it is, which is BN."""
    m, var = taken.m.double(), taken.var.double()
    mean = origin(x, axis).double() + m
    norm2 = x.shape[axis] * (var + mean * mean).sum(1, keepdim=True)
    if rms is None:
        norm2 = torch.zeros_like(norm2)
        s = torch.ones_like(norm2)
    else:
        s = sample_scale(norm2, squared_target(x, rms))
    mu = (s * mean).mean(0)
    zc = s * mean - mu
    return Features(mean, norm2, s, zc, mu, (s * s * var + zc * zc).mean(0))


def line(taken: Moments, z: Features, weight: Tensor | None, bias: Tensor | None, eps: float) -> Line:
    """What the second pass multiplies with and adds."""
    m = taken.m
    inv = 1 / (z.v + eps).sqrt()
    k = inv if weight is None else inv * weight
    shift = (z.zc - z.s * m) * k
    return Line((z.s * k).to(m.dtype), (shift if bias is None else shift + bias).to(m.dtype), inv)


def apply_line(x: Tensor, slope: Tensor, shift: Tensor, axis: int) -> Tensor:
    """The read-write pass."""
    slope, shift = computed_once(slope), computed_once(shift)
    return (distance(x, axis) * slope.unsqueeze(axis) + shift.unsqueeze(axis)).to(x.dtype)


def gradient_sums(g: Tensor, x: Tensor, m: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """The reading pass of backward: sg and sgx, (N, C)."""
    wide = widened(g)
    sg = wide.sum(axis)
    return sg, (wide * distance(x, axis)).sum(axis) - m * sg


def parameter_gradients(sg: Tensor, sgx: Tensor, z: Features, inv: Tensor) -> tuple[Tensor, Tensor]:
    """Of weight and bias, (C,)."""
    return ((z.s * sgx + z.zc * sg) * inv).sum(0), sg.double().sum(0)


def input_gradient_terms(
    sg: Tensor,
    sgx: Tensor,
    gw: Tensor,
    gb: Tensor,
    taken: Moments,
    z: Features,
    inv: Tensor,
    weight: Tensor | None,
    count: float | Tensor,
    positions: int,
) -> tuple[Tensor, Tensor]:
    """e and f of dx, (N, C). `count` is M, over which the statistics were taken."""
    m, var = taken
    k = inv if weight is None else inv * weight
    c1 = -k * gw * inv / count
    c0 = -k * gb / count + c1 * z.zc
    along_x = k * (sgx + z.mean * sg) + positions * (c0 * z.mean + c1 * z.s * var)
    # Below tiny, s does not depend on x.
    r = torch.where(z.norm2 > TINY**2, along_x.sum(1, keepdim=True) / z.norm2, 0.0)
    e = z.s * (c1 * z.s - r)
    return e.to(m.dtype), (z.s * (c0 - r * z.mean) - m * e).to(m.dtype)


def apply_gradient(g: Tensor, x: Tensor, slope: Tensor, e: Tensor, f: Tensor, axis: int) -> Tensor:
    """The read-write pass of backward."""
    slope, e, f = computed_once(slope), computed_once(e), computed_once(f)
    dx = widened(g) * slope.unsqueeze(axis) + distance(x, axis) * e.unsqueeze(axis) + f.unsqueeze(axis)
    return dx.to(x.dtype)


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, rms: bool, eps: float, axis: int
) -> tuple[Tensor, Features, Line, Moments]:
    """y, and what is small on the way to it."""
    taken = moments(x, axis)
    z = features(x, taken, rms, axis)
    drawn = line(taken, z, weight, bias, eps)
    return apply_line(x, drawn.slope, drawn.shift, axis), z, drawn, taken


def backward(
    g: Tensor, x: Tensor, weight: Tensor | None, inv: Tensor, taken: Moments, rms: bool, axis: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    n, positions = x.shape[0], x.shape[axis]
    z = features(x, taken, rms, axis)
    slope = (z.s * (inv if weight is None else inv * weight)).to(taken.m.dtype)
    sg, sgx = gradient_sums(g, x, taken.m, axis)
    gw, gb = parameter_gradients(sg, sgx, z, inv)
    e, f = input_gradient_terms(sg, sgx, gw, gb, taken, z, inv, weight, n * positions, positions)
    return apply_gradient(g, x, slope, e, f, axis), gw, gb


# --------------------------------------------------------------------------------------------- maps, seen as rows


def position_axis(x: Tensor) -> int:
    """Where P stands when the map x is seen as rows without a copy: 1 if the channels lie innermost."""
    if x.ndim == 2 or x[0, 0].numel() == 1:
        return 1
    return 1 if x.stride(1) == 1 and x.shape[1] > 1 else 2


def dense(x: Tensor, axis: int) -> Tensor:
    """x (N, C, ...) itself if its memory is that of dense rows, else a copy that is."""
    if axis == 2 or x.ndim == 2:
        return x.contiguous()
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def as_rows(x: Tensor, axis: int) -> Tensor:
    n, channels = x.shape[:2]
    return x.reshape(n, channels, -1) if axis == 2 else x.movedim(1, -1).reshape(n, -1, channels)


def as_map(rows: Tensor, like: Tensor, axis: int) -> Tensor:
    if axis == 2 or like.stride(-1) == 1:  # the latter: one position, of which both formats may be said
        return rows.reshape(like.shape)
    return rows.reshape(like.movedim(1, -1).shape).movedim(-1, 1)


def update_running(
    mean: Tensor | None, var: Tensor | None, mu: Tensor, v: Tensor, momentum: float | Tensor, count: float
) -> None:
    """Batch norm's rule, in place: towards the mean and the unbiased variance."""
    if mean is not None and var is not None:
        mean.copy_(mean + momentum * (mu - mean))
        var.copy_(var + momentum * (v * (count / (count - 1)) - var))


# ------------------------------------------------------------------------------- kernels, for eager callers


def forward_kernel(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    tracked: Tensor | None,
    rms: bool,
    eps: float,
    momentum: float | None,
    axis: int,
) -> tuple[Tensor, ...]:
    rows = as_rows(x, axis)
    y, z, drawn, taken = forward(rows, weight, bias, rms, eps, axis)
    step = momentum if tracked is None else 1.0 / tracked
    if step is not None:
        update_running(mean, var, z.mu, z.v, step, x.numel() / x.shape[1])
    return as_map(y, x, axis), drawn.inv, *taken


def backward_kernel(
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    inv: Tensor,
    m: Tensor,
    var: Tensor,
    rms: bool,
    axis: int,
) -> tuple[Tensor, ...]:
    g_rows, x_rows = as_rows(g, axis), as_rows(x, axis)
    dx, gw, gb = backward(g_rows, x_rows, weight, inv, Moments(m, var), rms, axis)
    return as_map(dx, x, axis), gw, gb


def evaluation_kernel(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    rms: bool,
    eps: float,
    axis: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """By the running statistics: only the samples' norms have to be read from x before the second pass."""
    rows = as_rows(x, axis)
    s = sample_scale(widened(rows).square().sum(axis).sum(1, keepdim=True), squared_target(x, rms))
    inv = 1 / (widened(var) + eps).sqrt()
    k = inv if weight is None else inv * weight
    shift = -widened(mean) * k if bias is None else bias - widened(mean) * k
    slope, shift = s * k, shift.expand(x.shape[0], -1)  # returned, and so computed once, as above
    y = (widened(rows) * slope.unsqueeze(axis) + shift.unsqueeze(axis)).to(x.dtype)
    return as_map(y, x, axis), slope, shift


Kernel = Callable[..., list[Tensor]]

STATIC_KINDS = 4
"""So many batch and image sizes of one channel count get a kernel of their own; all others share one that is
compiled for any size, so that inputs of ever new sizes do not compile for ever."""

_kernels: dict[Any, Kernel] = {}
_kinds: Counter[Any] = Counter()
_compiling = threading.Lock()


def run_kernel(
    function: Callable[..., Tensor | tuple[Tensor, ...]], tensors: tuple[Tensor | None, ...], *constants: Any
) -> list[Tensor]:
    """What function(*tensors, *constants) returns, listed, by a kernel for tensors of their kind.

    A kind is shapes, strides, types and devices; its kernel is compiled by inductor at the first call.
    """
    kind = (
        function,
        constants,
        torch.get_num_threads(),
        *[None if t is None else (t.dtype, t.device, t.shape, t.stride()) for t in tensors],
    )
    kernel = _kernels.get(kind)
    if kernel is None:
        with _compiling:
            kernel = _kernels[kind] = _new_kernel(function, tensors, constants)
    return kernel(*[t for t in tensors if t is not None])


def _new_kernel(
    function: Callable[..., Any], tensors: tuple[Tensor | None, ...], constants: tuple[Any, ...]
) -> Kernel:
    sizes = next(t.shape for t in tensors if t is not None)
    common = (
        function,
        constants,
        torch.get_num_threads(),
        *[None if t is None else (t.dtype, t.device, t.ndim) for t in tensors],
    )
    _kinds[common, sizes[1]] += 1
    if _kinds[common, sizes[1]] <= STATIC_KINDS:
        return _compile(function, tensors, constants, "fake")
    any_size = (common, tuple(size == 1 for size in sizes))  # the compiler takes a size of 1 for a constant
    if any_size not in _kernels:
        _kernels[any_size] = _compile(function, tensors, constants, "symbolic")
    return _kernels[any_size]


def _compile(
    function: Callable[..., Any],
    tensors: tuple[Tensor | None, ...],
    constants: tuple[Any, ...],
    sizes: Literal["fake", "symbolic"],
) -> Kernel:
    # Imported here: they are slow, and needed only where a kernel is built.
    from torch._inductor import compile as compile_graph
    from torch.fx.experimental import _config as open_sizes
    from torch.fx.experimental.proxy_tensor import make_fx

    given = [t is not None for t in tensors]

    def of_tensors(*present: Tensor) -> list[Tensor]:
        rest = iter(present)
        return listed(function(*(next(rest) if is_given else None for is_given in given), *constants))

    present = [t.detach() for t in tensors if t is not None]
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(present[0].device.type, enabled=False),
        open_sizes.patch(use_duck_shape=False),  # type: ignore[attr-defined] # sizes that are equal by chance are not equal for ever
    ):
        graph = make_fx(of_tensors, tracing_mode=sizes)(*present)
        inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
        compiled: Kernel = compile_graph(graph, inputs)
        return compiled


def listed(result: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


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
        tensors = dense(x, ctx.axis), weight, bias, mean, var, tracked
        y, inv, m, spread = run_kernel(forward_kernel, tensors, rms, eps, momentum, ctx.axis)
        ctx.save_for_backward(x, weight, inv, m, spread)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight, *small = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: the definition has the further derivatives
            return *_graph_of_gradients(g, x, weight, ctx.bias, ctx.rms, ctx.eps), *[None] * 6
        tensors = dense(g, ctx.axis), dense(x, ctx.axis), weight, *small
        dx, gw, gb = run_kernel(backward_kernel, tensors, ctx.rms, ctx.axis)
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
        y, z, drawn, taken = forward(x, weight, bias, rms, eps, axis)
        ctx.save_for_backward(x, weight, drawn.inv, *taken)
        ctx.rms, ctx.axis = rms, axis
        ctx.weight_dtype = None if weight is None else weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mark_non_differentiable(z.mu, z.v)
        return y, z.mu, z.v

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> Any:
        x, weight, inv, m, var = ctx.saved_tensors
        dx, gw, gb = backward(g, x, weight, inv, Moments(m, var), ctx.rms, ctx.axis)
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
    if torch.compiler.is_compiling():
        return evaluation_kernel(x, weight, bias, mean, var, rms, eps, axis)[0]
    return run_kernel(evaluation_kernel, (dense(x, axis), weight, bias, mean, var), rms, eps, axis)[0]


# ------------------------------------------------------------------------------------------ which kernels to use


@cache
def compiler_works(device_type: str) -> bool:
    """Whether inductor can build and run a kernel for this device; logs the reason once if not."""
    if device_type not in DEVICES:
        logger.info("L2BN takes the plain composition: no fused kernels for device %s", device_type)
        return False
    try:
        _compile(torch.add, (torch.ones(2, device=device_type), torch.ones(2, device=device_type)), (), "fake")(
            torch.ones(2, device=device_type), torch.ones(2, device=device_type)
        )
    except Exception as error:  # whatever a missing or broken tool chain raises
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        logger.warning("L2BN takes the plain composition: no compiler works for %s (%s)", device_type, reason)
        return False
    return True


UPDATES_A_CHANNEL_COUNT = 100
"""So many updates earn back what is compiled for one channel count: 3 kernels, about 2.5 s the first time, against
28 ms saved per update (ResNet-20, batch 128, 3 channel counts, two cores: 0.44 of BN's 194 ms)."""


def select_kernels(model: nn.Module, device: torch.device | str, updates: int) -> str:
    """Decide, for a run of so many updates, how the L2BN layers left at fused="auto" are computed.

    Returns what belongs into the run's record: "fused", "plain", or "stock" for a model without L2BN. One line is
    logged with the reason.
    """
    from l2bn.norms.l2bn import _L2BatchNorm  # the layer itself is built on this module

    layers = [layer for layer in model.modules() if isinstance(layer, _L2BatchNorm)]
    if not layers:
        return "stock"
    undecided = [layer for layer in layers if layer.fused == "auto"]
    if undecided:
        needed = UPDATES_A_CHANNEL_COUNT * len({layer.num_features for layer in undecided})
        works = updates >= needed and compiler_works(torch.device(device).type)
        if updates < needed:
            logger.info(
                "L2BN takes the plain composition: %d updates do not earn back the compilation (%d would)",
                updates,
                needed,
            )
        elif works:
            logger.info("L2BN takes fused kernels in %d layers", len(undecided))
        for layer in undecided:
            layer.fused = "on" if works else "off"
    return "fused" if any(layer.fused == "on" for layer in layers) else "plain"
