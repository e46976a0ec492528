"""The trial of a network before its run: an image in evaluation, and a step of training with its norm."""

import copy
import logging
from typing import Any

import torch
from torch import nn

from l2bn.data.splits import Splits
from l2bn.errors import UserError
from l2bn.failures import describe, is_out_of_memory
from l2bn.norms.swap import norm_layers
from l2bn.training.session import BuiltRun

log = logging.getLogger(__name__)

SMALL = 64  # pixels: the side of an image that a stem for 224 x 224 shrinks to a few


def check_fit(model: nn.Module, splits: Splits, stem: object = None) -> dict[nn.Module, set[int]]:
    """Return the batch sizes that each layer puts out for one image; a layer that does not run is left out.

    Raises UserError unless the model turns an image of the data set into a logit for each class. Logs it if norm
    layers see single pixels because the network's stem is that for large images.
    """
    size = splits.image_size
    batches: dict[nn.Module, set[int]] = {}
    norms = {model.get_submodule(name) for name in norm_layers(model)}
    last: tuple[int, ...] = ()

    def note(layer: nn.Module, _: object, output: object) -> None:
        nonlocal last
        batches.setdefault(layer, set()).add(
            len(output) if isinstance(output, torch.Tensor) and output.dim() else 1
        )
        if layer in norms and isinstance(output, torch.Tensor):
            last = tuple(output.shape[2:])

    hook = nn.modules.module.register_module_forward_hook(note)
    model.eval()
    try:
        with torch.no_grad():
            logits = model(torch.zeros(1, 3, size, size))
    except Exception as error:  # a network of the user's own may raise anything
        raise UserError(
            f"backbone: this network cannot take images of {size} x {size} pixels: {describe(error)}\n"
            "set a larger dataset.image_size, where the data set has that key, correct the network, or take another"
        ) from error
    finally:
        model.train()
        hook.remove()
    if wrong := _wrong_shape(logits, 1, splits.num_classes):
        raise UserError(f"backbone: for one image this network {wrong}, a logit for each class")
    if last == (1, 1) and stem == "imagenet" and size <= SMALL:
        log.info(
            "backbone: of an image of %d x %d pixels the last norm layer of this network sees one; "
            "backbone.stem=small keeps more",
            *(size, size),
        )
    return batches


def _wrong_shape(logits: object, images: int, classes: int) -> str | None:
    """Return how an output differs from logits (images, classes), None if it does not."""
    got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    return None if got == (images, classes) else f"returns {got}, not ({images}, {classes})"


def check_samples(regrouped: list[str], model: nn.Module, *, measured: bool) -> None:
    """Raise UserError where l2 norms or features of samples are wanted of layers that see tokens or windows."""
    if not regrouped:
        return
    from l2bn.norms.stepped import SteppedBatchNorm  # here: few networks have such layers

    stepped = any(isinstance(model.get_submodule(name), SteppedBatchNorm) for name in regrouped)
    if stepped or measured:
        unmeasured = "leave its features unmeasured (analysis.every=0)"
        key, remedy = ("norm", "take norm=bn") if stepped else ("analysis", unmeasured)
        raise UserError(
            f"{key}: norm layers of this network see a batch of tokens or windows ({regrouped[0]} and "
            f"{len(regrouped) - 1} more): an image is not one sample there; {remedy}, or another backbone"
        )


def check_step(built: BuiltRun) -> None:
    """Raise UserError unless a copy of the network takes a training step, as it will be trained.

    On two images, or on a whole batch, for a network that cannot do with two.
    """
    channels_last, share = built.compute.channels_last, built.recipe.batch_size // built.compute.devices
    fault = _fault_of_step(built, 2, channels_last)
    if fault and share > 2:
        fault = _fault_of_step(built, share, channels_last)
    if not fault:
        return
    remedy = "correct the network or the norm"
    if channels_last and not _fault_of_step(built, 2, channels_last=False):
        remedy = "take compute.channels_last=false"
    raise UserError(f"backbone, with this norm: a training step fails: {fault}; {remedy}")


def _fault_of_step(built: BuiltRun, images: int, channels_last: bool) -> str | None:
    size, classes = built.splits.image_size, built.splits.num_classes
    try:
        trial = copy.deepcopy(built.model).train()
    except Exception as error:  # nothing can be tried on such a network without a trace in it
        log.info("the network cannot be copied for a trial step: %s", describe(error))
        return None
    memory_format: Any = torch.channels_last if channels_last else torch.contiguous_format
    layers: list[Any] = list(trial.modules())
    for layer in layers:
        if getattr(layer, "fused", None) in ("auto", "on"):
            layer.fused = "off"  # one step isn't worth compiling kernels for
    x = torch.zeros(images, 3, size, size).to(memory_format=memory_format)
    try:
        with torch.random.fork_rng(devices=[]):
            logits = trial.to(memory_format=memory_format)(x)
            if wrong := _wrong_shape(logits, images, classes):
                return f"in training the network {wrong}"
            torch.autograd.backward(nn.functional.cross_entropy(logits, torch.zeros(images, dtype=torch.int64)))
    except Exception as error:  # a network of the user's own may raise anything
        if is_out_of_memory(error):
            raise
        if built.compute.devices > 1 and "process group" in str(error):
            return None  # it asks for the other processes, which are not there yet
        return describe(error).partition("\n")[0]
    unused = [name for name, weight in trial.named_parameters() if weight.requires_grad and weight.grad is None]
    if unused and built.compute.devices > 1:
        return f"no gradient reaches {', '.join(unused[:3])}, and several devices exchange all gradients"
    return None
