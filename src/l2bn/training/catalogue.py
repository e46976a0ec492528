"""The catalogue of choices: the YAML files of each group with their first line, and the cost of each backbone."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from textwrap import shorten

import torch
import yaml
from hydra import compose
from omegaconf import DictConfig, OmegaConf
from rich.text import Text
from torch import nn
from torch.nn import functional as F

from l2bn.backbones.cost import count_multiply_adds, count_parameters
from l2bn.failures import describe
from l2bn.records import natural_order
from l2bn.training.compute import Compute
from l2bn.training.instantiate import CONFIGS, Builder, Node
from l2bn.training.plan import CONFIG_NAME, GROUPS, composing, resolve

CATALOGUED = (*GROUPS, "experiment")
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
    """Parameters of a backbone, multiply-adds of one image, and hours of the usual recipe if they were measured.

    Multiply-adds and hours are None for a network that takes no images of the usual size.
    """

    parameters: int
    multiply_adds: int | None
    hours: float | None = None


@dataclass(frozen=True)
class Choice:
    """One YAML file of a group; only a backbone has a cost."""

    name: str
    summary: str
    cost: Cost | None = None


def choices(group: str, own: Sequence[Path] = (), *, timed: bool = False) -> list[Choice]:
    """List the choices of a group in natural order, resnet20 before resnet110; `own` are a user's own folders.

    A file that cannot be read, or a backbone that cannot be built, has the reason as its summary.
    """
    folders = [CONFIGS, *own]
    paths = [path for folder in folders for path in (folder / group).glob("[!.]*.yaml")]
    with composing(folders=own):
        base = compose(CONFIG_NAME) if group == "backbone" else None
        return [_choice(path, base, folders, timed) for path in sorted(paths, key=lambda p: natural_order(p.stem))]


def _choice(path: Path, base: DictConfig | None, folders: Sequence[Path], timed: bool) -> Choice:
    """Return the choice of a file; `base` is a configuration to put a backbone into."""
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
        cost = None
        if base is not None:
            if "defaults" in content:
                base = compose(CONFIG_NAME, [f"backbone={path.stem}"])
            else:
                base.backbone = OmegaConf.load(path)  # 50 ms faster
            named = CLASSES_OF_ITS_DATA.search(text)
            usual = CIFAR if named and named[1] == "10" else IMAGENET
            cost = cost_of(resolve(base)["backbone"], usual, folders, timed=timed)
        return Choice(path.stem, first_comment(text), cost)
    except Exception as error:  # of a user's own file, or of the library that a backbone comes from
        return Choice(path.stem, f"cannot be used: {' '.join(describe(error).split())}")


def first_comment(text: str) -> str:
    """Return the first comment of a YAML file that is not a directive to Hydra; "" if none comes first."""
    comments = takewhile(lambda line: line.startswith("#"), text.splitlines())
    texts = (comment.removeprefix("#").strip() for comment in comments)
    return next((text for text in texts if not text.startswith("@package")), "")


def cost_of(node: Node, usual: Usual, folders: Sequence[Path] = (CONFIGS,), *, timed: bool = False) -> Cost:
    """Count the parameters and multiply-adds of the backbone of a node.

    Nothing is allocated or computed unless it is `timed`, or the network can't be built on the meta device.
    """
    node = {**node, "num_classes": usual.classes}
    try:
        with torch.device("meta"):
            model: nn.Module = Builder(folders).build(node, "backbone")
    except Exception:  # the constructor may read values, which meta tensors don't have
        model = Builder(folders).build(node, "backbone")
    parameters = count_parameters(model)
    try:
        multiply_adds = count_multiply_adds(model, usual.image_size)
    except Exception:  # of a user's own network, which may take other images
        return Cost(parameters, None)
    hours = _measure_hours(Builder(folders).build(node, "backbone"), usual) if timed else None
    return Cost(parameters, multiply_adds, hours)


def _measure_hours(model: nn.Module, usual: Usual) -> float:
    """Estimate the hours of training by the usual recipe on this machine from the fastest of a few steps.

    As a run with batch norm computes, `compute=auto`, but not compiled; L2BN costs about as much
    (results/benchmarks/step.md). Without evaluation, optimizer and what loading images adds.
    """
    from l2bn.training.acceleration import prepare  # here: a list is seldom timed

    recipe, auto = (
        yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8"))
        for name in (f"recipe/{usual.recipe}.yaml", "compute/auto.yaml")
    )
    placing = Compute(**auto)
    placing.set_up()
    device = placing.fabric().device
    model = prepare(model.train(), placing, device, updates=0, in_memory=usual is CIFAR).trained
    images = torch.randn(usual.timed_batch, 3, usual.image_size, usual.image_size, device=device)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.zeros(usual.timed_batch, dtype=torch.long, device=device)
    seconds = []
    for _ in range(4):  # the first makes the buffers of the others
        start = time.perf_counter()
        model.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(images), labels))
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return float(recipe["epochs"] * usual.images / usual.timed_batch * min(seconds[1:]) / 3600)


def choices_text(
    groups: Sequence[str] = CATALOGUED, width: int = 110, own: Sequence[Path] = (), *, timed: bool = False
) -> Text:
    """All choices of the groups, one per line of at most `width` columns."""
    text = Text()
    for group in groups:
        rows = choices(group, own, timed=timed)
        names = max((len(row.name) for row in rows), default=0)
        heads, notes = _head_and_notes(timed) if group == "backbone" else ("", "")
        text.append(group.ljust(names) if heads else group, style="bold").append(f"{heads}\n", style="dim")
        for row in rows:
            cost = _cost_columns(row.cost, timed) if row.cost else ""
            room = max(width - names - len(cost) - 2, 1)  # below, `shorten` raises
            text.append(f"{row.name:<{names}}", style="cyan").append(cost)
            text.append(f"  {shorten(row.summary, room, placeholder=' …')}\n")
        text.append(f"{notes}\n", style="dim")
    text.rstrip()
    return text


def _head_and_notes(timed: bool) -> tuple[str, str]:
    """Return the headings of the columns of `_cost_columns`, and the lines below them."""
    hours = "Hours on this machine: python scripts/list.py backbone --hours (takes minutes).\n"
    if timed:
        hours = f"Hours of {CIFAR.recipe} on CIFAR or {IMAGENET.recipe} on ImageNet, from three steps timed here.\n"
    return f"{'parameters':>13}{'mult-adds':>11}" + (f"{'hours':>9}" if timed else ""), (
        f"At {CIFAR.classes} classes and {CIFAR.image_size} pixels; networks for ImageNet, of a library "
        f"and of your own at {IMAGENET.classes:,} and {IMAGENET.image_size}.\n{hours}"
    )


def _cost_columns(cost: Cost, timed: bool) -> str:
    """Fixed-width columns: parameters, multiply-adds of one image in millions, hours."""
    millions = "?  " if cost.multiply_adds is None else f"{cost.multiply_adds / 1e6:,.0f} M"
    hours = "?" if cost.hours is None else f"{cost.hours:,.1f}"
    return f"{cost.parameters:>13,}{millions:>11}" + (f"{hours:>9}" if timed else "")
