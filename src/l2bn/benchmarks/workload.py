"""Workloads of the benchmarks: networks, images, and the ways to train that are compared.

Images are noise, which costs as much as real ones: of 32 pixels in memory, of 224 pixels in JPEG files.
"""

import atexit
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from l2bn.benchmarks.measure import DEVICE, Action
from l2bn.data.augment import CropFlip
from l2bn.data.decode import read_rgb
from l2bn.data.imagenet import ImageFiles, imagenet
from l2bn.data.loader import evaluation_loader, training_loader
from l2bn.data.splits import Images, Splits, make_splits
from l2bn.norms.l2bn import convert
from l2bn.norms.swap import swap_norm
from l2bn.training.acceleration import prepare
from l2bn.training.compute import Compute
from l2bn.training.instantiate import CONFIGS, Builder
from l2bn.training.loop import Position, Trainer
from l2bn.training.optim import Recipe

WORKERS = 2  # processes that load images, of every path that has any
CLASSES = 10

# ---- Networks -------------------------------------------------------------------------------------------------


class Network(NamedTuple):
    """A network's name in configs/backbone, its image size, and the usual images a step."""

    backbone: str
    size: int
    batch: int


NETWORKS = {
    "ResNet-20": Network("resnet20", 32, 128),
    "VGG-16": Network("vgg16", 32, 128),
    "ShuffleNetV2": Network("shufflenetv2_x1_0", 32, 128),
    "MobileNetV2": Network("mobilenetv2_x1_0", 32, 128),
    "ResNet-18": Network("imagenet_resnet18", 224, 32),
    "ResNet-50": Network("imagenet_resnet50", 224, 32),
}

Norm = Callable[[Any], nn.Module]
"""From a network's own BN layer to what stands in its place."""

NORMS: dict[str, Norm] = {
    "bn": lambda bn: bn,
    "naive": lambda bn: convert(bn, fused="off"),
    "fused": lambda bn: convert(bn, fused="on"),
}
NORMS["l2bn"] = NORMS["fused"]  # as long runs compute it


def build(network: str, norm: str = "bn", seed: int = 0) -> nn.Module:
    """A network with its initial weights."""
    torch.manual_seed(seed)
    node = _configuration(f"backbone/{NETWORKS[network].backbone}") | {"num_classes": CLASSES}
    model: nn.Module = Builder().build(node, "backbone", nn.Module)
    swap_norm(model, NORMS[norm])
    return model


# ---- Images ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """A network, and images for a number of steps."""

    network: str
    batch: int
    splits: Splits

    @property
    def size(self) -> int:
        return self.splits.image_size

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return len(self.splits.train) // self.batch

    @property
    def images(self) -> int:
        return self.batch * self.steps


def make_workload(network: str, steps: int, batch: int | None = None) -> Workload:
    batch = batch or NETWORKS[network].batch
    make = small_images if NETWORKS[network].size == 32 else photographs
    return Workload(network, batch, make(steps * batch))


def small_images(count: int) -> Splits:
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=random)
    split = Images(pixels, torch.randint(CLASSES, (count,), generator=random))
    return make_splits(split, split, CLASSES, 32, label="noise", augmentation=CropFlip())


PHOTOGRAPH_WIDTH, PHOTOGRAPH_HEIGHT = 450, 370  # the mean of the 100 sample photographs of ImageNet


def photographs(count: int, cache_side: int | None = None) -> Splits:
    """JPEG files of photographs; `cache_side` keeps them decoded, as `dataset.cache_side` does."""
    root = Path(tempfile.mkdtemp(prefix="l2bn-benchmark-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    random = torch.Generator().manual_seed(0)
    for index in range(count):
        coarse = torch.rand(1, 3, PHOTOGRAPH_HEIGHT // 8, PHOTOGRAPH_WIDTH // 8, generator=random)
        pixels = nn.functional.interpolate(coarse, (PHOTOGRAPH_HEIGHT, PHOTOGRAPH_WIDTH), mode="bicubic")[0]
        image = Image.fromarray((255 * pixels.clamp(0, 1)).byte().permute(1, 2, 0).numpy())
        folder = root / "images" / f"class{index % CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{index}.jpg", quality=90)
    common: dict[str, Any] = {"label": "noise", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    return imagenet(str(root), "images", "images", cache_side=cache_side, cache=str(root / "cache"), **common)


# ---- Ways to train --------------------------------------------------------------------------------------------
# Ours, the plain loop of most CIFAR repositories, and the same loop on timm's loader.


def recipe(batch: int, epochs: int = 1000, lr: float = 0.01) -> Recipe:
    """The recipe `short` with more epochs, at a learning rate at which training on noise is stable."""
    given = _configuration("recipe/short") | {"epochs": epochs, "batch_size": batch, "lr": lr}
    made: Recipe = Builder().call(Recipe, given, "recipe")
    return made


def compute(**options: Any) -> Compute:
    """The settings of `compute=auto` without compilation, changed by these options."""
    given = _configuration("compute/auto") | {"device": DEVICE.type, "compile": False, "workers": WORKERS}
    return Compute(**given | options)


def _configuration(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    return content


def trainer_of(workload: Workload, model: nn.Module, learning: Recipe, placing: Compute, seed: int = 0) -> Trainer:
    """This project's trainer of a model on the images of a workload."""
    placing.set_up()
    fabric = placing.fabric()
    prepared = prepare(model, placing, fabric.device, updates=0)
    trained, optimizer = fabric.setup(prepared.trained, learning.optimizer(prepared.network))
    splits = workload.splits
    options: dict[str, Any] = {"splits": splits, "device": fabric.device}
    options |= {"workers": placing.workers, "channels_last": placing.channels_last}
    return Trainer(
        fabric=fabric,
        model=trained,
        network=prepared.network,
        optimizer=optimizer,
        recipe=learning,
        train=training_loader(splits.train, batch_size=workload.batch, seed=seed, **options),
        test=evaluation_loader(splits.test, batch_size=256, **options).epoch,
        classes=CLASSES,
        seed=seed,
        after_step=lambda _: 0.0,
        after_epoch=lambda _: None,
    )


def ours(workload: Workload, norm: str, **options: Any) -> tuple[Action, Trainer]:
    """This project's trainer, and one epoch of it as an action."""
    model = build(workload.network, norm)
    trainer = trainer_of(workload, model, recipe(workload.batch), compute(**options))
    return epochs_of(trainer), trainer


def epochs_of(trainer: Trainer) -> Action:
    """An action that trains one epoch after the other, at the learning rate of the first."""
    epoch = 0

    def action() -> None:
        nonlocal epoch
        trainer.train_epoch(Position(epoch=epoch % trainer.recipe.epochs))
        epoch += 1

    return action


class _Pictures(Dataset[Any]):
    """The workload's images as PIL images, as `torchvision.datasets` returns them, transformed."""

    def __init__(self, workload: Workload, transform: Callable[[Image.Image], Tensor] | None = None) -> None:
        self.split = workload.splits.train
        self.labels = self.split.labels.tolist()
        self.transform = transform
        if isinstance(self.split, Images):
            self.pixels = self.split.images.permute(0, 2, 3, 1).numpy()

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int, /) -> tuple[Any, int]:
        if isinstance(self.split, ImageFiles):
            path = self.split.folder / self.split.names[index].decode()
            image = read_rgb(path, str(path))
        else:
            image = Image.fromarray(self.pixels[index])
        return image if self.transform is None else self.transform(image), self.labels[index]


def pictures(workload: Workload, generator: torch.Generator | None = None) -> DataLoader[Any]:
    """PIL transforms in a DataLoader, as most repositories have them."""
    size = workload.size
    crop: nn.Module = transforms.RandomResizedCrop(size, antialias=True)
    if size == 32:
        crop = transforms.RandomCrop(size, padding=4)
    normalize = transforms.Normalize(workload.splits.mean, workload.splits.std)
    steps = [crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(), normalize]
    return DataLoader(
        _Pictures(workload, transforms.Compose(steps)),
        workload.batch,
        shuffle=True,
        drop_last=True,
        num_workers=WORKERS,
        persistent_workers=True,
        pin_memory=torch.cuda.is_available(),
        generator=generator,
    )


def timm_pictures(workload: Workload) -> Any:
    """timm's `create_loader`: random resized crops and flips in PIL, normalised on the device."""
    from timm.data.loader import create_loader  # here, for a slow import that only this path needs

    dataset: Any = _Pictures(workload)
    return create_loader(
        dataset,
        (3, workload.size, workload.size),
        workload.batch,
        is_training=True,
        color_jitter=0.0,
        mean=workload.splits.mean,
        std=workload.splits.std,
        num_workers=WORKERS,
        device=DEVICE,
    )


def plain(workload: Workload) -> Action:
    """The loop of most CIFAR repositories: eager, contiguous, loss and accuracy read after every step."""
    model = build(workload.network).to(DEVICE).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    loader = pictures(workload)
    return lambda: plain_epoch(model, optimizer, loader)


def timm(workload: Workload) -> Action:
    """The same loop on timm's loader, with the SGD that timm makes (Nesterov, no decay of norms and biases)."""
    from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]

    model = build(workload.network).to(DEVICE).train()
    optimizer = create_optimizer_v2(model, "sgd", lr=0.01, momentum=0.9, weight_decay=5e-4)
    loader = timm_pictures(workload)
    return lambda: plain_epoch(model, optimizer, loader)


def plain_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[tuple[Tensor, Tensor]]
) -> tuple[float, float]:
    """Mean loss and accuracy in percent."""
    loss_sum = right = images = 0.0
    for inputs, targets in batches:
        inputs, targets = inputs.to(DEVICE), targets.to(DEVICE)
        optimizer.zero_grad()
        outputs = model(inputs)
        loss = nn.functional.cross_entropy(outputs, targets)
        torch.autograd.backward(loss)
        optimizer.step()
        loss_sum += loss.item() * len(targets)
        right += outputs.argmax(1).eq(targets).sum().item()
        images += len(targets)
    return loss_sum / images, 100 * right / images
