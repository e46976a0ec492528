"""SIGKILL at each place where a run writes: the same command resumes the run, with the same bits.

`test_kill.py` kills at random instants; here every place is covered: a file partly written, written but not yet
renamed, and just renamed. The processes are real, forked from one that has imported everything already.
"""

import fnmatch
import multiprocessing
import os
import signal
from itertools import product
from pathlib import Path

import pytest
import torch

from conftest import TINIEST, same, train_in
from l2bn.records import FEATURES, SAMPLE, STATISTICS, Record, read_records

# Two updates an epoch, with a checkpoint after each, and all that can be measured.
ANALYSIS = ("analysis.every=1", "analysis.statistics_until=4", "analysis.statistics_every=2")
OPTIONS = (*TINIEST, "recipe.epochs=3", "checkpoint.every_steps=1", "norm=bn", *ANALYSIS)

MOMENTS = ("torn", "before its name", "after its name")
# Of files by their temporary name, and of those to which a line is added.
PLACES = [
    *product((".config.yaml*", ".metrics.jsonl*", ".env.json*", ".epoch*"), MOMENTS),
    *product(("statistics.jsonl", "features.jsonl", "metrics.jsonl"), ["torn"]),
    *product((".penultimate*", ".weights*", ".summary*"), MOMENTS),
]
# With the epoch's checkpoint and not its line, with half of the line, and at the start of a resumed run.
JOURNAL = [(".epoch*", "after its name"), ("metrics.jsonl", "torn"), (".metrics.jsonl*", "after its name")]


def attempt(runs: Path, place: tuple[str, str] | None) -> None:
    """Train the run, to its end or to the place where the process is killed."""
    torch.set_num_threads(1)
    if place:
        kill_at(*place)
    train_in(runs, *OPTIONS, "progress=false", "compute.workers=0")


def kill_at(pattern: str, moment: str) -> None:
    """Kill this process at the first write to a file of that name."""
    fsync, replace = os.fsync, Path.replace

    def here(path: Path, now: str) -> bool:
        return now == moment and fnmatch.fnmatch(path.name, pattern)

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def watched_fsync(descriptor: int) -> None:
        if here(Path(f"/proc/self/fd/{descriptor}").readlink(), "torn"):
            os.ftruncate(descriptor, max(0, os.fstat(descriptor).st_size - 10))
            die()
        fsync(descriptor)

    def watched_replace(self: Path, target: Path) -> Path:
        if here(self, "before its name"):
            die()
        replaced = replace(self, target)
        if here(self, "after its name"):
            die()
        return replaced

    os.fsync, Path.replace = watched_fsync, watched_replace  # type: ignore[method-assign]


def run(runs: Path, place: tuple[str, str] | None = None) -> int:
    """The exit code of a process that makes an attempt."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["l2bn.training.run", "torch.utils.tensorboard", "hydra", "conftest"])
    process = context.Process(target=attempt, args=(runs, place))
    process.start()
    process.join(timeout=300)
    assert process.exitcode is not None
    return process.exitcode


def record_of(runs: Path) -> Record:
    (record,), problems = read_records(runs)
    assert problems == []
    return record


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """The run that was left alone."""
    runs = tmp_path_factory.mktemp("whole")
    assert run(runs) == 0
    return record_of(runs)


def endure(places: list[tuple[str, str]], runs: Path, whole: Record) -> None:
    """Start the run once for each place, killed there, and once more; it must end as the whole one did."""
    for file, moment in places:
        assert run(runs, (file, moment)) == -signal.SIGKILL, f"{file} was not reached"
        last = (file, moment) == (".summary*", "after its name")
        assert len(read_records(runs)[0]) == last, f"{file} {moment}: an unfinished run claims to be finished"
        assert read_records(runs)[1] == []
    assert run(runs) == 0
    ended = record_of(runs)
    same(ended, whole)
    for file in (FEATURES, STATISTICS, SAMPLE):
        assert (ended.folder / file).read_bytes() == (whole.folder / file).read_bytes()
    assert not any(runs.rglob(".*.tmp")), "what a kill cut off was left lying about"
    print(f"{len(places)} kills, each while a file was being written")


def test_a_kill_while_the_journal_is_written(whole: Record, tmp_path: Path) -> None:
    endure(JOURNAL, tmp_path, whole)


@pytest.mark.slow
def test_a_kill_at_every_place(whole: Record, tmp_path: Path) -> None:
    endure(PLACES, tmp_path, whole)
