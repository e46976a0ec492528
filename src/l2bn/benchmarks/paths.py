"""Training paths to compare: this project's, the plain loop of most CIFAR repositories, and timm's loader.

Each is a function of a workload that returns one epoch of training as an action.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from l2bn.benchmarks.measure import Action
from l2bn.benchmarks.workload import CLASSES, NORMS, WORKERS, Workload, build
from l2bn.data.decode import read_rgb
from l2bn.data.imagenet import ImageFiles
from l2bn.data.loader import evaluation_loader, training_loader
from l2bn.data.splits import Images
from l2bn.training.compute import Compute
from l2bn.training.loop import Position, Trainer
from l2bn.training.optim import OneCycle, Recipe


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


def trainer_of(workload: Workload, model: nn.Module, learning: Recipe, placing: Compute, seed: int = 0) -> Trainer:
    """This project's trainer of a model on the images of a workload."""
    placing.set_up()
    fabric = placing.fabric()
    placed = placing.place(model, fabric.device, updates=0)
    trained, optimizer = fabric.setup(placed.trained, learning.optimizer(placed.network))
    splits = workload.splits
    options: dict[str, Any] = {"splits": splits, "device": fabric.device, "workers": placing.workers}
    options["channels_last"] = placing.channels_last
    return Trainer(
        fabric=fabric,
        model=trained,
        network=placed.network,
        optimizer=optimizer,
        recipe=learning,
        train=training_loader(splits.train, batch_size=workload.batch, seed=seed, **options),
        test=evaluation_loader(splits.test, batch_size=256, **options),
        classes=CLASSES,
        seed=seed,
        after_step=lambda _: None,
        after_epoch=lambda _: None,
    )


def ours(workload: Workload, norm: str, device: torch.device, **options: Any) -> tuple[Action, Trainer]:
    """This project's trainer, and one epoch of it as an action."""
    model = build(workload.network, NORMS[norm])
    trainer = trainer_of(workload, model, recipe(workload.batch), compute(device, **options))
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
    crop = (
        transforms.RandomCrop(size, padding=4) if size == 32 else transforms.RandomResizedCrop(size, antialias=True)
    )
    transform = transforms.Compose(
        [
            crop,
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(workload.splits.mean, workload.splits.std),
        ]
    )
    return DataLoader(
        _Pictures(workload, transform),
        workload.batch,
        shuffle=True,
        drop_last=True,
        num_workers=WORKERS,
        persistent_workers=True,
        pin_memory=torch.cuda.is_available(),
        generator=generator,
    )


def timm_pictures(workload: Workload, device: torch.device) -> Any:
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
        device=device,
    )


def plain(workload: Workload, device: torch.device) -> Action:
    """The loop of most CIFAR repositories: eager, contiguous, loss and accuracy read after every step."""
    model = build(workload.network).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    loader = pictures(workload)
    return lambda: plain_epoch(model, optimizer, loader, device)


def timm(workload: Workload, device: torch.device) -> Action:
    """The same loop on timm's loader, with the SGD that timm makes (Nesterov, no decay of norms and biases)."""
    from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]

    model = build(workload.network).to(device).train()
    optimizer = create_optimizer_v2(model, "sgd", lr=0.01, momentum=0.9, weight_decay=5e-4)
    loader = timm_pictures(workload, device)
    return lambda: plain_epoch(model, optimizer, loader, device)


def plain_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
) -> tuple[float, float]:
    """Mean loss and accuracy in percent."""
    loss_sum = right = images = 0.0
    for inputs, targets in batches:
        inputs, targets = inputs.to(device), targets.to(device)
        optimizer.zero_grad()
        outputs = model(inputs)
        loss = nn.functional.cross_entropy(outputs, targets)
        torch.autograd.backward(loss)
        optimizer.step()
        loss_sum += loss.item() * len(targets)
        right += outputs.argmax(1).eq(targets).sum().item()
        images += len(targets)
    return loss_sum / images, 100 * right / images
