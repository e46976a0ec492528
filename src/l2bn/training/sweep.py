"""A sweep: its runs are planned, the unfinished ones launched, and its summary says how every run has ended.

Hydra's own multirun starts all runs again, and ends by raising the first error. Here finished runs are left out,
and how the others have ended is read from their folders, whichever launcher ran them. A job gets the configuration
planned for it (`PlannedJobs`) and composes nothing, so that an edit of a YAML file does not affect a sweep that has
begun.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import takewhile
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn, JobStatus, env_override
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from l2bn.errors import UserError
from l2bn.failures import RESUMES, describe, explain, override_errors
from l2bn.processes import SIGNALS, available_cores, follow_parent
from l2bn.records import Record
from l2bn.training.interruption import EXIT_CODE, Interruption
from l2bn.training.plan import (
    COMPUTE_KEYS,
    CONFIG_NAME,
    PlannedRun,
    Planner,
    RunKey,
    differences,
    make_folder,
    resolve,
)
from l2bn.training.progress import NAMED
from l2bn.training.status import Status, read_status, sweep_summary

log = logging.getLogger(__name__)

Launch = Callable[[Sequence[Sequence[str]]], Sequence[JobReturn]]
"""Runs the jobs of these overrides, and returns when all have ended."""

VISIBLE = "CUDA_VISIBLE_DEVICES"
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


# The plan.


def compose_sweep(overrides: Sequence[str]) -> DictConfig:
    """Return the configuration of a whole sweep, as the command `train.py -m` composes it."""
    loader = GlobalHydra.instance().config_loader()
    return loader.load_configuration(CONFIG_NAME, [*overrides, "hydra.mode=MULTIRUN"], RunMode.MULTIRUN)


def plan_sweep(sweep: DictConfig) -> list[PlannedRun]:
    """Return every run of a sweep, in order, given the configuration that Hydra composed for the whole sweep.

    Every run is composed, so that a wrong name or key in any of them is found here. Raises UserError, also where
    two runs would have one folder.
    """
    arguments = OmegaConf.to_container(sweep.hydra.overrides.task, resolve=False)
    assert isinstance(arguments, list)
    runs: dict[Path, PlannedRun] = {}
    for run in _SweepPlanner().expand(sweep, _parameters(sweep), arguments):
        first = runs.setdefault(run.folder, run)
        # Also of what is no part of the identity: one of the two would not be trained.
        changed = differences(first.config, run.config)
        if changed:
            raise UserError(
                f"two runs of this sweep would have one folder, {run.folder}; they differ in\n"
                + "".join(f"  {line}\n" for line in changed)
                + "sweep over values that are part of a run's name, or give each its own runs_dir, as in "
                + "'runs_dir=runs/${"
                + changed[0].partition(":")[0]
                + "}'"
            )
    return list(runs.values())


class _SweepPlanner(Planner):
    """Plans the runs of a sweep; composes those that differ in their seed alone once."""

    def __init__(self) -> None:
        super().__init__()
        self._loader = GlobalHydra.instance().config_loader()
        self._composed: dict[tuple[str, ...], DictConfig] = {}

    def expand(self, sweep: DictConfig, parameters: list[str], arguments: list[str]) -> Iterator[PlannedRun]:
        """Yield the runs of a sweep: the product of its values, those of the experiment first."""
        for job in self._jobs([*parameters, *arguments]):
            try:
                full, seeds = self._compose(sweep, job)
                if (own := _parameters(full)) != parameters:  # a sweep over experiments
                    yield from self.expand(sweep, own, job)
                    continue
                if _plain(full.hydra.launcher) != _plain(sweep.hydra.launcher):
                    raise UserError("a sweep has one launcher: choose it on the command line, launcher=NAME")
                config = OmegaConf.masked_copy(full, [str(key) for key in full if key != "hydra"])
                for seed in seeds:
                    OmegaConf.update(config, "seed", seed)
                with _as_in_job(full):
                    run = self.plan(config, full.hydra.runtime.choices)
            except CompactHydraException as error:
                raise UserError(f"{explain(error)}\nin the run {' '.join(job)}") from error
            deferred = {key: value for key, value in _plain(config.compute).items() if key not in COMPUTE_KEYS}
            yield replace(run, overrides=job, deferred=deferred)

    def _jobs(self, overrides: list[str]) -> list[list[str]]:
        """Return the overrides of each job, as Hydra's own sweeper makes them."""
        parser = OverridesParser.create(config_loader=self._loader)
        with override_errors(overrides):
            parsed = [_listed(override, parser) for override in parser.parse_overrides(overrides)]
            (jobs,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
        return jobs

    def _compose(self, sweep: DictConfig, job: list[str]) -> tuple[DictConfig, list[Any]]:
        """Return the configuration of a job and the seeds given for it, one or none: they change nothing else."""
        others = tuple(override for override in job if not override.startswith("seed="))
        if others not in self._composed:
            self._composed[others] = self._loader.load_sweep_config(sweep, list(others))
        seeds = OverridesParser.create().parse_overrides([override for override in job if override not in others])
        return self._composed[others], [seed.value() for seed in seeds]


def _parameters(config: DictConfig) -> list[str]:
    """Return the values that a configuration sweeps over, as overrides."""
    return [f"{key}={value}" for key, value in (_plain(config.hydra.sweeper).get("params") or {}).items()]


def _plain(node: DictConfig) -> dict[str, Any]:
    content = OmegaConf.to_container(node, resolve=False)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def _listed(override: Override, parser: OverridesParser) -> Override:
    """Return a range as the list of its values: 0.3, not 0.30000000000000004.

    Raises UserError for an interval, and for a range or a pattern without any value: nothing would be trained.
    """
    if override.is_interval_sweep():
        raise UserError(
            f"{override.input_line}: an interval has no values to sweep over; list them, or use range(...)"
        )
    if override.is_sweep_override() and not any(True for _ in override.sweep_string_iterator()):
        raise UserError(
            f"{override.input_line}: no value to sweep over fits this; scripts/list.py prints all choices"
        )
    if not override.is_range_sweep():
        return override
    values = ",".join(f"{value:.12g}" for value in override.sweep_iterator())
    return parser.parse_override(f"{override.get_key_element()}={values}")


@contextlib.contextmanager
def _as_in_job(full: DictConfig) -> Iterator[None]:
    """Resolve interpolations of `hydra:` and of the environment as in the job of a configuration."""
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(full)
    try:
        with env_override({key: str(value) for key, value in full.hydra.job.env_set.items()}):
            yield
    finally:
        HydraConfig.instance().cfg = before


# The jobs.


class PlannedJobs(ConfigLoaderImpl):
    """Gives each job of a sweep the configuration planned for it, instead of composing it again."""

    def __init__(self, runs: Sequence[PlannedRun]) -> None:
        super().__init__(GlobalHydra.instance().config_loader().get_search_path())
        self._runs = {tuple(run.overrides): run for run in runs}

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        run = self._runs[tuple(sweep_overrides)]
        compute = {**run.config["compute"], **(run.deferred or {})}
        config = OmegaConf.masked_copy(master_config, ["hydra"])
        OmegaConf.copy_cache(from_config=master_config, to_config=config)
        config.update({**run.config, "compute": compute, "cell": asdict(run.cell)})
        config.hydra.overrides.task = list(sweep_overrides)
        return config


def read_planned(config: DictConfig) -> PlannedRun:
    """Return the run of a configuration from `PlannedJobs`, whose `_target_`s have been checked."""
    content = resolve(config)
    return PlannedRun(RunKey(**content.pop("cell")), content, folders=None)


def train_job(config: DictConfig) -> None:
    """Train the run of a job. A failure is reported at once, because Hydra goes on to the next job."""
    from l2bn.training.run import run  # here, because it loads torch

    planned = read_planned(config)
    try:
        run(planned, alone=False)
        return
    except Exception as error:
        message = describe(error)
        log.error("%s failed: %s", planned.cell, message)
    # A new error: Hydra keeps it until the sweep ends, and the caught one holds the run's network and images.
    raise UserError(message)


# The launch.


def run_sweep(runs: Sequence[PlannedRun], launch: Launch) -> int:
    """Launch the runs that have not ended, print how each run has ended, and return the exit code.

    It is 0 if all have ended, `interruption.EXIT_CODE` if the sweep was asked to stop, else 1. Raises UserError,
    before anything is launched, for a wrong configuration or a folder that cannot be made.
    """
    from l2bn.training.run import check, check_ended  # here: a process of `run_processes` need not wait for torch

    before = [read_status(run) for run in runs]
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
    Console(highlight=False, soft_wrap=True).print(sweep_summary(after, ended_before))
    return 0 if all(status.ended for status in after) else code


def _judge(run: PlannedRun, error: str | None) -> Status:
    """Return the state in a run's folder, or its error where the run could not even note that there."""
    status = read_status(run)
    if error is not None and status.standing in ("missing", "interrupted"):
        return replace(status, standing="failed", message=error)
    return status


# Runs side by side on this machine.


def hint_at_processes(jobs: int) -> None:
    """Say that runs side by side would take less time, where they would: on a CPU of several cores."""
    if jobs > 1 and available_cores() > 1 and not visible_gpus():
        log.info(
            "%d runs, one after the other; launcher=joblib trains them side by side, which on a CPU is faster", jobs
        )


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
