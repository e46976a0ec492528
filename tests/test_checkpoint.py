"""Checkpoints: complete or absent, the last two kept, damaged ones skipped and never deleted."""

import os
from pathlib import Path

import pytest
import torch

from l2bn.errors import UserError
from l2bn.failures import checkpoint_errors
from l2bn.records import write_durably
from l2bn.training.checkpoint import CheckpointPolicy, Checkpoints

CPU = torch.device("cpu")


def saved(folder: Path, *positions: tuple[int, int], keep_epochs: tuple[int, ...] = ()) -> Checkpoints:
    checkpoints = Checkpoints(folder, list(keep_epochs))
    for epoch, step in positions:
        checkpoints.save(epoch, step, {"at": [epoch, step], "weight": torch.full((3,), float(epoch))})
    return checkpoints


def places(checkpoints: Checkpoints) -> list[str]:
    return [path.name.partition(".")[0] for path in checkpoints.paths()]


def test_the_newest_is_loaded(tmp_path: Path) -> None:
    state = saved(tmp_path, (1, 0), (1, 50), (2, 0)).load(CPU)
    assert state is not None
    assert state["at"] == [2, 0]
    assert torch.equal(state["weight"], torch.full((3,), 2.0))


def test_without_any_there_is_nothing_to_load(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none", []).load(CPU) is None


def test_the_last_two_are_kept_and_those_asked_for(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, (1, 0), (2, 0), (2, 10), (3, 0), (4, 0), keep_epochs=(2,))
    assert places(checkpoints) == ["epoch0002-step0000000", "epoch0003-step0000000", "epoch0004-step0000000"]


def test_a_resumed_run_keeps_what_it_kept_before(tmp_path: Path) -> None:
    """Also where it was stopped right after one of them."""
    saved(tmp_path, (1, 0), (1, 10), keep_epochs=(1,))
    for start in (2, 4):
        resumed = Checkpoints(tmp_path, [])
        assert resumed.load(CPU) is not None
        resumed.save(start, 0, {})
        resumed.save(start + 1, 0, {})
    assert places(resumed) == ["epoch0001-step0000000", "epoch0004-step0000000", "epoch0005-step0000000"]


def test_order_is_by_number_not_by_name(tmp_path: Path) -> None:
    state = saved(tmp_path, (9999, 0), (10000, 0)).load(CPU)
    assert state is not None
    assert state["at"] == [10000, 0]


@pytest.mark.parametrize("damage", [b"", b"not a checkpoint", None], ids=["empty", "foreign", "a flipped bit"])
def test_a_damaged_newest_is_passed_over(
    damage: bytes | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = saved(tmp_path, (1, 0), (2, 0))
    newest = checkpoints.paths()[-1]
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data if damage is None else damage)
    state = checkpoints.load(CPU)
    assert state is not None
    assert state["at"] == [1, 0]
    assert str(newest) in caplog.text
    assert newest.exists()


def test_where_all_are_damaged_they_are_named_and_kept(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, (1, 0), (2, 0))
    for path in checkpoints.paths():
        path.write_bytes(b"damaged")
    with pytest.raises(UserError, match="all are damaged") as error:
        checkpoints.load(CPU)
    for path in checkpoints.paths():
        assert str(path) in str(error.value)
    assert len(checkpoints.paths()) == 2


def test_a_device_that_is_full_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is it a misfit, where memory runs out while the state is copied into the network."""
    checkpoints = saved(tmp_path, (1, 0))
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def load(*_: object, **__: object) -> None:
        raise full

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(torch.OutOfMemoryError):
        checkpoints.load(CPU)
    with pytest.raises(torch.OutOfMemoryError), checkpoint_errors(tmp_path):
        raise full


def damaged(checkpoints: Checkpoints, *names: str) -> list[Path]:
    found = [path for path in checkpoints.paths() if path.name.startswith(names)]
    for path in found:
        path.write_bytes(b"damaged")
    return found


def test_after_a_fallback_two_whole_ones_are_kept(tmp_path: Path) -> None:
    """A damaged one counts for none of them, and goes when one of its place or of a later one is written."""
    checkpoints = saved(tmp_path, (4, 0), (5, 0))
    (bad,) = damaged(checkpoints, "epoch0005")
    resumed = Checkpoints(tmp_path, [])
    assert resumed.load(CPU) is not None
    resumed.save(4, 10, {"at": [4, 10]})
    assert places(resumed) == ["epoch0004-step0000000", "epoch0004-step0000010", "epoch0005-step0000000"]
    resumed.save(4, 20, {"at": [4, 20]})
    assert places(resumed) == ["epoch0004-step0000010", "epoch0004-step0000020", "epoch0005-step0000000"]
    assert bad.exists()
    resumed.save(5, 0, {"at": [5, 0]})
    assert places(resumed) == ["epoch0004-step0000020", "epoch0005-step0000000"]
    assert not bad.exists()


def test_after_a_fallback_over_two_what_is_written_stays(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, (3, 0), (5, 0), (6, 0), keep_epochs=(3, 5))
    bad = damaged(checkpoints, "epoch0005", "epoch0006")
    resumed = Checkpoints(tmp_path, [3, 5])
    assert resumed.load(CPU) is not None
    resumed.save(4, 0, {"at": [4, 0]})
    state = Checkpoints(tmp_path, []).load(CPU)
    assert state is not None
    assert state["at"] == [4, 0]
    assert all(path.exists() for path in bad)
    resumed.save(5, 0, {"at": [5, 0]})
    resumed.save(7, 0, {"at": [7, 0]})
    assert not any(path.exists() for path in bad)
    assert [place[:9] for place in places(resumed)] == ["epoch0003", "epoch0005", "epoch0007"]


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "executed",))

    checkpoints = Checkpoints(tmp_path / "checkpoints", [])
    checkpoints.save(1, 0, {"model": Payload()})
    with pytest.raises(UserError, match="epoch0001"):
        checkpoints.load(CPU)
    assert not (tmp_path / "executed").exists()


def test_what_a_kill_cut_off_goes_with_the_next_write(tmp_path: Path) -> None:
    left = tmp_path / ".epoch0001-step0000000.0123456789abcdef.pt.tmp"
    left.write_bytes(b"half")
    checkpoints = saved(tmp_path, (1, 0))
    assert list(tmp_path.iterdir()) == checkpoints.paths()


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the name is there when the write returns: after a power cut the path holds the old or the new content."""
    order = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor: int) -> None:
        order.append(("flushed", Path(f"/proc/self/fd/{descriptor}").readlink().name))
        fsync(descriptor)

    def noted_replace(self: Path, target: Path) -> Path:
        order.append(("renamed", self.name))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    write_durably(tmp_path / "file", "new")
    assert order == [("flushed", ".file.tmp"), ("renamed", ".file.tmp"), ("flushed", tmp_path.name)]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_durably(path, "old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_durably(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_policy_says_when() -> None:
    assert [step for step in range(1, 10) if CheckpointPolicy(every_steps=3).due(step)] == [3, 6, 9]
    assert not CheckpointPolicy(every_steps=0).due(1000)
