"""From what Hydra composed to a plain configuration: values resolved, the run's cell named."""

import logging
import warnings
from collections.abc import Mapping
from typing import Any

from hydra import compose
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from l2bn.errors import UserError
from l2bn.records import Record
from l2bn.training.identity import GROUPS, name_cell
from l2bn.training.run import run


def train_from_hydra(config: DictConfig, choices: Mapping[str, str | None]) -> Record:
    """Train the run that Hydra composed; `choices` are the options chosen in each group."""
    _quieten()
    resolved = resolve(config)
    chosen = {group: str(choices[group]) for group in GROUPS}
    defaults = resolve(compose("train", [f"{group}={choice}" for group, choice in chosen.items()]), missing=True)
    files = [f"{group}/{choice}.yaml" for group, choice in choices.items() if choice]
    return run(resolved, name_cell(resolved, defaults, chosen), ["train.yaml", *files])


def resolve(config: DictConfig, *, missing: bool = False) -> dict[str, Any]:
    """The configuration as plain values. Raises UserError for a value that must be given and is not."""
    try:
        content = OmegaConf.to_container(config, resolve=True, throw_on_missing=not missing)
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key} has no value; give it one, as in {error.full_key}=...") from None
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {error.msg}") from None
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def _quieten() -> None:
    """Leave out what libraries say that a user can do nothing about."""
    for name, level in (("lightning_fabric", logging.WARNING), ("torch.utils.cpp_extension", logging.ERROR)):
        logging.getLogger(name).setLevel(level)
    warnings.filterwarnings("ignore", module="lightning_fabric")
