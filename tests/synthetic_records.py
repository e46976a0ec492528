"""For the tests of what reads records: invented runs in the real schema, without training."""

import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import yaml

from l2bn.records import (
    CONFIG,
    ENVIRONMENT,
    FEATURES,
    MEASURES,
    METRICS,
    Metrics,
    Record,
    Sample,
    write_lines,
    write_sample,
)


def write_run(
    root: Path,
    *,
    dataset: str = "cifar10",
    backbone: str = "resnet20",
    norm: str = "bn",
    recipe: str = "cosine_200",
    seed: int = 0,
    accuracy: float = 92.0,
    best: float | None = None,
    epochs: int = 200,
    curve: int | None = None,
    status: str = "finished",
    label: str | None = None,
    baseline: str | None = None,
    precision: str = "32-true",
    kernels: str | None = None,
    parameters: int = 272474,
    identity: dict[str, object] | None = None,
    images: dict[str, str | None] | None = None,
    train_images: int = 50_000,
    test_images: int = 10_000,
) -> Record:
    """One run that ends at `accuracy`; `curve` epochs are written to metrics.jsonl (default: one).

    A diverged run with a `curve` diverged after it, one without in its first epoch.
    """
    folder = root / dataset / backbone / norm / recipe / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    cell = {"dataset": dataset, "backbone": backbone, "norm": norm, "recipe": recipe, "seed": seed}
    own = identity or {}
    compute = {"precision": precision} | {key: own[key] for key in ("devices", "sync_bn") if key in own}
    (folder / CONFIG).write_text(yaml.safe_dump({"seed": seed, "compute": compute, "cell": cell}))
    (folder / ENVIRONMENT).write_text(json.dumps({"packages": {}}))
    rows = list(_epochs(accuracy, curve or 1, seed, norm))
    if curve is None:
        rows[0]["epoch"] = 1
    write_lines(folder / METRICS, rows)
    last = rows[-1] | {"epoch": epochs} if status == "finished" else rows[-1] if curve else {}
    record = Record(
        folder=folder,
        status=status,
        dataset=dataset,
        backbone=backbone,
        norm=norm,
        recipe=recipe,
        seed=seed,
        label=label or {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "digits": "Digits"}.get(dataset, dataset),
        baseline=baseline,
        precision=precision,
        kernels=kernels or ("stock" if norm == "bn" else "plain"),
        hash=f"{hash((dataset, backbone, norm, recipe, seed)) & 0xFFFFFFFFFFFFFFFF:016x}",
        identity={"recipe": {"epochs": epochs}, "seed": seed} | own,
        epochs=epochs,
        updates=epochs * 195,
        train_images=train_images,
        test_images=test_images,
        parameters=parameters,
        norm_layers=19,
        last=last,
        best=last and last | {"test/top1": accuracy if best is None else best},
        seconds=100.0,
        divergence=None if status == "finished" else "loss is nan in epoch 1, step 7",
        images=images,
    )
    record.write()
    return record


def _epochs(accuracy: float, epochs: int, seed: int, norm: str) -> Iterable[Metrics]:
    """A curve as a cosine recipe gives it: steep, then noisy, then still; noise by seed and norm."""
    noise = random.Random(f"{seed}{norm}")
    for epoch in range(1, epochs + 1):
        left = 1 - epoch / epochs
        value = accuracy - 9 * left**0.7 - 40 * left * math.exp(-20 * epoch / epochs) - 7 * left * noise.random()
        value = max(10.0, value)
        yield {
            "epoch": epoch,
            "step": epoch * 195,
            "lr": 0.1 * left,
            "train/loss": 2.3 * left,
            "train/top1": value,
            "test/loss": 2.3 * left,
            "test/top1": value,
            "test/top5": 99.0,
            "seconds": 1.0,
            "images_per_second": 1000.0,
            "peak_memory_bytes": None,
        }


def write_features(
    record: Record,
    *,
    within_share: float = 0.2,
    angle: float = 60.0,
    norm_cv: float = 0.1,
    shrink: float | None = 0.95,
    epochs: Iterable[int] = (),
    layers: int = 3,
    sample: bool = False,
) -> None:
    """Measured features that end at these values, and half of a share more at each measured epoch before."""
    measured = [*(epoch for epoch in epochs if epoch < record.epochs), record.epochs]
    rows = []
    for place, epoch in enumerate(reversed(measured)):
        measures = dict.fromkeys(MEASURES, 1.0)
        measures |= {
            "within_share": within_share * (1 + place / 2),
            "angle_mean": angle,
            "norm_cv_between": norm_cv / 2,
        }
        inputs = [{**measures, "norm_cv": norm_cv * depth} for depth in range(1, layers + 1)]
        found = [
            {
                "name": f"bn{i}",
                "shrink": shrink,
                "norms": {"first": 0, "counts": [10]},
                "input": given,
                "output": measures,
            }
            for i, given in enumerate(inputs)
        ]
        row = {"epoch": epoch, "step": 10 * epoch, "images": 10, "layers": found, "penultimate": measures}
        rows.append(row)
    write_lines(record.folder / FEATURES, rows[::-1])
    if sample:
        labels = np.arange(60) % 3
        noise = np.random.default_rng(record.seed).normal(size=(60, 8))
        write_sample(record.folder, Sample((noise + 4 * np.eye(8)[labels]).astype(np.float32), labels))


def write_pairs(
    root: Path, bn: Iterable[float], differences: Iterable[float], *, norm: str = "l2bn", **cell: object
) -> list[Record]:
    """BN runs of these accuracies at seeds 0, 1, ... and a partner of each, that much better."""
    records = []
    for seed, (accuracy, difference) in enumerate(zip(bn, differences, strict=True)):
        records.append(write_run(root, seed=seed, accuracy=accuracy, **cell))
        records.append(write_run(root, seed=seed, accuracy=accuracy + difference, norm=norm, **cell))
    return records


def write_folds(root: Path, differences: Mapping[int, Sequence[float]], **cell: object) -> None:
    """Pairs of runs on folds of ESC-50; by fold, the differences of L2BN from BN, which has 70 plus the fold."""
    for fold, values in differences.items():
        where = {"dataset": f"esc50,fold={fold}" if fold > 1 else "esc50", "label": f"ESC-50, fold {fold}"}
        options = where | {"identity": {"dataset": {"fold": fold}}, "recipe": "restarts_126", "epochs": 126} | cell
        write_pairs(root, [70.0 + fold] * len(values), values, **options)
