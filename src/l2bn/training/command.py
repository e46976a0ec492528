"""What a job of Hydra does: the run that was composed, alone or as one of a sweep."""

import logging
from collections.abc import Mapping

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from l2bn.records import CONFIG, Record
from l2bn.training.failure import describe, note_failure
from l2bn.training.interruption import is_owned
from l2bn.training.planning import PlannedRun, plan_run
from l2bn.training.worker import side_by_side

log = logging.getLogger(__name__)


def train_from_hydra(config: DictConfig, choices: Mapping[str, str | None]) -> Record:
    """Train the run that Hydra composed; `choices` are the options chosen in each group."""
    with side_by_side():
        from l2bn.training.run import run  # here, because it loads torch, which then finds this process's GPU

        planned = plan_run(config, choices)
        try:
            return run(planned.config, planned.cell, planned.files)
        except Exception as error:
            if _in_a_sweep():
                _tell(planned, error)
            raise


def _in_a_sweep() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def _tell(planned: PlannedRun, error: Exception) -> None:
    """Say at once that a run of a sweep failed, since Hydra goes on to the next.

    A run that got as far as its folder has noted it there itself; into that of another process nothing is written.
    """
    log.error("%s failed: %s", planned.cell, describe(error))
    if not (planned.folder / CONFIG).exists() and not is_owned(planned.folder):
        note_failure(planned.folder, error)
