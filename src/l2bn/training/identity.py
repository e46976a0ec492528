"""What makes a run the run that it is: its cell of the grid, and a hash over all that can change its result."""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l2bn.errors import UserError
from l2bn.records import is_plain_name

log = logging.getLogger(__name__)

Config = Mapping[str, Any]

GROUPS = ("dataset", "backbone", "norm", "recipe")

# Where the files lie, how they are read and which kernels compute the same thing do not change the result
# beyond rounding, so that a run can move between machines.
MACHINE_KEYS = frozenset({"root", "devkit", "download", "cache", "workers", "fused"})

LONGEST_NAME = 200  # bytes; file systems allow 255


@dataclass(frozen=True)
class Cell:
    """The place of a run in the grid; each part is a choice of its group, with the values overridden in it."""

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
    """The cell of a configuration, given what its choices alone compose to."""
    names = {group: _name(choices[group], config[group], defaults[group]) for group in GROUPS}
    return Cell(**names, seed=config["seed"])


def identity(config: Config) -> dict[str, Any]:
    """All of a configuration that can change the result."""
    compute = {key: config["compute"][key] for key in ("precision", "devices", "sync_bn")}
    return {**{group: _without_machine_keys(config[group]) for group in GROUPS}, **compute, "seed": config["seed"]}


def hash_identity(content: Config) -> str:
    """16 hexadecimal digits; equal numbers count as equal, whether written 1 or 1.0."""
    text = json.dumps(list(_flatten(content)), default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def differences(one: Config, other: Config) -> list[str]:
    """The keys in which two identities differ, with both values."""
    a, b = dict(_flatten(one)), dict(_flatten(other))
    missing = "not there"
    return [
        f"{key}: {a.get(key, missing)} against {b.get(key, missing)}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key, missing) != b.get(key, missing)
    ]


def check_images(stored: Mapping[str, Any] | None, present: Mapping[str, Any], place: Path) -> None:
    """Raise UserError if a run was made on other images than those present; both are fingerprints.

    Equal files that decode to other pixels, as another version of a decoder may make them, are warned of. Runs from
    before there were fingerprints have None.
    """
    if stored is None:
        log.info("%s says nothing of its images: whether they are those present is not checked", place)
    elif stored["files"] != present["files"]:
        raise UserError(
            f"{place} was made on other images than those present: files, their labels or their contents differ\n"
            "bring its images back, give these a name of their own by dataset.label=NAME, or move the folder away"
        )
    elif stored["pixels"] != present["pixels"]:
        log.warning("%s was made on the same files decoded to other pixels, by another version of a decoder", place)


def _name(choice: str, node: Config, default: Config) -> str:
    """The choice and what was overridden in it: "l2bn,eps=0.001"."""
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
    """Dotted keys and their values, in a fixed order, whole floats as integers."""
    for key, value in sorted(tree.items()):
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", int(value) if isinstance(value, float) and value.is_integer() else value
