"""From what Hydra composed to a plain configuration: values resolved, the run's cell named."""

from collections.abc import Mapping
from typing import Any

from hydra import compose
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from l2bn.errors import UserError
from l2bn.records import Record
from l2bn.training.identity import GROUPS, name_cell
from l2bn.training.run import check_complete, run


def train_from_hydra(config: DictConfig, choices: Mapping[str, str | None]) -> Record:
    """Train the run that Hydra composed; `choices` are the options chosen in each group."""
    resolved = resolve(config)
    check_complete(resolved)
    chosen = {group: _one_choice(group, choices.get(group)) for group in GROUPS}
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


def _one_choice(group: str, choice: str | None) -> str:
    if choice is None:  # a list of them, or the group taken out
        raise UserError(f"{group} takes one choice, as in {group}=NAME; several are a sweep: -m {group}=ONE,OTHER")
    return choice
