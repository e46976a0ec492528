"""The sweeper of this suite, in the package where Hydra looks for plugins; `l2bn.training.sweep` does the work."""

from collections.abc import Sequence
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class ResumingSweeper(BasicSweeper):
    """Launches the runs that have not ended, and ends with a summary of all runs."""

    def __init__(self, max_batch_size: int | None = None, params: Any = None, **others: Any) -> None:
        super().__init__(max_batch_size, params)
        self._others = others  # the options of another sweeper

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from l2bn.errors import UserError  # here, because Hydra loads this module in programs of others, too

        if self._others:
            raise UserError(
                f"hydra/sweeper={config.hydra.runtime.choices['hydra/sweeper']} cannot be used here: sweep over "
                "listed values, as in -m recipe.lr=0.05,0.1"
            )
        self.hydra_context, self.config = hydra_context, config

    def sweep(self, arguments: list[str]) -> None:
        """Exits with 1 or `interruption.EXIT_CODE` unless all runs have ended."""
        from l2bn.errors import expand
        from l2bn.training.sweep import PlannedJobs, plan_sweep, run_sweep, train_job

        assert self.config is not None
        assert self.hydra_context is not None
        runs = plan_sweep(self.config)
        self.config.hydra.sweep.dir = str(expand(self.config.hydra.sweep.dir, "hydra.sweep.dir"))
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=HydraContext(config_loader=PlannedJobs(runs), callbacks=self.hydra_context.callbacks),
            task_function=train_job,
            config=self.config,
        )
        code = run_sweep(runs, self._launch)
        if code:
            raise SystemExit(code)

    def _launch(self, jobs: Sequence[Sequence[str]]) -> list[JobReturn]:
        from l2bn.training.sweep import hint_at_processes

        assert self.launcher is not None
        if isinstance(self.launcher, BasicLauncher):
            hint_at_processes(len(jobs))
        returns: list[JobReturn] = []
        for batch in self.split_overrides_to_chunks([list(job) for job in jobs], self.max_batch_size):
            returns += self.launcher.launch(batch, initial_job_idx=len(returns))
        return returns
