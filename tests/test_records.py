"""Records: written whole, read back equal, and a mangled one named and left out."""

import contextlib
import errno
import itertools
import json
import math
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import ROOT
from l2bn.publication import publish
from l2bn.records import (
    CONFIG,
    ENVIRONMENT,
    FEATURES,
    METRIC_KEYS,
    METRICS,
    STATISTICS,
    SUMMARY,
    InvalidRecordError,
    Problem,
    Record,
    load,
    read_features,
    read_metrics,
    read_records,
    read_statistics,
    write_durably,
    write_lines,
)

FILES = (CONFIG, ENVIRONMENT, METRICS, SUMMARY)
EPOCHS = 3
HUGE = 10**400  # JSON has it, no float can hold it


def row(epoch: int) -> dict[str, float | None]:
    return {
        "epoch": epoch,
        "step": 10 * epoch,
        "lr": 0.1,
        "train/loss": 1 / epoch,
        "train/top1": 50.0 + epoch,
        "test/loss": 1.1 / epoch,
        "test/top1": 48.0 + epoch,
        "test/top5": None,
        "seconds": 1.5,
        "images_per_second": 100.0,
        "peak_memory_bytes": 1000,
    }


def written(folder: Path, **changes: object) -> Record:
    """A finished run's record, as the run writes it."""
    folder.mkdir(parents=True)
    rows = [row(epoch) for epoch in range(1, EPOCHS + 1)]
    (folder / "config.yaml").write_text("dataset: {label: Digits, root: /home/me/data}\nruns_dir: /home/me/runs\n")
    (folder / "env.json").write_text('{"starts": []}\n')
    write_lines(folder / METRICS, rows)
    content: dict[str, object] = {
        "status": "finished",
        "dataset": "digits",
        "backbone": "resnet20",
        "norm": "bn",
        "recipe": "short",
        "seed": 0,
        "label": "Digits",
        "baseline": None,
        "precision": "32-true",
        "kernels": "stock",
        "hash": "0123456789abcdef",
        "identity": {"seed": 0},
        "epochs": EPOCHS,
        "updates": 10 * EPOCHS,
        "train_images": 100,
        "test_images": 50,
        "parameters": 10,
        "norm_layers": 1,
        "last": rows[-1],
        "best": rows[-1],
        "seconds": 4.5,
    }
    record = Record(folder=folder, **{**content, **changes})  # type: ignore[arg-type]
    record.write()
    return record


def test_a_record_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    record = written(tmp_path / "run")
    assert Record.read(tmp_path / "run") == record
    assert read_records(tmp_path) == ([record], [])
    assert record.metrics() == [row(1), row(2), row(3)]


def test_published_records_are_written_back_byte_for_byte(tmp_path: Path) -> None:
    folders = [path.parent for path in (ROOT / "results").rglob(SUMMARY)]
    assert len(folders) > 100
    readers = {METRICS: lambda folder: read_metrics(folder / METRICS)}
    readers |= {FEATURES: read_features, STATISTICS: read_statistics}
    for number, folder in enumerate(folders):
        copy = tmp_path / str(number)
        shutil.copytree(folder, copy)
        record = Record.read(copy)
        assert record.metrics()[-1:] == [record.last] * bool(record.last)
        record.write()
        for name, read in readers.items():
            if (copy / name).exists():
                write_lines(copy / name, read(copy))
        for path in copy.iterdir():
            assert path.read_bytes() == (folder / path.name).read_bytes(), path.name


def test_records_load_as_a_data_frame(tmp_path: Path) -> None:
    for norm, seed in itertools.product(("bn", "l2bn"), range(3)):
        written(tmp_path / norm / str(seed), norm=norm, seed=seed)
    written(tmp_path / "diverged", norm="none", status="diverged", last={}, best={}, divergence="epoch 1, step 3")
    (tmp_path / "diverged" / METRICS).write_text("")
    runs, epochs = load(tmp_path), load(tmp_path, epochs=True)
    assert len(runs) == 7
    assert len(epochs) == 6 * EPOCHS
    top1 = runs.pivot_table(index="seed", columns="norm", values="test/top1")
    assert top1.to_numpy().tolist() == [[51.0, 51.0]] * 3
    assert runs.set_index("norm")["test/top1"].isna().to_dict() == {"bn": False, "l2bn": False, "none": True}
    assert epochs.groupby(["norm", "seed"])["test/top1"].last().eq(51.0).all()
    assert set(runs["seconds"]) == {4.5}
    assert set(runs["setting"]) == set(epochs["setting"]) == {"32-true"}
    (tmp_path / "bn/0" / SUMMARY).write_text("{}")
    with pytest.warns(UserWarning, match=r"bn/0 is left out: .*schema"):
        assert len(load(tmp_path)) == 6
    (tmp_path / "bn/1" / METRICS).write_text("{")
    with pytest.warns(UserWarning, match=r"bn/[01] is left out: ") as warned:
        assert len(load(tmp_path, epochs=True)) == 4 * EPOCHS
    assert any("bn/1 is left out: metrics.jsonl, line 1" in str(warning.message) for warning in warned)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(tmp_path / "nowhere")


def test_two_runs_of_one_cell_and_seed_are_loaded_with_a_warning(tmp_path: Path) -> None:
    """A mean over them would be the result of no run."""
    for name in ("a", "b"):
        written(tmp_path / name, norm="bn", seed=0)
    with pytest.warns(UserWarning, match=r"a and .*b are runs of one cell, norm and seed"):
        assert len(load(tmp_path)) == 2


def test_a_run_that_diverged_late_has_epochs_and_no_result(tmp_path: Path) -> None:
    written(tmp_path / "run", status="diverged", divergence="epoch 4, step 3", epochs=5)
    results = [name for name in METRIC_KEYS if "/" in name] + ["best/top1"]
    assert load(tmp_path)[results].isna().to_numpy().all()
    assert load(tmp_path, epochs=True)["test/top1"].tolist() == [49.0, 50.0, 51.0]


@pytest.mark.parametrize(
    ("identity", "setting"),
    [
        ({"devices": 1, "sync_bn": False}, "bf16-mixed"),
        ({"devices": 8, "sync_bn": False}, "bf16-mixed, 8 devices"),
        ({"devices": 8, "sync_bn": True}, "bf16-mixed, 8 devices, synchronised"),
    ],
    ids=str,
)
def test_the_setting_names_precision_and_what_is_not_the_default(
    identity: dict[str, object], setting: str, tmp_path: Path
) -> None:
    written(tmp_path / "run", precision="bf16-mixed", identity=identity)
    assert load(tmp_path)["setting"].tolist() == [setting]


def test_a_run_that_has_not_ended_is_no_record_and_no_problem(tmp_path: Path) -> None:
    written(tmp_path / "run")
    (tmp_path / "run" / SUMMARY).unlink()
    assert read_records(tmp_path) == ([], [])
    with pytest.warns(UserWarning, match=rf"no run under {tmp_path} has ended"):
        assert load(tmp_path).empty


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of another user, or of a server that does not answer: its runs would be missing from a table unnoticed."""
    record = written(tmp_path / "a")
    written(tmp_path / "b", seed=1)
    scandir = os.scandir

    def failing(folder: Any) -> Any:
        if Path(folder) == tmp_path / "b":
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", failing)
    problem = Problem(tmp_path / "b", "the folder cannot be read: Permission denied")
    assert read_records(tmp_path) == ([record], [problem])


@pytest.mark.parametrize(("code", "fails"), [(errno.EINVAL, False), (errno.EBADF, False), (errno.EIO, True)])
def test_a_file_system_that_cannot_flush_folders_takes_files(
    code: int, fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match=os.strerror(code)) if fails else contextlib.nullcontext():
        write_durably(tmp_path / "file", "content")
    assert (tmp_path / "file").read_text() == "content"


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("status", "done", "status"),
        ("seed", "0", "seed"),
        ("epochs", 4, "last epoch is not epoch 4"),
        ("last", {}, "its last epoch is not epoch 3"),
        ("best", {}, "last and best must both hold an epoch"),
        ("last", {"epoch": 3}, "last.step is missing"),
        ("last", {**row(3), "loss": 1.0}, "loss"),
        ("last", {**row(3), "test/top1": "high"}, "last.test/top1"),
        ("last", {**row(3), "test/top1": 101.0}, "no percentage"),
        ("last", {**row(3), "test/top1": None}, "no percentage"),
        ("best", {**row(3), "test/top1": 101.0}, "no percentage"),
        ("seconds", True, "seconds"),
        ("seconds", math.nan, "seconds"),
        ("seconds", HUGE, "seconds"),
        ("parameters", HUGE, "parameters"),
        ("last", {**row(3), "train/loss": HUGE}, "last.train/loss"),
        ("label", None, "label"),
        ("schema", 99, "schema"),
        ("norm", "../bn", "norm: must be a plain name, not '../bn'"),
        ("comment", "hello", "comment"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_wrong_value_is_named(key: str, value: object, reason: str, tmp_path: Path) -> None:
    written(tmp_path / "run")
    path = tmp_path / "run" / SUMMARY
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    records, (problem,) = read_records(tmp_path)
    assert records == []
    assert problem.folder == tmp_path / "run"
    assert reason in problem.reason


def mangled(data: st.DataObject, content: bytes) -> bytes:
    """The content cut short, with another byte, bytes, digit or a huge number in it, or something else instead."""
    place = data.draw(st.integers(0, len(content) - 1))
    match data.draw(st.sampled_from(["cut", "flip", "replace", "digit", "huge", "garbage"])):
        case "cut":
            return content[:place]
        case "flip":
            return content[:place] + bytes([content[place] ^ data.draw(st.integers(1, 255))]) + content[place + 1 :]
        case "replace":
            return content[:place] + data.draw(st.binary(min_size=1, max_size=16)) + content[place + 8 :]
        case "digit":
            digit = str(data.draw(st.integers(0, 9))).encode()
            return content[:place] + re.sub(rb"\d", digit, content[place:], count=1)
        case "huge":
            return content[:place] + re.sub(rb"\d+", str(HUGE).encode(), content[place:], count=1)
        case _:
            return data.draw(st.binary(max_size=200))


def mangle(accepted: Callable[[st.DataObject], bool]) -> None:
    """Try 200 examples, of which some are accepted and some are not."""
    outcomes = set()

    @settings(max_examples=200)
    @given(data=st.data())
    def each(data: st.DataObject) -> None:
        outcomes.add(accepted(data))

    each()
    assert outcomes == {True, False}


def written_mangled(data: st.DataObject, tmp_path: Path, name: str) -> Record:
    """A record of which one file is mangled."""
    record = written(Path(tempfile.mkdtemp(dir=tmp_path)) / "run")
    path = record.folder / name
    path.write_bytes(mangled(data, path.read_bytes()))
    return record


def test_a_mangled_record_is_left_out_or_read_as_it_was(tmp_path: Path) -> None:
    """But for one field: a changed digit or letter within a value cannot be told from the truth."""

    def accepted(data: st.DataObject) -> bool:
        record = written_mangled(data, tmp_path, SUMMARY)
        records, problems = read_records(record.folder)
        assert len(records) + len(problems) == 1
        for problem in problems:
            assert problem.folder == record.folder
            assert problem.reason
        for found in records:
            assert sum(value != vars(record)[field] for field, value in vars(found).items()) <= 1
        return bool(records)

    mangle(accepted)


def test_mangled_metrics_are_named_or_read_as_whole_epochs(tmp_path: Path) -> None:
    """The rows are every epoch, the last one as the summary has it, and no more than one number has changed."""

    def accepted(data: st.DataObject) -> bool:
        record = written_mangled(data, tmp_path, METRICS)
        try:
            rows = record.metrics()
        except InvalidRecordError:
            return False
        assert [row["epoch"] for row in rows] == list(range(1, EPOCHS + 1))
        assert rows[-1] == record.last
        pairs = zip(rows, map(row, range(1, EPOCHS + 1)), strict=True)
        assert sum(found[key] != value for found, original in pairs for key, value in original.items()) <= 1
        return True

    mangle(accepted)


def test_a_mangled_record_is_published_whole_or_not_at_all(tmp_path: Path) -> None:
    def accepted(data: st.DataObject) -> bool:
        place = Path(tempfile.mkdtemp(dir=tmp_path))
        path = written(place / "run").folder / data.draw(st.sampled_from(FILES))
        path.write_bytes(mangled(data, path.read_bytes()))
        try:
            published = publish(place / "run", place / "records")
        except InvalidRecordError:
            assert not (place / "records").exists()
            return False
        assert {file.name for file in published.iterdir()} == set(FILES)
        assert isinstance(json.loads((published / "env.json").read_text()), dict)
        assert Record.read(published).metrics()
        return True

    mangle(accepted)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        "[]",
        '{"epoch": 3}',
        json.dumps({**row(3), "epoch": 7}),
        json.dumps(row(3)).replace("0.1", "NaN", 1),
    ],
)
def test_a_bad_line_of_metrics_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / METRICS
    write_lines(path, [row(1), row(2)])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(InvalidRecordError, match=r"metrics.jsonl, line 3"):
        read_metrics(path)


def test_publishing_leaves_the_machine_behind(tmp_path: Path) -> None:
    record = written(tmp_path / "run")
    (tmp_path / "run" / "checkpoints").mkdir()
    folder = publish(tmp_path / "run", tmp_path / "records")
    assert folder == tmp_path / "records/digits/resnet20/bn/short/seed0"
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "env.json", METRICS, SUMMARY}
    assert Record.read(folder) == record
    assert "/home/me" not in (folder / "config.yaml").read_text()
    assert publish(tmp_path / "run", tmp_path / "records") == folder


def test_publishing_does_not_replace_another_result(tmp_path: Path) -> None:
    publish(written(tmp_path / "one").folder, tmp_path / "records")
    with pytest.raises(FileExistsError, match="this result already, of another run"):
        publish(written(tmp_path / "other", seconds=9.0).folder, tmp_path / "records")
    with pytest.raises(FileExistsError, match="another result"):
        publish(written(tmp_path / "third", best=row(1)).folder, tmp_path / "records")


def test_a_run_in_another_setting_has_its_place_beside_the_published_one(tmp_path: Path) -> None:
    """The folder's names hold no setting: who moved the other away would lose it."""
    other = written(tmp_path / "other", precision="bf16-mixed")
    publish(written(tmp_path / "one").folder, tmp_path / "records")
    with pytest.raises(FileExistsError, match=rf"setting 32-true, .* in bf16-mixed; .*{tmp_path}/records/NAME"):
        publish(other.folder, tmp_path / "records")
    publish(other.folder, tmp_path / "records/bf16")
    assert sorted(load(tmp_path / "records")["setting"]) == ["32-true", "bf16-mixed"]


def test_records_behind_links_to_folders_are_found_once(tmp_path: Path) -> None:
    record = written(tmp_path / "elsewhere" / "run")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/loop").symlink_to(tmp_path / "elsewhere")
    assert [found.folder for found in read_records(tmp_path / "runs")[0]] == [tmp_path / "runs/linked/run"]
    assert read_records(tmp_path / "runs")[0][0] == replace(record, folder=tmp_path / "runs/linked/run")


def test_publishing_names_a_damaged_record_in_its_place(tmp_path: Path) -> None:
    folder = publish(written(tmp_path / "one").folder, tmp_path / "records")
    (folder / SUMMARY).write_text("{")
    with pytest.raises(FileExistsError, match=rf"{folder} holds a damaged record \({SUMMARY}.*move it away"):
        publish(tmp_path / "one", tmp_path / "records")


def test_publishing_needs_an_ended_run(tmp_path: Path) -> None:
    written(tmp_path / "run")
    (tmp_path / "run" / SUMMARY).unlink()
    with pytest.raises(InvalidRecordError, match=r"summary\.json"):
        publish(tmp_path / "run", tmp_path / "records")
    assert not (tmp_path / "records").exists()
