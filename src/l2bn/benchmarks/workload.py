"""Workloads of the benchmarks: networks, and for training their images and the settings that all paths share.

Images of 32 pixels are in memory, images of 224 pixels are JPEG files. They are real where `--root` names their
folder (`train/<class>/`, `test/<class>/` and `imagenet-samples/<wnid>/`), else noise, which costs as much.
"""

import atexit
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import nn

from l2bn.backbones.mobilenetv2 import mobilenetv2
from l2bn.backbones.resnet import cifar_resnet
from l2bn.backbones.shufflenetv2 import shufflenetv2
from l2bn.backbones.vgg import vgg
from l2bn.data.augment import CropFlip
from l2bn.data.folder import image_folder
from l2bn.data.imagenet import imagenet
from l2bn.data.splits import Images, Split, Splits, make_splits
from l2bn.norms.l2bn import convert
from l2bn.norms.swap import swap_norm

WORKERS = 2  # processes that load images, of every path that has any
CLASSES = 10


class Network(NamedTuple):
    """A network's constructor, its image size, and the usual images a step."""

    build: Callable[[], nn.Module]
    size: int
    batch: int


def of_torchvision(name: str) -> nn.Module:
    from torchvision.models import get_model  # here, for a slow import that only these networks need

    model: nn.Module = get_model(name, num_classes=CLASSES)
    return model


NETWORKS = {
    "ResNet-20": Network(lambda: cifar_resnet(CLASSES, 20), 32, 128),
    "VGG-16": Network(lambda: vgg(CLASSES, 16), 32, 128),
    "ShuffleNetV2": Network(lambda: shufflenetv2(CLASSES), 32, 128),
    "MobileNetV2": Network(lambda: mobilenetv2(CLASSES), 32, 128),
    "ResNet-18": Network(lambda: of_torchvision("resnet18"), 224, 32),
    "ResNet-50": Network(lambda: of_torchvision("resnet50"), 224, 32),
}

Norm = Callable[[Any], nn.Module]
"""From a network's own BN layer to what stands in its place."""

NORMS: dict[str, Norm] = {
    "bn": lambda bn: bn,
    "l2bn": lambda bn: convert(bn, fused="on"),  # as long runs compute it
}


def build(network: str, norm: Norm = NORMS["bn"]) -> nn.Module:
    """A network with its initial weights."""
    torch.manual_seed(0)
    model = NETWORKS[network].build()
    swap_norm(model, norm)
    return model


def bn_inputs(network: str) -> list[tuple[int, int, int]]:
    """The map (C, H, W) that each BN layer of a network sees, in the order in which the layers run."""
    seen: list[tuple[int, int, int]] = []
    model = NETWORKS[network].build().eval()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[1:])))
    with torch.no_grad():
        model(torch.zeros(1, 3, NETWORKS[network].size, NETWORKS[network].size))
    return seen


@dataclass(frozen=True)
class Workload:
    """A network, and images for a number of steps."""

    network: str
    batch: int
    size: int
    steps: int  # of an epoch of these images
    splits: Splits
    source: str  # what the images are

    @property
    def images(self) -> int:
        return self.batch * self.steps


def make_workload(network: str, root: Path | None, steps: int, batch: int | None = None) -> Workload:
    """Raises UserError for a folder without images."""
    _, size, usual = NETWORKS[network]
    batch = batch or usual
    splits, source = (small_images if size == 32 else photographs)(root, steps * batch)
    return Workload(network, batch, size, len(splits.train) // batch, splits, source)


def small_images(root: Path | None, count: int) -> tuple[Splits, str]:
    """Images of 32 pixels in memory, at most `count` to train on, and their description."""
    if root is not None:
        splits = image_folder(str(root), label="CIFAR-10 (JPEG)", augmentation=CropFlip())
        few = torch.randperm(len(splits.train), generator=torch.Generator().manual_seed(0))[:count]
        return replace(splits, train=splits.train.select(few)), splits.label
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=random)
    split = Images(pixels, torch.randint(CLASSES, (count,), generator=random))
    return make_splits(split, split, CLASSES, 32, label="noise", augmentation=CropFlip()), "noise"


PHOTOGRAPH_WIDTH, PHOTOGRAPH_HEIGHT = 450, 370  # the mean of the 100 sample photographs of ImageNet


def photographs(root: Path | None, count: int, cache_side: int | None = None) -> tuple[Splits, str]:
    """`count` JPEG files of photographs to train on, repeated where there are fewer, and their description.

    `cache_side` keeps them decoded, as `dataset.cache_side` does.
    """
    source = "ImageNet samples"
    if root is None:
        root, source = _temporary_folder(), "noise"
        _write_noise(root, min(count, 100))
    common: dict[str, Any] = {"label": source, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    if cache_side is not None:
        common |= {"cache_side": cache_side, "cache": str(_temporary_folder())}
    splits = imagenet(str(root), train="imagenet-samples", val="imagenet-samples", **common)
    return replace(splits, train=_in_classes(splits.train, count)), source


def _temporary_folder() -> Path:
    """Make a folder that is removed when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="l2bn-benchmark-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _in_classes(split: Split, count: int) -> Any:
    """Select `count` images, repeated where there are fewer, with labels taken modulo CLASSES."""
    chosen: Any = split.select(torch.arange(count) % len(split))
    return replace(chosen, labels=chosen.labels % CLASSES)


def _write_noise(root: Path, count: int) -> None:
    random = torch.Generator().manual_seed(0)
    for index in range(count):
        coarse = torch.rand(1, 3, PHOTOGRAPH_HEIGHT // 8, PHOTOGRAPH_WIDTH // 8, generator=random)
        pixels = nn.functional.interpolate(coarse, (PHOTOGRAPH_HEIGHT, PHOTOGRAPH_WIDTH), mode="bicubic")[0]
        image = Image.fromarray((255 * pixels.clamp(0, 1)).byte().permute(1, 2, 0).numpy())
        folder = root / "imagenet-samples" / f"class{index % CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{index}.jpg", quality=90)
