"""What the machine may do to a run: each fault ends in a clear word or is survived; nothing is lost.

After every fault the run is issued again where it can be, and must equal the one that met none.
"""

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import TINY, Train
from l2bn.errors import UserError
from l2bn.records import read_records
from l2bn.training.loop import Trainer
from test_training import EPOCHS, equal, results, weights

Arrange = Callable[[int, Callable[[Trainer], None]], None]


@pytest.fixture
def at_update(monkeypatch: pytest.MonkeyPatch) -> Arrange:
    """Have something happen just before the n-th update from now, once."""
    forward = Trainer.forward

    def arrange(number: int, happen: Callable[[Trainer], None]) -> None:
        left = [number]

        def spied(self: Trainer, *arguments: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                happen(self)
            return forward(self, *arguments)

        monkeypatch.setattr(Trainer, "forward", spied)

    return arrange


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MB: room for one checkpoint of ResNet-20 (3 MB) and TensorBoard's file, and more."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "l2bn", disk]).returncode:
        pytest.skip("a file system can be mounted by root only")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def lost_nothing(runs: Path, again: Callable[[], Any], whole: Any) -> None:
    """No record claims to be finished; the same command then ends where a run without the fault does."""
    assert read_records(runs) == ([], [])
    assert any(runs.rglob("*.pt"))
    record = again()
    assert results(record) == results(whole)
    assert equal(weights(record), weights(whole))


def test_a_full_disk(small_disk: Path, train: Train, at_update: Arrange) -> None:
    whole = train(EPOCHS, *TINY)

    def run() -> Any:
        return train(EPOCHS, *TINY, f"runs_dir={small_disk}")

    def fill(_: Trainer) -> None:
        with contextlib.suppress(OSError), (small_disk / "ballast").open("wb", buffering=0) as file:
            while file.write(b"0" * 4096):
                pass

    at_update(10, fill)  # in the second epoch, with the first one's checkpoint written
    with pytest.raises(UserError, match=r"cannot write .*No space left on device"):
        run()
    (small_disk / "ballast").unlink()
    lost_nothing(small_disk, run, whole)


def test_a_folder_made_read_only(train: Train, at_update: Arrange, tmp_path: Path) -> None:
    whole = train(EPOCHS, *TINY, f"runs_dir={tmp_path / 'whole'}")
    runs, user = tmp_path / "runs", os.geteuid()

    def freeze(_: Trainer) -> None:
        for folder in [path for path in runs.rglob("*") if path.is_dir()]:
            folder.chmod(0o500)
        if user == 0:  # whom no mode keeps out
            os.seteuid(65534)

    at_update(10, freeze)
    try:
        with pytest.raises(UserError, match=r"cannot write .*Permission denied"):
            train(EPOCHS, *TINY)
    finally:
        os.seteuid(user)
        for folder in [runs, *(path for path in runs.rglob("*") if path.is_dir())]:
            folder.chmod(0o700)
    lost_nothing(runs, lambda: train(EPOCHS, *TINY), whole)


def test_a_folder_deleted_under_the_run(train: Train, at_update: Arrange, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    at_update(10, lambda _: shutil.rmtree(runs))
    with pytest.raises(UserError, match=r"cannot write .*No such file or directory"):
        train(EPOCHS, *TINY)
    assert read_records(tmp_path) == ([], [])
    assert train(EPOCHS, *TINY).status == "finished"


def test_a_device_out_of_memory(train: Train, at_update: Arrange, tmp_path: Path) -> None:
    whole = train(EPOCHS, *TINY, f"runs_dir={tmp_path / 'whole'}")

    def exhaust(_: Trainer) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    at_update(10, exhaust)
    with pytest.raises(UserError, match=r"out of memory: CUDA out of memory; take a smaller recipe\.batch_size"):
        train(EPOCHS, *TINY)
    lost_nothing(tmp_path / "runs", lambda: train(EPOCHS, *TINY), whole)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value: float, train: Train, at_update: Arrange) -> None:
    def poison(trainer: Trainer) -> None:
        with torch.no_grad():
            next(trainer.network.parameters()).fill_(value)

    at_update(11, poison)
    record = train(EPOCHS, *TINY)
    assert record.status == "diverged"
    assert record.divergence == "the loss is not finite in epoch 2, step 3"
    assert record.last["epoch"] == 1


def test_a_clock_that_jumps(train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = train(EPOCHS, *TINY, f"runs_dir={tmp_path / 'whole'}")
    now = time.time()
    jumps = iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: now + (-1) ** next(jumps) * 86_400)
    record = train(EPOCHS, *TINY)
    assert results(record) == results(whole)
    assert all(0 < (row["seconds"] or 0) < 3600 for row in record.metrics())


def test_a_damaged_newest_checkpoint(
    train: Train, at_update: Arrange, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = ("recipe.epochs=3", *TINY)
    whole = train(*options, f"runs_dir={tmp_path / 'whole'}")

    def stop(_: Trainer) -> None:
        raise KeyboardInterrupt

    at_update(20, stop)
    with pytest.raises(KeyboardInterrupt):
        train(*options)
    newest = sorted((tmp_path / "runs").rglob("*.pt"))[-1]
    newest.write_bytes(newest.read_bytes()[:-1])
    lost_nothing(tmp_path / "runs", lambda: train(*options), whole)
    assert f"{newest} is damaged" in caplog.text


def test_a_checkpoint_of_another_run_is_refused(train: Train, tmp_path: Path) -> None:
    one = train("recipe.epochs=1", *TINY)
    other = train("recipe.epochs=1", *TINY, "seed=1")
    (other.folder / "summary.json").unlink()
    shutil.rmtree(other.folder / "checkpoints")
    shutil.copytree(one.folder / "checkpoints", other.folder / "checkpoints")
    with pytest.raises(UserError, match="seed: 0 against 1"):
        train("recipe.epochs=1", *TINY, "seed=1")


def test_another_identity_in_the_same_folder_is_refused(train: Train) -> None:
    train("recipe.epochs=1", *TINY)
    with pytest.raises(UserError, match="precision: 32-true against bf16-mixed"):
        train("recipe.epochs=1", *TINY, "compute.precision=bf16-mixed")


def test_paths_with_spaces_quotes_and_other_alphabets(train: Train, tmp_path: Path) -> None:
    folder = tmp_path / "Läufe 'и' 走る \"x\""
    folder.mkdir()
    os.chdir(folder)
    try:
        record = train("recipe.epochs=1", *TINY, "runs_dir=.")
    finally:
        os.chdir(tmp_path)
    assert (folder / record.folder / "summary.json").exists()
