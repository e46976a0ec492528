"""Publication: copies of the records of ended runs, from which tables, figures and claims are made."""

import json
from pathlib import Path

import yaml

from l2bn.records import (
    CONFIG,
    ENVIRONMENT,
    FEATURES,
    METRICS,
    SAMPLE,
    STATISTICS,
    SUMMARY,
    InvalidRecordError,
    Record,
    read_features,
    read_records,
    read_sample,
    read_statistics,
    same_images,
    without_machine_paths,
    write_durably,
)


def publish(folder: Path, destination: Path) -> Path:
    """Copy the record of an ended run to its cell under `destination`; returns the new folder.

    Checkpoints and TensorBoard's files stay behind, and so do the paths of this machine in `config.yaml`.
    Raises InvalidRecordError if the run has not ended or is damaged, or if published runs of the same data set saw
    other images; FileExistsError if another result of the same cell and seed is published, or a damaged one.
    """
    record = Record.read(folder)
    record.metrics()
    for read in (read_features, read_statistics, read_sample):
        read(folder)
    files = _publishable(folder)
    for other in read_records(destination / record.dataset)[0]:
        if other.images and record.images and not same_images(other.images, record.images):
            raise InvalidRecordError(
                f"it was trained on other images than {other.folder}; train both on the same, or name these by "
                "dataset.label=NAME"
            )
    target = destination / record.dataset / record.backbone / record.norm / record.recipe / f"seed{record.seed}"
    if (target / SUMMARY).exists():
        try:
            published = Record.read(target)
        except InvalidRecordError as error:
            raise FileExistsError(
                f"{target} holds a damaged record ({error}); move it away to replace it"
            ) from error
        if published.setting != record.setting:
            raise FileExistsError(
                f"{target} holds a run in the setting {published.setting}, this one was made in {record.setting}; "
                f"publish it to a folder of its own, such as {destination / 'NAME'}: tables hold both"
            )
        if published != record:
            held = "this result already, of another run" if published.result == record.result else "another result"
            raise FileExistsError(f"{target} holds {held} of this cell and seed; move it away to replace it")
    target.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_durably(target / name, content)
    return target


def _publishable(folder: Path) -> dict[str, bytes]:
    """The files of a record, the summary last, without the machine's paths. Raises InvalidRecordError."""
    measured = [name for name in (FEATURES, STATISTICS, SAMPLE) if (folder / name).exists()]
    try:
        config = yaml.safe_load((folder / CONFIG).read_bytes())
        files = {name: (folder / name).read_bytes() for name in (ENVIRONMENT, METRICS, *measured, SUMMARY)}
        environment = json.loads(files[ENVIRONMENT])
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InvalidRecordError(f"cannot be read: {error}") from error
    for name, content in ((CONFIG, config), (ENVIRONMENT, environment)):
        if not isinstance(content, dict):
            raise InvalidRecordError(f"{name} is not that of a run")
    return {CONFIG: yaml.safe_dump(without_machine_paths(config), sort_keys=False).encode(), **files}
