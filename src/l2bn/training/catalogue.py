"""The catalogue of choices: the YAML files of each group, and the first line of each."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

import torch
import yaml
from rich.text import Text
from torch import nn

from l2bn.errors import UserError
from l2bn.records import natural_order
from l2bn.training.instantiate import CONFIGS, Builder, is_hidden

GROUPS = ("dataset", "backbone", "norm", "recipe", "experiment")
CLASSES_OF_ITS_DATA = re.compile(r"^# .*Parameters at ([\d,]+) classes", re.MULTILINE)


@dataclass(frozen=True)
class Choice:
    """One YAML file of a group, and for a backbone its number of parameters."""

    name: str
    summary: str
    parameters: int | None = None


def choices(group: str, folders: Sequence[Path] = (CONFIGS,)) -> list[Choice]:
    """All choices of a group, in natural order: resnet20 before resnet110.

    A file that cannot be read, or a backbone that cannot be built, has the reason as its summary.
    """
    paths = [path for folder in folders for path in (folder / group).glob("*.yaml")]
    visible = sorted(
        (path for path in paths if not is_hidden(Path(path.name))), key=lambda path: natural_order(path.stem)
    )
    return [_choice(path, group, folders) for path in visible]


def _choice(path: Path, group: str, folders: Sequence[Path]) -> Choice:
    try:
        parameters = count_parameters(path, folders) if group == "backbone" else None
        yaml.safe_load(path.read_text(encoding="utf-8"))
        return Choice(path.stem, summary(path), parameters)
    except Exception as error:  # of a user's own file, or of the library that a backbone comes from
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        return Choice(path.stem, f"cannot be used: {' '.join(text.split())}")


def summary(path: Path) -> str:
    """The first comment of a YAML file that is not a directive to Hydra, "" if there is none."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        text = line.removeprefix("#").strip()
        if not text.startswith("@package"):
            return text
    return ""


def count_parameters(path: Path, folders: Sequence[Path] = (CONFIGS,)) -> int:
    """The number of parameters of a backbone with the options of its YAML file, counted without allocating them.

    The number of classes is the one in the file's first comment, or ImageNet's 1,000.
    """
    text = path.read_text(encoding="utf-8")
    named = CLASSES_OF_ITS_DATA.search(text)
    node = {**yaml.safe_load(text), "num_classes": int(named[1].replace(",", "")) if named else 1000}
    with torch.device("meta"):
        model: nn.Module = Builder(folders).build(node, "backbone")
    return sum(parameter.numel() for parameter in model.parameters())


def overview(groups: Sequence[str] = GROUPS, width: int = 110, folders: Sequence[Path] = (CONFIGS,)) -> Text:
    """All choices of the groups, one per line of at most `width` columns."""
    text = Text()
    for group in groups:
        rows = choices(group, folders)
        names = max((len(row.name) for row in rows), default=0)
        text.append(f"{group:<{names}}" if group == "backbone" else group, style="bold")
        text.append("   parameters\n" if group == "backbone" else "\n", style="dim")
        for row in rows:
            count = "" if row.parameters is None else f"{row.parameters:>13,}"
            room = width - names - len(count) - 2
            text.append(f"{row.name:<{names}}", style="cyan").append(count)
            text.append(f"  {shorten(row.summary, room, placeholder=' …')}\n")
        if group == "backbone":
            text.append("at 10 classes; the networks for ImageNet and those of a library at 1,000\n", style="dim")
        text.append("\n")
    text.rstrip()
    return text
