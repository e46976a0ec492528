"""The plan of a command: every run that it stands for, its place in the grid and its configuration.

Hydra expands and composes; this module adds names and identities. A run is trained with the configuration planned
for it: a job of a sweep is handed that configuration (`PlannedJobs`) and composes nothing, so that an edit of a
YAML file does not reach a sweep that has begun. The module imports neither torch nor a data set, to plan fast.
"""

import contextlib
import copy
import hashlib
import importlib.resources
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import env_override
from hydra.errors import CompactHydraException, ConfigCompositionException
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from l2bn.errors import UserError
from l2bn.failures import explain, explained_overrides
from l2bn.records import CONFIG, is_plain_name
from l2bn.training.instantiate import CONFIGS, Builder, check_mapping, is_hidden

log = logging.getLogger(__name__)

ROOT = "train"  # the YAML file that every run is composed from
GROUPS = ("dataset", "backbone", "norm", "recipe")
NODES = (*GROUPS, "compute", "checkpoint", "analysis")
COMPUTE_KEYS = ("precision", "devices", "sync_bn")  # the keys of `compute` that are part of a run's identity

Config = Mapping[str, Any]


# Settings.


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The keys of a configuration besides its nodes."""

    seed: int
    runs_dir: str
    progress: bool

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, not {self.seed}")
        if not self.runs_dir:
            raise ValueError("runs_dir is empty: name a folder, '.' for this one")


def check_complete(config: Config) -> None:
    """Raise UserError unless a configuration has all that names a run and tells its length."""
    needed = (*NODES, *Settings.__dataclass_fields__)
    missing = [key for key in needed if key not in config]
    if not missing:
        for name in NODES:
            check_mapping(config[name], name)
        below = (("recipe", "epochs"), *(("compute", key) for key in COMPUTE_KEYS))
        missing = [f"{node}.{key}" for node, key in below if key not in config[node]]
    if missing:
        raise UserError(f"missing {', '.join(missing)}: a configuration has {', '.join(needed)}")


def read_settings(config: Config, builder: Builder) -> Settings:
    """The keys of a configuration besides its nodes. Raises UserError, also for an unknown key."""
    known = [*NODES, *Settings.__dataclass_fields__]
    for key in config.keys() - known:
        if key == "experiment":
            raise UserError(
                f'{key} is not a key: the file of an experiment begins with the line "# @package _global_"'
            )
        for node in NODES:
            if key in config[node]:
                raise UserError(f"unknown key {key}; did you mean {node}.{key}?")
    builder.check_keys(config, known, "")
    settings: Settings = builder.call(Settings, {k: v for k, v in config.items() if k not in NODES}, "")
    return settings


def make_folder(folder: Path) -> None:
    """Make `runs_dir`, or a folder in it. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"runs_dir: cannot make the folder {folder}: {error.strerror}; name another by runs_dir=FOLDER"
        ) from error


# Identity.

# Where the files are, how they are read and which kernels compute the same thing change the result by rounding at
# most: a run can move between machines.
MACHINE_KEYS = frozenset({"root", "devkit", "download", "cache", "workers", "fused"})

LONGEST_NAME = 200  # bytes; file systems allow 255


@dataclass(frozen=True)
class Cell:
    """The place of a run in the grid. Each name is a choice of its group and the values overridden in it."""

    dataset: str
    backbone: str
    norm: str
    recipe: str
    seed: int

    def __post_init__(self) -> None:
        for group in GROUPS:
            name = getattr(self, group)
            if not is_plain_name(name):
                raise ValueError(f"{group} must be a plain name, not {name!r}")

    @property
    def path(self) -> Path:
        """The run's folder, relative to the folder of all runs."""
        return Path(self.dataset, self.backbone, self.norm, self.recipe, f"seed{self.seed}")

    def __str__(self) -> str:
        return self.path.as_posix()


def name_cell(config: Config, defaults: Config, choices: Mapping[str, str]) -> Cell:
    """The cell of a configuration; `defaults` is the configuration that the choices alone compose to."""
    names = {group: _name(choices[group], config[group], defaults[group]) for group in GROUPS}
    return Cell(**names, seed=config["seed"])


def identity(config: Config) -> dict[str, Any]:
    """The part of a configuration that can change the result."""
    compute = {key: config["compute"][key] for key in COMPUTE_KEYS}
    return {**{group: _without_machine_keys(config[group]) for group in GROUPS}, **compute, "seed": config["seed"]}


def hash_identity(content: Config) -> str:
    """16 hexadecimal digits; 1 and 1.0 have the same hash."""
    text = json.dumps(list(_flatten(content)), default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def differences(one: Config, other: Config) -> list[str]:
    """A line for each key in which two identities differ, with both values."""
    a, b = dict(_flatten(one)), dict(_flatten(other))
    missing = "not there"
    return [
        f"{key}: {a.get(key, missing)} against {b.get(key, missing)}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key, missing) != b.get(key, missing)
    ]


def check_images(stored: Mapping[str, Any] | None, present: Mapping[str, Any], place: Path) -> None:
    """Raise UserError if a run was made on other images than those present; both are fingerprints.

    Equal files that decode to other pixels, as with another version of a decoder, cause a warning. A run from
    before there were fingerprints has None.
    """
    if stored is None:
        log.info("%s has no fingerprint of its images: they are not compared with those present", place)
    elif stored["files"] != present["files"]:
        raise UserError(
            f"{place} was made on other images than those present: files, their labels or their contents differ\n"
            "bring its images back, give these a name of their own by dataset.label=NAME, or move the folder away"
        )
    elif stored["pixels"] != present["pixels"]:
        log.warning("%s was made on the same files decoded to other pixels, by another version of a decoder", place)


def _name(choice: str, node: Config, default: Config) -> str:
    """A choice and the values overridden in it: "l2bn,eps=0.001"."""
    a, b = (dict(_flatten(_without_machine_keys(tree))) for tree in (node, default))
    changed = [f"{key}={a.get(key)}" for key in sorted(a.keys() | b.keys()) if a.get(key, ...) != b.get(key, ...)]
    name = ",".join([choice, *changed])
    name = "".join("_" if letter in "/ " or not letter.isprintable() else letter for letter in name)
    if len(name.encode()) > LONGEST_NAME:
        digest = hashlib.blake2b(name.encode(), digest_size=8).hexdigest()
        name = f"{choice},{digest}"
    return name


def _without_machine_keys(node: Config) -> dict[str, Any]:
    return {key: value for key, value in node.items() if key not in MACHINE_KEYS}


def _flatten(tree: Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values, in a fixed order, with whole floats as integers."""
    for key, value in sorted(tree.items(), key=lambda item: str(item[0])):
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", int(value) if isinstance(value, float) and value.is_integer() else value


# Composition.


class _Repository(ConfigRepository):
    """Hydra's YAML files, without the hidden ones."""

    def get_group_options(
        self, group_name: str, results_filter: ObjectType | None = ObjectType.CONFIG
    ) -> list[str]:
        return [name for name in super().get_group_options(group_name, results_filter) if not is_hidden(Path(name))]

    def load_config(self, config_path: str) -> ConfigResult | None:
        try:
            return super().load_config(config_path)
        except UnicodeDecodeError as error:
            raise UserError(f"{config_path}.yaml is not UTF-8 text: {error}; save it as UTF-8") from error


class _Loader(ConfigLoaderImpl):
    """Hydra's loader. A value on the command line of a sweep needs to fit each job, not the default choices."""

    def __init__(self, search_path: ConfigSearchPath) -> None:
        super().__init__(search_path)
        self.repository = _Repository(search_path)

    def load_configuration(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        with explained_overrides(overrides):
            values: dict[str | None, Override] = {}
            if run_mode == RunMode.MULTIRUN:
                found = self.compute_defaults_list(config_name, overrides, run_mode).config_overrides
                values = {value.input_line: value for value in found if not value.is_hydra_override()}
            choices = [override for override in overrides if override not in values]
            config = super().load_configuration(
                config_name, choices, run_mode, from_shell, validate_sweep_overrides
            )
            for value in values.values():
                # A value that does not fit here is judged in each job.
                with contextlib.suppress(ConfigCompositionException):
                    self._apply_overrides_to_config([value], config)
            if values:
                parsed = OverridesParser.create().parse_overrides(overrides)
                config.hydra.overrides.task = [o.input_line for o in parsed if not o.is_hydra_override()]
            return config


@contextlib.contextmanager
def composing(overrides: Sequence[str] = (), folders: Sequence[Path] = ()) -> Iterator[tuple[Hydra, list[str]]]:
    """Have Hydra compose from `configs/` and from a user's own folders, those of `hydra.searchpath` among them.

    Yields Hydra and the other overrides. Raises UserError for a folder that does not exist.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"--config-dir: there is no folder {folder}")
    with initialize_config_dir(str(CONFIGS), job_name="l2bn", version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        search_path = hydra.config_loader.get_search_path()
        own = [f"file://{folder.resolve()}" for folder in folders]
        rest = []
        for override in OverridesParser.create().parse_overrides(list(overrides)):
            if override.key_or_group == "hydra.searchpath":
                value = override.value()
                if not isinstance(value, list) or not all(isinstance(path, str) for path in value):
                    raise UserError(f"hydra.searchpath must be a list of folders, [file://FOLDER], not {value!r}")
                own += value
            else:
                rest.append(str(override.input_line))
        for path in own:
            search_path.prepend("command-line", path, SearchPathQuery(provider="schema"))
        loader = _Loader(search_path)
        for source in loader.get_sources():
            if not source.available():
                raise UserError(f"hydra.searchpath: there is no folder {source.full_path()}")
        hydra.config_loader = loader
        yield hydra, rest


def _own_sources() -> list[ConfigSource]:
    """The sources of YAML files on Hydra's search path, without Hydra's own."""
    sources = GlobalHydra.instance().config_loader().get_sources()
    return [source for source in sources if source.provider in ("main", "command-line")]


def _folder(source: ConfigSource) -> Path:
    """The folder of a source of YAML files."""
    if source.scheme() == "pkg":
        return Path(str(importlib.resources.files(source.path)))
    return Path(source.path).resolve()


def own_folders() -> list[Path]:
    """`configs/` and the user's own folders of YAML files."""
    return [_folder(source) for source in _own_sources()]


def compose_sweep(overrides: Sequence[str]) -> DictConfig:
    """The configuration of a whole sweep, as the command `train.py -m` composes it."""
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    return hydra.compose_config(ROOT, [*overrides, "hydra.mode=MULTIRUN"], run_mode=RunMode.MULTIRUN)


def resolve(config: DictConfig, *, missing: bool = False) -> dict[str, Any]:
    """A configuration as plain values; the label of a data set that has none is the name of its folder.

    Raises UserError for a value that is required and missing.
    """
    try:
        content = OmegaConf.to_container(config, resolve=True, throw_on_missing=not missing)
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key} has no value; give it one, as in {error.full_key}=...") from None
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {error.msg}") from None
    assert isinstance(content, dict)
    dataset = content.get("dataset")
    if isinstance(dataset, dict) and dataset.get("label", "") is None:
        root = dataset.get("root")
        if isinstance(root, str) and root != "???":
            dataset["label"] = Path(os.path.abspath(root)).name  # noqa: PTH100 (a link's own name)
    return {str(key): value for key, value in content.items()}


# Runs.


@dataclass(frozen=True)
class PlannedRun:
    """A run to be trained.

    files: the YAML files that its configuration was composed of, relative to the folder of each.
    folders: the folders of YAML files whose `_target_`s it may call; None once they have been checked.
    overrides: its job's in a sweep.
    deferred: the values of `compute` that its job resolves, because they may depend on the job's environment.
    """

    cell: Cell
    config: Config
    files: Sequence[str] = ()
    folders: Sequence[Path] | None = (CONFIGS,)
    overrides: Sequence[str] = ()
    deferred: Mapping[str, Any] | None = None

    @property
    def folder(self) -> Path:
        return Path(self.config["runs_dir"]) / self.cell.path

    @property
    def builder(self) -> Builder:
        return Builder(self.folders, self.files)

    @cached_property
    def identity(self) -> dict[str, Any]:
        return identity(self.config)

    @cached_property
    def hash(self) -> str:
        return hash_identity(self.identity)


def plan_run(config: DictConfig, hydra: Any) -> PlannedRun:
    """The run of a configuration that Hydra composed, given with its `hydra` node. Raises UserError."""
    return _Planner().plan(config, hydra.runtime.choices, ())


def plan_sweep(sweep: DictConfig) -> list[PlannedRun]:
    """Every run of a sweep, in order, given the configuration that Hydra composed for the whole sweep.

    Every run is composed, so that a wrong name or key in any of them is found here. Raises UserError, also where
    two runs would have one folder.
    """
    runs: dict[Path, PlannedRun] = {}
    for run in _Planner().expand(sweep):
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


class _Planner:
    """Plans the runs of one command; composes equal choices once, because composing takes 50 ms."""

    def __init__(self) -> None:
        self._loader = GlobalHydra.instance().config_loader()
        self._sources = _own_sources()
        self._composed: dict[tuple[str, ...], DictConfig] = {}
        self._defaults: dict[tuple[str, ...], Config] = {}

    def expand(self, sweep: DictConfig) -> Iterator[PlannedRun]:
        """The runs of a sweep: the product of all that it goes over, the experiment's parameters first."""
        arguments = OmegaConf.to_container(sweep.hydra.overrides.task, resolve=False)
        assert isinstance(arguments, list)
        yield from self._expand(sweep, _parameters(sweep), arguments)

    def _expand(self, sweep: DictConfig, parameters: list[str], arguments: list[str]) -> Iterator[PlannedRun]:
        for job in self._jobs([*parameters, *arguments]):
            try:
                full, seed = self._compose(sweep, job)
                if (own := _parameters(full)) != parameters:  # of an experiment that is swept over
                    yield from self._expand(sweep, own, job)
                    continue
                if _plain(full.hydra.launcher) != _plain(sweep.hydra.launcher):
                    raise UserError("a sweep has one launcher: choose it on the command line, launcher=NAME")
                config = OmegaConf.masked_copy(full, [str(key) for key in full if key != "hydra"])
                if seed is not None:
                    OmegaConf.update(config, "seed", seed)
                with _as_in_job(full):
                    run = self.plan(config, full.hydra.runtime.choices, job)
            except CompactHydraException as error:
                raise UserError(f"{explain(error)}\nin the run {' '.join(job)}") from error
            yield run

    def _jobs(self, overrides: list[str]) -> list[list[str]]:
        """The overrides of each job, as Hydra's own sweeper makes them."""
        parser = OverridesParser.create(config_loader=self._loader)
        with explained_overrides(overrides):
            parsed = [_listed(override, parser) for override in parser.parse_overrides(overrides)]
            (jobs,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
        return jobs

    def _compose(self, sweep: DictConfig, job: list[str]) -> tuple[DictConfig, object]:
        """The configuration of a job, and the seed that is to be set in it."""
        # A seed changes no other value, so that it can be set afterwards.
        others = tuple(override for override in job if not override.startswith("seed="))
        if others not in self._composed:
            self._composed[others] = self._loader.load_sweep_config(sweep, list(others))
        seeds = OverridesParser.create().parse_overrides([override for override in job if override not in others])
        return self._composed[others], seeds[0].value() if seeds else None

    def plan(self, config: DictConfig, choices: Mapping[str, str | None], overrides: Sequence[str]) -> PlannedRun:
        resolved = resolve(config)
        check_complete(resolved)
        if isinstance(resolved["runs_dir"], str):
            resolved["runs_dir"] = str(Path(resolved["runs_dir"]).expanduser()) if resolved["runs_dir"] else ""
        chosen = {group: _one_choice(group, choices.get(group)) for group in GROUPS}
        key = tuple(f"{group}={choice}" for group, choice in chosen.items())
        if key not in self._defaults:
            self._defaults[key] = resolve(compose(ROOT, list(key)), missing=True)
        deferred = OmegaConf.to_container(config.compute, resolve=False)
        assert isinstance(deferred, dict)
        return PlannedRun(
            cell=name_cell(resolved, self._defaults[key], chosen),
            config=resolved,
            files=[f"{ROOT}.yaml", *self._files(choices)],
            folders=own_folders(),
            overrides=overrides,
            deferred={str(key): value for key, value in deferred.items() if key not in COMPUTE_KEYS},
        )

    def _files(self, choices: Mapping[str, str | None]) -> Iterator[str]:
        """The YAML file of each choice. Raises UserError where a user's file has the name of another."""
        for group, choice in choices.items():
            if not isinstance(choice, str) or group.startswith("hydra/"):
                continue
            folders = [_folder(source) for source in self._sources if source.is_config(f"{group}/{choice}")]
            if len(folders) > 1:
                raise UserError(
                    f"{group}/{choice}.yaml is in {' and in '.join(map(str, folders))}; give your own another name"
                )
            yield f"{group}/{choice}.yaml"


def _parameters(config: DictConfig) -> list[str]:
    """The values that a configuration says to sweep over, as overrides."""
    return [f"{key}={value}" for key, value in (_plain(config.hydra.sweeper).get("params") or {}).items()]


def _plain(node: DictConfig) -> dict[str, Any]:
    content = OmegaConf.to_container(node, resolve=False)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def _listed(override: Override, parser: OverridesParser) -> Override:
    """A range as the list of its values: 0.3, not 0.30000000000000004. Raises UserError for an interval."""
    if override.is_interval_sweep():
        raise UserError(
            f"{override.input_line}: an interval has no values to go over; list them, or use range(...)"
        )
    if not override.is_range_sweep():
        return override
    values = ",".join(f"{value:.12g}" for value in override.sweep_iterator())
    return parser.parse_override(f"{override.get_key_element()}={values}") if values else override


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


def _one_choice(group: str, choice: object) -> str:
    if not isinstance(choice, str):  # a list, or a group that was taken out
        raise UserError(f"{group} takes one choice, as in {group}=NAME; several are a sweep: -m {group}=ONE,OTHER")
    return choice


def _check_names(config: Config) -> None:
    """Raise UserError unless the values that name a run and tell its length are there."""
    for key, value, kind, word in (
        ("seed", config["seed"], int, "a whole number"),
        ("recipe.epochs", config["recipe"]["epochs"], int, "a whole number"),
        ("runs_dir", config["runs_dir"], str, "a text"),
    ):
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(f"{key} must be {word}, not {value!r}")


def read_config(path: Path) -> tuple[dict[str, Any], Cell]:
    """The configuration and the cell of a run, from its `config.yaml`.

    Raises OSError, and ValueError if the file is not the configuration of a run.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(str(error)) from error
    names = content.pop("cell", None) if isinstance(content, dict) else None
    if not isinstance(names, dict) or names.keys() != Cell.__dataclass_fields__.keys():
        raise ValueError(f"missing cell, with {', '.join(Cell.__dataclass_fields__)}")
    cell = Cell(**names)
    # A published record has no runs_dir, and a record from before there was an analysis no such node.
    config = {"runs_dir": "runs", "analysis": {}, **content}
    try:
        check_complete(config)
    except UserError as error:
        raise ValueError(str(error)) from error
    if cell.seed != config["seed"]:
        raise ValueError(f"the cell's seed is {cell.seed!r}, the configuration's {config['seed']!r}")
    return config, cell


def find_runs(root: Path) -> list[PlannedRun]:
    """Every run that has begun under a folder; a file that is not the configuration of a run is passed over."""
    runs = []
    for path in sorted(root.rglob(CONFIG)):
        with contextlib.suppress(OSError, ValueError, UserError):
            config, cell = read_config(path)
            _check_names(config)
            runs.append(PlannedRun(cell, {**config, "runs_dir": str(path.parents[len(cell.path.parts)])}))
    return runs


class PlannedJobs(ConfigLoaderImpl):
    """Hands each job of a sweep the configuration planned for it, where Hydra's loader would compose it again."""

    def __init__(self, runs: Sequence[PlannedRun]) -> None:
        super().__init__(GlobalHydra.instance().config_loader().get_search_path())
        self._jobs = {
            tuple(run.overrides): {
                **run.config,
                "compute": {**run.config["compute"], **(run.deferred or {})},
                "cell": asdict(run.cell),
            }
            for run in runs
        }

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        config = copy.deepcopy(master_config)
        with open_dict(config):
            for key in [key for key in config if key != "hydra"]:
                del config[key]
            for key, value in self._jobs[tuple(sweep_overrides)].items():
                config[key] = value
            config.hydra.overrides.task = list(sweep_overrides)
            config.hydra.job.chdir = False  # relative paths are those of the place where the command was given
        return config


def read_planned(config: DictConfig) -> PlannedRun:
    """The run of a configuration that `PlannedJobs` handed over; its `_target_`s have been checked."""
    content = resolve(config)
    return PlannedRun(Cell(**content.pop("cell")), content, folders=None)
