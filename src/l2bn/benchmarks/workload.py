"""Workloads of the training benchmarks: a network, its images, and the settings that all paths share.

Images of 32 pixels are in memory, images of 224 pixels are JPEG files. They are real where `--root` names their
folder (`train/<class>/`, `test/<class>/` and `imagenet-samples/<wnid>/`), else noise, which costs as much.
"""

import argparse
import atexit
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from l2bn.benchmarks.norm import NETWORKS as SMALLER
from l2bn.data.augment import CropFlip
from l2bn.data.folder import image_folder
from l2bn.data.imagenet import imagenet
from l2bn.data.splits import Images, Split, Splits, make_splits
from l2bn.norms.l2bn import convert
from l2bn.norms.swap import swap_norm
from l2bn.training.compute import Compute
from l2bn.training.optim import OneCycle, Recipe

WORKERS = 2  # processes that load images, of every path that has any
CLASSES = 10


def imagenet_resnet18() -> nn.Module:
    from torchvision.models import resnet18  # here, for a slow import that only this network needs

    model: nn.Module = resnet18(num_classes=CLASSES)
    return model


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {  # constructor, image size, batch
    **{name: SMALLER[name] for name in ("ResNet-20", "VGG-16", "ShuffleNetV2", "MobileNetV2")},
    "ResNet-18": (imagenet_resnet18, 224, 32),
    "ResNet-50": SMALLER["ResNet-50"],
}


NORMS: dict[str, Callable[[Any], nn.Module]] = {
    "bn": lambda bn: bn,
    "l2bn": lambda bn: convert(bn, fused="on"),  # as long runs compute it
}


@dataclass(frozen=True)
class Workload:
    """A network's constructor, and images for a number of steps."""

    network: str
    batch: int
    size: int
    steps: int  # of an epoch of these images
    splits: Splits
    source: str  # what the images are

    @property
    def images(self) -> int:
        return self.batch * self.steps

    def build(self, norm: str) -> nn.Module:
        """Build the network with its initial weights."""
        torch.manual_seed(0)
        model = NETWORKS[self.network][0]()
        swap_norm(model, NORMS[norm])
        return model


def recipe(batch: int, epochs: int = 1000, lr: float = 0.01) -> Recipe:
    """The recipe `short` with more epochs, at a learning rate at which training on noise is stable."""
    return Recipe(
        epochs=epochs,
        batch_size=batch,
        lr=lr,
        momentum=0.9,
        nesterov=True,
        weight_decay=5e-4,
        decay_norm_and_bias=True,
        label_smoothing=0.0,
        mixup=0.0,
        schedule=OneCycle(),
    )


def compute(device: torch.device, **options: Any) -> Compute:
    """The settings of `compute=auto`, changed by these options."""
    defaults: dict[str, Any] = {
        "device": device.type,
        "devices": 1,
        "sync_bn": False,
        "precision": "32-true",
        "compile": False,
        "channels_last": True,
        "deterministic": False,
        "threads": None,
        "workers": WORKERS,
    }
    return Compute(**defaults | options)


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


def add_workload_arguments(parser: argparse.ArgumentParser, networks: list[str]) -> None:
    """Add the options that all training benchmarks share."""
    parser.add_argument("--json", type=Path, help="write the result here, and its table and plot beside it")
    parser.add_argument("--root", type=Path, help="folder of real images (default: noise)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="threads of the CPU (default: all cores)")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=networks)
