"""Any classification model of torchvision or timm, by its name there, with fresh weights.

Nothing is downloaded. `stem="small"` prepares a model for small images such as CIFAR's, which a stem for
224x224 pixels would shrink at once to a few: the first convolution becomes 3x3 with stride 1, the stem's pool
goes.
"""

import logging
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Literal

import timm
import torch
import torchvision.models
from torch import nn

from l2bn.errors import UserError

Stem = Literal["imagenet", "small"]

logger = logging.getLogger(__name__)

# In module order a stem's pool comes after one convolution (ResNet, DenseNet) or three (Inception, ResNet-D),
# at the top of the model or one level below ("maxpool", "stem.pool"); what lies deeper is part of a block.
MOST_STEM_CONVOLUTIONS = 3
MOST_STEM_DEPTH = 2


def torchvision_model(num_classes: int, name: str, stem: Stem = "imagenet") -> nn.Module:
    """The torchvision model `name`, for example "mobilenet_v2"; UserError if there is none.

    GoogLeNet and Inception come without their auxiliary heads, so that every model returns (N, num_classes).
    """
    valid = torchvision.models.list_models(module=torchvision.models)
    check_name(name, valid, "import torchvision.models as m; print(*m.list_models(module=m))")
    # With auxiliary heads the two return a tuple; without init_weights they warn that its default may change.
    special = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **special)
    return with_stem(model, stem, name)


def timm_model(num_classes: int, name: str, stem: Stem = "imagenet") -> nn.Module:
    """The timm model `name`, for example "regnety_004" (no tag of weights); UserError if there is none."""
    check_name(name, timm.list_models(), "import timm; print(*timm.list_models())")
    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=num_classes)
    return with_stem(model, stem, name)


def check_name(name: str, valid: Sequence[str], listing: str) -> None:
    """UserError with the nearest of the `valid` names and Python code that lists all, if `name` is none."""
    if name in valid:
        return
    nearest = get_close_matches(name, valid, n=5, cutoff=0.5)
    hint = f"nearest: {', '.join(nearest)}" if nearest else "no name is near"
    raise UserError(f"backbone.name={name}: no such model ({hint}). All {len(valid)}: python -c '{listing}'")


def with_stem(model: nn.Module, stem: Stem, name: str) -> nn.Module:
    """The model as it is ("imagenet") or fitted to small images in place ("small")."""
    if stem == "small":
        shrink_stem(model, name)
    elif stem != "imagenet":
        raise UserError(f"backbone.stem={stem}: choose imagenet or small")
    return model


def shrink_stem(model: nn.Module, name: str) -> None:
    """Fit `model`, in place, to small images: first convolution 3x3 with stride 1, no pool in the stem.

    A kernel larger than 3x3 is cut to its middle and scaled so that the variance of He's initialisation is kept.
    UserError, naming `name`, if the first convolution has not stride 2: VGG's stem is small already, and ViT and
    ConvNeXt begin with patches.
    """
    convolutions = 0
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Conv2d):
            convolutions += 1
            if convolutions == 1:
                model.set_submodule(path, small_convolution(module, name))
        elif isinstance(module, nn.MaxPool2d | nn.AvgPool2d) and convolutions > 0:
            if convolutions > MOST_STEM_CONVOLUTIONS:
                return
            if module.stride not in (2, (2, 2)) or len(path.split(".")) > MOST_STEM_DEPTH:
                raise UserError(
                    f"backbone.stem=small: the pool {path} of {name} cannot be left out; use backbone.stem=imagenet"
                )
            model.set_submodule(path, nn.Identity())
            logger.info("%s, small stem: %s left out", name, path)
            return
    if convolutions == 0:
        raise UserError(f"backbone.stem=small: {name} has no convolution; use backbone.stem=imagenet")


def small_convolution(conv: nn.Conv2d, name: str) -> nn.Conv2d:
    """A 3x3 convolution of stride 1 from the middle of `conv`'s kernel."""
    kernel = conv.kernel_size[0]
    square_and_odd = conv.kernel_size == (kernel, kernel) and kernel >= 3 and kernel % 2 == 1
    if type(conv) is not nn.Conv2d or conv.stride != (2, 2) or not square_and_odd:
        raise UserError(
            f"backbone.stem=small: {name} begins with a {type(conv).__name__} of kernel {conv.kernel_size} and "
            f"stride {conv.stride}; only a Conv2d with an odd kernel and stride (2, 2) can be made 3x3 with "
            "stride 1. Use backbone.stem=imagenet, or a backbone made for small images"
        )
    small = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1, bias=conv.bias is not None)
    margin = kernel // 2 - 1
    with torch.no_grad():
        small.weight.copy_(conv.weight[:, :, margin : margin + 3, margin : margin + 3] * (kernel / 3))
        if small.bias is not None and conv.bias is not None:
            small.bias.copy_(conv.bias)
    logger.info("%s, small stem: %dx%d stride 2 -> 3x3 stride 1", name, kernel, kernel)
    return small
