"""Accuracy of this project's trainer and of the plain loop, by one recipe, several seeds each: the price of speed.

The two runs of a seed start from the same weights; order and augmentation of the images differ. Runs in the JSON
are not repeated, so the same command goes on where it was stopped.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from l2bn.benchmarks.measure import add_device_arguments, count, set_up
from l2bn.benchmarks.paths import compute, pictures, plain_epoch, recipe, trainer_of
from l2bn.benchmarks.report import Result, Row, hardware, page, prose, report, table, write_json
from l2bn.benchmarks.workload import CLASSES, NETWORKS, Workload, small_images
from l2bn.data.loader import evaluation_loader
from l2bn.errors import UserError
from l2bn.reporting.formatting import mean_std
from l2bn.reporting.statistics import estimate, paired_differences
from l2bn.seeding import derive_seed
from l2bn.training.environment import describe_environment
from l2bn.training.loop import Position, evaluate
from l2bn.training.optim import Recipe

NAMES = {"ours": "ours", "plain": "plain loop"}


def initial(network: str, seed: int) -> nn.Module:
    torch.manual_seed(derive_seed(seed, "weights"))
    return NETWORKS[network].build()


def train_ours(workload: Workload, learning: Recipe, seed: int, device: torch.device) -> float:
    """Test accuracy in percent after the last epoch."""
    placing = compute(device, threads=torch.get_num_threads())
    trainer = trainer_of(workload, initial(workload.network, seed), learning, placing, seed)
    position = Position()
    trainer.fit(position)
    return float(position.rows[-1]["test/top1"] or 0.0)


def train_plain(workload: Workload, learning: Recipe, seed: int, device: torch.device) -> float:
    """Test accuracy in percent after the last epoch."""
    model = initial(workload.network, seed).to(device)
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
    parser.add_argument(
        "--json", type=Path, required=True, help="where results are kept; its table is written beside it"
    )
    parser.add_argument(
        "--root", type=Path, required=True, help="folder of CIFAR-10 as JPEG files, train/ and test/"
    )
    add_device_arguments(parser)
    parser.add_argument("--network", choices=NETWORKS, default="ResNet-20")
    parser.add_argument("--images", type=count, default=25_600, help="to train on (default: 25600)")
    parser.add_argument("--epochs", type=count, default=5, help="of them (default: 5)")
    parser.add_argument("--batch", type=count, default=128, help="images a step (default: 128)")
    parser.add_argument("--seeds", type=count, default=3, help="runs of each path (default: 3)")


def earlier_runs(path: Path, setting: dict[str, Any]) -> list[Row]:
    """The runs of an earlier result; none of a file that is no such result, as in the other benchmarks.

    Raises UserError for runs of another setting.
    """
    try:
        earlier = json.loads(path.read_text())
        found = earlier["setting"] if earlier["benchmark"] == "accuracy" else None
        runs = [{key: run[key] for key in ("path", "seed", "accuracy")} for run in earlier["runs"]]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return []
    if found is None:
        return []
    if found != setting:
        raise UserError(f"{path} holds runs of {found}, not of {setting}; move it away")
    return runs


def run(arguments: argparse.Namespace) -> None:
    """Raises UserError for results of another setting in the JSON's place."""
    device = set_up(arguments)
    splits, source = small_images(arguments.root, arguments.images)
    images, batch = len(splits.train), arguments.batch
    workload = Workload(arguments.network, batch, 32, images // batch, splits, source)
    learning = recipe(batch, arguments.epochs, lr=0.1)
    setting = {"network": arguments.network, "images": images, "epochs": arguments.epochs, "batch": batch}
    setting["source"] = source
    result: Result = {
        "benchmark": "accuracy",
        "machine": describe_environment(device),
        "setting": setting,
        "runs": [],
    }
    result["runs"] = earlier_runs(arguments.json, setting)
    for seed in range(arguments.seeds):
        for path, train in PATHS.items():
            if seed not in of_path(result["runs"], path):
                accuracy = train(workload, learning, seed, device)
                result["runs"].append({"path": path, "seed": seed, "accuracy": accuracy})
                write_json(arguments.json, result)
                print(f"{NAMES[path]:10} seed {seed}: {accuracy:.2f} %", flush=True)
    report(result, arguments.json, accuracy_table)
