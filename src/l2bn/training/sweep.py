"""A sweep that finishes itself: issued again, it runs what is missing, and it ends with what became of each run.

Hydra's own multirun starts over each time, and ends by raising the first error. Here the runs that have ended are
left out before anything is launched, and what became of the others is read from their folders, so that it does
not matter how they were launched or how they came to an end.
"""

import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig, OmegaConf, read_write
from rich.console import Console

from l2bn.errors import UserError
from l2bn.records import Record
from l2bn.training.configuration import make_folder
from l2bn.training.failure import describe
from l2bn.training.interruption import EXIT_CODE, Interruption, is_owned
from l2bn.training.outcome import Outcome, look
from l2bn.training.planning import PlannedRun
from l2bn.training.status import summary
from l2bn.training.worker import RunLeftError, visible_gpus

log = logging.getLogger(__name__)

Launch = Callable[[Sequence[Sequence[str]]], Sequence[JobReturn]]
"""Runs the jobs of these overrides, and returns when all have been run."""

ATTEMPTS = 2  # joblib ends all of its processes when one is killed
PATIENCE = 3.0  # seconds that they have for it


def run_sweep(runs: Sequence[PlannedRun], launch: Launch, *, parallel: bool) -> int:
    """Launch the runs that have not ended, and print what became of each; the exit code.

    It is 0 when all have ended, `interruption.EXIT_CODE` when the sweep was told to leave, else 1. `parallel`
    says that the runs have processes of their own on this machine, which are told when this one is. Raises
    UserError, before anything is launched, for a configuration that is wrong or a folder that cannot be made.
    """
    ended_before = {run.folder for run in runs if look(run).ended}
    todo = [run for run in runs if run.folder not in ended_before]
    _check_images([run for run in runs if run.folder in ended_before])
    _check(todo)
    _make_folders(todo)
    errors: dict[Path, str] = {}
    code = 1
    told = Interruption()
    with told if parallel else nullcontext():
        for left in reversed(range(ATTEMPTS if parallel else 1)):
            try:
                errors = _launch(todo, launch)
            except (SystemExit, KeyboardInterrupt):
                code = EXIT_CODE
            except Exception as error:
                log.error("the launcher stopped: %s", describe(error).partition("\n")[0])
                if parallel:
                    _wait_for_killed(todo)
                todo = [run for run in todo if look(run).standing in ("missing", "interrupted")]
                if left and not told.signal:
                    log.warning("the %d runs that have not ended are started once more", len(todo))
                    continue
            break
    if told.signal:
        code = EXIT_CODE
    outcomes = [(run, _judge(run, errors)) for run in runs]
    console = Console(highlight=False, soft_wrap=True)
    console.print(summary(outcomes, ended_before))
    return 0 if all(outcome.ended for _, outcome in outcomes) else code


def _wait_for_killed(runs: Sequence[PlannedRun]) -> None:
    """Wait until the processes that joblib ends together with a killed one have left their runs.

    It says that one was killed before it ends the others. A run that somebody else is at work on stays his.
    """
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and any(is_owned(run.folder) for run in runs):
        time.sleep(0.05)


def _check(runs: Sequence[PlannedRun]) -> None:
    """Raise UserError if one of these configurations is wrong."""
    if not runs:
        return
    from l2bn.training.run import check  # seconds of imports that a sweep with nothing to do need not spend

    for run in runs:
        try:
            check(run.config, run.files)
        except UserError as error:
            raise UserError(f"{run.cell}: {error}") from error


def _check_images(ended: Sequence[PlannedRun]) -> None:
    """Raise UserError if a run that has ended was made on other images than those present."""
    if not ended:
        return
    from l2bn.training.run import check_ended  # seconds of imports

    check_ended((Record.read(run.folder), run.config) for run in ended)


def _make_folders(runs: Sequence[PlannedRun]) -> None:
    """Make the folders that the runs are to lie in, which else the launcher would fail to do."""
    for folder in dict.fromkeys(Path(run.config["runs_dir"]) for run in runs):
        make_folder(folder)


def _launch(runs: Sequence[PlannedRun], launch: Launch) -> dict[Path, str]:
    """Launch these runs; what the failed ones say."""
    returns = launch([run.overrides for run in runs]) if runs else []
    errors = {run.folder: done._return_value for run, done in zip(runs, returns, strict=True) if _failed(done)}
    return {folder: describe(error) for folder, error in errors.items() if not isinstance(error, RunLeftError)}


def _failed(job: JobReturn) -> bool:
    return bool(job.status == JobStatus.FAILED)


def _judge(run: PlannedRun, errors: dict[Path, str]) -> Outcome:
    """How a run stands, by its folder; by its error where it could not even be noted there."""
    outcome = look(run)
    if run.folder in errors and outcome.standing in ("missing", "interrupted"):
        return Outcome("failed", outcome.epoch, outcome.pace, errors[run.folder])
    return outcome


def prepare_launcher(launcher: DictConfig) -> bool:
    """Make sure of the launcher's package: share the machine out among the processes of joblib, and see to it that
    submitit waits for all of its jobs.

    Returns whether the runs will have processes of their own on this machine. Raises UserError if the package
    is not installed.
    """
    package = ".".join(str(launcher._target_).split(".")[:2])
    if package.startswith("hydra_plugins.") and find_spec(package) is None:
        name = package.removeprefix("hydra_plugins.").replace("_", "-")
        raise UserError(
            f"this launcher needs the package {name}, which is not installed; "
            "pip install 'l2bn[launchers]', or take launcher=basic"
        )
    if package.endswith("submitit_launcher"):
        _outlive_jobs()
    if not package.endswith("joblib_launcher"):
        return False
    from joblib import cpu_count

    gpus = visible_gpus()
    if launcher.n_jobs < 0:
        with read_write(launcher):
            OmegaConf.update(launcher, "n_jobs", len(gpus) or cpu_count())
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    return bool(launcher.n_jobs > 1)


def _outlive_jobs() -> None:
    """Make how a job of submitit died its result.

    The launcher asks one job after the other for its result, and would leave off at the first that has none, while
    others run or stand in the queue.
    """
    from submitit import Job

    results = Job.results

    def results_or_death(job: "Job[JobReturn]") -> list[JobReturn]:
        try:
            return results(job)
        except Exception as error:
            return [JobReturn(status=JobStatus.FAILED, _return_value=error)]

    Job.results = results_or_death  # type: ignore[method-assign, assignment]
