"""A sweep: its unfinished runs are launched, and its summary says how every run has ended.

Hydra's own multirun starts all runs again, and ends by raising the first error. Here finished runs are left out,
and how the others have ended is read from their folders, whichever launcher ran them.
"""

import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import takewhile
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from hydra.core.utils import JobReturn, JobStatus, env_override
from rich.console import Console

from l2bn.errors import UserError
from l2bn.failures import RESUMES, describe
from l2bn.processes import SIGNALS, available_cores
from l2bn.records import Record
from l2bn.training.interruption import EXIT_CODE, Interruption, follow_parent
from l2bn.training.plan import PlannedRun, make_folder
from l2bn.training.progress import NAMED
from l2bn.training.status import Status, look, summary

log = logging.getLogger(__name__)

Launch = Callable[[Sequence[Sequence[str]]], Sequence[JobReturn]]
"""Runs the jobs of these overrides, and returns when all have ended."""

VISIBLE = "CUDA_VISIBLE_DEVICES"
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def run_sweep(runs: Sequence[PlannedRun], launch: Launch) -> int:
    """Launch the runs that have not ended, print how each run has ended, and return the exit code.

    It is 0 if all have ended, `interruption.EXIT_CODE` if the sweep was asked to stop, else 1. Raises UserError,
    before anything is launched, for a wrong configuration or a folder that cannot be made.
    """
    from l2bn.training.run import check, check_ended  # here: a process of `run_processes` need not wait for torch

    before = [look(run) for run in runs]
    ended_before = {status.run.folder for status in before if status.ended}
    todo = [run for run in runs if run.folder not in ended_before]
    check_ended((Record.read(status.run.folder), status.run) for status in before if status.ended)
    tried: set[str] = set()
    for run in todo:
        try:
            check(run, tried)
        except UserError as error:
            raise UserError(f"{run.cell}: {error}") from error
    for folder in dict.fromkeys(Path(run.config["runs_dir"]) for run in todo):
        make_folder(folder)
    errors: dict[Path, str] = {}
    code = 1
    try:
        returns = launch([run.overrides for run in todo]) if todo else []
        for run, done in zip(todo, returns, strict=True):
            if done.status == JobStatus.FAILED:
                errors[run.folder] = describe(done._return_value)
    except (SystemExit, KeyboardInterrupt):
        code = EXIT_CODE
    except UserError:
        raise
    except Exception as error:
        log.error("the launcher stopped: %s", describe(error).partition("\n")[0])
    after = [_judge(run, errors.get(run.folder)) for run in runs]
    Console(highlight=False, soft_wrap=True).print(summary(after, ended_before))
    return 0 if all(status.ended for status in after) else code


def _judge(run: PlannedRun, error: str | None) -> Status:
    """Return the state in a run's folder, or its error where the run could not even note that there."""
    status = look(run)
    if error is not None and status.standing in ("missing", "interrupted"):
        return replace(status, standing="failed", message=error)
    return status


# Runs side by side on this machine.


def run_processes(jobs: Sequence[Callable[[], bool]], n_jobs: int, devices: int = 1) -> list[str | None]:
    """Call each job in a process of its own, `n_jobs` at a time; return how each failed, None for success.

    Each process has `devices` GPUs of its own where there are as many, and its share of the CPU cores (unless
    OMP_NUM_THREADS is set already); fewer jobs than `n_jobs` have larger shares. A process that dies fails its own
    job only. A request to stop is passed on: the processes leave in good order, no other is started, and SystemExit
    with `interruption.EXIT_CODE` is raised.

    n_jobs: -1 for one per `devices` GPUs, or without a GPU one per as many CPU cores.
    """
    found, cores = visible_gpus(), available_cores()
    gpus = [",".join(found[end - devices : end]) for end in range(devices, len(found) + 1, devices)]
    most = n_jobs if n_jobs > 0 else len(gpus) or max(1, cores // devices)
    n_jobs = min(most, max(1, len(jobs)))
    shared = {name: os.environ.get(name, str(max(1, cores // n_jobs))) for name in THREADS}
    failures: list[str | None] = [None] * len(jobs)
    waiting, slots = list(enumerate(jobs)), list(range(n_jobs))
    running: dict[int, tuple[int, int, BaseProcess]] = {}  # by sentinel: number of the job, slot, process
    with Interruption() as interruption:
        while running or (waiting and interruption.signal is None):
            while waiting and slots and interruption.signal is None:
                (number, job), slot = waiting.pop(0), slots.pop(0)
                gpu = {VISIBLE: gpus[slot % len(gpus)]} if gpus else {}
                process = _start(job, {**shared, **gpu, NAMED: "1"})
                running[process.sentinel] = number, slot, process
            for sentinel in wait(list(running)):
                assert isinstance(sentinel, int)
                number, slot, process = running.pop(sentinel)
                process.join()
                failures[number] = _failure(process)
                slots.append(slot)
        if interruption.signal is not None:
            raise SystemExit(EXIT_CODE)
    return failures


def _start(job: Callable[[], bool], environment: dict[str, str]) -> BaseProcess:
    """Start a process that calls a job. It begins with requests to stop blocked, until it can handle them."""
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(job,))
    resource_tracker.ensure_running()  # the first start would do so, and unblock the signals behind it
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        with env_override(environment):
            process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return process


def _serve(job: Callable[[], bool]) -> None:
    """Call a job in this process, and end the process with 0 only if it succeeds."""
    follow_parent()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    if not job():
        raise SystemExit(1)


def _failure(process: BaseProcess) -> str | None:
    """Return how an ended process failed; None if it did not, or left in good order."""
    code = process.exitcode
    assert code is not None
    if code in (0, EXIT_CODE):
        return None
    if code > 0:
        return f"its process ended with exit code {code}; see what it printed above"
    return f"its process was ended by {signal.Signals(-code).name}; {RESUMES}"


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; CUDA stops at the first -1."""
    if VISIBLE in os.environ:
        names = (name.strip() for name in os.environ[VISIBLE].split(","))
        return list(takewhile(lambda name: name and not name.startswith("-"), names))
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]
