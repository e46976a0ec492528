"""Provenance: the code that a record names is the code that made it, or null where it is not known."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from l2bn.training import environment
from l2bn.training.environment import describe_environment, note_start


def git(folder: Path, *arguments: str) -> None:
    own = ("-c", "user.name=somebody", "-c", "user.email=somebody@example.org")
    subprocess.run(["git", "-C", str(folder), *own, *arguments], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of one committed file, which the package takes for its own."""
    folder = tmp_path / "project"
    (folder / "src/l2bn").mkdir(parents=True)
    (folder / "src/l2bn/one.py").write_text("one = 1\n")
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "one")
    monkeypatch.setattr(environment, "PROJECT", folder)
    monkeypatch.setattr(environment, "PACKAGE", folder / "src/l2bn")
    return folder


def facts() -> dict[str, Any]:
    return describe_environment(torch.device("cpu"))


@pytest.mark.parametrize(
    ("file", "dirty"),
    [
        ("src/l2bn/one.py", True),
        ("src/l2bn/norms/own norm.py", True),
        ("configs/norm/own.yaml", True),
        ("notes.txt", False),
        ("runs/src/one.py", False),
    ],
)
def test_changed_files_and_untracked_source_are_dirty(checkout: Path, file: str, dirty: bool) -> None:
    assert facts()["dirty"] is False
    (checkout / file).parent.mkdir(parents=True, exist_ok=True)
    (checkout / file).write_text("another\n")
    assert facts()["dirty"] is dirty


def test_nothing_is_said_of_a_commit_where_none_is_known(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(facts()["commit"], str)
    inner = checkout / "unpacked"  # in somebody's repository, which is not the project's
    inner.mkdir()
    for folder in (inner, checkout.parent):
        monkeypatch.setattr(environment, "PROJECT", folder)
        assert (facts()["commit"], facts()["dirty"]) == (None, None)
    monkeypatch.setattr(environment, "PROJECT", checkout)
    monkeypatch.setenv("PATH", "")  # no git
    assert (facts()["commit"], facts()["dirty"]) == (None, None)
    assert facts()["source"]


def test_a_run_that_goes_on_with_other_code_is_warned_of(
    checkout: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def start() -> None:
        note_start(tmp_path, torch.device("cpu"), "plain", {})

    start()
    start()
    assert not caplog.records
    (checkout / "src/l2bn/one.py").write_text("one = 2\n")
    start()
    assert "resumed with other code" in caplog.text
    caplog.clear()
    git(checkout, "commit", "--all", "--quiet", "--message", "two")
    start()
    assert "resumed with other code" in caplog.text
