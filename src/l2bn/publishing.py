"""Publishing a run: its record, without the checkpoints and without the paths of the machine."""

import json
from collections.abc import Iterable
from pathlib import Path

import yaml

from l2bn import measurements
from l2bn.durable import write_durably
from l2bn.records import (
    CONFIG,
    ENVIRONMENT,
    METRICS,
    SUMMARY,
    InvalidRecordError,
    Record,
    read_records,
    without_machine_paths,
)


def publish(folder: Path, destination: Path) -> Path:
    """Copy the record of an ended run to its cell under `destination`; returns the new folder.

    Checkpoints and TensorBoard's files stay behind, and so do the paths of this machine in `config.yaml`.
    Raises InvalidRecordError if the run has not ended or is damaged, FileExistsError if another result of the
    same cell and seed is there already, InvalidRecordError if runs on other images of this data set are.
    """
    record = Record.read(folder)
    record.metrics()
    files = _read(folder, measurements.check(folder))
    _check_images(record, destination)
    target = destination / record.dataset / record.backbone / record.norm / record.recipe / f"seed{record.seed}"
    if (target / SUMMARY).exists() and Record.read(target) != record:
        raise FileExistsError(f"{target} holds another result of this cell and seed; move it away to replace it")
    target.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_durably(target / name, content)
    return target


def _check_images(record: Record, destination: Path) -> None:
    """Raise InvalidRecordError if a published run of the same data set was trained on other images."""
    others = read_records(destination / record.dataset)[0] if record.images else []
    for other in others:
        if other.images and record.images and other.images["files"] != record.images["files"]:
            raise InvalidRecordError(
                f"it was trained on other images than {other.folder}; train both on the same, or name these by "
                "dataset.label=NAME"
            )


def _read(folder: Path, measured: Iterable[str]) -> dict[str, bytes]:
    """The files of a record, the summary last, without the machine's paths. Raises InvalidRecordError."""
    try:
        config = yaml.safe_load((folder / CONFIG).read_text())
        files = {name: (folder / name).read_bytes() for name in (ENVIRONMENT, METRICS, *measured, SUMMARY)}
        environment = json.loads(files[ENVIRONMENT])
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InvalidRecordError(f"cannot be read: {error}") from error
    for name, content in ((CONFIG, config), (ENVIRONMENT, environment)):
        if not isinstance(content, dict):
            raise InvalidRecordError(f"{name} is not that of a run")
    return {CONFIG: yaml.safe_dump(without_machine_paths(config), sort_keys=False).encode(), **files}
