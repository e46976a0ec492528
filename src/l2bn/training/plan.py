"""The plan of a run: its configuration, identity and place in the grid.

Hydra composes; this module adds names and identities. It imports neither torch nor a data set, to plan fast. The
runs of a sweep are planned in `sweep.py`.
"""

import contextlib
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
from hydra._internal.hydra import Hydra
from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from l2bn.errors import UserError, expand
from l2bn.failures import override_errors
from l2bn.records import CONFIG, MACHINE_PATHS, METRICS, is_plain_name, same_images
from l2bn.training.instantiate import CONFIGS, Builder, check_mapping, check_type, flatten, is_hidden

log = logging.getLogger(__name__)

CONFIG_NAME = "train"  # the YAML file that every run is composed from
GROUPS = ("dataset", "backbone", "norm", "recipe")
NODES = (*GROUPS, "compute", "checkpoint", "analysis")
SETTINGS = {"seed": int, "runs_dir": str, "progress": bool}  # the keys of a configuration besides its nodes
CHECKPOINTS = "checkpoints"  # the folder in that of a run
COMPUTE_KEYS = ("precision", "devices", "sync_bn")  # the keys of `compute` that are part of a run's identity

Config = Mapping[str, Any]


# Settings.


def check_settings(config: Config) -> None:
    """Raise UserError for a key that a configuration lacks, or a wrong value of one that this module reads."""
    needed = (*NODES, *SETTINGS)
    missing = [key for key in needed if key not in config]
    if not missing:
        for name in NODES:
            check_mapping(config[name], name)
        below = (("recipe", "epochs"), *(("compute", key) for key in COMPUTE_KEYS))
        missing = [f"{node}.{key}" for node, key in below if key not in config[node]]
    if missing:
        raise UserError(f"missing {', '.join(missing)}: a configuration has {', '.join(needed)}")
    for key, kind in SETTINGS.items():
        check_type(config[key], kind, key)
    check_type(config["recipe"]["epochs"], int, "recipe.epochs")
    if config["seed"] < 0:
        raise UserError(f"seed must be 0 or more, not {config['seed']}")
    if not config["runs_dir"]:
        raise UserError("runs_dir is empty: name a folder, '.' for this one")


def check_keys(config: Config, builder: Builder) -> None:
    """Raise UserError for an unknown key beside the nodes of a configuration."""
    for key in config.keys() - {*NODES, *SETTINGS}:
        if key == "experiment":
            raise UserError(
                f'{key} is not a key: the file of an experiment begins with the line "# @package _global_"'
            )
        for node in NODES:
            if key in config[node]:
                raise UserError(f"unknown key {key}; did you mean {node}.{key}?")
    builder.check_keys(config, [*NODES, *SETTINGS], "")


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
MACHINE_KEYS = {
    "dataset": MACHINE_PATHS | {"download", "workers"},
    "norm": frozenset({"fused"}),
}

LONGEST_NAME = 200  # bytes; file systems allow 255


@dataclass(frozen=True)
class RunKey:
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


def run_key(config: Config, defaults: Config, choices: Mapping[str, str]) -> RunKey:
    """Return the key of a run; `defaults` is the configuration that the choices alone compose to."""
    own, default = identity(config), identity(defaults)
    names = {group: _name(choices[group], own[group], default[group]) for group in GROUPS}
    return RunKey(**names, seed=config["seed"])


def identity(config: Config) -> dict[str, Any]:
    """Return the part of a configuration that can change the result."""
    compute = {key: config["compute"][key] for key in COMPUTE_KEYS}
    chosen = {
        group: {key: value for key, value in config[group].items() if key not in MACHINE_KEYS.get(group, ())}
        for group in GROUPS
    }
    return {**chosen, **compute, "seed": config["seed"]}


def hash_identity(content: Config) -> str:
    """Return 16 hexadecimal digits; 1 and 1.0 have the same hash."""
    return _digest(json.dumps(list(_values(content).items()), default=str))


def differences(one: Config, other: Config) -> list[str]:
    """Return a line for each key in which two identities differ, with both values."""
    a, b = _values(one), _values(other)
    missing = "not there"
    return [
        f"{key}: {a.get(key, missing)} against {b.get(key, missing)}"
        for key in sorted(a.keys() | b.keys())
        if not _equal(a.get(key, missing), b.get(key, missing))
    ]


def check_identity(stored: Config, own: Config, place: Path) -> None:
    """Raise UserError if a folder holds a run of another identity: it is neither overwritten nor mixed."""
    changed = differences(stored, own)
    if changed:
        raise UserError(
            f"{place} holds another run, which differs (there against here) in\n"
            + "".join(f"  {line}\n" for line in changed)
            + "give this one another runs_dir, or move the old folder away"
        )


def has_begun(folder: Path) -> bool:
    """Tell whether a run's folder holds anything of its training; a configuration alone is no run yet."""
    metrics = folder / METRICS
    return any((folder / CHECKPOINTS).glob("*.pt")) or (metrics.is_file() and metrics.stat().st_size > 0)


def check_images(stored: Mapping[str, Any] | None, present: Mapping[str, Any], place: Path) -> None:
    """Raise UserError if a run was made on other images than those present; both are fingerprints.

    Other files with equal pixels, as after a lossless conversion, are the same images. Equal files that decode to
    other pixels, as with another version of a decoder, cause a warning. A run from before there were fingerprints
    has None.
    """
    if stored is None:
        log.info("%s has no fingerprint of its images: they are not compared with those present", place)
    elif not same_images(stored, present):
        raise UserError(
            f"{place} was made on other images than those present: files, their labels or their contents differ "
            "(of images that are decoded as they are read, their sizes: a repaired file may count as another)\n"
            "bring its images back, give these a name of their own by dataset.label=NAME, or move the folder away"
        )
    elif stored["pixels"] != present["pixels"]:
        log.warning("%s was made on the same files decoded to other pixels, by another version of a decoder", place)


def _name(choice: str, node: Config, default: Config) -> str:
    """Return a choice and the values overridden in it: "l2bn,eps=0.001"."""
    a, b = _values(node), _values(default)
    keys = sorted(a.keys() | b.keys())
    changed = [f"{key}={a.get(key)}" for key in keys if not _equal(a.get(key, ...), b.get(key, ...))]
    name = ",".join([choice, *changed])
    name = "".join("_" if letter in "/ " or not letter.isprintable() else letter for letter in name)
    return name if len(name.encode()) <= LONGEST_NAME else f"{choice},{_digest(name)}"


def _values(tree: Config) -> dict[str, Any]:
    """Return the values of a tree by their dotted keys, in a fixed order, with whole floats as integers."""
    return {
        key: int(value) if isinstance(value, float) and value.is_integer() else value
        for key, value in flatten(tree)
    }


def _equal(one: object, other: object) -> bool:
    """Tell whether two values of YAML are equal; to Python, true is 1 and false is 0."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


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
        with override_errors(overrides):
            values: dict[str | None, Override] = {}
            if run_mode == RunMode.MULTIRUN:
                found = self.compute_defaults_list(config_name, overrides, run_mode).config_overrides
                values = {value.input_line: value for value in found if not value.is_hydra_override()}
            choices = [override for override in overrides if override not in values]
            config = super().load_configuration(
                config_name, choices, run_mode, from_shell, validate_sweep_overrides
            )
            for value in values.values():
                # Each job rejects a value that does not fit its own choices.
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
            if override.key_or_group != "hydra.searchpath":
                rest.append(str(override.input_line))
                continue
            value = override.value()
            if not isinstance(value, list) or not all(isinstance(path, str) for path in value):
                raise UserError(f"hydra.searchpath must be a list of folders, [file://FOLDER], not {value!r}")
            own += value
        for path in own:
            search_path.prepend("command-line", path, SearchPathQuery(provider="schema"))
        hydra.config_loader = _Loader(search_path)
        for source in hydra.config_loader.get_sources():
            if not source.available():
                raise UserError(f"hydra.searchpath: there is no folder {source.full_path()}")
        found = [str(folder) for folder, source in config_folders().items() if source.is_config(CONFIG_NAME)]
        if len(found) > 1:
            raise UserError(
                f"{CONFIG_NAME}.yaml is in {' and in '.join(found)}, and the suite's own alone is read: give its "
                "values in a file of the group experiment"
            )
        yield hydra, rest


def config_folders() -> dict[Path, ConfigSource]:
    """Return `configs/` and the user's own folders of YAML files, each with Hydra's source of it."""
    folders = {}
    for source in GlobalHydra.instance().config_loader().get_sources():
        if source.provider in ("main", "command-line"):
            path = importlib.resources.files(source.path) if source.scheme() == "pkg" else source.path
            folders[Path(str(path)).resolve()] = source
    return folders


def resolve(config: DictConfig, *, missing: bool = False) -> dict[str, Any]:
    """Return a configuration as plain values; a data set without a label is called by the name of its folder.

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

    cell: RunKey
    config: Config
    files: Sequence[str] = ()
    folders: Sequence[Path] | None = (CONFIGS,)
    overrides: Sequence[str] = ()
    deferred: Config | None = None

    @property
    def folder(self) -> Path:
        return Path(self.config["runs_dir"]) / self.cell.path

    def as_yaml(self) -> str:
        """Return the content of the run's `config.yaml`."""
        return yaml.safe_dump({**self.config, "cell": asdict(self.cell)}, sort_keys=False)

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
    """Return the run of a configuration that Hydra composed, given with its `hydra` node. Raises UserError."""
    return Planner().plan(config, hydra.runtime.choices)


class Planner:
    """Plans the runs of one command; composes the defaults of equal choices once, because composing takes 50 ms."""

    def __init__(self) -> None:
        self._folders = config_folders()
        self._defaults: dict[tuple[str, ...], Config] = {}

    def plan(self, config: DictConfig, choices: Mapping[str, str | None]) -> PlannedRun:
        """Return the run of a configuration and its choices, with its settings checked and its cell named."""
        resolved = resolve(config)
        check_settings(resolved)
        resolved["runs_dir"] = str(expand(resolved["runs_dir"], "runs_dir"))
        chosen = {}
        for group in GROUPS:
            choice = choices.get(group)
            if not isinstance(choice, str):  # a list, or a group that was taken out
                raise UserError(
                    f"{group} takes one choice, as in {group}=NAME; several are a sweep: -m {group}=ONE,OTHER"
                )
            chosen[group] = choice
        key = tuple(f"{group}={choice}" for group, choice in chosen.items())
        if key not in self._defaults:
            self._defaults[key] = resolve(compose(CONFIG_NAME, list(key)), missing=True)
        run = PlannedRun(
            cell=run_key(resolved, self._defaults[key], chosen),
            config=resolved,
            files=[f"{CONFIG_NAME}.yaml", *self._files(choices)],
            folders=list(self._folders),
        )
        check_keys(run.config, run.builder)
        return run

    def _files(self, choices: Mapping[str, str | None]) -> Iterator[str]:
        """Yield the YAML file of each choice. Raises UserError where a user's file has the name of another."""
        for group, choice in choices.items():
            if not isinstance(choice, str) or group.startswith("hydra/"):
                continue
            name = f"{group}/{choice}"
            folders = [str(folder) for folder, source in self._folders.items() if source.is_config(name)]
            if len(folders) > 1:
                raise UserError(f"{name}.yaml is in {' and in '.join(folders)}; give your own another name")
            yield f"{name}.yaml"


def read_config(folder: Path) -> PlannedRun:
    """Return the run whose `config.yaml` is in a folder.

    Raises OSError, and ValueError if the file is not the configuration of a run.
    """
    try:
        content = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(str(error)) from error
    names = content.pop("cell", None) if isinstance(content, dict) else None
    if not isinstance(names, dict) or names.keys() != RunKey.__dataclass_fields__.keys():
        raise ValueError(f"missing cell, with {', '.join(RunKey.__dataclass_fields__)}")
    # A published record has no runs_dir, and a record from before there was an analysis no such node.
    run = PlannedRun(RunKey(**names), {"runs_dir": "runs", "analysis": {}, **content})
    try:
        check_settings(run.config)
    except UserError as error:
        raise ValueError(str(error)) from error
    if run.cell.seed != run.config["seed"]:
        raise ValueError(f"the cell's seed is {run.cell.seed!r}, the configuration's {run.config['seed']!r}")
    return run
