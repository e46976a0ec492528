"""SIGKILL at any instant: the same command resumes the run, with the same result.

Each kill is of a real process, at an instant drawn from a printed seed: while it starts, trains, evaluates, or in
the middle of writing a checkpoint. Afterwards the final weights, and all metrics but time and memory, must equal
those of an uninterrupted run, bit for bit.
"""

import os
import random
import subprocess
import time
from pathlib import Path

import pytest

from conftest import TINIEST, TRAIN, Process, finish, same, start
from l2bn.records import Record, read_records

SEED = 20220706
# Two updates an epoch and a checkpoint after each: something is always being written.
RUN = (*TINIEST, "recipe.epochs=24", "checkpoint.every_steps=1")
IMPORTS = 0.3  # the share of a run's life before its first update; killing there proves little
MANY = {
    "one process": (30, ("norm=l2bn",)),
    "two devices": (12, ("norm=bn", "compute.device=cpu", "compute.devices=2")),
    "a multirun": (12, ("-m", "norm=bn,l2bn")),
}


def start_run(runs: Path, options: tuple[str, ...]) -> Process:
    arguments = [*options, *RUN, f"runs_dir={runs}", "progress=false"]
    return start(TRAIN, *arguments, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)


def trained(runs: Path, options: tuple[str, ...]) -> list[Record]:
    finish(start_run(runs, options))
    records, problems = read_records(runs)
    assert problems == []
    return records


def kill_once(runs: Path, options: tuple[str, ...], draw: random.Random, life: float) -> str:
    """Start the run and kill it: "at a write", "at an instant", or "" if it ended before."""
    process = start_run(runs, options)
    began = time.monotonic()
    at_a_write = draw.random() < 0.3
    instant = began + life * draw.uniform(IMPORTS, 1.0)
    while process.poll() is None:
        writing = at_a_write and any(runs.rglob("checkpoints/.*.tmp"))
        if writing or time.monotonic() > instant + (life if at_a_write else 0):
            process.kill()
            process.wait()
            return "at a write" if writing else "at an instant"
        time.sleep(0.0002 if at_a_write else 0.002)
    return ""


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "options"), MANY.values(), ids=MANY)
def test_many_kills(kills: int, options: tuple[str, ...], tmp_path: Path) -> None:
    draw = random.Random(SEED)
    began = time.monotonic()
    whole = trained(tmp_path / "whole", options)
    life = time.monotonic() - began
    done: list[str] = []
    attempt = 0
    while len(done) < kills:
        attempt += 1
        runs = tmp_path / f"killed{attempt}"
        while len(done) < kills and (how := kill_once(runs, options, draw, life)):
            done.append(how)
            for record in read_records(runs)[0]:  # what claims to be finished is
                assert record.last["epoch"] == record.epochs
        survived = trained(runs, options)
        assert len(survived) == len(whole)
        for one, other in zip(survived, whole, strict=True):
            same(one, other)
    print(f"seed {SEED}: {kills} kills, {done.count('at a write')} of them in the middle of a checkpoint's write")
    assert "at a write" in done
