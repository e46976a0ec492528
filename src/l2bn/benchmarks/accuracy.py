"""Accuracy of this project's trainer against the plain loop's, and in bfloat16 against float32: the price of speed.

By one recipe, several seeds each. The runs of a seed start from the same weights. Order and augmentation of the
images are the same in all of ours, and others in the plain loop's.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from l2bn.benchmarks.measure import DEVICE, Result, Row, count, page, table
from l2bn.benchmarks.workload import CLASSES, Workload, build, compute, pictures, plain_epoch, recipe, trainer_of
from l2bn.data.augment import CropFlip
from l2bn.data.folder import image_folder
from l2bn.data.loader import evaluation_loader
from l2bn.errors import UserError
from l2bn.reporting.formatting import interval, mean_std, signed
from l2bn.reporting.statistics import estimate, paired_differences
from l2bn.seeding import derive_seed
from l2bn.training.compute import Precision
from l2bn.training.loop import Position, evaluate
from l2bn.training.optim import Recipe

NETWORK, BATCH = "ResNet-20", 128


def initial(seed: int, norm: str = "bn") -> nn.Module:
    return build(NETWORK, norm, derive_seed(seed, "weights"))


def train_ours(
    workload: Workload, learning: Recipe, seed: int, norm: str = "bn", precision: Precision = "32-true"
) -> float:
    """Test accuracy in percent after the last epoch."""
    trainer = trainer_of(workload, initial(seed, norm), learning, compute(precision=precision), seed)
    position = Position()
    trainer.fit(position)
    return float(position.rows[-1]["test/top1"] or 0.0)


def train_plain(workload: Workload, learning: Recipe, seed: int) -> float:
    """Test accuracy in percent after the last epoch."""
    model = initial(seed).to(DEVICE)
    options = {key: getattr(learning, key) for key in ("lr", "momentum", "weight_decay", "nesterov")}
    optimizer = torch.optim.SGD(model.parameters(), **options)
    updates = learning.epochs * workload.steps
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda update: learning.schedule(update / workload.steps, learning.epochs) if update < updates else 0,
    )
    optimizer.register_step_post_hook(lambda *_: scheduler.step())
    torch.manual_seed(derive_seed(seed, "plain"))
    batches = pictures(workload, torch.Generator().manual_seed(derive_seed(seed, "plain")))
    for _ in range(learning.epochs):
        plain_epoch(model.train(), optimizer, batches)
    test = evaluation_loader(workload.splits.test, splits=workload.splits, batch_size=256, device=DEVICE)
    _, accuracy, _ = evaluate(model, test.epoch(0), CLASSES, compute().fabric())
    return accuracy


class Way(NamedTuple):
    """A way to train, by its name on the page."""

    name: str
    train: Callable[[Workload, Recipe, int], float]


PATHS = {
    "ours": Way("ours, BN", train_ours),
    "plain": Way("plain loop", train_plain),
    "bf16": Way("ours, BN, bfloat16", partial(train_ours, precision="bf16-mixed")),
    "l2bn": Way("ours, L2BN", partial(train_ours, norm="l2bn")),
    "l2bn-bf16": Way("ours, L2BN, bfloat16", partial(train_ours, norm="l2bn", precision="bf16-mixed")),
}
COMPARED = (("ours", "plain"), ("bf16", "ours"), ("l2bn-bf16", "l2bn"))


def of_path(runs: list[Row], path: str) -> dict[int, float]:
    return {run["seed"]: run["accuracy"] for run in runs if run["path"] == path}


EXPLANATION = """
{network} on {images:,} training images of {source}, {epochs} epochs of `recipe=short`, batch {batch}. Test accuracy
in percent after the last epoch on all test images, mean ± standard deviation over seeds. The runs of a seed start
from the same weights. Order and augmentation of the images are the same in all of ours, and others in the plain
loop's, which has BN.
"""


def make_page(result: Result) -> str:
    found = {path: accuracies for path in PATHS if (accuracies := of_path(result["runs"], path))}
    rows, differences = [], []
    for path, accuracies in found.items():
        of_seeds = ", ".join(f"{accuracies[seed]:.2f}" for seed in sorted(accuracies))
        rows.append((PATHS[path].name, f"{mean_std(accuracies.values())} (n = {len(accuracies)})", of_seeds))
    for path, other in COMPARED:
        if path in found and other in found:
            difference = estimate(paired_differences(found[other], found[path]))
            names = PATHS[path].name, PATHS[other].name
            differences.append((*names, signed(difference.mean), interval(difference)))
    return page(
        "Accuracy: the price of speed",
        result,
        EXPLANATION.format(**result["setting"]),
        table(("path", "accuracy", "of each seed"), rows, names=1),
        "Differences in points, paired by seed:",
        table(("path", "minus", "difference", "95 % interval (Student's)"), differences, names=2),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--root", type=Path, required=True, help="folder of CIFAR-10 as JPEG files, train/ and test/"
    )
    parser.add_argument("--paths", nargs="+", choices=list(PATHS), default=list(PATHS))
    parser.add_argument("--images", type=count, default=12_800, help="to train on (default: 12800)")
    parser.add_argument("--epochs", type=count, default=5, help="of them (default: 5)")
    parser.add_argument("--seeds", type=count, default=5, help="runs of each path (default: 5)")


def run(arguments: argparse.Namespace) -> Result:
    """Raises UserError for a folder with fewer images than a batch."""
    splits = image_folder(str(arguments.root), label="CIFAR-10 (JPEG)", augmentation=CropFlip())
    order = torch.randperm(len(splits.train), generator=torch.Generator().manual_seed(0))
    splits = replace(splits, train=splits.train.select(order[: arguments.images]))
    if len(splits.train) < BATCH:
        raise UserError(
            f"{len(splits.train)} training images are fewer than one batch of {BATCH}: give more by --images, "
            "or a folder with more by --root"
        )
    workload = Workload(NETWORK, BATCH, splits)
    learning = recipe(BATCH, arguments.epochs, lr=0.1)
    runs: list[Row] = []
    for seed in range(arguments.seeds):
        for path in arguments.paths:
            runs.append({"path": path, "seed": seed, "accuracy": PATHS[path].train(workload, learning, seed)})
            print(f"{PATHS[path].name}, seed {seed}: {runs[-1]['accuracy']:.2f} %", flush=True)
    setting = {"network": NETWORK, "images": len(splits.train), "epochs": arguments.epochs}
    return {"setting": {**setting, "batch": BATCH, "source": splits.label}, "runs": runs}
