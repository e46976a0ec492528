"""The record of a run: the files that say what was run, on what, and what came of it.

    config.yaml                the resolved configuration
    env.json                   commit, versions, device, threads: a whitelist of facts about the machine
    metrics.jsonl              one line an epoch
    features.jsonl             norms, compactness and separation of features: one line a measured epoch
    statistics.jsonl           accuracy by running against batch statistics: one line a measured update
    penultimate.safetensors    penultimate features of a few test images after the last epoch
    summary.json               written last and in one step; its existence means that the run has ended, and its
                               `status` says whether it finished or diverged

Tables and figures read nothing but records. pydantic checks what is read. `load` gives a notebook a data frame.
`l2bn/analysis/features.py` defines what is measured. numpy and pandas are imported where they are used, so that
commands start fast.
"""

import errno
import fnmatch
import itertools
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Self, TypeGuard

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, with_config
from pydantic.dataclasses import dataclass
from typing_extensions import TypedDict

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

CONFIG, ENVIRONMENT, METRICS, SUMMARY = "config.yaml", "env.json", "metrics.jsonl", "summary.json"
FEATURES, STATISTICS, SAMPLE = "features.jsonl", "statistics.jsonl", "penultimate.safetensors"
SCHEMA = 1
THEN = " then "

COST_KEYS = ("seconds", "images_per_second", "peak_memory_bytes")
"""The cost of an epoch: the metrics in which two runs that are otherwise equal bit for bit may differ."""

SIDES = ("input", "output")
CLASS_MEASURES = (
    *("class_cosine", "within_share", "angle_mean", "angle_min", "centred_angle_min", "distance"),
    *("nc1", "cdnv", "fisher", "effective_rank"),
)
MEASURES = ("norm_mean", "norm_cv", "norm_cv_within", "norm_cv_between", *CLASS_MEASURES)
BINS_PER_OCTAVE = 16
"""Of the histogram of norms: a bin is 4.4 % wide."""

Metrics = dict[str, float | None]
"""One epoch, with the keys METRIC_KEYS."""

FeatureRow = dict[str, Any]
"""One measured epoch: epoch, step, images, layers, penultimate."""

StatisticsRow = dict[str, Any]
"""One measured update: step (updates so far), running/loss, running/top1, batch/loss, batch/top1 (percent)."""

Measures = Mapping[str, float | None]
"""Each of MEASURES at one place of the network; None where it is not defined or not finite."""


class InvalidRecordError(ValueError):
    """A record that is half-written, corrupt or foreign; the message names the file and the reason."""


class Problem(NamedTuple):
    """A record that was left out, or a part of one that counts in all else, and the reason."""

    folder: Path
    reason: str
    part: str = ""  # "measurements", say; empty for the whole record


def is_finite_number(value: object) -> TypeGuard[float]:
    """Tell whether a value is a number that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_plain_name(name: object) -> bool:
    """Tell whether a name can be that of a folder, and leads to no other place than its parent."""
    if not isinstance(name, str) or not name.isprintable() or "/" in name or name in ("", ".", ".."):
        return False
    return len(name.encode()) <= 255  # bytes that file systems take


def natural_order(name: str) -> tuple[list[tuple[str, float]], str]:
    """A sort key in which the numbers inside a name count as numbers: resnet20 before resnet110, 0.05 before 0.1.

    Different names have different keys.
    """
    return [(text, float(number or 0)) for text, number in re.findall(r"(\D*)((?:\d+(?:\.\d+)?)?)", name)], name


def setting_of(precision: str, devices: int = 1, sync_bn: bool = False) -> str:
    """The precision, and where they are not the default the number of devices and synchronised batch statistics."""
    parts = (precision, f"{devices} devices" if devices != 1 else "", "synchronised" if sync_bn else "")
    return ", ".join(filter(None, parts))


def _finite(value: float) -> float:
    if not is_finite_number(value):
        raise ValueError("must be a finite number")
    return value


def _plain(name: str) -> str:
    if not is_plain_name(name):
        raise ValueError("must be a plain name")
    return name


Number = Annotated[int | float, AfterValidator(_finite)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Ordinal = Annotated[int, Field(ge=1, lt=2**63)]  # an epoch or an update, counted from 1
Name = Annotated[str, AfterValidator(_plain)]
CHECKED = ConfigDict(strict=True, extra="forbid")


@with_config(CHECKED)
class Fingerprint(TypedDict):
    """The images of a data set, before any subset is taken; see `same_images`.

    files: digest over name, label and content of each file; the size in bytes stands for the content of images that
    are decoded when asked. pixels: digest of the decoded uint8 pixels and labels, None for images that are decoded
    when asked. Another version of a decoder may change the pixels of equal files.
    """

    files: str
    pixels: str | None


def same_images(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Tell whether two fingerprints are of the same images: equal files, or others that decode to equal pixels."""
    return one["files"] == other["files"] or (one["pixels"] is not None and one["pixels"] == other["pixels"])


def _row(fields: Mapping[str, Any]) -> Any:
    """The type of a JSON object with exactly these keys."""
    return with_config(CHECKED)(TypedDict("Row", dict(fields)))  # type: ignore[operator]


# Accuracies in percent; test/top5 is null under 5 classes; step counts updates.
METRIC_KEYS = ("epoch", "step", "lr", "train/loss", "train/top1", "test/loss", "test/top1", "test/top5", *COST_KEYS)
_METRICS = TypeAdapter(_row(dict.fromkeys(METRIC_KEYS, Number | None) | {"epoch": Ordinal, "step": Count}))

_STATISTIC_KEYS = ("running/loss", "running/top1", "batch/loss", "batch/top1")
_STATISTICS = TypeAdapter(_row(dict.fromkeys(_STATISTIC_KEYS, Number | None) | {"step": Number}))

_Measures = _row(dict.fromkeys(MEASURES, Number | None))
# The histogram counts norms at the layer's input: bin i begins at 2 ** (i / BINS_PER_OCTAVE), `first` is the first.
_Norms = _row({"first": int, "counts": list[Count]})
# `shrink` is null without running statistics; layers stand in the order in which they run.
_Layer = _row({"name": str, "shrink": Number | None, "norms": _Norms, "input": _Measures, "output": _Measures})
_Layers = list[_Layer]  # type: ignore[valid-type]
_FEATURES = TypeAdapter(
    _row({"epoch": Ordinal, "step": Ordinal, "images": Ordinal, "layers": _Layers, "penultimate": _Measures})
)


def _check_epoch(row: Metrics) -> Metrics:
    """Accept an epoch whose test/top1 is a percentage, or {} where a run diverged in its first epoch."""
    if row:
        _METRICS.validate_python(row)
        accuracy = row["test/top1"]
        if accuracy is None or not 0 <= accuracy <= 100:
            raise ValueError(f"test/top1 is {accuracy}, which is no percentage")
    return row


Epoch = Annotated[dict[str, Number | None], AfterValidator(_check_epoch)]


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class Record:
    """The content of `summary.json`. Raises pydantic's ValidationError, a ValueError, for a value that is wrong."""

    folder: Path = field(compare=False)
    status: Literal["finished", "diverged"]
    # The cell: the folder's names, with the values that were overridden ("l2bn,eps=0.001").
    dataset: Name
    backbone: Name
    norm: Name
    recipe: Name
    seed: Count
    label: str  # the data set as tables call it
    baseline: str | None  # the published rows it may be compared with
    precision: str
    # "stock", "plain" or "fused"; with "+compiled" or "+graphs" where the model was compiled or replayed from CUDA
    # graphs. A run that was resumed with others has all of them, in the order of their first use, with THEN
    # between them.
    kernels: str
    hash: str  # of the identity
    identity: dict[str, Any]
    epochs: Count
    updates: Count
    train_images: Count
    test_images: Count
    parameters: Count
    norm_layers: Count
    last: Epoch  # {} where the run diverged in its first epoch
    best: Epoch  # the epoch of the best test/top1: chosen on the test set, so shown and never the result
    seconds: Number
    divergence: str | None = None  # place and kind, of a diverged run
    images: Fingerprint | None = None  # older records have none

    def __post_init__(self) -> None:
        if self.status == "finished" and self.last.get("epoch") != self.epochs:
            raise ValueError(f"finished, but its last epoch is not epoch {self.epochs}")
        if bool(self.best) != bool(self.last):
            raise ValueError("last and best must both hold an epoch, or both be {}")

    @property
    def result(self) -> tuple[object, ...]:
        """Status, last and best epoch, without what the epochs cost."""
        rows = ({key: row[key] for key in row.keys() - set(COST_KEYS)} for row in (self.last, self.best))
        return self.status, *rows

    @property
    def setting(self) -> str:
        """The conditions besides the names of its folder that a run shares with those it is compared with."""
        return setting_of(self.precision, self.identity.get("devices", 1), self.identity.get("sync_bn", False))

    def metrics(self) -> list[Metrics]:
        """All epochs, read from `metrics.jsonl`. Raises InvalidRecordError, also if they do not end with `last`."""
        rows = read_metrics(self.folder / METRICS)
        if (rows[-1] if rows else {}) != self.last:
            raise InvalidRecordError(f"{METRICS}: its last line is not the last epoch of {SUMMARY}")
        return rows

    def write(self) -> None:
        """Write `summary.json`: the run has ended."""
        content = {"schema": SCHEMA} | {key: value for key, value in asdict(self).items() if key != "folder"}
        if self.images is None:  # as older records have it
            del content["images"]
        write_durably(self.folder / SUMMARY, json.dumps(content, indent=2, allow_nan=False) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The record in a folder. Raises InvalidRecordError where it is missing, corrupt or foreign."""
        try:
            content = json.loads((folder / SUMMARY).read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise InvalidRecordError(f"{SUMMARY} cannot be read: {error}") from error
        if not isinstance(content, dict) or content.pop("schema", None) != SCHEMA:
            raise InvalidRecordError(f"{SUMMARY} is not a record of schema {SCHEMA}")
        try:
            return cls(**{**content, "folder": folder})
        except ValidationError as error:
            raise InvalidRecordError(f"{SUMMARY}: {first_fault(error)}") from error


def first_fault(error: ValidationError) -> str:
    """The first fault that pydantic found: its place, the reason, the value."""
    fault = error.errors(include_url=False)[0]
    place = ".".join(map(str, fault["loc"]))
    reason = fault["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if fault["type"] == "missing":
        return f"{place} is missing"
    return f"{place}: {reason}, not {repr(fault['input'])[:60]}" if place else reason


def files_under(root: Path, pattern: str, unreadable: Callable[[OSError], object] | None = None) -> list[Path]:
    """The files under a folder whose names match, in the order of their paths; links to folders are followed.

    `Path.rglob` does not follow them. A folder that links lead to counts once, at its own place if that is under
    the root. A folder that cannot be read is passed over, after a call of `unreadable`.
    """
    seen: set[str] = set()
    found = []
    places: list[Path] = [root]
    for place in places:  # links are added while it goes on
        links = []
        for folder, folders, files in os.walk(place, onerror=unreadable):
            real = os.path.realpath(folder)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders.sort()
            links += [path for name in folders if (path := Path(folder, name)).is_symlink()]
            found += [Path(folder, name) for name in fnmatch.filter(files, pattern)]
        # A run's own place lies deeper than a shortcut to it.
        places += sorted(links, key=lambda link: -len(link.parts))
    return sorted(found)


def read_records(root: Path) -> tuple[list[Record], list[Problem]]:
    """Every ended run under a folder, in the order of their paths, and the folders that had to be left out."""
    records: list[Record] = []
    problems: list[Problem] = []

    def unreadable(error: OSError) -> None:
        problems.append(Problem(Path(error.filename), f"the folder cannot be read: {error.strerror}"))

    for path in files_under(root, SUMMARY, unreadable):
        try:
            records.append(Record.read(path.parent))
        except InvalidRecordError as error:
            problems.append(Problem(path.parent, str(error)))
    return records, problems


def load(folder: Path | str, *, epochs: bool = False) -> "pd.DataFrame":
    """The ended runs under a folder as a data frame: a row a run, or with `epochs` a row a run and epoch.

    Columns of both: dataset, backbone, norm, recipe, setting, seed, status; only runs of equal data set, backbone,
    recipe and setting are comparable. These are names: unlike the tables, it does not check that runs of one name
    had equal conditions and images (columns identity, images). A run also has the other fields of `Record`, the
    losses and accuracies (in percent) of its last epoch, and `best/top1`: all NaN if it diverged, for then it has
    no result. An epoch has METRIC_KEYS, also one of a run that diverged later. A folder that holds no valid record
    is left out with a warning; two runs of one cell, norm and seed both stay, with a warning, for a mean would
    count them twice. A frame without rows, which has no columns, also comes with a warning.

    Raises FileNotFoundError for a missing folder.
    """
    import pandas as pd  # takes longer than most commands run

    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder of runs")
    records, problems = read_records(root)
    firsts: dict[tuple[object, ...], Record] = {}
    rows: list[dict[str, Any]] = []
    for record in records:
        names = ("dataset", "backbone", "norm", "recipe", "setting", "seed")
        run = {key: getattr(record, key) for key in names}
        first = firsts.setdefault(tuple(run.values()), record)
        if first is not record:
            message = f"{first.folder} and {record.folder} are runs of one cell, norm and seed: keep one of them"
            warnings.warn(message, stacklevel=2)
        run["status"] = record.status
        if epochs:
            try:
                rows += [run | epoch for epoch in record.metrics()]
            except InvalidRecordError as error:
                problems.append(Problem(record.folder, str(error)))
            continue
        # The last whole epoch before a divergence would look like a result.
        last, best = (record.last, record.best) if record.status == "finished" else ({}, {})
        result = {key: last.get(key) for key in METRIC_KEYS if "/" in key} | {"best/top1": best.get("test/top1")}
        others = {key: value for key, value in vars(record).items() if key not in ("last", "best")}
        rows.append(run | result | others)
    for problem in problems:
        warnings.warn(f"{problem.folder} is left out: {problem.reason}", stacklevel=2)
    if not rows:
        warnings.warn(f"no run under {root} has ended: the data frame has no columns", stacklevel=2)
    return pd.DataFrame(rows)


# Files of JSON lines. A run writes a line before the checkpoint of its position, and a resumed run keeps the lines
# up to its checkpoint: it neither misses one nor has one twice.


def read_metrics(path: Path) -> list[Metrics]:
    """The lines of a `metrics.jsonl`. Raises InvalidRecordError naming the first bad line."""
    rows = _read_lines(path, _METRICS)
    for number, row in enumerate(rows, start=1):
        if row["epoch"] != number:
            raise InvalidRecordError(f"{path.name}, line {number}: not the epoch of its line")
    return rows


def read_features(folder: Path) -> list[FeatureRow]:
    """The measured epochs of a record; none where nothing was measured. Raises InvalidRecordError."""
    return _read_steps(folder / FEATURES, _FEATURES)


def read_statistics(folder: Path) -> list[StatisticsRow]:
    """The measured updates of a record; none where nothing was measured. Raises InvalidRecordError."""
    return _read_steps(folder / STATISTICS, _STATISTICS)


def _read_steps(path: Path, kind: TypeAdapter[Any]) -> list[Any]:
    rows = _read_lines(path, kind) if path.exists() else []
    for number, (one, other) in enumerate(itertools.pairwise(rows), start=2):
        if one["step"] >= other["step"]:
            raise InvalidRecordError(f"{path.name}, line {number}: not after the step of the line before")
    return rows


def _read_lines(path: Path, kind: TypeAdapter[Any]) -> list[Any]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InvalidRecordError(f"{path.name} cannot be read: {error}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
            kind.validate_python(rows[-1])
        except (ValueError, RecursionError) as error:
            reason = first_fault(error) if isinstance(error, ValidationError) else f"not JSON: {error}"
            raise InvalidRecordError(f"{path.name}, line {number}: {reason}") from error
    return rows


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace a file of JSON lines, in one step."""
    write_durably(path, "".join(map(as_line, rows)))


def as_line(row: Mapping[str, Any]) -> str:
    """A row as a line of a file of JSON lines. Raises ValueError for a number that is not finite."""
    return json.dumps(row, allow_nan=False) + "\n"


def truncate_measurements(
    folder: Path, step: float, epochs: float = math.inf
) -> tuple[list[FeatureRow], list[StatisticsRow]]:
    """Drop what was measured after so many updates, and features after so many epochs; return the rest.

    A run may stand at the last update of an epoch, before the evaluation in which the features are measured. A line
    that was cut off goes, too. Raises InvalidRecordError.
    """
    kept: dict[str, list[Any]] = {}
    for name, read in ((FEATURES, read_features), (STATISTICS, read_statistics)):
        path = folder / name
        if path.exists():
            content = path.read_bytes()
            write_durably(path, content[: content.rfind(b"\n") + 1])
        rows = read(folder)
        kept[name] = [row for row in rows if row["step"] <= step and row.get("epoch", 0) <= epochs]
        if len(kept[name]) < len(rows):
            (folder / SAMPLE).unlink(missing_ok=True)
            write_lines(path, kept[name])
    return kept[FEATURES], kept[STATISTICS]


class Sample(NamedTuple):
    """Penultimate features of the first test images of each of the first classes, in the order of the test set."""

    features: "NDArray[np.float32]"  # (n, d)
    labels: "NDArray[np.int64]"  # (n,)


def read_sample(folder: Path) -> Sample | None:
    """The sample of penultimate features, or None where there is none. Raises InvalidRecordError."""
    import numpy as np
    import safetensors.numpy

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
    """Write the sample in half precision; a value that exceeds it becomes its largest."""
    import numpy as np
    import safetensors.numpy

    largest = float(np.finfo(np.float16).max)
    features = np.clip(sample.features, -largest, largest).astype(np.float16)
    content = {"features": features, "labels": sample.labels.astype(np.int16)}
    write_durably(folder / SAMPLE, safetensors.numpy.save(content))


# Places on a machine, and durable writing.

MACHINE_PATHS = frozenset({"root", "devkit", "cache"})  # of a data set
"""Keys of `config.yaml` that give places on a machine, and nothing of the run."""


def without_machine_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `config.yaml` without the places on the machine."""
    kept = {key: value for key, value in config.items() if key != "runs_dir"}
    return kept | ({"dataset": _without_paths(kept["dataset"])} if "dataset" in kept else {})


def _without_paths(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    return {key: _without_paths(value) for key, value in node.items() if key not in MACHINE_PATHS}


def write_durably(path: Path, data: bytes | str) -> None:
    """Replace a file in one step: write a temporary file beside it, flush it to the disk, rename it.

    After a crash or a power cut the path holds the old content or the new one, never a mixture. Raises
    OSError (disk full, read-only folder): then the old file stands and the temporary one is removed. A file system
    that cannot flush a folder (some network and virtual ones) may lose the new content in a power cut.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    content = data.encode() if isinstance(data, str) else data
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    descriptor = os.open(path.parent, os.O_RDONLY)  # a rename is on the disk only once its folder is
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EBADF, errno.EINVAL):  # as of CIFS
            raise
    finally:
        os.close(descriptor)
