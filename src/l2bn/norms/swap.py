"""Put a norm where a model's batch normalization stood, and leave everything else as it is.

The layers are replaced after the model is built, so that any model will do, and so that one seed gives the
same parameters and the same random state with every norm: a comparison of two norms is paired.
"""

import functools
import inspect
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules
from types import CellType, FunctionType, MethodType

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.modules.batchnorm import _BatchNorm

Norm = Callable[..., nn.Module]
logger = logging.getLogger(__name__)

UNTRACED = "swap the norm of the untraced model, then trace it"
OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # attributes, hooks among them


def swap_norm(model: nn.Module, norm: str | Norm) -> int:
    """Replace, in place, each batch norm layer of `model`, and return (and log) their number.

    `norm` is a name such as "l2bn", resolved to `l2bn.norms.<name>.convert`, or a callable that takes the layer and
    returns its replacement. If the callable has a parameter `last`, it gets `last=True` for the last of the layers
    in the order of `model.modules()`, which is the order of construction, and `last=False` for the others. A layer
    used in several places stays one layer. A row of a layer's input is a sample to it: where a network hands it
    tokens as rows (LeViT), each token is normalized, not each image.

    Raises:
        ValueError: no norm has this name, the model has no batch norm layer to replace, it was traced and computes
            batch norm in its graph, or `last` is already bound.
        TypeError: the norm can't stand for one of the layers, or the model also reaches it by an attribute that is
            no registered module, such as a list, where the old layer would stay.
        In both cases nothing is replaced.
    """
    layers = replacements(model, norm)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in layers:
                setattr(parent, name, layers[child])
    logger.info(
        "%s: %d batch norm layers now are %s",
        type(model).__name__,
        len(layers),
        ", ".join(sorted({type(layer).__name__ for layer in layers.values()})),
    )
    from l2bn.norms.advice import warn_of_options  # here: what follows is about L2BN and its controls
    from l2bn.norms.stock import ESTIMATED_ELSEWHERE

    if any(_keeps_estimate(layer, other) for layer, other in layers.items()):
        logger.warning(ESTIMATED_ELSEWHERE)
    warn_of_options(layers)
    return len(layers)


def _keeps_estimate(layer: nn.Module, other: nn.Module) -> bool:
    """Tell whether a layer of another class holds running statistics that were estimated before."""
    var = getattr(layer, "running_var", None)
    if type(other) is type(layer) or not isinstance(var, Tensor) or var.is_meta:
        return False
    # By their values: weights from before there was a count of batches load with a count of 0.
    estimated = bool(var.ne(1).any() or layer.get_buffer("running_mean").any())
    return estimated and getattr(other, "running_var", None) is var


def replacements(model: nn.Module, norm: str | Norm) -> dict[nn.Module, nn.Module]:
    """Return what `swap_norm` would put in the place of each batch norm layer; raises as it does."""
    convert = _named(norm) if isinstance(norm, str) else norm
    given: object = convert.func if isinstance(convert, functools.partial) else convert
    if isinstance(given, type) and issubclass(given, _BatchNorm):
        raise TypeError(
            f"{given.__name__} is the class of a layer: give the name of a norm, such as 'l2bn', or a function "
            "of the layer to replace, such as l2bn.norms.l2bn.convert"
        )
    _refuse_graphs(model)
    layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
    if not layers:
        graph = any(isinstance(module, GraphModule | torch.jit.ScriptModule) for module in model.modules())
        hidden = f"; if it was decomposed or folded in a graph, {UNTRACED}" if graph else ""
        raise ValueError(
            f"{type(model).__name__} has no batch norm layer to replace: {_norms_in(model)}. "
            f"Choose a model, or a norm_layer of it, with batch normalization{hidden}"
        )
    if model in layers:
        raise ValueError(f"the model is itself a {type(model).__name__}, which nothing holds: convert it")
    found: dict[nn.Module, nn.Module]
    if "last" in inspect.signature(convert).parameters:
        if isinstance(convert, functools.partial) and "last" in convert.keywords:
            raise ValueError("last can't be set: the swap finds the last batch norm layer; leave it out")
        found = {layer: convert(layer, last=layer is layers[-1]) for layer in layers}
    else:
        found = {layer: convert(layer) for layer in layers}
    for other in found.values():
        if not isinstance(other, nn.Module):
            raise TypeError(
                f"it returned {type(other).__name__} for a batch norm layer, not the layer in its place"
            )
    _refuse_other_references(model, {layer for layer, other in found.items() if other is not layer})
    return found


def _refuse_graphs(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, GraphModule):
            found = any(map(_is_batch_norm, module.graph.nodes))
        else:
            found = isinstance(module, torch.jit.ScriptModule) and "BatchNorm" in module.original_name
        if found:
            raise ValueError(
                f"{path or type(model).__name__} was traced, scripted or exported, and computes batch norm in its "
                f"graph, where a swap would not reach it: {UNTRACED}"
            )


def _is_batch_norm(node: torch.fx.Node) -> bool:
    """Tell whether a node calls batch norm by running statistics; weight standardization has none."""
    inputs = node.all_input_nodes
    return "batch_norm" in str(node.target) and any("running_mean" in str(given.target) for given in inputs)


def _refuse_other_references(model: nn.Module, replaced: set[nn.Module]) -> None:
    for path, parent in model.named_modules():
        for name, value in vars(parent).items():
            if name not in OF_EVERY_MODULE and any(m in replaced for m in _modules_in(value, {id(parent)})):
                raise TypeError(
                    f"{path or type(model).__name__}.{name} refers to a batch norm layer beside the registered "
                    "modules, and a swap would not reach it there: hold it in an nn.ModuleList or nn.ModuleDict, "
                    "and call it by its attribute"
                )


def _modules_in(value: object, seen: set[int]) -> Iterator[nn.Module]:
    """Yield the modules that a value is, holds or calls, in containers, partials, bound methods and closures."""
    if id(value) in seen:
        return
    seen.add(id(value))
    inner: Iterable[object] = ()
    if isinstance(value, nn.Module):
        yield value
    elif isinstance(value, Mapping):
        inner = value.values()
    elif isinstance(value, list | tuple | set):
        inner = value
    elif isinstance(value, functools.partial):
        inner = (value.func, value.args, value.keywords)
    elif isinstance(value, MethodType):
        inner = (value.__self__,)
    elif isinstance(value, FunctionType):
        cells = (cell.cell_contents for cell in value.__closure__ or () if cell != CellType())  # not an empty one
        inner = (*cells, value.__defaults__, value.__kwdefaults__)
    for item in inner:
        yield from _modules_in(item, seen)


def norm_layers(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the batch norm layers of `model`: BN, L2BN and the controls that subclass it."""
    return tuple(name for name, layer in model.named_modules() if isinstance(layer, _BatchNorm))


def _named(name: str) -> Norm:
    package = __name__.rpartition(".")[0]
    if name.isidentifier() and find_spec(f"{package}.{name}") is not None:
        module = import_module(f"{package}.{name}")
        if hasattr(module, "convert"):
            convert: Norm = module.convert
            return convert
    modules = (info.name for info in iter_modules(import_module(package).__path__))
    names = sorted(m for m in modules if hasattr(import_module(f"{package}.{m}"), "convert"))
    raise ValueError(f"no norm is called {name!r}; there are {', '.join(names)}")


def _norms_in(model: nn.Module) -> str:
    """Describe the norm layers that the model has instead, for the error message."""
    names = (type(layer).__name__ for layer in model.modules())
    found = Counter(name for name in names if "norm" in name.lower())
    return "it has " + (", ".join(f"{n} {name}" for name, n in found.items()) or "no norm layer at all")
