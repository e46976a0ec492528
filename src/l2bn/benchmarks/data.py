"""Throughput of the data pipelines alone: this project's, PIL transforms in a DataLoader, and timm's loader.

Each pipeline makes an epoch of batches of the same images on the device and discards them.
"""

import argparse
from collections import deque
from collections.abc import Iterable
from typing import Any

from l2bn.benchmarks.measure import DEVICE, Action, Result, Row, add_common_arguments, interleaved, page, table
from l2bn.benchmarks.workload import WORKERS, Workload, make_workload, photographs, pictures, timm_pictures
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
    deque(batches, maxlen=0)


def pipelines(workload: Workload) -> dict[str, Action]:
    """One epoch of each pipeline, as an action."""
    options: dict[str, Any] = {"splits": workload.splits, "batch_size": workload.batch, "device": DEVICE}
    options |= {"channels_last": True, "workers": WORKERS}
    training = training_loader(workload.splits.train, seed=0, **options)
    evaluation = evaluation_loader(workload.splits.train, **options)
    plain, timm = pictures(workload), timm_pictures(workload)
    actions = {
        "ours": lambda: exhaust(training.epoch(0)),
        "evaluation": lambda: exhaust(evaluation.epoch(0)),
        "plain": lambda: exhaust((images.to(DEVICE), labels.to(DEVICE)) for images, labels in plain),
        "timm": lambda: exhaust(timm),
    }
    if workload.size == 224:
        splits = photographs(workload.images, cache_side=256)
        decoded = training_loader(splits.train, seed=0, **options)
        actions["decoded"] = lambda: exhaust(decoded.epoch(0))
    return actions


EXPLANATION = """
Batches of noise on the device, augmented and normalised, all pipelines in turn in one process; × against PIL
transforms in a DataLoader. Workers: processes that load images; a set in memory needs none.
"""


def make_page(result: Result) -> str:
    rows = []
    for row in result["rows"]:
        speeds = row["images_per_second"]
        for name in filter(speeds.get, NAMES):
            workers = 0 if row["size"] == 32 and name in ("ours", "evaluation") else WORKERS
            names = f"{row['size']}²", NAMES[name], str(row["batch"]), str(workers)
            rows.append((*names, f"{speeds[name]:,.0f}", f"{speeds[name] / speeds['plain']:.1f}"))
    columns = ("images", "pipeline", "batch", "workers", "images/s", "×")
    return page("Data pipelines alone: images/s", result, EXPLANATION, table(columns, rows, names=2))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, STEPS, seconds=20)


def run(arguments: argparse.Namespace) -> Result:
    rows: list[Row] = []
    for network in arguments.networks:
        workload = make_workload(network, STEPS[network])
        times = interleaved(pipelines(workload), arguments.seconds, fewest=5, warm_up=1)
        speeds = {name: workload.images / taken for name, taken in times.items()}
        rows.append({"size": workload.size, "batch": workload.batch, "images_per_second": speeds})
        print("   ".join(f"{name} {speed:,.0f}" for name, speed in speeds.items()), "images/s", flush=True)
    return {"rows": rows}
