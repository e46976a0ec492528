"""What there is to choose from: the files of configs/, and what each says of itself in its first line."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

import torch
import yaml
from rich.text import Text
from torch import nn

from l2bn.records import natural_order
from l2bn.training.build import CONFIGS, Builder

GROUPS = ("dataset", "backbone", "norm", "recipe", "experiment")
CLASSES_OF_ITS_DATA = re.compile(r"^# .*Parameters at ([\d,]+) classes", re.MULTILINE)


@dataclass(frozen=True)
class Choice:
    """One file of a group, and for a backbone its number of parameters."""

    name: str
    summary: str
    parameters: int | None = None


def choices(group: str) -> list[Choice]:
    """All choices of a group, in the order in which a reader would count: resnet20 before resnet110."""
    paths = sorted((CONFIGS / group).glob("*.yaml"), key=lambda path: natural_order(path.stem))
    counted = group == "backbone"
    return [Choice(path.stem, summary(path), count_parameters(path) if counted else None) for path in paths]


def summary(path: Path) -> str:
    """The comment that a file opens with: its first line that is no directive to Hydra, "" if there is none."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        text = line.removeprefix("#").strip()
        if not text.startswith("@package"):
            return text
    return ""


def count_parameters(path: Path) -> int:
    """Parameters of a backbone with its file's own options; no memory is taken for them.

    They are counted at the number of classes that the file's opening comment speaks of, or at ImageNet's 1,000.
    """
    text = path.read_text(encoding="utf-8")
    named = CLASSES_OF_ITS_DATA.search(text)
    node = {**yaml.safe_load(text), "num_classes": int(named[1].replace(",", "")) if named else 1000}
    with torch.device("meta"):
        model: nn.Module = Builder().build(node, "backbone")
    return sum(parameter.numel() for parameter in model.parameters())


def overview(groups: Sequence[str] = GROUPS, width: int = 110) -> Text:
    """All choices of the groups, each on a line of at most so many columns."""
    text = Text()
    for group in groups:
        rows = choices(group)
        names = max(len(row.name) for row in rows)
        text.append(f"{group:<{names}}" if group == "backbone" else group, style="bold")
        text.append("   parameters\n" if group == "backbone" else "\n", style="dim")
        for row in rows:
            count = "" if row.parameters is None else f"{row.parameters:>13,}"
            room = width - names - len(count) - 2
            text.append(f"{row.name:<{names}}", style="cyan").append(count)
            text.append(f"  {shorten(row.summary, room, placeholder=' …')}\n")
        if group == "backbone":
            text.append("at 10 classes; the nets for ImageNet and those of a library at 1,000\n", style="dim")
        text.append("\n")
    text.rstrip()
    return text
