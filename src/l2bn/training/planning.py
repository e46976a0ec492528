"""From the overrides of a command to the runs that it stands for, each with its place in the grid.

Light on purpose: neither torch nor a data set is loaded to say which runs a sweep is made of.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from hydra import compose
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from l2bn.errors import UserError
from l2bn.records import CONFIG
from l2bn.training.configuration import check_complete
from l2bn.training.identity import GROUPS, Cell, Config, differences, hash_identity, identity, name_cell

ROOT = "train"  # the file of configs/ that every run is composed from


@dataclass(frozen=True)
class PlannedRun:
    """A run that is to be: its place in the grid, and all that it is made from."""

    cell: Cell
    config: Config
    files: list[str]  # of configs/, that the configuration was composed of
    overrides: Sequence[str] = ()  # from which Hydra composes it as a job of its sweep

    @property
    def folder(self) -> Path:
        return Path(self.config["runs_dir"]) / self.cell.path

    @cached_property
    def identity(self) -> dict[str, Any]:
        return identity(self.config)

    @cached_property
    def hash(self) -> str:
        return hash_identity(self.identity)


def plan_run(config: DictConfig, choices: Mapping[str, str | None]) -> PlannedRun:
    """The run that Hydra composed; `choices` are the options chosen in each group. Raises UserError."""
    return _planned(config, choices, {}, ())


def plan_sweep(sweep: DictConfig) -> list[PlannedRun]:
    """Every run of a sweep, in its order, given the configuration that Hydra composed for the whole of it.

    Runs are composed one by one, so that a wrong name or key in any of them is found here. Raises UserError,
    also where two runs would have one folder.
    """
    composed: dict[tuple[str, ...], DictConfig] = {}
    defaults: dict[tuple[str, ...], Config] = {}
    runs: dict[Path, PlannedRun] = {}
    for overrides in expand(sweep):
        # A seed is a plain value: it is set afterwards, because composing takes 50 ms.
        seeds = [override for override in overrides if override.startswith("seed=")]
        others = tuple(override for override in overrides if override not in seeds)
        if others not in composed:
            composed[others] = compose(ROOT, list(others), return_hydra_config=True)
        full = composed[others]
        config = OmegaConf.masked_copy(full, [str(key) for key in full if key != "hydra"])
        for seed in OverridesParser.create().parse_overrides(seeds):
            OmegaConf.update(config, "seed", seed.value())
        run = _planned(config, full.hydra.runtime.choices, defaults, overrides)
        _check_names(run.config)
        first = runs.setdefault(run.folder, run)
        changed = differences(first.identity, run.identity)
        if changed:
            raise UserError(
                f"two runs of this sweep would have one folder, {run.folder}; they differ in\n"
                + "".join(f"  {line}\n" for line in changed)
                + "sweep over values that are part of a run's name, or give each its own runs_dir"
            )
    return list(runs.values())


def find_runs(root: Path) -> list[PlannedRun]:
    """Every run that has begun under a folder; what is no run's configuration is passed over."""
    runs = []
    for path in sorted(root.rglob(CONFIG)):
        try:
            config = yaml.safe_load(path.read_text())
            cell = Cell(**config.pop("cell"))
            run = PlannedRun(cell, {**config, "runs_dir": str(path.parents[len(cell.path.parts)])}, [])
            _check_names(run.config)
            identity(run.config)
        except (
            OSError,
            yaml.YAMLError,
            UserError,
            UnicodeDecodeError,
            ValueError,
            AttributeError,
            IndexError,
            KeyError,
            TypeError,
        ):
            continue
        runs.append(run)
    return runs


def compose_sweep(overrides: Sequence[str]) -> DictConfig:
    """The configuration of a whole sweep, as the command `train.py -m` would compose it."""
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    return hydra.compose_config(ROOT, [*overrides, "hydra.mode=MULTIRUN"], run_mode=RunMode.MULTIRUN)


def expand(sweep: DictConfig) -> list[list[str]]:
    """The overrides of each job: the product of all that a sweep goes over, the experiment's first."""
    parameters = [f"{key}={value}" for key, value in (sweep.hydra.sweeper.params or {}).items()]
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    overrides = parser.parse_overrides([*parameters, *sweep.hydra.overrides.task])
    (jobs,) = BasicSweeper.split_arguments(overrides, max_batch_size=None)
    return jobs


def resolve(config: DictConfig, *, missing: bool = False) -> dict[str, Any]:
    """The configuration as plain values; a data set without a label is called by the name of its folder.

    Raises UserError for a value that must be given and is not.
    """
    try:
        content = OmegaConf.to_container(config, resolve=True, throw_on_missing=not missing)
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key} has no value; give it one, as in {error.full_key}=...") from None
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {error.msg}") from None
    assert isinstance(content, dict)
    dataset = content.get("dataset")
    if isinstance(dataset, dict) and dataset.get("label", "") is None and dataset.get("root") not in (None, "???"):
        dataset["label"] = Path(os.path.abspath(dataset["root"])).name  # noqa: PTH100 (a link's own name)
    return {str(key): value for key, value in content.items()}


def _check_names(config: Config) -> None:
    """What a run's folder and length are told by must be there; the rest shows when the run is made."""
    for key, value, kind, word in (
        ("seed", config["seed"], int, "a whole number"),
        ("recipe.epochs", config["recipe"]["epochs"], int, "a whole number"),
        ("runs_dir", config["runs_dir"], str, "a text"),
    ):
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(f"{key} must be {word}, not {value!r}")


def _planned(
    config: DictConfig,
    choices: Mapping[str, str | None],
    defaults: dict[tuple[str, ...], Config],
    overrides: Sequence[str],
) -> PlannedRun:
    """A run; `defaults` holds what choices alone compose to, of those met before."""
    resolved = resolve(config)
    check_complete(resolved)
    chosen = {group: _one_choice(group, choices.get(group)) for group in GROUPS}
    key = tuple(f"{group}={choice}" for group, choice in chosen.items())
    if key not in defaults:
        defaults[key] = resolve(compose(ROOT, list(key)), missing=True)
    files = [f"{group}/{choice}.yaml" for group, choice in choices.items() if choice]
    cell = name_cell(resolved, defaults[key], chosen)
    return PlannedRun(cell, resolved, [f"{ROOT}.yaml", *files], overrides)


def _one_choice(group: str, choice: str | None) -> str:
    if choice is None:  # a list of them, or the group taken out
        raise UserError(f"{group} takes one choice, as in {group}=NAME; several are a sweep: -m {group}=ONE,OTHER")
    return choice
