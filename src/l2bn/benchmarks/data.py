"""Throughput of the data pipelines alone: this project's, PIL transforms in a DataLoader, and timm's loader.

Each pipeline makes an epoch of batches of the same images on the device and discards them.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from l2bn.benchmarks.measure import Action, interleaved, machine, undisturbed, write_json
from l2bn.benchmarks.paths import pictures, timm_pictures
from l2bn.benchmarks.report import hardware, prose, write_table
from l2bn.benchmarks.workload import WORKERS, Workload, add_workload_arguments, make_workload, photographs
from l2bn.data.loader import evaluation_loader, training_loader

STEPS = {"ResNet-20": 50, "ResNet-18": 6}  # batches of 128 images of 32 pixels, of 32 images of 224 pixels
NAMES = {
    "ours": "ours",
    "evaluation": "ours, evaluation",
    "decoded": "ours, `cache_side=256`",
    "plain": "PIL transforms, DataLoader",
    "timm": "timm's loader",
}


def exhaust(batches: Iterable[Any]) -> None:
    for _ in batches:
        pass


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


def data_table(result: dict[str, Any]) -> str:
    lines = [
        "# Data pipelines alone: images/s",
        "",
        f"{hardware(result)}.",
        "",
        prose(EXPLANATION),
        "",
        "| images | batch | pipeline | workers | images/s | × |",
        "|---|---:|---|---:|---:|---:|",
    ]
    for row in result["rows"]:
        plain = row["images_per_second"]["plain"]
        for name in (name for name in NAMES if name in row["images_per_second"]):
            speed = row["images_per_second"][name]
            workers = 0 if row["size"] == 32 and name in ("ours", "evaluation") else WORKERS
            lines.append(
                f"| {row['images']}, {row['size']}² | {row['batch']} | {NAMES[name]} | {workers} "
                f"| {speed:,.0f} | {speed / plain:.1f} |"
            )
    return "\n".join(lines) + "\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_workload_arguments(parser, list(STEPS))
    parser.add_argument("--seconds", type=float, default=20.0, help="measuring time of a size (default: 20)")
    parser.add_argument("--rounds", type=int, default=5, help="fewest epochs of each pipeline (default: 5)")


def run(arguments: argparse.Namespace) -> None:
    """Raises UserError."""
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    rows = []
    for network in arguments.networks:
        workload = make_workload(network, arguments.root, STEPS[network])
        actions = pipelines(workload, arguments.root, device)
        with undisturbed():
            for action in actions.values():
                action()
        seconds = interleaved(actions, device, arguments.seconds, fewest=arguments.rounds, warm_up=0)
        speeds = {name: workload.images / value for name, value in seconds.items()}
        row = {
            "images": workload.source,
            "size": workload.size,
            "batch": workload.batch,
            "images_per_second": speeds,
        }
        rows.append(row)
        print("   ".join(f"{name} {speed:,.0f}" for name, speed in speeds.items()), "images/s", flush=True)
    result = {"benchmark": "data", "machine": machine(device), "rows": rows}
    if arguments.json:  # first, because it is what took the time
        write_json(arguments.json, result)
    print("\n" + write_table(data_table(result), arguments.json))
