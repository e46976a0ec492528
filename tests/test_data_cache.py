"""The cache of what is made from files: made once, made again when a file has changed, and never half there."""

import errno
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from l2bn.data import cache
from l2bn.data.cache import Arrays, cached, file_state, replacing, temporary_folder

ARRAYS = [np.arange(12, dtype=np.uint8).reshape(3, 4), np.array("a text")]


class Kept:
    """Arrays in a cache of their own; `made` counts how often they were made. folder: None for the user's own."""

    def __init__(self, folder: Path | None) -> None:
        self.folder, self.made, self.seconds = folder, 0, 0.0

    def get(self, state: str = "a", key: str = "a") -> None:
        folder = None if self.folder is None else str(self.folder)
        found = cached(folder, "my name, äöü", [key], state, self.make)
        assert [array.tolist() for array in found] == [array.tolist() for array in ARRAYS]

    def make(self) -> Arrays:
        time.sleep(self.seconds)
        self.made += 1
        return ARRAYS


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    return Kept(tmp_path / "cache")


def test_arrays_are_made_once_for_each_key_and_again_for_another_state(kept: Kept) -> None:
    asked = (("1", "a", 1), ("1", "a", 1), ("1", "b", 2), ("2", "a", 3), ("2", "a", 3), ("1", "b", 3))
    for state, key, made in asked:
        kept.get(state, key)
        assert kept.made == made


@pytest.mark.parametrize("length", [0, 7, 140, -1])
def test_a_file_that_was_cut_short_is_made_again(length: int, kept: Kept, tmp_path: Path) -> None:
    kept.get()
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(file.read_bytes()[:length])
    kept.get()
    assert kept.made == 2


def test_a_file_with_a_damaged_header_is_made_again(kept: Kept, tmp_path: Path) -> None:
    """numpy reads it once more, as one of Python 2, by a tokenizer, which has errors of its own."""
    kept.get()
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(file.read_bytes().replace(b"(2,)", b"(2, ", 1))
    kept.get()
    assert kept.made == 2


def test_two_runs_make_them_once(kept: Kept, tmp_path: Path) -> None:
    """As the runs of a sweep side by side, which all begin with images that nobody has decoded yet."""
    kept.seconds = 0.2
    with ThreadPoolExecutor() as pool:
        list(pool.map(kept.get, ["a", "a"]))
    assert kept.made == 1
    assert len(list((tmp_path / "cache").iterdir())) == 1


def write_in_place(one: Path, _: Path) -> None:
    """The same size, and the old time restored: only the time of the change tells."""
    one.write_bytes(b"other")
    os.utime(one, (1e9, 1e9))


def exchange(one: Path, other: Path) -> None:
    """Two of equal size and time, as unpacked from an archive."""
    third = one.with_name("third")
    one.rename(third)
    other.rename(one)
    third.rename(other)


CHANGES: dict[str, Callable[[Path, Path], object]] = {
    "another size": lambda one, _: one.write_bytes(b"longer"),
    "another time": lambda one, _: os.utime(one, (2e9, 2e9)),
    "written in place": write_in_place,
    "two exchanged": exchange,
    "one more": lambda one, _: one.with_name("new").write_bytes(b"new"),
    "one less": lambda one, _: one.unlink(),
    "another name": lambda one, _: one.rename(one.with_name("z")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_files_is_a_change_of_their_state(change: str, tmp_path: Path) -> None:
    def state() -> str:
        return file_state(tmp_path, sorted(path.name for path in tmp_path.iterdir()))

    one, other = tmp_path / "one", tmp_path / "other"
    for file, content in ((one, b"first"), (other, b"other")):
        file.write_bytes(content)
        os.utime(file, (1e9, 1e9))
    before = state()
    assert state() == before
    time.sleep(0.02)  # the clock of a file system stands still for some milliseconds
    CHANGES[change](one, other)
    assert state() != before


def test_the_users_cache_folder_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    Kept(None).get()
    assert len(list((tmp_path / "home" / "l2bn").iterdir())) == 1


def no_folder(kept: Kept, _: pytest.MonkeyPatch) -> None:
    assert kept.folder
    kept.folder.write_text("a file, where a folder should be")


def no_home(kept: Kept, patch: pytest.MonkeyPatch) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    kept.folder = None
    patch.setattr(Path, "home", unknown)
    patch.setenv("XDG_CACHE_HOME", "relative, which the standard ignores")


def full_disk(_: Kept, patch: pytest.MonkeyPatch) -> None:
    def half(stream: Any, *_: Any) -> None:
        stream.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    patch.setattr(cache, "write_arrays", half)


@pytest.mark.parametrize("fault", [no_folder, no_home, full_disk])
def test_a_cache_that_cannot_be_written_costs_no_run_and_leaves_nothing(
    fault: Callable[[Kept, pytest.MonkeyPatch], None],
    kept: Kept,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fault(kept, monkeypatch)
    kept.get()
    assert re.search(r"my name, äöü is kept in memory only .*set dataset\.cache=FOLDER", caplog.text)
    assert not list(tmp_path.glob("cache/*"))


def test_a_cache_follows_the_users_umask(kept: Kept, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        kept.get()
    finally:
        os.umask(before)
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o750
    assert [file.stat().st_mode & 0o777 for file in (tmp_path / "cache").iterdir()] == [0o640]


@pytest.mark.parametrize(("made", "stays"), [(False, b"one"), (True, b"other")])
def test_two_writers_of_a_file_leave_one_whole(made: bool, stays: bytes, tmp_path: Path) -> None:
    """The last to end, as of containers with one process id; where files cannot be locked, what is there stays."""
    file = tmp_path / "cache"
    options = {"made": file.exists} if made else {}
    with replacing(file, **options) as one, replacing(file, **options) as other:
        one.write(b"one")
        other.write(b"other")
    assert file.read_bytes() == stays
    assert list(tmp_path.iterdir()) == [file]


def test_what_a_killed_process_left_is_removed_an_hour_later(tmp_path: Path) -> None:
    file = tmp_path / "cache"
    old, new, lock = (tmp_path / f"cache.{end}" for end in ("0123", "4567", "lock"))
    for remains in (old, new, lock):
        remains.write_bytes(b"half")
    for remains in (old, lock):  # this process may hold the lock
        os.utime(remains, (1e9, 1e9))
    with replacing(file):
        pass
    assert sorted(tmp_path.iterdir()) == [file, new, lock]


def test_what_a_killed_process_left_goes_after_an_hour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = tmp_path / ".packing-abc"
    (left / "train").mkdir(parents=True)
    (left / "train/0.tar").touch()
    os.utime(left / "train/0.tar", (0, 0))  # as an archive's file that was unpacked
    for late, there in ((0, True), (cache.HOUR + 60, False)):
        now = time.time() + late
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda now=now: now)
            with temporary_folder(tmp_path, ".packing-") as place:
                (place / "1.tar").touch()
        assert left.exists() is there
        assert not place.exists()
