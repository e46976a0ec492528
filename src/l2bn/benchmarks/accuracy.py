"""Accuracy of this project's trainer and of the plain loop, by one recipe, several seeds each: the price of speed.

The two runs of a seed start from the same weights; order and augmentation of the images differ.
"""

import argparse
from pathlib import Path

import torch
from torch import nn

from l2bn.benchmarks.measure import add_device_arguments, count, set_up
from l2bn.benchmarks.paths import compute, pictures, plain_epoch, recipe, trainer_of
from l2bn.benchmarks.report import Result, Row, hardware, page, prose, report, table
from l2bn.benchmarks.workload import CLASSES, NETWORKS, Workload, small_images
from l2bn.data.loader import evaluation_loader
from l2bn.reporting.formatting import mean_std
from l2bn.reporting.statistics import estimate, paired_differences
from l2bn.seeding import derive_seed
from l2bn.training.environment import describe_environment
from l2bn.training.loop import Position, evaluate
from l2bn.training.optim import Recipe

NETWORK, BATCH = "ResNet-20", 128
NAMES = {"ours": "ours", "plain": "plain loop"}


def initial(seed: int) -> nn.Module:
    torch.manual_seed(derive_seed(seed, "weights"))
    return NETWORKS[NETWORK].build()


def train_ours(workload: Workload, learning: Recipe, seed: int, device: torch.device) -> float:
    """Test accuracy in percent after the last epoch."""
    placing = compute(device, threads=torch.get_num_threads())
    trainer = trainer_of(workload, initial(seed), learning, placing, seed)
    position = Position()
    trainer.fit(position)
    return float(position.rows[-1]["test/top1"] or 0.0)


def train_plain(workload: Workload, learning: Recipe, seed: int, device: torch.device) -> float:
    """Test accuracy in percent after the last epoch."""
    model = initial(seed).to(device)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=learning.lr,
        momentum=learning.momentum,
        weight_decay=learning.weight_decay,
        nesterov=learning.nesterov,
    )
    updates = learning.epochs * workload.steps
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda update: learning.schedule(update / workload.steps, learning.epochs) if update < updates else 0,
    )
    optimizer.register_step_post_hook(lambda *_: scheduler.step())
    torch.manual_seed(derive_seed(seed, "plain"))
    batches = pictures(workload, torch.Generator().manual_seed(derive_seed(seed, "plain")))
    for _ in range(learning.epochs):
        plain_epoch(model.train(), optimizer, batches, device)
    test = evaluation_loader(workload.splits.test, splits=workload.splits, batch_size=256, device=device)
    _, accuracy, _ = evaluate(model, test, CLASSES, compute(device).fabric())
    return accuracy


PATHS = {"ours": train_ours, "plain": train_plain}


def of_path(runs: list[Row], path: str) -> dict[int, float]:
    return {run["seed"]: run["accuracy"] for run in runs if run["path"] == path}


EXPLANATION = """
{network} with BN on {images:,} training images of {source}, {epochs} epochs of `recipe=short`, batch {batch}. Test
accuracy in percent after the last epoch on all test images, mean ± standard deviation over seeds. The two runs of a
seed start from the same weights; order and augmentation of the images differ.
"""


def accuracy_table(result: Result) -> str:
    found = {path: of_path(result["runs"], path) for path in PATHS}
    difference = estimate(paired_differences(found["plain"], found["ours"]))
    rows = [
        (
            *(NAMES[path], f"{mean_std(accuracies.values())} (n = {len(accuracies)})"),
            ", ".join(f"{accuracies[seed]:.2f}" for seed in sorted(accuracies)),
        )
        for path, accuracies in found.items()
    ]
    parts = [f"{hardware(result)}.", prose(EXPLANATION.format(**result["setting"]))]
    parts.append(table(("path", ">accuracy", "of each seed"), rows))
    if difference.low is not None and difference.high is not None:
        parts.append(
            f"Ours − plain loop: {difference.mean:+.2f} points, 95 % interval "
            f"[{difference.low:+.2f}, {difference.high:+.2f}] (Student's, paired by seed)."
        )
    return page("Accuracy: the trainer against the plain loop", *parts)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, help="write the result here, and its table beside it")
    parser.add_argument(
        "--root", type=Path, required=True, help="folder of CIFAR-10 as JPEG files, train/ and test/"
    )
    add_device_arguments(parser)
    parser.add_argument("--images", type=count, default=12_800, help="to train on (default: 12800)")
    parser.add_argument("--epochs", type=count, default=5, help="of them (default: 5)")
    parser.add_argument("--seeds", type=count, default=3, help="runs of each path (default: 3)")


def run(arguments: argparse.Namespace) -> None:
    """Raises UserError."""
    device = set_up(arguments)
    splits, source = small_images(arguments.root, arguments.images)
    learning = recipe(BATCH, arguments.epochs, lr=0.1)
    workload = Workload(NETWORK, BATCH, 32, len(splits.train) // BATCH, splits, source)
    runs: list[Row] = []
    for seed in range(arguments.seeds):
        for path, train in PATHS.items():
            runs.append({"path": path, "seed": seed, "accuracy": train(workload, learning, seed, device)})
            print(f"{NAMES[path]:10} seed {seed}: {runs[-1]['accuracy']:.2f} %", flush=True)
    setting = {"network": NETWORK, "images": len(splits.train), "epochs": arguments.epochs}
    setting |= {"batch": BATCH, "source": source}
    machine = describe_environment(device)
    result: Result = {"benchmark": "accuracy", "machine": machine, "setting": setting, "runs": runs}
    report(result, arguments.json, accuracy_table)
