"""The record of a run: the files that say what was run, on what, and what came of it.

    config.yaml     the resolved configuration
    env.json        commit, versions, device, threads: a whitelist of facts, nothing else of the environment
    metrics.jsonl   one line an epoch
    summary.json    written last and in one step; its existence means that the run has ended, and its `status`
                    says whether it finished or diverged

A run that was looked into more closely holds more files: see `measurements.py`.

Tables and figures read nothing but records. This module imports no heavy library, so that they start fast.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self

from l2bn.durable import write_durably

CONFIG, ENVIRONMENT, METRICS, SUMMARY = "config.yaml", "env.json", "metrics.jsonl", "summary.json"
FILES = (CONFIG, ENVIRONMENT, METRICS, SUMMARY)
SCHEMA = 1
THEN = " then "

Metrics = dict[str, float | None]
"""One epoch: epoch (counted from 1), step (updates so far), lr, train/loss, train/top1, test/loss,
test/top1, test/top5 (accuracies in percent; top5 null under 5 classes), seconds, images_per_second,
peak_memory_bytes."""

METRIC_KEYS = frozenset(
    {"epoch", "step", "lr", "train/loss", "train/top1", "test/loss", "test/top1", "test/top5"}
    | {"seconds", "images_per_second", "peak_memory_bytes"}
)
COST_KEYS = ("seconds", "images_per_second", "peak_memory_bytes")
"""What an epoch cost: the metrics in which two runs that are otherwise equal bit for bit may differ."""


class InvalidRecordError(ValueError):
    """A record that is half-written, corrupt or not ours; the message says which file and why."""


@dataclass(frozen=True)
class Problem:
    """A folder that was left out, and why."""

    folder: Path
    reason: str


@dataclass(frozen=True, kw_only=True)
class Record:
    """What `summary.json` holds."""

    folder: Path = field(compare=False)
    status: Literal["finished", "diverged"]
    # The cell: the folder's names, with the values that were overridden ("l2bn,eps=0.001").
    dataset: str
    backbone: str
    norm: str
    recipe: str
    seed: int
    label: str  # the data set as tables call it
    baseline: str | None  # the published rows it may be compared with
    precision: str
    # "stock", "plain" or "fused"; with "+compiled" where the model was compiled. Of a run that was resumed with
    # others all of them, in the order of their first use, with THEN between them.
    kernels: str
    hash: str  # of the identity
    identity: dict[str, Any]
    epochs: int
    updates: int
    train_images: int
    test_images: int
    parameters: int
    norm_layers: int
    last: Metrics  # empty where the run diverged in its first epoch
    best: Metrics  # the epoch of the best test/top1: chosen on the test set, so shown and never the result
    seconds: float
    divergence: str | None = None  # where and how, of a diverged run
    images: dict[str, str | None] | None = None  # their fingerprint: `files` and `pixels`; older records have none

    def metrics(self) -> list[Metrics]:
        """All epochs, read from `metrics.jsonl`. Raises InvalidRecordError, also where they end with another one
        than this record."""
        rows = read_metrics(self.folder / METRICS)
        if (rows[-1] if rows else {}) != self.last:
            raise InvalidRecordError(f"{METRICS}: its last line is not the last epoch of {SUMMARY}")
        return rows

    def write(self) -> None:
        """Write `summary.json`: the run has ended."""
        content = {"schema": SCHEMA} | {key: value for key, value in asdict(self).items() if key != "folder"}
        if self.images is None:
            del content["images"]
        write_durably(self.folder / SUMMARY, json.dumps(content, indent=2, allow_nan=False) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The record in a folder. Raises InvalidRecordError where it is missing, corrupt or foreign."""
        path = folder / SUMMARY
        try:
            content = json.loads(path.read_text())
        except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
            raise InvalidRecordError(f"{SUMMARY} cannot be read: {error}") from error
        if not isinstance(content, dict) or content.pop("schema", None) != SCHEMA:
            raise InvalidRecordError(f"{SUMMARY} is not a record of schema {SCHEMA}")
        _check_fields(cls, content)
        record = cls(folder=folder, **content)
        _check_values(record)
        return record


MACHINE_PATHS = frozenset({"root", "devkit", "cache", "runs_dir"})
"""Keys of `config.yaml` that say where things lie on a machine, and nothing of the run."""


def without_machine_paths(node: Any) -> Any:
    """A node of `config.yaml`, and those in it, without what they say of the machine."""
    if not isinstance(node, dict):
        return node
    return {key: without_machine_paths(value) for key, value in node.items() if key not in MACHINE_PATHS}


def read_records(root: Path) -> tuple[list[Record], list[Problem]]:
    """Every ended run under a folder, in the order of their paths, and what had to be left out."""
    records, problems = [], []
    for path in sorted(root.rglob(SUMMARY)):
        try:
            records.append(Record.read(path.parent))
        except InvalidRecordError as error:
            problems.append(Problem(path.parent, str(error)))
    return records, problems


def read_metrics(path: Path) -> list[Metrics]:
    """The lines of a `metrics.jsonl`. Raises InvalidRecordError naming the first bad line."""
    rows = read_lines(path, _bad_metrics)
    for number, row in enumerate(rows, start=1):
        if row["epoch"] != number:
            raise InvalidRecordError(f"{path.name}, line {number}: not the epoch of its line")
    return rows


def read_lines(path: Path, reason: Callable[[object], str | None]) -> list[Any]:
    """The values of a file of JSON lines; `reason` says why a value does not belong there, or None.

    Raises InvalidRecordError naming the first bad line.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRecordError(f"{path.name} cannot be read: {error}") from error
    return [_parse_line(line, f"{path.name}, line {number}", reason) for number, line in enumerate(lines, 1)]


def _parse_line(line: str, place: str, reason: Callable[[object], str | None]) -> Any:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidRecordError(f"{place} is not JSON: {error}") from error
    if found := reason(value):
        raise InvalidRecordError(f"{place}: {found}")
    return value


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace a file of JSON lines, in one step."""
    write_durably(path, "".join(map(as_line, rows)))


def as_line(row: Mapping[str, Any]) -> str:
    """A row as it stands in a file of JSON lines. Raises ValueError for a number that is not finite."""
    return json.dumps(row, allow_nan=False) + "\n"


def _bad_metrics(row: object) -> str | None:
    """Why a row is not a row of metrics, or None."""
    if not isinstance(row, dict):
        return "not an object"
    if row.keys() != METRIC_KEYS:
        return f"missing {sorted(METRIC_KEYS - row.keys())}, unknown {sorted(row.keys() - METRIC_KEYS)}"
    bad = [key for key, value in row.items() if not (value is None or is_finite_number(value))]
    return f"not finite numbers: {bad}" if bad else None


def is_finite_number(value: object) -> bool:
    """Whether a value is a number that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


_JSON_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "seed": int,
    "epochs": int,
    "updates": int,
    "train_images": int,
    "test_images": int,
    "parameters": int,
    "norm_layers": int,
    "seconds": (int, float),
    "identity": dict,
    "last": dict,
    "best": dict,
    "baseline": (str, type(None)),
    "divergence": (str, type(None)),
    "images": dict,
}


def _check_fields(cls: type, content: dict[str, Any]) -> None:
    names = {item.name for item in fields(cls)} - {"folder"}
    if content.keys() | {"images"} != names:
        missing, unknown = sorted(names - content.keys()), sorted(content.keys() - names)
        raise InvalidRecordError(f"{SUMMARY}: missing {missing}, unknown {unknown}")
    for key, value in content.items():
        expected = _JSON_TYPES.get(key, str)
        if not isinstance(value, expected) or (isinstance(value, int | float) and not is_finite_number(value)):
            raise InvalidRecordError(f"{SUMMARY}: {key} is {value!r}")


def is_plain_name(name: object) -> bool:
    """Whether a name can be that of a folder and of no other place than in its own."""
    if not isinstance(name, str) or not name.isprintable() or "/" in name or name in ("", ".", ".."):
        return False
    return len(name.encode()) <= 255  # bytes that file systems take


def _check_values(record: Record) -> None:
    images = record.images
    if images is not None and not (
        images.keys() == {"files", "pixels"}
        and isinstance(images["files"], str)
        and isinstance(images["pixels"], str | None)
    ):
        raise InvalidRecordError(f"{SUMMARY}: images is {images!r}, no fingerprint")
    for group in ("dataset", "backbone", "norm", "recipe"):
        if not is_plain_name(getattr(record, group)):
            raise InvalidRecordError(f"{SUMMARY}: {group} is {getattr(record, group)!r}, which is no plain name")
    if record.status not in ("finished", "diverged"):
        raise InvalidRecordError(f"{SUMMARY}: status is {record.status!r}, not finished or diverged")
    for name, row in (("last", record.last), ("best", record.best)):
        reason = _bad_metrics(row) if row or record.status == "finished" else None
        accuracy = row.get("test/top1")
        if not reason and row and (accuracy is None or not 0 <= accuracy <= 100):
            reason = f"a test/top1 of {accuracy}, which is no percentage"
        if reason:
            raise InvalidRecordError(f"{SUMMARY}: {name}: {reason}")
    if record.status == "finished" and record.last["epoch"] != record.epochs:
        raise InvalidRecordError(f"{SUMMARY}: finished, but its last epoch is not epoch {record.epochs}")
