"""Formulas as kernels: compiled by inductor at a first call, one for each kind of tensors, for eager callers.

Dynamo takes no part, so there are no guards to check at every call and no recompile limit to fall over.
"""

import logging
import threading
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
import torch._inductor.inductor_prims  # registers the operator that `computed_once` calls
from torch import Tensor

logger = logging.getLogger(__name__)

DEVICES = ("cpu", "cuda")  # where inductor's kernels are tried and float64 exists


def computed_once(t: Tensor) -> Tensor:
    """t; inductor stores it here instead of computing it anew for each element of the pass that follows."""
    return torch.ops.prims.inductor_force_stride_order(t, t.stride())


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
            kernel = _kernels.get(kind)  # another thread may have compiled it meanwhile
            if kernel is None:
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
        logger.warning("no compiler works for %s (%s): L2BN takes the plain composition", device_type, reason)
        return False
    return True
