"""Every data set of configs/dataset is built from a small stand-in in its official format, and makes batches."""

import hashlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from l2bn.data import fashion_mnist
from l2bn.data.loader import evaluation_loader, training_loader
from l2bn.data.splits import Images, Splits, pixel_statistics
from l2bn.errors import UserError
from l2bn.training.instantiate import Builder
from official_formats import CONFIGS, write

NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
# Every day the first by its name of those that one function reads.
FIRST = {yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["_target_"]: name for name in NAMES[::-1]}
BY_FUNCTION = [
    pytest.param(name, marks=() if name in FIRST.values() else pytest.mark.slow, id=name) for name in NAMES
]


def composed(name: str, overrides: list[str]) -> Any:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS.parent), version_base="1.3"):
        config = compose("train", [f"dataset={name}", *overrides])
    return OmegaConf.to_container(config.dataset, resolve=True, throw_on_missing=True)


def build(name: str, overrides: list[str]) -> Splits:
    return Builder().build(composed(name, overrides), "dataset")


@pytest.mark.parametrize("name", NAMES)
def test_a_data_set_is_what_its_file_says_and_makes_batches(name: str, tmp_path: Path) -> None:
    node = composed(name, write(name, tmp_path / "a folder, äöü"))
    splits: Splits = Builder().build(node, "dataset")
    label = node["label"] or Path(node["root"]).name
    # A stand-in for a published set holds fewer images, which its label says; no published number stands beside it.
    said = f"{label}, {len(splits.train):,} and ", f"{label}, tested on its training images"
    assert splits.label == label or splits.label.startswith(said)
    assert splits.baseline == (node["baseline"] if splits.label == label else None)
    assert splits.train.labels.unique().numel() > 1
    size = splits.image_size
    assert len(splits.mean) == len(splits.std) == 3
    assert splits.num_classes >= 2
    assert not splits.classes or len(splits.classes) == splits.num_classes
    for split in (splits.train, splits.test):
        assert split.labels.dtype == torch.int64
        assert 0 <= int(split.labels.min()) <= int(split.labels.max()) < splits.num_classes
        pixels, label = split[0]
        assert (pixels.dtype, pixels.shape, label) == (torch.uint8, (3, size, size), int(split.labels[0]))
    train = training_loader(splits.train, splits=splits, batch_size=8, seed=0, device="cpu")
    images, labels = next(train.epoch(0))
    assert (images.shape, images.dtype, labels.shape) == ((8, 3, size, size), torch.float32, (8,))
    assert torch.isfinite(images).all()
    test = evaluation_loader(splits.test, splits=splits, batch_size=8, device="cpu")
    assert sum(len(labels) for _, labels in test.epoch(0)) == len(splits.test)


def test_the_digits_are_those_of_the_published_records() -> None:
    """The split and the pixels, which no machine rounds: they are multiples of 255/1024."""
    splits = build("digits", [])
    content = hashlib.sha256()
    for split in (splits.train, splits.test):
        assert isinstance(split, Images)
        content.update(split.images.contiguous().numpy())
        content.update(split.labels.numpy())
    assert content.hexdigest()[:16] == "e77ebbdc94687233"


@pytest.mark.parametrize("name", BY_FUNCTION)
def test_a_data_set_offers_subset_and_validation(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A subset that leaves a class that is tested untrained says so."""
    images = 400 if name == "cifar100" else 80  # four of each of a hundred classes
    overrides = [*write(name, tmp_path, train=images), "dataset.validation=0.5"]
    trained = len(build(name, overrides).train)
    size = trained - 1 if trained > 8 else 8
    splits = build(name, [*overrides, f"dataset.subset={size}"])
    assert len(splits.train) == size
    assert torch.equal(splits.test[0][0], splits.test[0][0])  # read without random crops
    assert splits.label.endswith(f", validation 0.5, {size} images")
    assert splits.baseline is None
    few = build(name, [*overrides, "dataset.subset=1"])
    assert re.search(r", 1 images, \d+ of \d+ classes untrained", few.label)
    assert re.search(r"1 images: \d+ of \d+ classes have test images and no training images", caplog.text)


@pytest.mark.parametrize("name", BY_FUNCTION)
def test_a_data_set_that_is_not_there_is_said_with_its_place(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "no system files")
    node = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    if "root" not in node:
        pytest.skip("comes with the project")
    overrides = [f"dataset.root={tmp_path}/nowhere", "++dataset.label=none"]
    overrides += ["dataset.download=false"] if "download" in node else []
    with pytest.raises(UserError, match=str(tmp_path / "nowhere")):
        build(name, overrides)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_normalisation_constants_are_those_of_the_data(name: str) -> None:
    """Computed anew wherever the data set itself is at hand."""
    node = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    if node["mean"] is None:
        pytest.skip("computed for every run")
    try:
        splits = build(name, ["dataset.download=false"] if "download" in node else [])
    except UserError:
        if (Path(node["root"]) / node.get("train", "")).exists():
            raise
        pytest.skip(f"{node['label']} is not here")
    if not isinstance(splits.train, Images):
        pytest.skip("too large to decode; the constants are the field's")
    mean, std = pixel_statistics(splits.train.images)
    torch.testing.assert_close(
        torch.tensor([splits.mean, splits.std]), torch.tensor([mean, std]), rtol=0, atol=1e-4
    )
