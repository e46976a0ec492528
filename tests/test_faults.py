"""Faults of the machine: full disks, lack of memory, killed workers, lost images; nothing is lost.

After each fault the same command runs again, and its result must equal that of a run without the fault.
"""

import contextlib
import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from conftest import EPOCHS, ROOT, TINIEST, TINY, AtUpdate, Issue, Train, decoding, require, same
from l2bn.errors import UserError
from l2bn.failures import run_errors
from l2bn.records import SUMMARY, read_records

EXHAUSTED = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
    OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MB: room for one checkpoint of ResNet-20 (3 MB) and TensorBoard's file, and more."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "l2bn", disk]
    mounted = os.geteuid() == 0 and subprocess.run(mount).returncode == 0
    require("a small file system", [] if mounted else ["the right to mount one, which root has"])
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def fill(disk: Path) -> None:
    with contextlib.suppress(OSError), (disk / "ballast").open("wb", buffering=0) as file:
        while file.write(b"0" * 4096):
            pass


def lost_nothing(runs: Path, again: Callable[[], Any], whole: Any) -> None:
    """No record claims to be finished; the same command then ends where a run without the fault does."""
    assert read_records(runs) == ([], [])
    assert any(runs.rglob("*.pt"))
    record = again()
    same(record, whole)


def test_a_full_disk(small_disk: Path, train: Train, trained: Train, at_update: AtUpdate) -> None:
    """In the second epoch, with the first one's checkpoint written; and still full at the next start."""
    whole = trained(EPOCHS, *TINY)

    def run() -> Any:
        return train(EPOCHS, *TINY, f"runs_dir={small_disk}")

    at_update(10, lambda _: fill(small_disk))
    for _ in range(2):
        with pytest.raises(UserError, match="No space left on device; once that is corrected"):
            run()
    (small_disk / "ballast").unlink()
    lost_nothing(small_disk, run, whole)


def test_a_full_disk_before_the_run(small_disk: Path, train: Train) -> None:
    fill(small_disk)
    with pytest.raises(UserError, match="No space left on device"):
        train(EPOCHS, *TINY, f"runs_dir={small_disk}")
    assert read_records(small_disk) == ([], [])


def test_a_full_disk_under_the_cache_of_images(
    small_disk: Path, photographs: Path, train: Train, caplog: pytest.LogCaptureFixture
) -> None:
    fill(small_disk)
    root = (f"dataset.root={photographs / 'imagenet-samples'}", "dataset.train=.", "dataset.test=.")
    record = train(
        *("dataset=image_folder", "dataset.image_size=32", "dataset.validation=0.5", *root),
        *(f"dataset.cache={small_disk}", "progress=false", "recipe.epochs=1", "recipe.batch_size=25"),
    )
    assert record.status == "finished"
    assert "kept in memory only" in caplog.text
    assert "No space left on device" in caplog.text
    assert [path.name for path in small_disk.iterdir()] == ["ballast"]


def test_a_folder_made_read_only(
    train: Train, trained: Train, at_update: AtUpdate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write anywhere, and so becomes another user first."""
    whole = trained(EPOCHS, *TINY)
    monkeypatch.chdir(tmp_path)  # others may not walk through pytest's own folders
    runs, user = Path("runs"), os.geteuid()

    def freeze(_: Any) -> None:
        for folder in [runs, *(path for path in runs.rglob("*") if path.is_dir())]:
            folder.chmod(0o555)
        if user == 0:
            os.seteuid(65534)

    at_update(10, freeze)
    try:
        with pytest.raises(UserError, match="Permission denied; once that is corrected"):
            train(EPOCHS, *TINY, f"runs_dir={runs}")
    finally:
        os.seteuid(user)
        for folder in [runs, *(path for path in runs.rglob("*") if path.is_dir())]:
            folder.chmod(0o755)
    lost_nothing(runs, lambda: train(EPOCHS, *TINY, f"runs_dir={runs}"), whole)


def test_a_folder_deleted_under_the_run(train: Train, at_update: AtUpdate, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    at_update(10, lambda _: shutil.rmtree(runs))
    with pytest.raises(UserError, match="No such file or directory; once that is corrected"):
        train(EPOCHS, *TINY)
    assert read_records(tmp_path) == ([], [])
    assert train(EPOCHS, *TINY).status == "finished"


def test_a_device_out_of_memory(train: Train, trained: Train, at_update: AtUpdate, tmp_path: Path) -> None:
    """A real allocation that the machine has to refuse."""
    whole = trained(EPOCHS, *TINY)
    at_update(10, lambda _: torch.empty(2**60, dtype=torch.uint8))
    with pytest.raises(UserError, match=r"out of memory: .*; take a smaller recipe\.batch_size"):
        train(EPOCHS, *TINY)
    lost_nothing(tmp_path / "runs", lambda: train(EPOCHS, *TINY), whole)


@pytest.mark.parametrize("error", EXHAUSTED, ids=lambda error: type(error).__name__)
def test_every_out_of_memory_error_is_recognized(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="out of memory"), run_errors("run", tmp_path):
        raise error


def test_a_file_that_is_gone_is_told_as_such(tmp_path: Path) -> None:
    """As of a data set of the user's own: nothing was to be written there."""
    told = f"^run: {tmp_path}/gone: No such file or directory; once that is corrected"
    with pytest.raises(UserError, match=told), run_errors("run", tmp_path):
        (tmp_path / "gone").read_bytes()


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), OSError("Caught OSError in a worker")])
def test_another_error_is_not_explained_away(error: Exception, tmp_path: Path) -> None:
    """An OSError without a number is a library's: nothing failed to be written."""
    with pytest.raises(type(error), match=str(error)), run_errors("run", tmp_path):
        raise error


def test_a_shared_memory_that_is_too_small(tmp_path: Path) -> None:
    """As of a container, which has 64 MB, under a run on several devices; torch's own words."""
    full = "unable to allocate shared memory(shm) for file </torch_7_1_0>: No space left on device (28)"
    with pytest.raises(UserError, match=r"No space left.*enlarge /dev/shm"), run_errors("run", tmp_path):
        raise RuntimeError(full)


OUTPUTS = {
    "both on a full disk": "> /dev/full 2> /dev/full",
    "a reader that stops": "2>&1 | head -n 1",
    "stdout on a full disk": "> /dev/full",
    "no stdout": ">&-",
    "a terminal without the characters": "| PYTHONIOENCODING=utf-8 cat",
}


@pytest.mark.parametrize(
    "output", [*list(OUTPUTS)[:2], *(pytest.param(o, marks=pytest.mark.slow) for o in list(OUTPUTS)[2:])]
)
def test_output_that_cannot_be_written_ends_no_run(output: str, tmp_path: Path) -> None:
    """The result is in files: the run is trained to its end, with exit code 0, and no file of it is blamed."""
    options = " ".join([f"runs_dir={tmp_path}", "norm=bn", "recipe.epochs=2", *TINIEST, "progress=true"])
    run = f"{sys.executable} {ROOT}/scripts/train.py {options} compute.workers=0"
    command = f"set -o pipefail; {run} {OUTPUTS[output]}"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "error" not in done.stderr.lower()
    (record,), problems = read_records(tmp_path)
    assert (record.status, record.epochs, problems) == ("finished", 2, [])


@pytest.mark.parametrize("other_loader", [False, True], ids=["", "after another DataLoader"])
def test_a_data_worker_that_is_killed(
    other_loader: bool,
    photographs: Path,
    train: Train,
    trained: Train,
    at_update: AtUpdate,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SIGKILL, as the kernel sends it when memory runs short; the run resumes with another number of workers."""
    options = (*decoding(photographs), EPOCHS)
    whole = trained(*options, "compute.workers=0")
    if other_loader:  # torch then has its handler of SIGCHLD in place, which it sets once in a process
        monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)
        assert len(list(DataLoader(range(2), num_workers=1))) == 2

    def kill(_: Any) -> None:
        for worker in multiprocessing.active_children():
            os.kill(worker.pid or 0, signal.SIGKILL)

    at_update(5, kill)  # the first of the second epoch
    with pytest.raises(UserError, match=r"a process that decodes images was ended.*fewer compute\.workers"):
        train(*options, "compute.workers=2")
    lost_nothing(tmp_path / "runs", lambda: train(*options, "compute.workers=1"), whole)


@pytest.mark.parametrize("damage", ["no image", "gone"])
def test_an_image_that_is_damaged_under_the_run(
    damage: str, photographs: Path, train: Train, trained: Train, at_update: AtUpdate, tmp_path: Path
) -> None:
    """A worker finds it in the second epoch; once it is repaired, the run resumes."""
    whole = trained(*decoding(photographs), EPOCHS, "compute.workers=0")
    folder = tmp_path / "images"
    shutil.copytree(photographs, folder)
    options = (*decoding(folder), EPOCHS, "compute.workers=1")
    images = sorted(folder.rglob("*.JPEG"))
    contents = [image.read_bytes() for image in images]

    def spoil(_: Any) -> None:
        for image in images:
            if damage == "gone":
                image.unlink()
            else:
                image.write_bytes(b"no image")

    at_update(4, spoil)  # the last of the first epoch: what has not been read yet is of its evaluation
    with pytest.raises(UserError, match=r"\.JPEG(: cannot be decoded| cannot be read)"):
        train(*options)
    for image, content in zip(images, contents, strict=True):
        image.write_bytes(content)
    assert read_records(tmp_path / "runs") == ([], [])
    record = train(*options)
    same(record, whole)


def test_a_clock_that_jumps(train: Train, trained: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trained(EPOCHS, *TINY)
    now = time.time()
    jumps = iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: now + (-1) ** next(jumps) * 86_400)
    record = train(EPOCHS, *TINY)
    same(record, whole)
    assert all(0 < (row["seconds"] or 0) < 3600 for row in record.metrics())


def test_paths_with_spaces_quotes_and_other_alphabets(
    train: Train, issue: Issue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the runs, of the images and of where the command is given: composed, and as `train.py` reads them."""
    here, runs, images = (tmp_path / f"{name} 'и' 走る \"x\"" for name in ("Ort", "Läufe", "Bilder"))
    here.mkdir()
    for number in range(8):
        for path in (
            images / part / f"Klasse 'é' {number % 2}" / f'画像 "{number}".png' for part in ("train", "test")
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (30 * number, 0, 0)).save(path)
    options = (
        *("dataset=image_folder", "dataset.label=x", "recipe.batch_size=4", "recipe.epochs=1", "progress=false"),
        *(
            f"dataset.{key}={quoted(path)}"
            for key, path in (("root", images), ("cache", tmp_path / 'Vorrat é "x"'))
        ),
    )
    monkeypatch.chdir(here)
    record = train(*options, "runs_dir=.")
    assert (here / record.folder / SUMMARY).exists()
    done = issue("train", *options, f"runs_dir={quoted(runs)}")
    assert done.code == 0, done.err
    (other,), problems = read_records(runs)
    assert (other.folder.relative_to(runs), problems) == (record.folder, [])


def quoted(path: Path) -> str:
    """A path as Hydra reads it, whatever is in it."""
    return '"' + str(path).replace('"', r"\"") + '"'
