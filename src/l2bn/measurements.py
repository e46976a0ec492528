"""What a record may hold besides: measurements inside the network, over the test images.

    features.jsonl             norms, compactness and separation of features: one line a measured epoch
    statistics.jsonl           accuracy by running against batch statistics: one line a measured update
    penultimate.safetensors    penultimate features of a few test images after the last epoch

A run writes a line before the checkpoint of its position. A resumed run keeps the lines up to its checkpoint, and
so neither misses one nor has one twice. What is measured, `l2bn/analysis/features.py` defines.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from l2bn.durable import write_durably
from l2bn.records import InvalidRecordError, is_finite_number, read_lines, write_lines

FEATURES, STATISTICS, SAMPLE = "features.jsonl", "statistics.jsonl", "penultimate.safetensors"

SIDES = ("input", "output")

BINS_AN_OCTAVE = 16
"""Of the histogram of norms: a bin is 4.4 % wide."""

NORM_MEASURES = ("norm_mean", "norm_cv", "norm_cv_within", "norm_cv_between")
CLASS_MEASURES = (
    *("class_cosine", "within_share", "angle_mean", "angle_min", "centred_angle_min", "distance"),
    *("nc1", "cdnv", "fisher", "effective_rank"),
)
MEASURES = (*NORM_MEASURES, *CLASS_MEASURES)

Measures = Mapping[str, float | None]
"""Each of MEASURES at one place of the network; None where it is not defined or not finite."""

FeatureRow = dict[str, Any]
"""One measured epoch: epoch, step (updates so far), images; `layers`, the norm layers in the order in which they
run, each with its name, the measures at its input and output, `shrink` (None without running statistics) and
`norms`, the histogram of the norms at its input; `penultimate`, the measures there."""

StatisticsRow = dict[str, Any]
"""One measured update: step (updates so far), running/loss, running/top1, batch/loss, batch/top1 (percent)."""

STATISTICS_KEYS = {"step", "running/loss", "running/top1", "batch/loss", "batch/top1"}


@dataclass(frozen=True)
class Sample:
    """Penultimate features of the first test images of each of the first classes, in the order of the test set."""

    features: NDArray[np.float32]  # (n, d)
    labels: NDArray[np.int64]  # (n,)


def read_features(folder: Path) -> list[FeatureRow]:
    """The measured epochs of a record; none where nothing was measured. Raises InvalidRecordError."""
    return _read_steps(folder / FEATURES, _bad_features)


def read_statistics(folder: Path) -> list[StatisticsRow]:
    """The measured updates of a record; none where nothing was measured. Raises InvalidRecordError."""
    return _read_steps(folder / STATISTICS, _bad_statistics)


def _read_steps(path: Path, reason: Callable[[object], str | None]) -> list[Any]:
    if not path.exists():
        return []
    rows = read_lines(path, reason)
    for number, (one, other) in enumerate(itertools.pairwise(rows), start=2):
        if one["step"] >= other["step"]:
            raise InvalidRecordError(f"{path.name}, line {number}: not after the step of the line before")
    return rows


def read_sample(folder: Path) -> Sample | None:
    """The sample of penultimate features, or None where there is none. Raises InvalidRecordError."""
    path = folder / SAMPLE
    if not path.exists():
        return None
    try:
        tensors = safetensors.numpy.load_file(path)
        features, labels = tensors["features"].astype(np.float32), tensors["labels"].astype(np.int64)
    except (OSError, KeyError, safetensors.SafetensorError) as error:
        raise InvalidRecordError(f"{SAMPLE} cannot be read: {error}") from error
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise InvalidRecordError(f"{SAMPLE}: {labels.shape} labels for features of shape {features.shape}")
    return Sample(features, labels)


def write_sample(folder: Path, sample: Sample) -> None:
    """Write the sample in half precision; what does not fit it is brought to its largest value."""
    largest = float(np.finfo(np.float16).max)
    features = np.clip(sample.features, -largest, largest).astype(np.float16)
    content = {"features": features, "labels": sample.labels.astype(np.int16)}
    write_durably(folder / SAMPLE, safetensors.numpy.save(content))


def keep(folder: Path, step: float, epochs: float = math.inf) -> tuple[list[FeatureRow], list[StatisticsRow]]:
    """Drop what was measured after so many updates, and features after so many epochs; what stays.

    A run may stand at the last update of an epoch, before the evaluation in which the features are measured. A line
    that was cut off goes, too. Raises InvalidRecordError.
    """
    for name, read in ((FEATURES, read_features), (STATISTICS, read_statistics)):
        path = folder / name
        if path.exists():
            content = path.read_bytes()
            write_durably(path, content[: content.rfind(b"\n") + 1])
            rows = read(folder)
            kept = [row for row in rows if row["step"] <= step and row.get("epoch", 0) <= epochs]
            write_lines(path, kept)
            if len(kept) < len(rows):
                (folder / SAMPLE).unlink(missing_ok=True)
    return read_features(folder), read_statistics(folder)


def check(folder: Path) -> list[str]:
    """The names of the files of measurements in a folder, each of which could be read.

    Raises InvalidRecordError.
    """
    read_features(folder)
    read_statistics(folder)
    read_sample(folder)
    return [name for name in (FEATURES, STATISTICS, SAMPLE) if (folder / name).exists()]


def _bad_features(row: object) -> str | None:
    """Why a value is no measured epoch, or None."""
    if not isinstance(row, dict) or row.keys() != {"epoch", "step", "images", "layers", "penultimate"}:
        return "not a measured epoch"
    if not all(isinstance(row[key], int) and row[key] > 0 for key in ("epoch", "step", "images")):
        return "epoch, step and images must be whole numbers above 0"
    places = [("penultimate", row["penultimate"])]
    for layer in row["layers"] if isinstance(row["layers"], list) else [None]:
        if not isinstance(layer, dict) or layer.keys() != {"name", "shrink", "norms", *SIDES}:
            return "a layer that is none"
        if not _is_number_or_none(layer["shrink"]) or not _is_histogram(layer["norms"]):
            return f"shrink or norms of {layer['name']}"
        places += [(f"{side} of {layer['name']}", layer[side]) for side in SIDES]
    for place, measures in places:
        if not isinstance(measures, dict) or measures.keys() != set(MEASURES):
            return f"other measures than {', '.join(MEASURES)}: {place}"
        if not all(map(_is_number_or_none, measures.values())):
            return f"not finite numbers: {place}"
    return None


def _bad_statistics(row: object) -> str | None:
    """Why a value is no measured update, or None."""
    if not isinstance(row, dict) or row.keys() != STATISTICS_KEYS:
        return "not a measured update"
    if not is_finite_number(row["step"]) or not all(map(_is_number_or_none, row.values())):
        return "not finite numbers"
    return None


def _is_number_or_none(value: object) -> bool:
    return value is None or is_finite_number(value)


def _is_histogram(value: object) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"first", "counts"}
        and isinstance(value["first"], int)
        and isinstance(value["counts"], list)
        and all(isinstance(count, int) and count >= 0 for count in value["counts"])
    )
