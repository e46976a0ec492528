"""Kernels: formulas that inductor compiles at their first call, once for each kind of tensors, for eager callers.

Dynamo takes no part, so no call checks guards and no recompile limit applies.
"""

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

logger = logging.getLogger(__name__)

Fused = Literal["auto", "on", "off"]
"""A layer's kernels: "auto", where a compiler works; "on", the same, but a failed compilation is an error; "off",
the definition. Calls that have no kernel take the definition in any case: evaluation with gradients, joint
statistics, devices but CPU and CUDA, and with a torch before 2.15 a compiled model (`TRACED`)."""

TRACED = torch.__version__ >= "2.15"
"""True if a compiled model takes the kernels' formulas into its graph. In torch 2.11 their gradients
are 0 there, and in 2.12 to 2.14 graphs of open sizes don't compile. Eager code is right in each."""

DEVICES = ("cpu", "cuda")  # inductor's kernels are tested there, and float64 exists

Function = Callable[..., Tensor | tuple[Tensor, ...]]
Kernel = Callable[..., list[Tensor]]
Sizes = Literal["fake", "symbolic"]
"""Of the tensors of a kernel: theirs alone, or any."""

STATIC_KINDS = 4
"""Batch and image sizes of one channel count that get a kernel of their own, on CUDA and in training for maps of
few positions; all others share one for any size. On a CPU it is about as fast where positions are many."""

UPDATES_TO_REPAY = {"cpu": (100, 0), "cuda": (0, 10_000)}
"""Updates that repay the first compilation, by device: in all, and for each channel count. ResNet-20, batch 128:

cpu: 3 kernels, about 9 s once a machine, against 31 ms saved per update (0.29 of BN's 108 ms, two cores): three
    runs of 100 updates repay them.
cuda: 42 s for 3 channel counts, against 1.4 ms saved per update (0.4 of BN's 3.5 ms on an H100).
"""

PATIENCE = 2.0
"""Seconds of compilation after which a process says, once, what it is doing."""

MOST_CALLS = 4096
"""Kinds of call that are kept: inputs of any length have no end of sizes."""


@dataclass
class Kernels:
    """The kernels of this process."""

    built: dict[Any, Kernel] = field(default_factory=dict)
    calls: dict[Any, Kernel] = field(default_factory=dict)  # the same, by the exact tensors of a call
    # Calls that have a kernel to themselves, by their kind without sizes and their channel count.
    own: defaultdict[Any, set[Any]] = field(default_factory=lambda: defaultdict(set))
    # For any size: the run's first call, whose sizes the compiler takes as a hint.
    first: dict[Any, Any] = field(default_factory=dict)


_kernels = Kernels()
_compiling = threading.Lock()
_compiled_for = 0.0
"""Seconds of compilation in this process."""


def needs_plain_operators(*tensors: Tensor) -> bool:
    """Return whether a transform or dispatch mode is active, or a tensor is of a class, that must see operators.

    A kernel hides its operators: torch.func and forward-mode differentiation could not transform it, and make_fx or
    torch.jit.trace would record its output as a constant.
    """
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting() or not TRACED  # an exported graph shows the definition
    return (
        any(type(t) not in (Tensor, nn.Parameter) for t in tensors)
        or any(map(torch._C._functorch.is_legacy_batchedtensor, tensors))  # autograd's own batched backward
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    )


@lru_cache(maxsize=64)
def scalar(value: float) -> Tensor:
    """Return the value as a tensor () for a kernel, which then doesn't depend on it."""
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=torch.float64, device="cpu")


def run_kernel(
    function: Function,
    tensors: tuple[Tensor | None, ...],
    *constants: Any,
    strict: bool = False,
    each_size: bool = False,
) -> list[Tensor]:
    """Return function(*tensors, *constants) as a list, by a kernel for tensors of their kind.

    A kind is types, devices, numbers of axes and the constants, and with `each_size` or on CUDA at first the sizes
    too (STATIC_KINDS). Inductor compiles a kernel at the first call of its kind. If that fails, the function itself
    serves from then on, after one warning; with `strict` the error is raised.
    """
    kind = (
        function,
        constants,
        strict,
        torch.get_num_threads(),
        *[None if t is None else (t.dtype, t.device, t.shape, t.stride()) for t in tensors],
    )
    kernel = _kernels.calls.get(kind)
    if kernel is None:
        with _compiling:
            kernel = _kernels.calls.get(kind)  # another thread may have compiled it in the meantime
            if kernel is None:
                kernel = _kernel_for(kind, function, tensors, constants, strict, each_size)
                if len(_kernels.calls) >= MOST_CALLS:
                    _kernels.calls.clear()
                _kernels.calls[kind] = kernel
    return kernel(*[t for t in tensors if t is not None])


def _kernel_for(
    kind: Any,
    function: Function,
    tensors: tuple[Tensor | None, ...],
    constants: tuple[Any, ...],
    strict: bool,
    each_size: bool,
) -> Kernel:
    x = next(t for t in tensors if t is not None)
    common = (
        function,
        constants,
        torch.get_num_threads(),
        *[None if t is None else (t.dtype, t.device, t.ndim) for t in tensors],
    )
    own = _kernels.own[common, x.shape[1]]
    sizes: Sizes = "symbolic"
    if kind in own or len(own) < (STATIC_KINDS if each_size or x.device.type == "cuda" else 0):
        own.add(kind)
        sizes = "fake"
    else:
        # The compiler takes a size of 1 for a constant, indices for as long as those of its first map, and the
        # channels' strides for those of the first ones.
        long = max(t.numel() for t in tensors if t is not None) > torch.iinfo(torch.int32).max
        strided = tuple(min(t.stride(0), 2) if t is not None and t.ndim == 1 else 1 for t in tensors)
        kind = _kernels.first.setdefault((common, tuple(size == 1 for size in x.shape), long, strided), kind)
    try:
        if (kind, sizes) not in _kernels.built:
            _kernels.built[kind, sizes] = _compile(function, tensors, constants, sizes)
        return _kernels.built[kind, sizes]
    except Exception as error:  # whatever a full disk or a missing compiler raises
        if strict:
            raise
        _warn_once(_reason(error))
        uncompiled = _with_absent(function, tensors, constants)
        # `.data`, because autograd forbids an in-place ReLU on a view that a Function returns.
        return lambda *present: [t.data for t in uncompiled(*present)]


def _with_absent(function: Function, tensors: tuple[Tensor | None, ...], constants: tuple[Any, ...]) -> Kernel:
    """Return the function as a kernel is called: with those tensors alone that are not None."""
    given = [t is not None for t in tensors]

    def of_present(*present: Tensor) -> list[Tensor]:
        rest = iter(present)
        result = function(*(next(rest) if is_given else None for is_given in given), *constants)
        return [result] if isinstance(result, Tensor) else list(result)

    return of_present


def _compile(
    function: Function,
    tensors: tuple[Tensor | None, ...],
    constants: tuple[Any, ...],
    sizes: Sizes,
) -> Kernel:
    # Imported here: they are slow, and needed only where a kernel is built.
    from torch._inductor import compile as compile_graph
    from torch.fx.experimental import _config as open_sizes
    from torch.fx.experimental.proxy_tensor import make_fx

    present = [t.detach() for t in tensors if t is not None]
    called = _with_absent(function, tensors, constants)
    if sizes == "symbolic":
        present, called = _vectors(present), _of_vectors(called, [t.ndim == 0 for t in present])
    with (
        _log_slow_compilation(),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(present[0].device.type, enabled=False),
        open_sizes.patch(use_duck_shape=False),  # type: ignore[attr-defined] # sizes equal by chance may differ later
    ):
        graph = make_fx(called, tracing_mode=sizes)(*present)
        inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
        compiled: Kernel = compile_graph(graph, inputs)
    return compiled if sizes == "fake" else lambda *tensors: compiled(*_vectors(tensors))


@contextmanager
def _log_slow_compilation() -> Iterator[None]:
    global _compiled_for
    start = time.monotonic()
    timer = threading.Timer(PATIENCE - _compiled_for, _tell)
    timer.daemon = True
    if _compiled_for < PATIENCE:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
        _compiled_for += time.monotonic() - start


def _tell() -> None:
    # A program that has set no logging up shows warnings alone.
    level = logging.INFO if logger.isEnabledFor(logging.INFO) else logging.WARNING
    logger.log(
        level, "preparing L2BN's kernels: seconds for each kind of map, less once torch's cache has them on disk"
    )


def _vectors(tensors: Iterable[Tensor]) -> list[Tensor]:
    """View tensors () as (1,): with symbolic sizes a tensor () would be traced as a number, and fail to compile."""
    return [t.view(1) if t.ndim == 0 else t for t in tensors]


def _of_vectors(kernel: Kernel, scalars: list[bool]) -> Kernel:
    """Return the kernel for arguments as `_vectors` makes them; `scalars` says which of them were tensors ()."""
    return lambda *tensors: kernel(*(t.view(()) if s else t for t, s in zip(tensors, scalars, strict=True)))


@cache
def compiler_works(device_type: str) -> bool:
    """Return whether inductor builds and runs a kernel for this device; log the reason once if it does not."""
    if device_type not in DEVICES:
        logger.info("L2BN takes the plain composition: no fused kernels for device %s", device_type)
        return False
    ones = torch.ones(2, device=device_type)
    try:
        _compile(torch.add, (ones, ones), (), "fake")(ones, ones)
    except Exception as error:  # whatever a missing or broken tool chain raises
        logger.warning(
            "no compiler works for %s (%s): L2BN takes the plain composition", device_type, _reason(error)
        )
        return False
    return True


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@cache
def _warn_once(reason: str) -> None:
    logger.warning(
        "a kernel of L2BN can't be compiled (%s): its formulas are computed uncompiled, more slowly", reason
    )


def select_kernels(model: nn.Module, device: torch.device | str, updates: int) -> str:
    """Decide, for a run of so many updates, how the L2BN layers left at fused="auto" are computed.

    Returns the entry of the run's record: "fused", "plain", or "stock" for a model without L2BN. Logs one line with
    the reason. The run gets the kernels that it would get in a process of its own, whatever sizes came before it.
    Layers whose batch statistics are joint compute the definition.
    """
    for of_this_run in (_kernels.calls, _kernels.own, _kernels.first):
        of_this_run.clear()
    layers: list[Any] = [
        layer for layer in model.modules() if getattr(layer, "fused", None) in ("auto", "on", "off")
    ]
    if not layers:
        return "stock"
    for layer in layers:
        if layer._shares_batch():
            layer.fused = "off"
    undecided = [layer for layer in layers if layer.fused == "auto"]
    if undecided:
        kind = torch.device(device).type
        in_all, a_channel_count = UPDATES_TO_REPAY.get(kind, (0, 0))
        needed = in_all + a_channel_count * len({layer.num_features for layer in undecided})
        works = updates >= needed and compiler_works(kind)
        if updates < needed:
            logger.info(
                "L2BN takes the plain composition: %d updates do not repay the compilation (%d would)",
                updates,
                needed,
            )
        elif works:
            logger.info("L2BN takes fused kernels in %d layers", len(undecided))
        for layer in undecided:  # "auto" goes on where a later compilation fails
            layer.fused = "auto" if works else "off"
    # On a device without kernels, the layers that ask for them compute the definition.
    fused = torch.device(device).type in DEVICES and any(layer.fused != "off" for layer in layers)
    return "fused" if fused else "plain"
