"""A user's own parts from outside the repository: found wherever a run is planned, trained or opened."""

import contextlib
import importlib
import json
import os
import re
import sys
from pathlib import Path

import pytest
import yaml

from conftest import ROOT, finish, planned, start, train_in
from l2bn.errors import UserError
from l2bn.training import environment, instantiate
from l2bn.training.environment import own_source
from l2bn.training.existing import evaluate_run, replay
from l2bn.training.instantiate import Builder
from l2bn.training.run import check, launch
from l2bn.training.session import BuiltRun

MODULE = """
from collections.abc import Callable

import torch
from torch import nn

from l2bn.data.digits import digits

def data(**common):
    return digits(**common)

def network(num_classes: int, width: int = 8, **others: "not importable") -> nn.Module:
    layers = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(width, num_classes))

class Tokens(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 8, 4, 4), nn.BatchNorm1d(8), nn.Linear(8, num_classes)

    def forward(self, x):
        tokens = self.conv(x).flatten(2).transpose(1, 2)
        return self.head(self.bn(tokens.reshape(-1, 8)).view(tokens.shape).mean(1))

def pooled(num_classes: int) -> nn.Module:
    layers = nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(8)
    return nn.Sequential(*layers, nn.Linear(8, num_classes))

class Flat(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8))
        self.head = nn.LazyLinear(num_classes)
        self.head(self._flat(torch.zeros(1, 3, 32, 32)))

    def _flat(self, x):
        x = self.body(x)
        return x.view(x.size(0), -1)

    def forward(self, x):
        return self.head(self._flat(x))

class Auxiliary(Flat):
    def forward(self, x):
        logits = self.head(self.body(x).flatten(1))
        return (logits, logits) if self.training else logits

class Unused(Flat):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.spare = nn.Linear(2, 2)

    def forward(self, x):
        return self.head(self.body(x).flatten(1))

class Spare(Unused):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.spare = nn.Linear(2, num_classes)

class Tempered(Unused):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.spare = Temperature()

    def forward(self, x):
        return super().forward(x) / self.spare()

class Temperature(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.ones(()))

    def forward(self):
        return self.value

class Local(Unused):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.spare = nn.Identity()
        self.act = lambda x: x

class Rows(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(2))
        self.head = nn.Linear(4, num_classes)

    def forward(self, x):
        tokens = self.stem(x).mT
        return self.head(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2]).mean(1)

class Wrong(Flat):
    def forward(self, x):
        return self.tail(x)

class ByFour(Unused):
    def forward(self, x):
        if self.training:
            assert len(x) % 4 == 0, "a ghost batch has 4 images"
        return super().forward(x)

def convert(bn: nn.Module, limit: float) -> nn.Module:
    return nn.Sequential(nn.Hardtanh(-limit, limit), bn)

def misnamed(classes: int) -> nn.Module:
    return network(classes)

def forgetful(bn: nn.Module) -> nn.Module:
    bn.eps = 0.1

def but_last(bn: nn.Module, last: bool) -> nn.Module:
    return bn if last else nn.Sequential(nn.Hardtanh(), bn)

def polynomial(epoch: float, epochs: int, power: int) -> float:
    return (1 - epoch / epochs) ** power

class Activated(Unused):
    def __init__(self, num_classes: int, act: Callable[..., nn.Module]) -> None:
        super().__init__(num_classes)
        self.spare = act()
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a part of each kind, whose module can be imported here and in processes started from here."""
    folder = tmp_path / "mine"
    files = {
        "norm/clipped": {"defaults": ["_base"], "limit": 3.0},
        "norm/forgetful": {"_target_": "own_parts.forgetful", "_partial_": True},
        "norm/whole": {"_target_": "own_parts.forgetful"},
        "norm/but_last": {"_target_": "own_parts.but_last", "_partial_": True},
        "norm/_base": {"_target_": "own_parts.convert", "_partial_": True},
        "backbone/tiny": {"_target_": "own_parts.network", "width": 4},
        "dataset/mine": yaml.safe_load((ROOT / "configs/dataset/digits.yaml").read_text())
        | {"_target_": "own_parts.data", "label": "Mine"},
        "recipe/quick": yaml.safe_load((ROOT / "configs/recipe/short.yaml").read_text())
        | {"epochs": 1, "batch_size": 32},
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.yaml").write_text("# Mine.\n" + yaml.safe_dump(content))
    (folder / "experiment").mkdir()
    parameters = {"dataset": "mine", "backbone": "tiny", "norm": "bn,clipped", "recipe": "quick"}
    experiment = {"runs_dir": str(tmp_path / "runs"), "progress": False, "dataset": {"subset": 64}}
    experiment |= {"compute": {"threads": 1}}  # as the processes of tests: sums of more threads round differently
    experiment |= {"hydra": {"mode": "MULTIRUN", "sweeper": {"params": parameters}}}
    text = "# @package _global_\n# Mine.\n" + yaml.safe_dump(experiment)
    (folder / "experiment/both.yaml").write_text(text)
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/own_parts.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.delitem(sys.modules, "own_parts", raising=False)  # of another test's folder
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'modules'}:{os.environ.get('PYTHONPATH', '')}")
    return folder


def script(name: str, *arguments: object, code: int = 0) -> str:
    return finish(start(ROOT / "scripts" / f"{name}.py", *arguments), code)


@pytest.mark.parametrize("by", ["--config-dir", "hydra.searchpath"])
def test_own_parts_are_planned_and_checked(by: str, mine: Path) -> None:
    overrides = ["experiment=both"] + ([f"hydra.searchpath=[file://{mine}]"] if by == "hydra.searchpath" else [])
    runs = planned(*overrides, folders=[mine] if by == "--config-dir" else [])
    assert [str(run.cell) for run in runs] == [
        f"mine,subset=64/tiny/{norm}/quick/seed0" for norm in ("bn", "clipped")
    ]
    for run in runs:
        check(run)


def test_other_code_of_an_ended_run_is_told(mine: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its identity names the function, not what it does."""

    def train() -> None:
        options = ["dataset=mine", "dataset.subset=64", "backbone=tiny", "norm=clipped", "recipe=quick"]
        train_in(tmp_path / "runs", *options, folders=[mine])

    train()
    train()
    assert "other code of yours" not in caplog.text
    (tmp_path / "modules/own_parts.py").write_text(MODULE.replace("Hardtanh(-limit", "Hardtanh(-2 * limit"))
    sys.modules.pop("own_parts")  # as in a new process
    environment._own.cache_clear()
    train()
    assert "was trained with other code of yours than there is now" in caplog.text


def test_the_code_of_a_run_is_that_which_was_imported(
    mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not what is in the files when it starts, nor what a process of one of its devices has imported."""
    options = ["dataset=mine", "dataset.subset=64", "backbone=tiny", "norm=clipped", "recipe=quick"]
    (run,) = planned(*options, folders=[mine])
    check(run)  # as at the start of a sweep
    before = own_source(run.config)
    (tmp_path / "modules/own_parts.py").write_text(MODULE.replace("Hardtanh(-limit", "Hardtanh(-2 * limit"))

    def elsewhere(built: BuiltRun) -> bool:
        sys.modules.pop("own_parts")
        return launch(built)

    monkeypatch.setattr("l2bn.training.run.launch", elsewhere)
    record = train_in(tmp_path / "runs", *options, folders=[mine])
    (start,) = json.loads((record.folder / "env.json").read_text())["starts"]
    assert start["own_source"] == before is not None


@pytest.mark.parametrize(
    ("function", "helper"),
    [("", "own_helper"), ("def convert(bn): ", "own_helper"), ("def convert(bn): ", "own_folder.inner.helper")],
)
def test_own_code_is_that_of_all_own_modules(
    function: str, helper: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Modules count that are imported at once or within a function, called or not."""
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("own_user", helper):
        monkeypatch.delitem(sys.modules, name, raising=False)
    file = tmp_path / f"{helper.replace('.', '/')}.py"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("limit = 1\ndef helper(): ...\n")
    (tmp_path / "own_user.py").write_text(f"import torch\n{function}from {helper} import helper\n")
    node = {"norm": {"_target_": "own_user.convert", "inner": {"_target_": "torch.nn.ReLU"}}}
    assert own_source(node) is None, "not imported"
    importlib.import_module("own_user")
    before = own_source(node)
    assert before is not None
    importlib.import_module(helper)
    assert own_source(node) == before
    assert own_source({"norm": {"_target_": "l2bn.norms.bn.convert"}}) is None
    file.write_text("limit = 2\ndef helper(): ...\n")
    environment._own.cache_clear()
    assert own_source(node) not in (None, before)


@pytest.mark.parametrize(
    "statement",
    [
        "from .settings import WIDTH",
        "from . import settings",
        "import own_kit.settings",
        "from own_kit.settings import *",
    ],
)
def test_a_module_of_which_only_values_are_imported_is_own_code_too(
    statement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    kit = tmp_path / "own_kit"
    kit.mkdir()
    (kit / "__init__.py").write_text("")
    (kit / "settings.py").write_text("WIDTH = 16\n")
    (kit / "parts.py").write_text(f"{statement}\ndef convert(bn): ...\n")
    importlib.import_module("own_kit.parts")
    node = {"norm": {"_target_": "own_kit.parts.convert"}}
    digests = [own_source(node)]
    for name in ("settings", "__init__"):
        (kit / f"{name}.py").write_text("WIDTH = 64\n")
        environment._own.cache_clear()
        digests.append(own_source(node))
    for name in ("own_kit.parts", "own_kit.settings", "own_kit"):
        sys.modules.pop(name)  # for the next statement
    assert len(set(digests)) == 3


@pytest.mark.parametrize(
    ("hint", "given", "got"),
    [
        ("Literal[16, 512]", "512", 512),
        ("Literal[0, 1]", "true", "v must be 0 or 1, not True"),
        ("tuple[int, ...] | None", "[8, 16]", (8, 16)),
        ("tuple[int, ...]", "8", "v must be a list, not 8"),
        ("list[int] | tuple[int, ...]", "[8, 16]", [8, 16]),
        ("Path", "a/b", Path("a/b")),
        ("str | Path", "a/b", "a/b"),
        ("Making", "{_target_: torch.relu, _partial_: true}", None),
        ("Options", "{a: 1}", {"a": 1}),
        ("List", "[8, 16]", [8, 16]),
        ("Optional[List]", "8", "v must be a list or null, not 8"),
        ("list[Any]", "[{_target_: builtins.int}]", "v holds a node with a _target_, which would not be built"),
        ("Any", "{a: {b: {_target_: builtins.int}}}", "v holds a node with a _target_"),
        ("int, on: int = 0", "1\non: 2", "unknown key norm.True"),
    ],
)
def test_own_parts_may_have_any_types(
    hint: str, given: str, got: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list of YAML becomes a tuple and a text a path where only these will do; what is not built is refused."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "hinted", raising=False)
    (tmp_path / "hinted.py").write_text(
        "from pathlib import Path\nfrom typing import Any, List, Literal, Optional, Protocol, TypedDict\n"
        "class Making(Protocol):\n    def __call__(self) -> int: ...\n"
        f"class Options(TypedDict):\n    a: int\n\ndef part(v: {hint}): return [v]\n"
    )
    (tmp_path / "norm").mkdir()
    text = f"_target_: hinted.part\nv: {given}\n"
    (tmp_path / "norm" / "mine.yaml").write_text(text)
    builder = Builder([tmp_path])
    if isinstance(got, str) and " " in got:
        with pytest.raises(UserError, match=re.escape(got)):
            builder.build(yaml.safe_load(text), "norm")
    else:
        (value,) = builder.build(yaml.safe_load(text), "norm")
        assert got is None or (value == got and type(value) is type(got))


def test_a_function_may_be_a_schedule_and_an_argument(mine: Path, tmp_path: Path) -> None:
    """A node need not give what the caller passes: a schedule's two arguments, a norm's layer and `last`."""
    schedule: dict[str, object] = {"_target_": "own_parts.polynomial", "_partial_": True, "power": 2}
    recipe = mine / "recipe/polynomial.yaml"
    quick = yaml.safe_load((mine / "recipe/quick.yaml").read_text()) | {"epochs": 2}
    recipe.write_text(yaml.safe_dump(quick | {"schedule": schedule}))
    act = {"_target_": "torch.nn.LeakyReLU", "_partial_": True, "negative_slope": 0.1}
    (mine / "backbone/activated.yaml").write_text(yaml.safe_dump({"_target_": "own_parts.Activated", "act": act}))
    options = ["dataset=mine", "dataset.subset=64", "progress=false", "backbone=activated", "norm=but_last"]
    record = train_in(tmp_path / "runs", *options, "recipe=polynomial", folders=[mine])
    # Of the last of two steps.
    assert [row["lr"] for row in record.metrics()] == pytest.approx([0.1 * 0.75**2, 0.1 * 0.25**2])
    for change, said in (
        ({"_partial_": False}, "missing recipe.schedule.epoch, recipe.schedule.epochs: .* or add _partial_: true"),
        ({"power": "two"}, "recipe.schedule.power must be a whole number"),
    ):
        recipe.write_text(yaml.safe_dump(quick | {"schedule": schedule | change}))
        instantiate._targets.cache_clear()
        with pytest.raises(UserError, match=said):
            train_in(tmp_path / "others", *options, "recipe=polynomial", folders=[mine])


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_own_parts_are_trained_and_opened_again(launcher: str, mine: Path, tmp_path: Path) -> None:
    (tmp_path / "another").mkdir()
    given = ["--config-dir", mine, "--config-dir", tmp_path / "another"]
    assert "sweep: 2 finished" in script("train", *given, "experiment=both", f"launcher={launcher}")
    assert "2 finished" in script("status", *given, "--experiment", "both")
    for group, name in (("norm", "clipped"), ("backbone", "tiny"), ("dataset", "mine"), ("recipe", "quick")):
        assert f"\n{name} " in script("list", group, *given)
    assert "64 images to train on" in script("fetch_data", "mine", "dataset.subset=64", *given)
    (summary,) = (tmp_path / "runs").rglob("clipped/*/*/summary.json")
    run = summary.parent
    result = json.loads(summary.read_text())["last"]
    assert evaluate_run(run, "cpu", config_dirs=[mine])[:2] == (result["test/loss"], result["test/top1"])
    assert "top-1" in script("evaluate", *given, run)
    assert replay(run, str(tmp_path / "again"), config_dirs=[mine]).last["test/loss"] == result["test/loss"]
    # A stranger's record runs nothing that the user has not named.
    with pytest.raises(
        UserError, match=r"own_parts\.\w+, which is at this place in no YAML file of configs/; .*--config-dir"
    ):
        replay(run, str(tmp_path / "third"))
    assert "Traceback" not in script("evaluate", run, code=1)
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize(
    ("network", "given", "said"),
    [
        ("Tokens", ["norm=bn"], ""),
        (
            "Tokens",
            ["norm=l2bn"],
            r"norm: norm layers of this network see a batch of tokens or windows \(bn and 0 more\)",
        ),
        ("Tokens", ["norm=bn", "analysis=on"], "analysis: norm layers of this network see"),
        ("pooled", ["norm=bn", "recipe.batch_size=1"], "take a larger recipe.batch_size"),
        (
            "Flat",
            ["norm=bn"],
            "training step fails: RuntimeError: view size is not.*take compute.channels_last=false",
        ),
        ("Flat", ["norm=bn", "compute.channels_last=false"], ""),
        ("Auxiliary", ["norm=bn"], r"in training the network returns tuple, not \(\d+, 10\)"),
        ("Unused", ["norm=bn", "compute.devices=2"], "no gradient reaches spare.weight, spare.bias"),
        ("Unused", ["norm=bn"], ""),
        ("Local", ["norm=bn", "compute.devices=2"], "the run cannot be sent .*lambda.*or take compute.devices=1"),
        ("Tempered", ["norm=bn", "analysis=on"], ""),
        ("Rows", ["norm=bn", "analysis=on"], "analysis: head would be the classifier.*several rows for an image"),
        ("Rows", ["norm=l2bn"], ""),
        ("Spare", ["norm=bn", "analysis=on"], "analysis: spare would be the classifier.*does not run"),
        ("Wrong", ["norm=bn"], "images of 32 x 32 pixels: AttributeError: 'Wrong' object has no attribute 'tail'"),
        ("ByFour", ["norm=bn"], ""),
        ("ByFour", ["norm=bn", "recipe.batch_size=18"], "a ghost batch has 4 images; correct the network"),
        ("network", ["norm=forgetful"], "norm: it returned NoneType for a batch norm layer"),
        ("network", ["norm=whole"], "norm: add _partial_: true to its YAML file"),
        ("misnamed", ["norm=bn"], r"backbone: own_parts\.misnamed needs a parameter num_classes"),
    ],
)
def test_what_cannot_be_trained_is_one_message(
    network: str, given: list[str], said: str, mine: Path, tmp_path: Path
) -> None:
    """Of tokens an l2 norm is not that of an image's feature; one value has no variance. No folder is left."""
    (mine / "backbone/other.yaml").write_text(f"# Mine.\n_target_: own_parts.{network}\n")
    options = ["dataset=mine", "backbone=other", "recipe=quick", "dataset.subset=64", "progress=false", *given]
    expected = pytest.raises(UserError, match=said) if said else contextlib.nullcontext()
    with expected:
        train_in(tmp_path / "runs", *options, folders=[mine])
    assert (tmp_path / "runs").exists() is (not said or given[-1] == "recipe.batch_size=1")


@pytest.mark.slow
def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    for name, *arguments in (
        ("train", "norm=bn"),
        ("list",),
        ("status", "norm=bn"),
        ("evaluate", tmp_path),
        ("replay", tmp_path),
        ("fetch_data", "digits"),
    ):
        printed = script(name, *arguments, "--config-dir", tmp_path / "nowhere", code=1)
        assert f"--config-dir: there is no folder {tmp_path / 'nowhere'}" in printed
        assert "Traceback" not in printed
