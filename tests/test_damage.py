"""Damaged files of a run: reported, skipped where that loses nothing, and never deleted."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import TINY, Train, interrupted, same, train_in
from l2bn.errors import UserError
from l2bn.training.checkpoint import Checkpoints
from l2bn.training.environment import note_start
from test_faults import lost_nothing

ONE, THREE = (("recipe.epochs=1", *TINY), ("recipe.epochs=3", *TINY))


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of three epochs that was stopped after the second, with two checkpoints."""
    runs = tmp_path_factory.mktemp("left")
    interrupted(20, train_in, runs, *THREE)
    return runs


@pytest.fixture
def stopped(left: Path, tmp_path: Path) -> Path:
    """The folder of that run in a copy of the test's own."""
    shutil.copytree(left, tmp_path / "runs")
    (folder,) = (tmp_path / "runs").rglob("seed0")
    assert len(list(folder.rglob("*-step0000000.*.pt"))) == 2
    return folder


def test_a_damaged_newest_checkpoint(
    stopped: Path, train: Train, trained: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    newest = sorted(stopped.rglob("*.pt"))[-1]
    newest.write_bytes(newest.read_bytes()[:-1])
    lost_nothing(tmp_path / "runs", lambda: train(*THREE), trained(*THREE))
    assert f"{newest} is damaged" in caplog.text


def test_a_run_whose_checkpoints_are_gone_says_that_it_starts_anew(
    stopped: Path, train: Train, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a cluster that deletes large files after a month."""
    shutil.rmtree(stopped / "checkpoints")
    record = train(*THREE)
    assert record.status == "finished"
    assert len(json.loads((record.folder / "env.json").read_text())["starts"]) == 1
    assert "metrics.jsonl has epochs, but the run has no checkpoint: it starts at its first epoch" in caplog.text


def test_a_checkpoint_that_cannot_be_read(
    stopped: Path,
    train: Train,
    trained: Train,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As of a disk that fails: the one before is taken."""
    newest = sorted(stopped.rglob("*.pt"))[-1]
    read = Path.read_bytes

    def fail(self: Path) -> bytes:
        if self == newest:
            raise OSError(5, "Input/output error", str(self))
        return read(self)

    whole = trained(*THREE)
    monkeypatch.setattr(Path, "read_bytes", fail)
    record = train(*THREE)
    assert "Input/output error" in caplog.text
    same(record, whole)


def test_a_checkpoint_of_another_run_is_refused(train: Train, trained: Train, copied: Train) -> None:
    one, other = trained(*ONE), copied(*ONE, "seed=1")
    (other.folder / "summary.json").unlink()
    shutil.rmtree(other.folder / "checkpoints")
    shutil.copytree(one.folder / "checkpoints", other.folder / "checkpoints")
    with pytest.raises(UserError, match="seed: 0 against 1"):
        train(*ONE, "seed=1")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda state: state.pop("optimizer"), "optimizer"),
        (lambda state: state["model"].popitem(), "Missing key"),
        (lambda state: state["position"].update(batches=3), "batches"),
    ],
    ids=["a part missing", "another network", "a field more"],
)
def test_a_checkpoint_of_another_version_is_refused(change: Any, named: str, stopped: Path, train: Train) -> None:
    checkpoints = Checkpoints(stopped / "checkpoints", [])
    state = checkpoints.load(torch.device("cpu"))
    assert state is not None
    change(state)
    checkpoints.save(2, 4, state)
    before = checkpoints.paths()
    with pytest.raises(UserError, match="does not fit this network") as error:
        train(*THREE)
    assert named in str(error.value)
    assert checkpoints.paths() == before


def test_another_identity_in_the_same_folder_is_refused(train: Train, copied: Train) -> None:
    copied(*ONE)
    with pytest.raises(UserError, match="precision: 32-true against bf16-mixed"):
        train(*ONE, "compute.precision=bf16-mixed")


def test_a_configuration_alone_is_no_run(train: Train, copied: Train) -> None:
    """As one that ran out of memory in its first step, and is then started in another precision."""
    folder = copied(*ONE).folder
    for path in (folder / "summary.json", folder / "metrics.jsonl", *folder.glob("checkpoints/*")):
        path.unlink()
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("32-true", "bf16-mixed"))
    assert train(*ONE).status == "finished"
    assert "bf16-mixed" not in config.read_text()


def test_a_damaged_configuration_is_named(stopped: Path, train: Train) -> None:
    path = stopped / "config.yaml"
    for content in ("", "{", "- 1", "compute: 5"):
        path.write_text(content)
        with pytest.raises(UserError, match=r"config\.yaml is damaged[^$]*\nremove this file to continue"):
            train(*THREE)
    path.unlink()
    assert train(*THREE).status == "finished"


def test_a_damaged_summary_is_named(train: Train, copied: Train) -> None:
    (copied(*ONE).folder / "summary.json").write_text("{")
    with pytest.raises(UserError, match=r"summary\.json cannot be read[^$]*move the folder away"):
        train(*ONE)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"starts": [1]}'])
def test_a_damaged_list_of_starts_is_begun_anew(
    content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "env.json"
    path.write_text(content)
    note_start(tmp_path, torch.device("cpu"), "plain", {}, resumed=True)
    assert "env.json is damaged" in caplog.text
    assert len(json.loads(path.read_text())["starts"]) == 1
