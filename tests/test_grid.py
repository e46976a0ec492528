"""The grid: everything in configs/ alone, every backbone with every norm, and whatever else depends on a pair.

Nothing here knows the name of a data set, backbone, norm or recipe: the tests find them.
"""

import copy
import functools
import itertools
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from torch import Tensor, nn

import official_formats
from conftest import ROOT, TRAIN, Issue, Train, finish, start
from l2bn.norms.swap import swap_norm
from l2bn.records import natural_order
from l2bn.training.catalogue import CIFAR, IMAGENET, Cost, Usual, choices, choices_text, cost_of, first_comment
from l2bn.training.instantiate import Builder
from l2bn.training.optim import Recipe

CONFIGS = ROOT / "configs"
GROUPS = ("dataset", "backbone", "norm", "recipe")
NAMES = {group: sorted(path.stem for path in (CONFIGS / group).glob("*.yaml")) for group in GROUPS}
EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
FILES = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))

Node = dict[str, Any]
Row = dict[str, str]  # a choice of each group


def test_the_batteries_are_not_empty() -> None:
    assert all(len(names) > 1 for names in [*NAMES.values(), EXPERIMENTS])
    assert len(FILES) > sum(map(len, NAMES.values()))


def read(group: str, name: str) -> Node:
    """A node as its file has it."""
    node: Node = yaml.safe_load((CONFIGS / group / f"{name}.yaml").read_text())
    node.pop("defaults", None)
    return node


def over(node: Node, change: Mapping[str, Any]) -> Node:
    """A node with the values of another over its own."""
    both = {key: over(node[key], change[key]) for key in node.keys() & change.keys() if isinstance(node[key], dict)}
    return {**node, **change, **both}


@pytest.fixture(scope="module")
def composed() -> Callable[..., Node]:
    """Compose the configuration of some overrides to plain values, and the choices that it was made of."""

    def composed(*overrides: str) -> Node:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            config = compose("train", list(overrides), return_hydra_config=True)
        made_of = OmegaConf.to_container(config.hydra.runtime.choices)
        own = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
        return {"choices": made_of, **OmegaConf.to_container(own, resolve=True)}  # type: ignore[dict-item]

    return composed


@pytest.fixture(autouse=True, scope="module")
def _counted_once() -> Iterator[None]:
    """The cost of a backbone, 0.2 s each, for all lists of all backbones."""
    counted: dict[Any, Cost] = {}

    def cost_once(node: Node, usual: Usual, *given: Any, **options: Any) -> Cost:
        key = yaml.safe_dump(node), usual, repr(given), repr(options)
        if key not in counted:
            counted[key] = cost_of(node, usual, *given, **options)
        return counted[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("l2bn.training.catalogue.cost_of", cost_once)
        yield


# Each file.


@pytest.mark.parametrize("file", FILES)
def test_a_file_opens_with_what_it_is_and_how_to_run_it(file: str) -> None:
    text = (CONFIGS / file).read_text()
    assert text.startswith("# ")
    assert len(first_comment(text).split()) > 3
    group, _, name = file.removesuffix(".yaml").rpartition("/")
    if group in ("dataset", "backbone", "norm"):
        header = text[: re.search(r"^[^#]", text, re.MULTILINE).start()]  # type: ignore[union-attr]
        assert re.search(rf"^# Run:.*{group}={name}\b|^#  .* {group}={name}\b|fetch_data", header, re.MULTILINE)


@pytest.mark.parametrize("name", NAMES["dataset"])
def test_a_data_set_brings_its_usual_recipe_or_falls_to_that_of_every_run(
    name: str, composed: Callable[..., Node]
) -> None:
    defaults = yaml.safe_load((CONFIGS / "dataset" / f"{name}.yaml").read_text()).get("defaults", [])
    usual = [entry["override /recipe@_global_.recipe"] for entry in defaults if entry != "_self_"]
    of_every_run = [entry["recipe"] for entry in main_defaults() if "recipe" in entry]
    assert composed(f"dataset={name}")["choices"]["recipe"] == (usual or of_every_run)[0]


def main_defaults() -> list[Any]:
    content: Node = yaml.safe_load((CONFIGS / "train.yaml").read_text())
    return [entry for entry in content["defaults"] if isinstance(entry, dict)]


# The product of the groups. What a run is composed of depends on pairs of choices at most: an exception in
# recipe_for/ is named by a recipe and a data set or backbone, and a data set brings a recipe only where none is
# chosen. So the test takes rows that hold each choice once or more, and one for each exception, and proves of each
# row that nothing else in it has changed anything.

LONGEST = max(map(len, NAMES.values()))
ROWS: list[Row] = [{group: names[i % len(names)] for group, names in NAMES.items()} for i in range(LONGEST)]
EXCEPTIONS = {
    path: {**ROWS[0], group: name, "recipe": recipe}
    for group in ("dataset", "backbone")
    for name, recipe in itertools.product(NAMES[group], NAMES["recipe"])
    if (path := CONFIGS / "recipe_for" / group / f"{name}_{recipe}.yaml").exists()
}


@pytest.fixture(scope="module")
def elsewhere(composed: Callable[..., Node]) -> Node:
    """What a configuration says outside the four groups."""
    return {key: value for key, value in composed().items() if key not in (*GROUPS, "choices")}


@pytest.mark.parametrize("row", [*ROWS, *EXCEPTIONS.values()], ids=lambda row: "-".join(row.values()))
def test_every_choice_composes_with_others(row: Row, composed: Callable[..., Node], elsewhere: Node) -> None:
    """Each node is what its file says, the recipe with the exceptions for this data set and backbone."""
    config = composed(*(f"{group}={name}" for group, name in row.items()))
    recipe = read("recipe", row["recipe"])
    for group in ("dataset", "backbone"):
        exception = CONFIGS / "recipe_for" / group / f"{row[group]}_{row['recipe']}.yaml"
        if exception.exists():
            recipe = over(recipe, yaml.safe_load(exception.read_text()))
    assert config["recipe"] == recipe
    for group in ("dataset", "backbone", "norm"):
        assert config[group] == read(group, row[group])
    assert {key: config[key] for key in elsewhere} == elsewhere
    assert config["choices"].items() >= row.items()
    Builder().call(Recipe, config["recipe"], "recipe")


def test_an_exception_is_for_a_pair_that_there_is() -> None:
    assert EXCEPTIONS.keys() == set((CONFIGS / "recipe_for").rglob("*.yaml"))


# Every backbone with every norm: each day the first that a function builds with all of them, each other one, whose
# blocks and stem may differ, with l2bn; `make test-all` takes the rest.

BACKBONES = sorted(NAMES["backbone"], key=natural_order)
FIRST = {read("backbone", name)["_target_"]: name for name in reversed(BACKBONES)}.values()
PAIRS = [
    pytest.param(backbone, norm, marks=() if backbone in FIRST or norm == "l2bn" else pytest.mark.slow)
    for backbone in BACKBONES
    for norm in NAMES["norm"]
]


@functools.lru_cache(maxsize=1)
def built(name: str) -> nn.Module:
    """A backbone, for its norms one after the other."""
    torch.manual_seed(0)
    model: nn.Module = Builder().build({**read("backbone", name), "num_classes": 7}, "backbone")
    return model


@pytest.mark.parametrize(("backbone", "norm"), PAIRS)
def test_a_backbone_trains_and_evaluates_with_a_norm(backbone: str, norm: str) -> None:
    """Its own norms are batch norms; those of the suite's networks start as the identity."""
    model = copy.deepcopy(built(backbone))
    norms = [m for m in model.modules() if hasattr(m, "running_mean")]
    assert all(isinstance(m, nn.BatchNorm2d) for m in norms)
    if "library" not in read("backbone", backbone)["_target_"]:
        assert {type(m) for m in norms} == {nn.BatchNorm2d}
        assert all(m.weight.eq(1).all() and m.bias.eq(0).all() for m in norms)
    node = read("norm", norm)
    if "fused" in node:
        node["fused"] = "off"  # what is tested here is the pair, not the kernels
    parameters = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert swap_norm(model, Builder().build(node, "norm")) == len(norms) > 0
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == parameters
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    logits = model.train()(images)
    assert logits.shape == (2, 7)
    F.cross_entropy(logits, torch.tensor([0, 6])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name

    before = buffers(model)
    with torch.inference_mode():
        logits = model.eval()(images)
        alone = model(images[:1])
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()
    torch.testing.assert_close(alone, logits[:1], rtol=1e-3, atol=1e-4)  # an image's logits are its own
    after = buffers(model)
    assert all(tensor.equal(after[name]) for name, tensor in before.items())


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.named_buffers()}


# Every data set, read from a stand-in in its official format.

SMALL = 64  # pixels; larger images are asked for at this size here


def stand_in(name: str, folder: Path) -> list[str]:
    """Write a stand-in for a data set and return the overrides that lead to it."""
    overrides = [f"dataset={name}", *official_formats.write(name, folder)]
    if (read("dataset", name).get("image_size") or 0) > SMALL:
        overrides.append(f"dataset.image_size={SMALL}")
    return overrides


# Every experiment.


def jobs(experiment: str) -> list[list[str]]:
    """The overrides of every run that an experiment is made of."""
    content = yaml.safe_load((CONFIGS / "experiment" / f"{experiment}.yaml").read_text())
    parameters = content["hydra"]["sweeper"]["params"]
    for key, value in parameters.items():
        if value == "glob(*)":
            parameters[key] = ",".join(NAMES[key])
    overrides = OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in parameters.items()])
    (batch,) = BasicSweeper.split_arguments(overrides, max_batch_size=None)
    return batch


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_composes_in_every_run_and_counts_them(name: str, composed: Callable[..., Node]) -> None:
    text = (CONFIGS / "experiment" / f"{name}.yaml").read_text()
    assert yaml.safe_load(text)["hydra"]["mode"] == "MULTIRUN"
    batch = jobs(name)
    announced = re.search(r"([\d,]+) runs", first_comment(text))
    if announced:
        assert int(announced[1].replace(",", "")) == len(batch)
    seen = set[str]()
    for job in batch:
        if seen.issuperset(job):
            continue  # every choice of it has been composed already
        seen.update(job)
        config = composed(f"experiment={name}", *job)
        assert config["choices"]["experiment"] == name
        # A sweep may also give a group some values, as {...}, which is no choice of a file.
        given = dict(override.split("=", 1) for override in job)
        chosen = {k: v for k, v in given.items() if k in GROUPS and not v.startswith("{")}
        assert config["choices"].items() >= chosen.items()
        Builder().call(Recipe, config["recipe"], "recipe")


# A few updates of all that there is, as a user would make them.


@functools.cache
def smallest_backbone() -> str:
    return min(choices("backbone"), key=lambda choice: choice.cost.parameters if choice.cost else math.inf).name


SMOKE = ("experiment=smoke", "compute.threads=1")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES["dataset"])
def test_smoke_of_a_data_set_with_every_norm(name: str, tmp_path: Path, train: Train) -> None:
    overrides = [*SMOKE, *stand_in(name, tmp_path / "data"), f"backbone={smallest_backbone()}"]
    for norm in NAMES["norm"]:
        record = train(*overrides, f"norm={norm}")
        assert (record.status, record.updates, record.train_images) == ("finished", 2, 8)
        assert record.norm == norm
        assert record.dataset.split(",")[0] == name
        assert record.baseline is None  # two updates on a few images may stand beside no published number


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "norm"), list(zip(BACKBONES, itertools.cycle(NAMES["norm"]), strict=False)))
def test_smoke_of_a_backbone_with_a_norm_in_turn(backbone: str, norm: str, tmp_path: Path, train: Train) -> None:
    record = train(*SMOKE, f"backbone={backbone}", f"norm={norm}")
    if backbone in ("imagenet_resnet50", "imagenet_resnet101") and record.divergence is not None:
        # Two updates after their start at 1, running variances are too small: a factor in each layer.
        assert record.divergence == "the test loss is not finite after epoch 1"
    else:
        assert (record.status, record.updates) == ("finished", 2)
    shutil.rmtree(tmp_path / "runs")  # its checkpoints take up to a gigabyte


@pytest.mark.slow
def test_smoke_as_a_command_sweeps_over_every_norm(tmp_path: Path) -> None:
    options = (f"runs_dir={tmp_path / 'runs'}", f"backbone={smallest_backbone()}")
    finish(start(TRAIN, *SMOKE, *options, cwd=tmp_path))
    summaries = [json.loads(path.read_text()) for path in (tmp_path / "runs").rglob("summary.json")]
    assert sorted(content["norm"] for content in summaries) == NAMES["norm"]


# The list of it all.


@pytest.fixture(scope="module")
def listing() -> str:
    return choices_text(width=110).plain


@pytest.mark.parametrize("width", [1, 40, 53, 62])
def test_the_list_fits_a_narrow_terminal_or_is_cut_to_the_names(width: int) -> None:
    text = choices_text(["norm"], width).plain
    assert set(NAMES["norm"]) <= set(text.split())
    assert max(map(len, text.splitlines())) <= max(width, max(map(len, NAMES["norm"])) + len("  …"))


@pytest.mark.parametrize("group", [*GROUPS, "experiment"])
def test_the_list_has_a_line_for_each_choice(group: str, listing: str) -> None:
    for choice in choices(group):
        lines = re.findall(rf"^{choice.name} +(?:([\d,]+) +([\d,]+) M  )?(.+?)(?: …)?$", listing, re.MULTILINE)
        assert len(lines) == 1
        count, millions, text = lines[0]
        assert choice.summary.startswith(text)
        assert bool(choice.cost) == (group == "backbone")
        if choice.cost:
            assert choice.cost.multiply_adds is not None
            assert count == f"{choice.cost.parameters:,}"
            assert millions == f"{choice.cost.multiply_adds / 1e6:,.0f}"


def test_the_list_is_at_most_110_columns_wide(listing: str) -> None:
    assert max(map(len, listing.splitlines())) <= 110


def test_the_list_has_the_published_parameter_counts(listing: str) -> None:
    published = yaml.safe_load((ROOT / "tests" / "backbone_parameters.yaml").read_text())
    for name, count in ((name, count) for table in published.values() for name, count in table.items()):
        assert re.search(rf"^{name} +{count:,} ", listing, re.MULTILINE)


def test_the_multiply_adds_are_those_of_the_papers() -> None:
    """ResNet-50 and ResNet-18 at 224 pixels: 3.8 and 1.8 billion in He et al., arXiv 1512.03385, table 1, which
    counts the stride of a block in its first convolution; torchvision has it in the second (4.1 billion)."""
    for name, billions in (
        ("imagenet_resnet50", 4.09),
        ("imagenet_resnet18", 1.81),
        ("imagenet_mobilenet_v2", 0.30),
    ):
        cost = cost_of(read("backbone", name), IMAGENET)
        assert cost.multiply_adds is not None
        assert cost.multiply_adds / 1e9 == pytest.approx(billions, abs=0.01)


def test_the_hours_of_a_backbone_are_those_of_the_fastest_of_three_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a first one, by a clock that gives the steps 1, 4, 3 and 5 seconds."""
    clock = iter([0, 1, 10, 14, 20, 23, 30, 35])
    monkeypatch.setattr("l2bn.training.catalogue.time", SimpleNamespace(perf_counter=clock.__next__))
    hours = cost_of(read("backbone", smallest_backbone()), CIFAR, timed=True).hours
    assert hours == pytest.approx(200 * (50_000 / 128) * 3 / 3600)  # epochs, steps of an epoch, seconds of a step


def test_the_script_prints_one_group_of_the_list(issue: Issue) -> None:
    printed = issue("list", "norm").out
    assert all(re.search(rf"^{name} ", printed, re.MULTILINE) for name in NAMES["norm"])
    assert not re.search(rf"^{NAMES['recipe'][0]} ", printed, re.MULTILINE)


def test_own_backbones_are_listed_as_they_are_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra's floats, defaults and interpolations; a network for one size of image has no known multiply-adds.

    A constructor may read the values of a tensor, as timm's once did of the rates of stochastic depth.
    """
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "listed_parts.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def flat(num_classes: int, width: int, drop: float = 0.0):\n"
        "    layers = nn.Conv2d(3, width, 1), nn.Flatten(), nn.Dropout(drop)\n"
        "    return nn.Sequential(*layers, nn.Linear(9 * 9 * width, num_classes))\n"
        "def deep(num_classes: int, drop: float):\n"
        "    drops = [nn.Dropout(rate.item()) for rate in torch.linspace(0, drop, 2)]\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 32, 32), *drops, nn.Flatten(), nn.Linear(196, num_classes))\n"
        "def named(num_classes: int):\n"
        "    if not torch.ones(1).is_cpu:\n"
        "        raise ValueError('no such device')\n"
        "    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, num_classes))\n"
    )
    files = {
        "flat": "_target_: listed_parts.flat\nwidth: ${recipe.batch_size}\ndrop: 1e-3\n",
        "wide": "defaults: [flat, _self_]\nwidth: 64\n",
        "deep": "_target_: listed_parts.deep\ndrop: 0.1\n",
        "named": "_target_: listed_parts.named\n",
    }
    (tmp_path / "backbone").mkdir()
    for name, content in files.items():
        (tmp_path / "backbone" / f"{name}.yaml").write_text(f"# Mine.\n{content}")
    found = {choice.name: choice for choice in choices("backbone", [tmp_path])}
    assert [found[name].summary for name in files] == ["Mine."] * 4
    assert found["wide"].cost == Cost(64 * 4 + 1000 * (81 * 64 + 1), None)
    assert found["flat"].cost
    assert found["named"].cost == Cost(4 * 1000, 3 * 1000)
    assert found["deep"].cost


def test_what_cannot_be_used_is_one_line_of_the_list(tmp_path: Path) -> None:
    (tmp_path / "backbone").mkdir()
    (tmp_path / "norm").mkdir()
    (tmp_path / "backbone/broken.yaml").write_text("# Mine\n_target_: no_such_module.net\n")
    (tmp_path / "norm/wip.yaml").write_text("# Mine\nscale: [\n")
    (tmp_path / "norm/latin.yaml").write_bytes(b"# \xff\n")
    (tmp_path / "norm/._bn.yaml").write_bytes(b"\x00\xff")
    text = choices_text(("backbone", "norm"), 200, [tmp_path]).plain
    assert re.search(r"^broken +cannot be used: .*No module named 'no_such_module'", text, re.MULTILINE)
    assert re.search(r"^wip +cannot be used: ", text, re.MULTILINE)
    assert re.search(r"^latin +cannot be used: ", text, re.MULTILINE)
    assert "._bn" not in text
    assert all(re.search(rf"^{name} ", text, re.MULTILINE) for name in [*NAMES["backbone"], *NAMES["norm"]])
