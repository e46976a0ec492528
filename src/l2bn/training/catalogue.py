"""The catalogue of choices: the YAML files of each group with their first line, and the cost of each backbone."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

import torch
import yaml
from rich.text import Text
from torch import nn
from torch.nn import functional as F

from l2bn.backbones.cost import count_multiply_adds, count_parameters
from l2bn.errors import UserError
from l2bn.records import natural_order
from l2bn.training.instantiate import CONFIGS, Builder, is_hidden

GROUPS = ("dataset", "backbone", "norm", "recipe", "experiment")
CLASSES_OF_ITS_DATA = re.compile(r"^# .*Parameters at ([\d,]+) classes", re.MULTILINE)


@dataclass(frozen=True)
class Usual:
    """The data set and recipe by which a backbone is usually trained."""

    classes: int
    image_size: int
    images: int  # training images
    recipe: str
    timed_batch: int  # images of a timed step


CIFAR = Usual(10, 32, 50_000, "cosine_200", 128)
IMAGENET = Usual(1000, 224, 1_281_167, "imagenet_90", 16)


@dataclass(frozen=True)
class Cost:
    """Parameters of a backbone, multiply-adds of one image, and hours of the usual recipe if they were measured."""

    parameters: int
    multiply_adds: int
    hours: float | None = None


@dataclass(frozen=True)
class Choice:
    """One YAML file of a group; only a backbone has a cost."""

    name: str
    summary: str
    cost: Cost | None = None


def choices(group: str, folders: Sequence[Path] = (CONFIGS,), *, timed: bool = False) -> list[Choice]:
    """List the choices of a group in natural order: resnet20 before resnet110.

    A file that cannot be read, or a backbone that cannot be built, has the reason as its summary.
    """
    paths = [path for folder in folders for path in (folder / group).glob("*.yaml")]
    visible = [path for path in paths if not is_hidden(Path(path.name))]
    return [_choice(path, group, folders, timed) for path in sorted(visible, key=lambda p: natural_order(p.stem))]


def _choice(path: Path, group: str, folders: Sequence[Path], timed: bool) -> Choice:
    try:
        cost = cost_of(path, folders, timed=timed) if group == "backbone" else None
        yaml.safe_load(path.read_text(encoding="utf-8"))
        return Choice(path.stem, summary(path), cost)
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


def cost_of(path: Path, folders: Sequence[Path] = (CONFIGS,), *, timed: bool = False) -> Cost:
    """Count the parameters and multiply-adds of a backbone with the options of its YAML file.

    The number of classes is the one in the file's comments, else ImageNet's 1,000. Nothing is allocated or computed
    unless it is `timed`.
    """
    text = path.read_text(encoding="utf-8")
    named = CLASSES_OF_ITS_DATA.search(text)
    usual = CIFAR if named and named[1] == "10" else IMAGENET
    node = {**yaml.safe_load(text), "num_classes": usual.classes}
    with torch.device("meta"):
        model: nn.Module = Builder(folders).build(node, "backbone")
    hours = _measure_hours(Builder(folders).build(node, "backbone"), usual) if timed else None
    return Cost(count_parameters(model), count_multiply_adds(model, usual.image_size), hours)


def _measure_hours(model: nn.Module, usual: Usual) -> float:
    """Estimate the hours of the usual recipe in float32 on this machine from the faster of two training steps.

    Batch norm, eager, images in memory: L2BN costs about as much (results/benchmarks/step.md).
    """
    recipe = yaml.safe_load((CONFIGS / "recipe" / f"{usual.recipe}.yaml").read_text(encoding="utf-8"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    images = torch.randn(usual.timed_batch, 3, usual.image_size, usual.image_size, device=device)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.zeros(usual.timed_batch, dtype=torch.long, device=device)
    seconds = []
    for _ in range(3):  # the first makes the buffers of the other two
        start = time.perf_counter()
        torch.autograd.backward(F.cross_entropy(model(images), labels))
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return float(recipe["epochs"] * usual.images / usual.timed_batch * min(seconds[1:]) / 3600)


def overview(
    groups: Sequence[str] = GROUPS, width: int = 110, folders: Sequence[Path] = (CONFIGS,), *, timed: bool = False
) -> Text:
    """All choices of the groups, one per line of at most `width` columns."""
    text = Text()
    for group in groups:
        rows = choices(group, folders, timed=timed)
        names = max((len(row.name) for row in rows), default=0)
        backbones = group == "backbone"
        text.append(f"{group:<{names}}" if backbones else group, style="bold")
        heads = (
            f"{'parameters':>13}{'mult-adds':>11}{'hours':>9}" if timed else f"{'parameters':>13}{'mult-adds':>11}"
        )
        text.append(f"{heads}\n" if backbones else "\n", style="dim")
        for row in rows:
            cost = _cost_columns(row.cost) if row.cost else ""
            room = max(width - names - len(cost) - 2, 1)  # below, `shorten` raises
            text.append(f"{row.name:<{names}}", style="cyan").append(cost)
            text.append(f"  {shorten(row.summary, room, placeholder=' …')}\n")
        if backbones:
            text.append(
                f"At {CIFAR.classes} classes and {CIFAR.image_size} pixels; networks for ImageNet, of a library "
                f"and of your own at {IMAGENET.classes:,} and {IMAGENET.image_size}.\n",
                style="dim",
            )
            text.append(
                f"Hours of {CIFAR.recipe} on CIFAR or {IMAGENET.recipe} on ImageNet, from two steps timed here.\n"
                if timed
                else "Hours on this machine: python scripts/list.py backbone --hours (takes minutes).\n",
                style="dim",
            )
        text.append("\n")
    text.rstrip()
    return text


def _cost_columns(cost: Cost) -> str:
    """Fixed-width columns: parameters, multiply-adds of one image in millions, hours."""
    columns = f"{cost.parameters:>13,}{cost.multiply_adds / 1e6:>9,.0f} M"
    return columns if cost.hours is None else f"{columns}{cost.hours:>9,.1f}"
