"""The files of measurements: read back as they were written, bad ones named, later ones forgotten on a resume."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from l2bn.publication import publish
from l2bn.records import (
    FEATURES,
    MEASURES,
    SAMPLE,
    STATISTICS,
    InvalidRecordError,
    Sample,
    read_features,
    read_sample,
    read_statistics,
    truncate_measurements,
    write_lines,
    write_sample,
)
from test_records import written


def features_row(epoch: int, **changes: Any) -> dict[str, Any]:
    measures = dict.fromkeys(MEASURES, 0.5)
    norms = {"first": -3, "counts": [1, 0, 9]}
    layer = {"name": "bn1", "shrink": 0.9, "norms": norms, "input": measures, "output": {**measures, "nc1": None}}
    row = {"epoch": epoch, "step": 10 * epoch, "images": 10, "layers": [layer], "penultimate": measures}
    return {**row, **changes}


def statistics_row(step: int, **changes: Any) -> dict[str, Any]:
    row = {"step": step, "running/loss": None, "running/top1": 10.0, "batch/loss": 0.5, "batch/top1": 90.0}
    return {**row, **changes}


SAMPLED = Sample(np.array([[1.5, -2.0], [1e6, 0.25]], dtype=np.float32), np.array([3, 0]))


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    assert read_features(tmp_path) == read_statistics(tmp_path) == []
    assert read_sample(tmp_path) is None
    write_lines(tmp_path / FEATURES, [features_row(1), features_row(3)])
    write_lines(tmp_path / STATISTICS, [statistics_row(10)])
    write_sample(tmp_path, SAMPLED)
    assert read_features(tmp_path) == [features_row(1), features_row(3)]
    assert read_statistics(tmp_path) == [statistics_row(10)]
    sample = read_sample(tmp_path)
    assert sample is not None
    assert sample.features.tolist() == [[1.5, -2.0], [65504, 0.25]]  # the largest half
    assert sample.labels.tolist() == [3, 0]


def changed(*path: Any, to: Any) -> dict[str, Any]:
    row = json.loads(json.dumps(features_row(2)))
    node = row
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = to
    return row


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([], "valid dictionary"),
        ({"epoch": 2}, "step is missing"),
        (features_row(2, step=0), "step: must be greater than or equal to 1"),
        (changed("epoch", to="two"), "epoch: must be a valid integer"),
        (features_row(2, layers="bn1"), "layers: must be a valid list"),
        (changed("layers", 0, "shrink", to="little"), "layers.0.shrink"),
        (changed("layers", 0, "norms", "counts", to=[-1]), "layers.0.norms.counts.0"),
        (changed("layers", 0, "output", "nc1", to="small"), "layers.0.output.nc1"),
        (changed("penultimate", to={}), "penultimate.norm_mean is missing"),
        (features_row(1), "not after the step"),
    ],
)
def test_a_bad_line_of_features_is_named(row: Any, reason: str, tmp_path: Path) -> None:
    write_lines(tmp_path / FEATURES, [features_row(1), row])
    with pytest.raises(InvalidRecordError, match=rf"features.jsonl, line 2.*{reason}"):
        read_features(tmp_path)


@pytest.mark.parametrize(
    "row", [{}, statistics_row(20) | {"step": None}, statistics_row(20, **{"batch/top1": "high"})]
)
def test_a_bad_line_of_statistics_is_named(row: Any, tmp_path: Path) -> None:
    write_lines(tmp_path / STATISTICS, [statistics_row(10), row])
    with pytest.raises(InvalidRecordError, match=r"statistics.jsonl, line 2"):
        read_statistics(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not safetensors", None], ids=["empty", "foreign", "other tensors"])
def test_a_bad_sample_is_named(content: bytes | None, tmp_path: Path) -> None:
    write_sample(tmp_path, Sample(SAMPLED.features, SAMPLED.labels[:1]))
    if content is not None:
        (tmp_path / SAMPLE).write_bytes(content)
    with pytest.raises(InvalidRecordError, match=r"penultimate\.safetensors"):
        read_sample(tmp_path)


def test_what_was_measured_later_is_forgotten_and_a_line_that_was_cut_off(tmp_path: Path) -> None:
    write_lines(tmp_path / FEATURES, [features_row(1), features_row(2), features_row(3)])
    write_lines(tmp_path / STATISTICS, [statistics_row(10), statistics_row(20)])
    with (tmp_path / STATISTICS).open("a") as file:
        file.write('{"step": 25, "runn')
    write_sample(tmp_path, SAMPLED)
    kept = [features_row(1), features_row(2)], [statistics_row(10), statistics_row(20)]
    assert truncate_measurements(tmp_path, step=20) == kept
    assert read_features(tmp_path) == [features_row(1), features_row(2)]
    assert read_statistics(tmp_path) == [statistics_row(10), statistics_row(20)]
    assert not (tmp_path / SAMPLE).exists()


def test_features_of_an_epoch_whose_evaluation_is_still_to_be_made_are_forgotten(tmp_path: Path) -> None:
    """A run that was left at the last update of its second epoch stands at that update, with one epoch done."""
    write_lines(tmp_path / FEATURES, [features_row(1), features_row(2)])
    write_lines(tmp_path / STATISTICS, [statistics_row(20)])
    assert truncate_measurements(tmp_path, step=20, epochs=1) == ([features_row(1)], [statistics_row(20)])


def test_measurements_are_published_and_damaged_ones_are_not(tmp_path: Path) -> None:
    record = written(tmp_path / "run")
    write_lines(record.folder / FEATURES, [features_row(1)])
    write_sample(record.folder, SAMPLED)
    folder = publish(record.folder, tmp_path / "records")
    assert read_features(folder) == [features_row(1)]
    assert (folder / SAMPLE).read_bytes() == (record.folder / SAMPLE).read_bytes()
    (record.folder / FEATURES).write_text('{"epoch": 1')
    with pytest.raises(InvalidRecordError, match=r"features\.jsonl, line 1"):
        publish(record.folder, tmp_path / "others")
    assert not (tmp_path / "others").exists()
