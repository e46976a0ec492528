"""What a configuration is made of: its nodes, and what it says besides them."""

from dataclasses import dataclass
from pathlib import Path

from l2bn.errors import UserError
from l2bn.training.build import Builder, check_mapping
from l2bn.training.identity import Config

NODES = ("dataset", "backbone", "norm", "recipe", "compute", "checkpoint", "analysis")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a configuration says besides its nodes."""

    seed: int
    runs_dir: str
    progress: bool

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, not {self.seed}")
        if not self.runs_dir:
            raise ValueError("runs_dir is empty: name a folder, '.' for this one")


def check_complete(config: Config) -> None:
    """Raise UserError unless all that a run needs is there, its nodes as such."""
    needed = (*NODES, *Settings.__dataclass_fields__)
    missing = [key for key in needed if key not in config]
    if missing:
        raise UserError(f"missing {', '.join(missing)}: a configuration has {', '.join(needed)}")
    for name in NODES:
        check_mapping(config[name], name)


def read_settings(config: Config, builder: Builder) -> Settings:
    """What a configuration says besides its nodes. Raises UserError, also for a key that is neither."""
    known = [*NODES, *Settings.__dataclass_fields__]
    for key in config.keys() - known:
        if key == "experiment":
            raise UserError(
                f'{key} is no key: the file of an experiment begins with the line "# @package _global_"'
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
