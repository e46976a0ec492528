"""The sweeper of this suite, where Hydra looks for plugins; what it does is in `l2bn.training.sweep`."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

# A launcher whose package is missing composes all the same, so that the sweeper can say what to install.
for launcher, package in (
    ("joblib", "hydra_plugins.hydra_joblib_launcher"),
    ("submitit_slurm", "hydra_plugins.hydra_submitit_launcher"),
):
    if find_spec(package) is None:
        ConfigStore.instance().store(group="hydra/launcher", name=launcher, node={"_target_": f"{package}.missing"})


class ResumingSweeper(BasicSweeper):
    """Launches the runs that have not ended, and ends with what became of all."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from l2bn.training.sweep import prepare_launcher  # here, because Hydra loads this module at every start

        self.parallel = prepare_launcher(config.hydra.launcher)
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> Any:
        """Exits with 1 or `interruption.EXIT_CODE` unless all runs have ended."""
        from l2bn.training.planning import plan_sweep
        from l2bn.training.sweep import run_sweep

        assert self.config is not None
        code = run_sweep(plan_sweep(self.config), self._launch, parallel=self.parallel)
        if code:
            raise SystemExit(code)

    def _launch(self, jobs: Sequence[Sequence[str]]) -> list[JobReturn]:
        assert self.launcher is not None
        returns: list[JobReturn] = []
        for batch in self.split_overrides_to_chunks([list(job) for job in jobs], self.max_batch_size):
            returns += self.launcher.launch(batch, initial_job_idx=len(returns))
        return returns
