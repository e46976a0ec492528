"""Provenance: the code that a record names is the code that made it, or null where it is not known."""

import functools
import importlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from l2bn.training import environment
from l2bn.training.environment import describe_code, describe_environment, note_start, own_source


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
    monkeypatch.setattr(environment, "_package", functools.cache(environment._package.__wrapped__))
    return folder


def facts() -> dict[str, Any]:
    """The code that a new process finds."""
    environment._package.cache_clear()
    return describe_environment(torch.device("cpu"))


def start(folder: Path, kernels: str = "plain", *, resumed: bool = True) -> None:
    """Note a start in a new process."""
    environment._package.cache_clear()
    note_start(folder, torch.device("cpu"), kernels, describe_code({}), resumed=resumed)


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


def test_files_of_any_name_may_lie_in_the_checkout(checkout: Path) -> None:
    """One whose name is not UTF-8, with git told to quote no names, and the lock that an editor leaves."""
    git(checkout, "config", "core.quotepath", "false")
    before = facts()
    (checkout / "src/l2bn/.#one.py").symlink_to("nobody@nowhere.1")
    assert facts()["source"] == before["source"]
    Path(os.fsdecode(bytes(checkout / "src") + b"/caf\xe9.py")).touch()
    assert facts()["dirty"]


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
    start(tmp_path)
    start(tmp_path)
    assert not caplog.records
    (checkout / "src/l2bn/one.py").write_text("one = 2\n")
    start(tmp_path)
    assert "resumed with other code" in caplog.text
    caplog.clear()
    git(checkout, "commit", "--all", "--quiet", "--message", "two")
    start(tmp_path)
    assert not caplog.records, "the same code, committed"
    environment_file = tmp_path / "env.json"
    starts = json.loads(environment_file.read_text())["starts"]
    starts[-1] |= {"commit": "another"}
    del starts[-1]["source"]
    environment_file.write_text(json.dumps({"starts": starts}))
    start(tmp_path)
    assert "resumed with other code" in caplog.text, "by the commit, where that is all that is known"


def test_of_a_start_that_left_nothing_nothing_is_said(
    checkout: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As of a run that was killed before its first checkpoint: the result is of the later code alone."""
    start(tmp_path, resumed=False)
    (checkout / "src/l2bn/one.py").write_text("one = 2\n")
    start(tmp_path, resumed=False)
    assert not caplog.records
    assert len(json.loads((tmp_path / "env.json").read_text())["starts"]) == 1


def test_what_is_edited_after_the_import_is_no_code_of_the_process(checkout: Path) -> None:
    before = facts()
    (checkout / "src/l2bn/one.py").write_text("one = 2\n")
    later = describe_environment(torch.device("cpu"))
    assert [later[key] for key in ("source", "dirty")] == [before["source"], False]


def test_a_run_that_goes_on_with_another_processor_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As a job that is requeued on another node: the same instructions, and kernels with other block sizes."""
    for processor in ("EPYC", "Xeon"):
        monkeypatch.setattr(environment, "_processor", lambda name=processor: name)
        start(tmp_path)
    assert "resumed with other processor: equal to an uninterrupted run up to rounding\n" in caplog.text


def test_a_run_that_goes_on_in_another_memory_format_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    code = describe_code({})
    for facts in ({}, {"channels_last": True}, {"channels_last": True}):  # older starts do not say it
        note_start(tmp_path, torch.device("cpu"), "plain", {**code, **facts}, resumed=True)
    assert not caplog.text
    note_start(tmp_path, torch.device("cpu"), "plain", {**code, "channels_last": False}, resumed=True)
    assert "resumed with other channels_last: equal to an uninterrupted run up to rounding\n" in caplog.text


def test_a_run_that_goes_on_with_other_kernels_may_have_other_masks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for kernels in ("plain", "plain+compiled"):
        start(tmp_path, kernels)
    assert "kernels: equal to an uninterrupted run up to rounding and, with dropout, other masks" in caplog.text


def test_an_installed_package_is_not_own_code_wherever_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster's PYTHONPATH names folders of packages beside those of the environment."""
    packages = tmp_path / "modules" / "site-packages"
    packages.mkdir(parents=True)
    (packages / "own_nowhere.py").write_text("limit = 1\n")
    (tmp_path / "own_caller.py").write_text("import own_nowhere\ndef convert(bn): ...\n")
    for folder in (packages, tmp_path):
        monkeypatch.syspath_prepend(folder)
    importlib.import_module("own_caller")
    node = {"norm": {"_target_": "own_caller.convert"}}
    before = own_source(node)
    (packages / "own_nowhere.py").write_text("limit = 2\n")
    environment._own.cache_clear()
    assert own_source(node) == before is not None
