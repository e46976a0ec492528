"""Evaluating and replaying a run or a record, which may come from anybody."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml

from conftest import ROOT, TINY, Issue, Train, results, same, train_in
from l2bn.errors import UserError
from l2bn.publication import publish
from l2bn.records import CONFIG, ENVIRONMENT, SUMMARY, read_records
from l2bn.training.existing import _threads, analyze, evaluate_run, replay
from l2bn.training.plan import read_config
from official_formats import write

Change = Callable[[dict[str, Any]], Any]

ONE = ("recipe.epochs=1", *TINY)


@pytest.fixture
def record(trained: Train, tmp_path: Path) -> Path:
    return publish(trained(*ONE).folder, tmp_path / "records")


def test_a_run_is_evaluated_to_the_same_numbers(trained: Train) -> None:
    record = trained(*ONE)
    loss, top1, top5 = evaluate_run(record.folder)
    assert (loss, top1, top5) == (record.last["test/loss"], record.last["test/top1"], record.last["test/top5"])


def test_a_network_without_a_classifier_is_evaluated_and_not_measured(copied: Train) -> None:
    run = copied(*ONE).folder
    with (
        mock.patch("l2bn.analysis.probe.classifier", side_effect=ValueError("it has no linear layer")),
        pytest.raises(UserError, match="analysis: it has no linear layer; leave its features unmeasured"),
    ):
        analyze(run)


def test_what_another_machine_had_more_of_is_not_replayed(copied: Train, tmp_path: Path) -> None:
    record = copied(*ONE).folder
    config = record / "config.yaml"
    text = config.read_text().replace("compile: auto", "compile: graphs")
    config.write_text(text.replace("threads: null", "threads: 1"))
    assert _threads(read_config(record)) == 1
    with mock.patch("l2bn.training.existing.available_cores", return_value=0):
        assert _threads(read_config(record)) is None
    again = replay(record, str(tmp_path / "again")).folder / "config.yaml"
    assert yaml.safe_load(again.read_text())["compute"] == {
        **yaml.safe_load(config.read_text())["compute"],
        "compile": "graphs" if torch.cuda.is_available() else "auto",
        "threads": 1,
    }


def test_a_run_of_a_gpu_is_evaluated_on_a_cpu_and_not_repeated_there(copied: Train, tmp_path: Path) -> None:
    record = copied(*ONE)
    path = record.folder / CONFIG
    path.write_text(path.read_text().replace("32-true", "tf32-mixed").replace("device: auto", "device: cuda"))
    assert evaluate_run(record.folder, device="cpu")[1] == record.last["test/top1"]
    with (
        mock.patch("torch.cuda.is_available", return_value=False),
        pytest.raises(UserError, match="trained in tf32-mixed, which only a GPU computes"),
    ):
        replay(record.folder, str(tmp_path / "again"))


def test_weights_that_are_no_result_are_evaluated_with_a_warning(
    copied: Train, caplog: pytest.LogCaptureFixture
) -> None:
    record = copied(*ONE)
    evaluate_run(record.folder)
    assert "no result" not in caplog.text
    summary = record.folder / SUMMARY
    ended = json.loads(summary.read_text())
    summary.write_text(json.dumps(ended | {"status": "diverged", "divergence": "epoch 2, step 1"}))
    evaluate_run(record.folder)
    assert "diverged (epoch 2, step 1): its last weights, those after 1 of 1 epochs, are no result" in caplog.text
    summary.unlink()
    evaluate_run(record.folder)
    assert "has not ended: its last weights, those after 1 of 1 epochs, are no result" in caplog.text


def test_weights_of_an_earlier_epoch_are_no_result(train: Train, caplog: pytest.LogCaptureFixture) -> None:
    record = train("recipe.epochs=2", "checkpoint.every_steps=4", *TINY)
    max((record.folder / "checkpoints").iterdir()).unlink()
    evaluate_run(record.folder)
    assert "lacks the checkpoint at its end: its last weights, those after 1 of 2 epochs and 4 steps" in caplog.text


@pytest.mark.parametrize("again", ["evaluate", "analyze", "replay"])
def test_other_code_of_the_users_own_is_a_warning(
    again: str, copied: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = copied(*ONE)
    environment = record.folder / ENVIRONMENT
    found = json.loads(environment.read_text())
    found["starts"][-1]["own_source"] = "another"
    environment.write_text(json.dumps(found))
    calls: dict[str, Callable[[], Any]] = {
        "evaluate": lambda: evaluate_run(record.folder),
        "analyze": lambda: analyze(record.folder),
        "replay": lambda: replay(record.folder, str(tmp_path / "replayed")),
    }
    calls[again]()
    assert "was trained with other code of yours" in caplog.text


def test_a_published_record_is_replayed_to_the_same_numbers_once(
    trained: Train, record: Path, tmp_path: Path, issue: Issue
) -> None:
    run = trained(*ONE)
    for said in ("finished, test accuracy", "ended before: "):
        assert said in issue("replay", record, "--runs-dir", tmp_path / "replayed").err
    ((again,), _) = read_records(tmp_path / "replayed")
    same(again, run)
    assert again.hash == run.hash


def test_the_paths_of_a_replay_are_those_of_the_composed_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of the user's own may inherit from another, and take a path from the environment."""
    overrides = write("image_folder", tmp_path / "images" / "mine")
    own = tmp_path / "own"
    (own / "dataset").mkdir(parents=True)
    (own / "dataset" / "mine.yaml").write_text(
        "# Mine.\ndefaults: [image_folder, _self_]\nroot: ${oc.env:IMAGES}/mine\n"
    )
    monkeypatch.setenv("IMAGES", str(tmp_path / "images"))
    options = ["dataset=mine", *(text for text in overrides if "root" not in text), "recipe.epochs=1"]
    run = train_in(tmp_path / "runs", *options, "recipe.batch_size=8", "progress=false", folders=[own])
    record = publish(run.folder, tmp_path / "records")
    assert results(replay(record, str(tmp_path / "again"), config_dirs=[own])) == results(run)
    monkeypatch.setenv("IMAGES", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"nowhere.*by --root FOLDER"):
        replay(record, str(tmp_path / "third"), config_dirs=[own])
    with pytest.raises(UserError, match=r"nowhere.*by --root FOLDER"):
        evaluate_run(run.folder, root=str(tmp_path / "nowhere"), config_dirs=[own])
    monkeypatch.setenv("IMAGES", str(tmp_path / "images"))
    text = (own / "dataset" / "mine.yaml").read_text()
    (own / "dataset" / "mine.yaml").write_text(text.partition("root")[0])
    with pytest.raises(UserError, match=r"dataset\.root has no value; give --root"):
        replay(record, str(tmp_path / "third"), config_dirs=[own])
    (own / "dataset" / "mine.yaml").write_text(text)
    monkeypatch.delenv("IMAGES")
    with pytest.raises(UserError, match=r"dataset\.root: .*'IMAGES' not found\"; give --root"):
        replay(record, str(tmp_path / "third"), config_dirs=[own])


def test_a_path_in_a_record_is_taken_where_the_users_own_file_has_it_too(tmp_path: Path) -> None:
    overrides = write("image_folder", tmp_path / "images")
    own = tmp_path / "own"
    (own / "dataset").mkdir(parents=True)
    text = f"# Mine.\ndefaults: [image_folder, _self_]\ntrain: {tmp_path}/images/train\n"
    (own / "dataset" / "mine.yaml").write_text(text)
    options = ["dataset=mine", *overrides, "recipe.epochs=1", "recipe.batch_size=8", "progress=false"]
    run = train_in(tmp_path / "runs", *options, folders=[own])
    record = publish(run.folder, tmp_path / "records")
    root = str(tmp_path / "images")
    assert results(replay(record, str(tmp_path / "again"), root, config_dirs=[own])) == results(run)
    (own / "dataset" / "mine.yaml").write_text(text.replace("images/train", "images/test"))
    with pytest.raises(UserError, match=r"dataset\.train is '.*must also stand in the YAML file of the data set"):
        replay(record, str(tmp_path / "third"), root, config_dirs=[own])


def on(name: str, **values: object) -> Change:
    """As if a run on this data set had been recorded with these values."""

    def change(config: dict[str, Any]) -> None:
        node = yaml.safe_load((ROOT / f"configs/dataset/{name}.yaml").read_text())
        node.pop("defaults", None)
        config["dataset"] = {**node, "label": "x", **values}
        config["cell"]["dataset"] = name

    return change


# What stands in a place is built before it is known to be of the wrong kind: it may not be a data set.
DOWNLOAD = {"_target_": "l2bn.data.cifar.cifar10", "root": "elsewhere", "download": True, "label": "x"}
NOT_HERE = "cifar10, which is at this place in no YAML file of configs"
MALICE: dict[str, tuple[Change, str]] = {
    "a target outside configs/": (lambda c: c["backbone"].update(_target_="os.system"), "os.system"),
    "a target behind a known prefix": (lambda c: c["norm"].update(_target_="torch.os.system"), "torch.os.system"),
    "a nested target": (lambda c: c["recipe"]["schedule"].update(_target_="builtins.exec"), "builtins.exec"),
    "a function of our own": (
        lambda c: c["dataset"].update(_target_="l2bn.records.write_durably"),
        "write_durably",
    ),
    "a data set for an augmentation": (lambda c: c["dataset"].update(augmentation=DOWNLOAD), NOT_HERE),
    "a data set for a norm": (lambda c: c["norm"].update(DOWNLOAD), NOT_HERE),
    "a data set for a schedule": (lambda c: c["recipe"].update(schedule=DOWNLOAD), NOT_HERE),
    "a folder elsewhere": (lambda c: c["cell"].update(dataset="../../elsewhere"), "plain name"),
    "files elsewhere": (on("cifar10", root="elsewhere", download=False), "data/cifar10"),
    "images elsewhere": (
        on("image_folder", root="elsewhere", cache="elsewhere"),
        r"dataset\.root has no value; give --root",
    ),
    **{
        f"{key}={value}": (on("image_folder", **{key: value}), rf"dataset\.{key} is .*within its data set's folder")
        for key in ("train", "test")
        for value in ("/elsewhere", "..", "train/../../elsewhere")
    },
    "a seed that is a path": (lambda c: c["cell"].update(seed="../0"), "seed"),
    "an unknown key": (lambda c: c.update(hydra={"run": {"dir": "/"}}), "hydra"),
    "no cell": (lambda c: c.pop("cell"), "not the configuration of a run"),
}


@pytest.mark.parametrize("name", MALICE)
def test_a_malicious_record_runs_nothing(
    name: str, record: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    change, named = MALICE[name]
    config = yaml.safe_load((record / "config.yaml").read_text())
    change(config)
    (record / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=named):
        replay(record, str(tmp_path / "runs" / "replayed"))
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "elsewhere").exists()  # also that of ../../elsewhere


def test_a_path_in_a_nested_place_is_not_used(record: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((record / "config.yaml").read_text())
    config["dataset"]["augmentation"]["root"] = str(tmp_path / "elsewhere")
    (record / "config.yaml").write_text(yaml.safe_dump(config))
    replay(record, str(tmp_path / "replayed"))
    assert not (tmp_path / "elsewhere").exists()


def test_a_yaml_that_would_make_objects_makes_none(record: Path, tmp_path: Path) -> None:
    (record / "config.yaml").write_text(f"!!python/object/apply:os.mkdir ['{tmp_path / 'made'}']\n")
    with pytest.raises(UserError, match="not the configuration of a run"):
        replay(record, str(tmp_path / "replayed"))
    assert not (tmp_path / "made").exists()
