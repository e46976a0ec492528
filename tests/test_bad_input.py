"""Wrong input: one message that names the field, what it got and what it takes; nothing is left behind."""

from pathlib import Path

import pytest
from hydra.errors import CompactHydraException

from conftest import ROOT, Issue, Train, train_in
from l2bn.errors import UserError
from l2bn.training.instantiate import check_type

# What is given, and what the message must name. Hydra prints these exceptions without a traceback.
WRONG = [
    # names
    ("dataset=cifar11", ["dataset/cifar11", "cifar10"]),
    ("experiment=table", ["experiment/table", "demo"]),
    # unknown keys, at every level
    ("epochs=3", ["use +epochs=3"]),
    ("+epochs=3", ["unknown key epochs", "did you mean recipe.epochs?"]),
    ("+rcipe=3", ["unknown key rcipe", "did you mean recipe?"]),
    ("+recipe.epoch=3", ["unknown key recipe.epoch", "did you mean epochs"]),
    ("+recipe.schedule.gamma=3", ["unknown key recipe.schedule.gamma", "peak"]),
    ("+dataset.path=data", ["unknown key dataset.path", "label"]),
    ("+backbone.width=2", ["unknown key backbone.width", "depth"]),
    ("+norm.gamma=2", ["unknown key norm.gamma", "scale"]),
    # keys and choices that are taken out, doubled or of another kind
    ("~seed", ["missing seed"]),
    ("~norm", ["missing norm"]),
    ("~recipe.lr", ["missing recipe.lr"]),
    ("~compute.precision", ["missing compute.precision"]),
    ("dataset.label='${oc.env:UNSET}'", ["dataset.label", "UNSET", "not found"]),
    ("norm=[bn,l2bn]", ["norm takes one choice", "-m norm="]),
    ("norm=bn,l2bn", ["norm=bn,l2bn", "--multirun"]),
    ("seed=0,1", ["seed=0,1", "--multirun"]),
    ("checkpoint=5", ["checkpoint", "5", "node"]),
    ("checkpoint=null", ["checkpoint", "None", "node"]),
    ("recipe.lr=[1", ["no viable alternative at input '[1'"]),
    ("recipe.lr='${recipe.rate}'", ["recipe.lr", "recipe.rate", "not found"]),
    ("seed='${seed}'", ["seed", "Recursive"]),
    ("+backbone.num_classes=3", ["backbone.num_classes", "the data set", "leave it out"]),
    # wrong types
    ("seed=null", ["seed", "None", "whole number"]),
    ("seed=one", ["seed", "'one'", "whole number"]),
    ("seed=-1", ["seed", "-1", "0 or more"]),
    ("seed=9999999999999999999", ["record cannot hold", "seed", "less than"]),
    ("runs_dir='~nosuchuser/x'", ["runs_dir", "no home folder"]),
    ("seed=true", ["seed", "True", "whole number"]),
    ("recipe.epochs=2.5", ["recipe.epochs", "2.5", "whole number"]),
    ("recipe.lr=high", ["recipe.lr", "'high'", "number"]),
    ("recipe.lr=nan", ["recipe.lr", "nan", "finite"]),
    ("recipe.nesterov=1", ["recipe.nesterov", "1", "true or false"]),
    ("recipe.schedule=cosine", ["recipe.schedule", "'cosine'", "_target_"]),
    ("recipe=step_200 recipe.schedule.milestones=[a]", ["recipe.schedule.milestones", "['a']", "list"]),
    ("dataset.label=7", ["dataset.label", "7", "text"]),
    ("dataset.subset=some", ["dataset.subset", "'some'", "whole number"]),
    ("dataset.augmentation=flip", ["dataset.augmentation", "'flip'", "_target_"]),
    ("checkpoint.keep_epochs=3", ["checkpoint.keep_epochs", "3", "list"]),
    ("norm.eps=small", ["norm.eps", "'small'", "number"]),
    ("norm._partial_=yes", ["norm._partial_", "'yes'", "true or false"]),
    ("progress=loud", ["progress", "'loud'", "true or false"]),
    ("runs_dir=null", ["runs_dir", "None", "text"]),
    # values out of range
    ("recipe.epochs=0", ["recipe: epochs", "not 0", "or equal to 1"]),
    ("recipe.momentum=0", ["nesterov needs a momentum"]),
    ("recipe=step_200 recipe.schedule.start_factor=2", ["start_factor", "not 2", "or equal to 1"]),
    ("recipe.schedule.peak=1", ["peak", "not 1", "less than 1"]),
    ("recipe=step_200 recipe.schedule.milestones=[9,3]", ["milestones", "[9, 3]", "rising"]),
    ("recipe.batch_size=100000", ["batch_size", "100000", "1437 training images"]),
    ("dataset.subset=5000", ["dataset.subset", "5000", "from 1 to 1437"]),
    ("dataset.subset=16", ["batch_size", "16"]),
    ("dataset.validation=1", ["dataset.validation", "1", "0 <= share < 1"]),
    ("dataset.mean=[125,123,114]", ["dataset.mean", "[125, 123, 114]", "scaled to [0, 1]"]),
    ("dataset.label=''", ["dataset.label", "empty"]),
    ("dataset.image_size=100000", ["dataset.image_size", "100000", "4096"]),
    ("dataset.augmentation.padding=-1", ["padding", "-1", "from 0 to 256"]),
    ("dataset.augmentation.padding=99999", ["padding", "99999", "256"]),
    ("backbone.shortcut=none", ["backbone.shortcut", "'none'", "projection"]),
    ("backbone=torchvision backbone.name=inception_v3", ["backbone", "32 x 32", "image_size"]),
    ("backbone=torchvision backbone.name=vgg16", ["norm", "VGG", "no batch norm"]),
    ("norm.eps=0", ["norm", "eps", "0", "greater than 0"]),
    ("norm.momentum=7", ["norm", "momentum", "7", "[0, 1]"]),
    ("norm.scale=max", ["norm.scale", "'max'", "rms"]),
    ("norm.fused=false", ["norm.fused", "auto or on or off", 'in YAML write "off" with its quotes']),
    ("compute.device=tpu", ["compute.device", "'tpu'", "cuda"]),
    ("compute.devices=0", ["devices", "0", "at least 1"]),
    ("compute.device=cpu compute.devices=100000", ["devices", "100000", "cores"]),
    ("compute.device=cpu compute.precision=16-mixed", ["16-mixed", "CUDA"]),
    ("compute.device=cpu compute.precision=tf32-mixed", ["tf32-mixed", "CUDA"]),
    ("compute.device=cpu compute.compile=graphs", ["compile graphs", "CUDA"]),
    ("compute=ddp compute.device=cpu recipe.batch_size=33", ["batch_size", "33", "2 devices"]),
    ("recipe.lr=1" + 400 * "0", ["recipe.lr", "a finite number"]),
    ("compute.threads=0", ["threads", "0", "at least 1"]),
    ("compute.threads=100000000", ["threads", "100000000", "1024"]),
    ("compute.workers=-1", ["workers", "-1", "from 0 to 1024"]),
    ("compute.workers=100000", ["workers", "100000", "1024"]),
    ("checkpoint.every_steps=-1", ["every_steps", "-1", "or equal to 0"]),
    ("checkpoint.keep_epochs=[0]", ["keep_epochs", "not 0", "or equal to 1"]),
    ("analysis.every=-1", ["analysis", "every", "-1", "or equal to 0"]),
    ("analysis.statistics_every=0", ["analysis", "statistics_every", "not 0", "or equal to 1"]),
    # data that is not there, or not as it should be
    ("dataset=cifar10 dataset.download=false dataset.root=nowhere", ["nowhere", "dataset.root", "image_folder"]),
    ("dataset=image_folder", ["dataset.root"]),
    ("dataset=image_folder dataset.root=nowhere dataset.label=x", ["nowhere/train", "dataset.root=FOLDER"]),
    # targets
    ("norm._target_=null", ["norm: has no _target_"]),
    (
        "backbone._target_=l2bn.data.digits.digits",
        ["backbone._target_", "digits", "is at this place in no YAML file"],
    ),
    ("norm=bn norm._partial_=false", ["norm: add _partial_: true"]),
    # folders
    ("runs_dir=/proc/runs", ["runs_dir", "/proc/runs", "runs_dir=FOLDER"]),
    ("runs_dir=''", ["runs_dir", "empty"]),
]
assert len(WRONG) >= 60


def test_each_row_names_more_than_was_typed() -> None:
    """A message of Hydra's ends with all that was typed."""
    for given, named in WRONG:
        typed = given.lower().replace("null", "none")
        assert not all(word.lower().strip("'") in typed for word in named), given


@pytest.mark.parametrize(("given", "named"), WRONG, ids=[given[:60] for given, _ in WRONG])
def test_a_wrong_configuration_is_named(given: str, named: list[str], train: Train, tmp_path: Path) -> None:
    with pytest.raises(CompactHydraException) as error:
        train(*given.split())
    for word in named:
        assert word in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_a_free_text_that_yaml_took_for_a_truth_value_gets_no_advice_on_words() -> None:
    with pytest.raises(UserError, match=r"dataset\.cache must be a text or null, not False$"):
        check_type(False, str | None, "dataset.cache")


# Refused by Hydra, as a sweep that lacks -m, and by us as late as the data.
COMMANDS = ["dataset=cifar11", "norm=bn,l2bn", "dataset=cifar10 dataset.download=false dataset.root=nowhere"]


@pytest.mark.parametrize("given", COMMANDS)
def test_as_a_command_too_it_leaves_one_message_and_no_folder(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, issue: Issue
) -> None:
    monkeypatch.chdir(tmp_path)
    done = issue("train", f"runs_dir={tmp_path / 'runs'}", *given.split())
    assert done.code == 1
    assert "Traceback" not in done.printed
    for word in dict(WRONG)[given]:
        assert word in done.err
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_key_in_a_yaml_file_is_named_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text(
        (ROOT / "configs/recipe/short.yaml").read_text().replace("momentum", "momentun")
    )
    with pytest.raises(CompactHydraException) as error:
        train_in(tmp_path / "runs", "recipe=mine", folders=[tmp_path])
    file = tmp_path / "recipe" / "mine.yaml"
    assert f"unknown key recipe.momentun in {file}; did you mean momentum?" in str(error.value)
    assert not (tmp_path / "runs").exists()
