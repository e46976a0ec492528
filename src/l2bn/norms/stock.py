"""The stock batch norm layers, and what a layer takes over in place of one: what it holds, checks, counts."""

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from l2bn.kernels.formulas import State

Layer = TypeVar("Layer", bound=nn.Module)

STOCK = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

ESTIMATED_ELSEWHERE = (
    "running statistics were estimated by other layers than those that use them now: train, or call "
    "torch.optim.swa_utils.update_bn, before you evaluate"
)


def stock_name(bn: nn.Module) -> str:
    """Classify a layer: "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", or "BatchNormAct2d", which is timm's.

    Raises TypeError for any other layer, and for one with behaviour that a replacement would lose.
    """
    name = f"{type(bn).__module__}.{type(bn).__qualname__}"
    if isinstance(bn, nn.modules.lazy.LazyModuleMixin):
        raise TypeError(f"{name} has no shape yet: run the model once, then swap its norm")
    stock: type[nn.Module]
    for stock in STOCK:
        if isinstance(bn, stock) and type(bn).forward is stock.forward:
            break
    else:
        from timm.layers.norm_act import BatchNormAct2d  # here, for a slow import that few models need

        stock = BatchNormAct2d
        if not isinstance(bn, stock):
            raise TypeError(
                f"no norm can stand for {name}: accepted are nn.BatchNorm1d, 2d and 3d, timm's BatchNormAct2d, and "
                "subclasses that override nothing. Give swap_norm a callable that handles this layer. Statistics "
                "joint across ranks come after the swap, by l2bn.norms.sync.convert_sync"
            )
    if reason := _behaviour_to_lose(bn, stock):
        raise TypeError(f"no norm can stand for {name}: {reason}")
    return stock.__name__


def _behaviour_to_lose(bn: nn.Module, stock: type[nn.Module]) -> str | None:
    """Say why a layer of another class would not behave as `bn` does, or return None."""
    if is_parametrized(bn):
        return "its parameters are parametrized; swap the norm first, then parametrize"
    added = [cls for cls in type(bn).__mro__ if cls not in stock.__mro__]
    defined = {n for cls in added for n, value in vars(cls).items() if not n.startswith("__") or callable(value)}
    if own := sorted(defined - {"__init__", "__annotate__", "__annotate_func__", "extra_repr"}):
        return f"its class has {', '.join(own)} of its own, which the replacement would not have"
    if own := sorted(name for name in vars(bn) if callable(getattr(stock, name, None))):
        return f"its {', '.join(own)} was replaced on this layer; swap the norm first, then replace it"
    if bn._compiled_call_impl is not None:
        return "it was compiled by itself; swap the norm first, then compile"
    if any(getattr(hook, "with_module", False) for hook in bn._load_state_dict_pre_hooks.values()):
        return (
            "it has a load_state_dict pre-hook, which is bound to it; swap the norm first, then register the hook"
        )
    return None


def in_place_of(bn: nn.Module, cls: type[Layer]) -> Layer:
    """Return a layer of class `cls` that holds everything `bn` holds.

    Parameters, buffers and inner modules are the same objects; hooks, mode, persistence of buffers and a user's own
    attributes are carried over too. `bn` is not changed.
    """
    layer = cls.__new__(cls)
    layer.__dict__.update(vars(bn))
    for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        layer.__dict__[name] = copy.copy(getattr(bn, name))
    # Hooks stay in the same dictionaries, so that their handles can still remove them.
    return layer


def check_options(eps: float | None, momentum: float | None) -> None:
    """Raise ValueError for an eps or momentum, other than None, that batch norm can't compute with."""
    if eps is not None and eps <= 0:
        raise ValueError(f"eps must be greater than 0, not {eps}")
    if momentum is not None and not 0 <= momentum <= 1:
        raise ValueError(f"momentum must lie in [0, 1], not {momentum}")


def state_of(layer: _BatchNorm) -> State:
    """Return the tensors that a call uses. It reads them once, because a module's attributes are slow."""
    if layer.training and not layer.track_running_stats:
        return State(layer.weight, layer.bias, None, None)
    return State(layer.weight, layer.bias, layer.running_mean, layer.running_var)


def count_batch(layer: _BatchNorm, state: State) -> float | Tensor | None:
    """Count a batch; return its weight in the running statistics (torch's `exponential_average_factor`).

    None if they stay.
    """
    if not layer.training or state.mean is None:
        return None
    batches = layer.num_batches_tracked
    if batches is None:
        return layer.momentum
    batches.add_(1)
    return 1.0 / batches if layer.momentum is None else layer.momentum


def takes_batch_statistics(state: State, training: bool) -> bool:
    return training or state.mean is None


def check_call(x: Tensor, state: State, eps: float, *, training: bool, joint: bool = False) -> None:
    """Raise what batch norm raises for such an input, eps, weights or statistics; the kernels check nothing.

    With `joint` other ranks have values too, so that one value a channel is enough here.
    """
    if not x.is_floating_point() or x.layout is not torch.strided:
        advice = "; put a DeQuantStub before the layer and a QuantStub behind it" if x.is_quantized else ""
        raise NotImplementedError(f'"batch_norm" not implemented for {x.dtype} in layout {x.layout}{advice}')
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return  # sizes are tensors there; batch norm itself checks them
    channels = x.shape[1]
    for name, tensor in (
        ("running_mean", state.mean),
        ("running_var", state.var),
        ("weight", state.weight),
        ("bias", state.bias),
    ):
        if tensor is None:
            continue
        if tensor.numel() != channels:
            raise RuntimeError(f"{name} should contain {channels} elements not {tensor.numel()}")
        if tensor.dtype != x.dtype and (tensor.dtype != torch.float32 or x.dtype == torch.float64):
            raise RuntimeError(
                f"mixed dtype: {name} is {tensor.dtype}, the input {x.dtype}; accepted is the input's own type, "
                "and torch.float32 for an input of half precision"
            )
    if (state.mean is None) != (state.var is None):
        raised = ValueError if training else RuntimeError
        raise raised("running_mean and running_var must be given together or not at all")
    if takes_batch_statistics(state, training):
        if not eps > 0:
            raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
        if x.numel() == channels and not joint:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")


class Activated:
    """Dropout and activation behind a norm, in place of timm's `BatchNormAct2d`, whose modules the layer holds."""

    drop: nn.Module
    act: nn.Module

    def _activated(self, y: Tensor) -> Tensor:
        return self.act(self.drop(y))
