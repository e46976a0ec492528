"""Put a norm where a model's batch normalization stood, without touching anything else.

The layers are replaced after the model is built, so that any model will do, and so that one seed gives the
same parameters and the same random state with every norm: a comparison of two norms is paired.
"""

import logging
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

Norm = Callable[[nn.Module], nn.Module]
logger = logging.getLogger(__name__)


def swap_norm(model: nn.Module, norm: str | Norm) -> int:
    """Replace, in place, each batch norm layer of `model`, and return (and log) how many there were.

    `norm` is a name such as "l2bn", resolved to `l2bn.norms.<name>.convert`, or a callable that is given the
    layer and returns what stands in its place. A layer used in several places stays one layer.

    Raises:
        ValueError: no norm has this name, or the model has no batch norm layer to replace. Nothing is changed
            then, nor when the norm refuses one of the layers.
    """
    convert = _named(norm) if isinstance(norm, str) else norm
    layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no batch norm layer to replace: {_norms_in(model)}. "
            "Choose a model, or a norm_layer of it, with batch normalization"
        )
    if model in layers:
        raise ValueError(f"the model is itself a {type(model).__name__}, which nothing holds: convert it")
    replacements = {layer: convert(layer) for layer in layers}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in replacements:
                setattr(parent, name, replacements[child])
    logger.info(
        "%s: %d batch norm layers now are %s",
        type(model).__name__,
        len(layers),
        ", ".join(sorted({type(layer).__name__ for layer in replacements.values()})),
    )
    return len(layers)


def norm_layers(model: nn.Module) -> tuple[str, ...]:
    """The names of the batch norm layers of `model`; after a swap those of what stands in their places."""
    return tuple(name for name, layer in model.named_modules() if isinstance(layer, _BatchNorm))


def stock_class(bn: nn.Module) -> type[_BatchNorm]:
    """What a norm has to stand for: nn.BatchNorm1d, 2d or 3d, or timm's BatchNormAct2d.

    Raises TypeError for anything else, a batch norm layer with a `forward` of its own too.
    """
    for stock in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        if isinstance(bn, stock) and type(bn).forward is stock.forward:
            return stock
    from timm.layers.norm_act import BatchNormAct2d  # here, for a slow import that few models need

    if type(bn) is BatchNormAct2d:
        return BatchNormAct2d
    raise TypeError(
        f"no norm can stand for {type(bn).__module__}.{type(bn).__qualname__}: accepted are nn.BatchNorm1d, 2d and "
        "3d, subclasses that keep their forward, and timm's BatchNormAct2d"
    )


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
    """What the model normalises with instead, for the error message."""
    names = (type(layer).__name__ for layer in model.modules())
    found = Counter(name for name in names if "norm" in name.lower())
    return "it has " + (", ".join(f"{n} {name}" for name, n in found.items()) or "no norm layer at all")
