"""The launchers of runs side by side, in the package where Hydra looks for plugins; each run is a process.

launcher=joblib starts processes on this machine, launcher=slurm jobs of a Slurm cluster. Imports are local, because
Hydra loads this module at every start, also in programs of others.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


@dataclass
class ProcessesConfig:
    """Options of launcher=joblib."""

    _target_: str = "hydra_plugins.l2bn_launchers.ProcessLauncher"
    n_jobs: int = -1


@dataclass
class SlurmConfig:
    """Options of launcher=slurm: those of `sbatch` and submitit, where null is the cluster's default.

    Other options of sbatch go into `additional_parameters`.
    """

    _target_: str = "hydra_plugins.l2bn_launchers.SlurmLauncher"
    cluster: str = "slurm"  # "local" starts the same jobs as processes, to try a set-up without Slurm
    submitit_folder: str = "${hydra.sweep.dir}/.submitit/%j"
    timeout_min: int = 60
    cpus_per_task: int | None = None
    gpus_per_node: int | None = None
    mem_gb: int | None = None
    name: str = "${hydra.job.name}"
    partition: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gres: str | None = None
    account: str | None = None
    signal_delay_s: int = 120
    max_num_timeout: int = 0
    additional_parameters: dict[str, Any] = field(default_factory=dict)
    array_parallelism: int = 256
    setup: list[str] | None = None


# The options that submitit has for every cluster; the others are Slurm's.
COMMON = {"timeout_min", "cpus_per_task", "gpus_per_node", "mem_gb", "name"}

for name, options in (("l2bn_processes", ProcessesConfig), ("l2bn_slurm", SlurmConfig)):
    ConfigStore.instance().store(group="hydra/launcher", name=name, node=options, provider="l2bn")


@dataclass
class Job:
    """The job of one run, callable in any process; submitit calls `checkpoint` before it requeues a job."""

    config: DictConfig
    task_function: TaskFunction
    hydra_context: HydraContext

    def __call__(self) -> bool:
        """Run the job; return whether it has succeeded. Its task reports a failure itself."""
        from l2bn.errors import optional_output

        setup_globals()
        with optional_output():
            done = run_job(
                hydra_context=self.hydra_context,
                task_function=self.task_function,
                config=self.config,
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
            )
        return bool(done.status == JobStatus.COMPLETED)

    def checkpoint(self) -> Any:
        """Return the same job, which goes on from the checkpoint of its run."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


class _JobLauncher(Launcher):
    """Makes a job of each configuration; subclasses run the jobs."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._context, self._task, self._config = hydra_context, task_function, config

    def _jobs(self, job_overrides: Sequence[Sequence[str]]) -> list[Job]:
        load = self._context.config_loader.load_sweep_config
        return [Job(load(self._config, list(overrides)), self._task, self._context) for overrides in job_overrides]


class ProcessLauncher(_JobLauncher):
    """Runs jobs as processes of this machine, `n_jobs` at a time: the GPUs and CPU cores are shared out.

    n_jobs: -1 for as many as the GPUs suffice for, with `compute.devices` each; without a GPU the CPU cores.
    """

    def __init__(self, n_jobs: int) -> None:
        from l2bn.errors import UserError

        if n_jobs < 1 and n_jobs != -1:
            raise UserError(f"hydra.launcher.n_jobs must be at least 1, or -1 for all GPUs or cores, not {n_jobs}")
        self.n_jobs = n_jobs

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        from l2bn.training.sweep import run_processes

        jobs = self._jobs(job_overrides)
        devices = max(job.config.compute.devices for job in jobs)
        endings = run_processes(jobs, self.n_jobs, devices)
        return [_returned(failure) for failure in endings]


class SlurmLauncher(_JobLauncher):
    """Submits jobs to Slurm through submitit, and waits until all have ended."""

    def __init__(self, **options: Any) -> None:
        self.options: dict[str, Any] = {
            key: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            for key, value in options.items()
        }

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        from l2bn.errors import UserError

        try:
            from submitit import AutoExecutor
        except ImportError as error:
            raise UserError(
                "launcher=slurm needs the package submitit, which is not installed; pip install 'l2bn[launchers]', "
                "or take launcher=basic or launcher=joblib"
            ) from error
        options = dict(self.options)
        cluster = options.pop("cluster")
        executor = AutoExecutor(
            cluster=cluster,
            folder=options.pop("submitit_folder"),
            slurm_max_num_timeout=options.pop("max_num_timeout"),
        )
        named = {key if key in COMMON else f"slurm_{key}": value for key, value in options.items()}
        executor.update_parameters(tasks_per_node=1, **named)  # a second task would train the same run
        submitted = executor.submit_array(self._jobs(job_overrides))
        return [_returned(_failure(job)) for job in submitted]


def _failure(job: Any) -> str | None:
    """Wait for a job of submitit; return how it failed, None if it did not."""
    error = job.exception()
    if error is not None:
        return f"its job was ended: {error}"
    return None if job.result() else f"its job failed; its log is {job.paths.stdout}"


def _returned(failure: str | None) -> JobReturn:
    from l2bn.errors import UserError

    if failure is None:
        return JobReturn(status=JobStatus.COMPLETED)
    return JobReturn(status=JobStatus.FAILED, _return_value=UserError(failure))
