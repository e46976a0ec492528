"""Throughput of the data pipelines alone: this project's, PIL transforms in a DataLoader, and timm's loader.

Each pipeline makes an epoch of batches of the same images on the device and discards them.
"""

import argparse
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from l2bn.benchmarks.measure import Action, add_common_arguments, count, interleaved, set_up, undisturbed
from l2bn.benchmarks.paths import pictures, timm_pictures
from l2bn.benchmarks.report import Result, hardware, page, prose, report, table
from l2bn.benchmarks.workload import WORKERS, Workload, make_workload, photographs
from l2bn.data.loader import evaluation_loader, training_loader
from l2bn.training.environment import describe_environment

STEPS = {"ResNet-20": 50, "ResNet-18": 6}  # batches of 128 images of 32 pixels, of 32 images of 224 pixels
NAMES = {
    "ours": "ours",
    "evaluation": "ours, evaluation",
    "decoded": "ours, `cache_side=256`",
    "plain": "PIL transforms, DataLoader",
    "timm": "timm's loader",
}


def exhaust(batches: Iterable[Any]) -> None:
    deque(batches, maxlen=0)


def pipelines(workload: Workload, root: Path | None, device: torch.device) -> dict[str, Action]:
    """One epoch of each pipeline, as an action."""
    options: dict[str, Any] = {"splits": workload.splits, "batch_size": workload.batch, "device": device}
    options |= {"channels_last": True, "workers": WORKERS}
    training = training_loader(workload.splits.train, seed=0, **options)
    evaluation = evaluation_loader(workload.splits.train, **options)
    plain, timm = pictures(workload), timm_pictures(workload, device)
    actions = {
        "ours": lambda: exhaust(training.epoch(0)),
        "evaluation": lambda: exhaust(evaluation.epoch(0)),
        "plain": lambda: exhaust((images.to(device), labels.to(device)) for images, labels in plain),
        "timm": lambda: exhaust(timm),
    }
    if workload.size == 224:
        splits, _ = photographs(root, workload.images, cache_side=256)
        decoded = training_loader(splits.train, seed=0, **options)
        actions["decoded"] = lambda: exhaust(decoded.epoch(0))
    return actions


EXPLANATION = """
Batches on the device, augmented and normalised, all pipelines in turn in one process; × against PIL transforms in a
DataLoader. Workers: processes that load images; a set in memory needs none.
"""


def data_table(result: Result) -> str:
    rows = []
    for row in result["rows"]:
        speeds = row["images_per_second"]
        for name in filter(speeds.get, NAMES):
            workers = 0 if row["size"] == 32 and name in ("ours", "evaluation") else WORKERS
            names = f"{row['images']}, {row['size']}²", str(row["batch"]), NAMES[name], str(workers)
            rows.append((*names, f"{speeds[name]:,.0f}", f"{speeds[name] / speeds['plain']:.1f}"))
    columns = ("images", ">batch", "pipeline", ">workers", ">images/s", ">×")
    title = "Data pipelines alone: images/s"
    return page(title, f"{hardware(result)}.", prose(EXPLANATION), table(columns, rows))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, STEPS)
    parser.add_argument("--root", type=Path, help="folder of real images (default: noise)")
    parser.add_argument("--seconds", type=float, default=20.0, help="measuring time of a size (default: 20)")
    parser.add_argument("--rounds", type=count, default=5, help="fewest epochs of each pipeline (default: 5)")


def run(arguments: argparse.Namespace) -> None:
    """Raises UserError."""
    device = set_up(arguments)
    rows = []
    for network in arguments.networks:
        workload = make_workload(network, arguments.root, STEPS[network])
        actions = pipelines(workload, arguments.root, device)
        with undisturbed():
            for action in actions.values():
                action()
        seconds = interleaved(actions, device, arguments.seconds, fewest=arguments.rounds, warm_up=0)
        speeds = {name: workload.images / value for name, value in seconds.items()}
        names = {"images": workload.source, "size": workload.size, "batch": workload.batch}
        rows.append({**names, "images_per_second": speeds})
        print("   ".join(f"{name} {speed:,.0f}" for name, speed in speeds.items()), "images/s", flush=True)
    result = {"benchmark": "data", "machine": describe_environment(device), "rows": rows}
    report(result, arguments.json, data_table)
