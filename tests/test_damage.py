"""Damaged files of a run: reported, skipped where that loses nothing, and never deleted."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import TINY, AtUpdate, Train
from l2bn.errors import UserError
from l2bn.training.checkpoint import Checkpoints
from test_faults import lost_nothing
from test_training import EPOCHS, equal, results, weights


@pytest.fixture
def stopped(train: Train, at_update: AtUpdate, tmp_path: Path) -> Path:
    """The folder of a run of three epochs that was left in the third, with two checkpoints."""

    def stop(_: Any) -> None:
        raise KeyboardInterrupt

    at_update(20, stop)
    with pytest.raises(KeyboardInterrupt):
        train("recipe.epochs=3", *TINY)
    (folder,) = (tmp_path / "runs").rglob("seed0")
    assert len(list(folder.rglob("*.pt"))) == 2
    return folder


def test_a_damaged_newest_checkpoint(
    stopped: Path, train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    newest = sorted(stopped.rglob("*.pt"))[-1]
    newest.write_bytes(newest.read_bytes()[:-1])
    again = lambda: train("recipe.epochs=3", *TINY)  # noqa: E731
    whole = train("recipe.epochs=3", *TINY, f"runs_dir={tmp_path / 'whole'}")
    lost_nothing(tmp_path / "runs", again, whole)
    assert f"{newest} is damaged" in caplog.text


def test_two_damaged_checkpoints(stopped: Path, train: Train) -> None:
    both = sorted(stopped.rglob("*.pt"))
    for checkpoint in both:
        checkpoint.write_bytes(checkpoint.read_bytes()[:-1])
    with pytest.raises(UserError, match="all are damaged") as error:
        train("recipe.epochs=3", *TINY)
    assert all(str(checkpoint) in str(error.value) for checkpoint in both)
    assert sorted(stopped.rglob("*.pt")) == both


def test_a_run_whose_checkpoints_are_gone_says_that_it_starts_anew(
    stopped: Path, train: Train, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a cluster that deletes large files after a month."""
    shutil.rmtree(stopped / "checkpoints")
    assert train("recipe.epochs=3", *TINY).status == "finished"
    assert "metrics.jsonl has epochs, but the run has no checkpoint: it starts at its first epoch" in caplog.text


def test_a_checkpoint_that_cannot_be_read(
    stopped: Path, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As of a disk that fails: the one before is taken."""
    newest = sorted(stopped.rglob("*.pt"))[-1]
    read = Path.read_bytes

    def fail(self: Path) -> bytes:
        if self == newest:
            raise OSError(5, "Input/output error", str(self))
        return read(self)

    whole = train("recipe.epochs=3", *TINY, f"runs_dir={tmp_path / 'whole'}")
    monkeypatch.setattr(Path, "read_bytes", fail)
    record = train("recipe.epochs=3", *TINY)
    assert "Input/output error" in caplog.text
    assert results(record) == results(whole)


def test_a_checkpoint_of_another_run_is_refused(train: Train) -> None:
    one = train("recipe.epochs=1", *TINY)
    other = train("recipe.epochs=1", *TINY, "seed=1")
    (other.folder / "summary.json").unlink()
    shutil.rmtree(other.folder / "checkpoints")
    shutil.copytree(one.folder / "checkpoints", other.folder / "checkpoints")
    with pytest.raises(UserError, match="seed: 0 against 1"):
        train("recipe.epochs=1", *TINY, "seed=1")


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
        train("recipe.epochs=3", *TINY)
    assert named in str(error.value)
    assert checkpoints.paths() == before


def test_another_identity_in_the_same_folder_is_refused(train: Train) -> None:
    train("recipe.epochs=1", *TINY)
    with pytest.raises(UserError, match="precision: 32-true against bf16-mixed"):
        train("recipe.epochs=1", *TINY, "compute.precision=bf16-mixed")


@pytest.mark.parametrize("content", ["", "{", "- 1", "compute: 5"])
def test_a_damaged_configuration_is_named(content: str, stopped: Path, train: Train) -> None:
    path = stopped / "config.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=r"config\.yaml is damaged[^$]*\nremove this file to continue"):
        train("recipe.epochs=3", *TINY)
    path.unlink()
    assert train("recipe.epochs=3", *TINY).status == "finished"


def test_a_damaged_summary_is_named(train: Train) -> None:
    record = train("recipe.epochs=1", *TINY)
    (record.folder / "summary.json").write_text("{")
    with pytest.raises(UserError, match=r"summary\.json cannot be read[^$]*move the folder away"):
        train("recipe.epochs=1", *TINY)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"starts": [1]}'])
def test_a_damaged_list_of_starts_is_begun_anew(
    content: str, stopped: Path, train: Train, caplog: pytest.LogCaptureFixture
) -> None:
    (stopped / "env.json").write_text(content)
    assert train("recipe.epochs=3", *TINY).status == "finished"
    assert "env.json is damaged" in caplog.text


def test_half_a_line_of_metrics_is_made_whole(stopped: Path, train: Train, tmp_path: Path) -> None:
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "step": 24, "lr"')
    whole = train(EPOCHS.replace("2", "3"), *TINY, f"runs_dir={tmp_path / 'whole'}")
    record = train("recipe.epochs=3", *TINY)
    assert results(record) == results(whole)
    assert equal(weights(record), weights(whole))
