"""A sweep on a real Slurm: jobs that are preempted or requeued midway go back into the queue and resume."""

import contextlib
import json
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import local_slurm
from conftest import TRAIN, Train, finish, require, same, start
from l2bn.records import ENVIRONMENT, read_records

pytestmark = [pytest.mark.services, pytest.mark.slow]

SMALL = ("norm=bn", "dataset.subset=64", "dataset.image_size=16", "dataset.validation=0.05", "recipe.epochs=120")
# A node without GPUs, on which two of the runs find room at a time.
JOBS = ("hydra.launcher.gpus_per_node=null", "hydra.launcher.cpus_per_task=1", "hydra.launcher.mem_gb=null")
JOBS += ("+hydra.launcher.additional_parameters.comment=TEXT",)


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Mapping[str, str]]:
    require("Slurm (Debian's slurm-wlm and munge)", local_slurm.missing_programs())
    with local_slurm.cluster(tmp_path / "slurm") as environment:
        yield environment


def test_a_sweep_survives_preemption_and_requeueing(slurm: Mapping[str, str], tmp_path: Path, train: Train) -> None:
    runs = tmp_path / "sweep"

    def control(*command: str, timeout: float = 60) -> list[str]:
        done = subprocess.run(command, env=slurm, capture_output=True, text=True, timeout=timeout)
        return done.stdout.split()

    def midway() -> dict[str, Path]:
        """The jobs that run, by their ids, and the folders of the runs they make, some epochs along."""
        found = {}
        for identifier in control("squeue", "--noheader", "--states=running", "--format=%A"):
            job = control("squeue", "--noheader", f"--job={identifier}", "--format=%K")  # its place in the array
            for folder in runs.rglob(f"seed{job[0] if job else None}"):
                if any(path.name >= "epoch0005" for path in folder.glob("checkpoints/*.pt")):
                    found[identifier] = folder
        return found

    sweep = (TRAIN, "launcher=slurm", f"runs_dir={runs}", *SMALL, *JOBS, "seed=0,1,2")
    process = start(*sweep, "progress=false", env=slurm)
    try:
        deadline = time.monotonic() + 1800
        while len(jobs := midway()) < 2:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        (preempted, first), (requeued, second) = list(jobs.items())[:2]
        # What Slurm sends before it preempts a job or its time is up; scancel would do it again and again.
        with contextlib.suppress(subprocess.TimeoutExpired):
            control("scancel", "--signal=USR2", preempted, timeout=1)
        control("scontrol", "requeue", requeued)
        while process.poll() is None:
            assert time.monotonic() < deadline
            for identifier in control("squeue", "--noheader", "--states=pending", "--format=%A"):
                control("scontrol", "update", f"JobId={identifier}", "StartTime=now")  # Slurm waits two minutes
            time.sleep(0.5)
        printed = finish(process)
    finally:
        process.kill()
    assert "sweep: 3 finished\n" in printed
    records, problems = read_records(runs)
    assert problems == []
    starts = {r.folder: json.loads((r.folder / ENVIRONMENT).read_text())["starts"] for r in records}
    assert {folder: len(facts) for folder, facts in starts.items()} == {
        record.folder: 2 if record.folder in (first, second) else 1 for record in records
    }
    assert {fact["threads"] for facts in starts.values() for fact in facts} == {1}
    logs = "".join(path.read_text() for path in runs.rglob("*_log.out"))
    assert logs.count("resumed after epoch") == 2
    assert logs.count(" - Requeued job ") == 1  # by submitit; the other is Slurm's doing
    for record in records:
        if record.folder == first:
            same(record, train(*SMALL, "progress=false", f"seed={record.seed}"))

    assert "sweep: 3 skipped (ended before)\n" in finish(start(*sweep, env=slurm))
    assert not control("squeue", "--noheader")
