"""The choices that every data set offers: subset, validation, normalisation."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from l2bn.data import splits as module
from l2bn.data.splits import Images, Splits, make_splits, pixel_statistics, stratified_order
from l2bn.errors import UserError


def numbered(labels: list[int], first: int = 0) -> Images:
    """Images whose every pixel is the image's number, so that a test sees which ones it holds."""
    pixels = torch.arange(first, first + len(labels), dtype=torch.uint8).view(-1, 1, 1, 1)
    pixels = pixels.expand(-1, 3, 4, 4).contiguous()
    return Images(pixels, torch.tensor(labels))


def numbers(split: Any) -> list[int]:
    return split.images[:, 0, 0, 0].tolist()


def splits(**common: Any) -> Splits:
    common = {"label": "Data", "mean": [0.5] * 3, "std": [0.5] * 3, **common}
    return make_splits(numbered([i % 4 for i in range(200)]), numbered([0, 1, 2, 3], first=200), 4, 4, **common)


@settings(max_examples=30)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=80))
def test_every_prefix_of_the_stratified_order_holds_each_class_in_proportion(labels: list[int]) -> None:
    tensor = torch.tensor(labels)
    order = stratified_order(tensor, "test")
    assert order.sort().values.tolist() == list(range(len(labels)))
    share = torch.bincount(tensor, minlength=5) / len(labels)
    for length in range(1, len(labels) + 1):
        counts = torch.bincount(tensor[order[:length]], minlength=5)
        # Each class is off by half an image at most from n * t of its n, and so is each of the four others.
        assert (counts - share * length).abs().max() <= 2 + 1e-5


def test_classes_of_one_size_differ_by_one_image_at_most() -> None:
    labels = torch.arange(60) % 5
    order = stratified_order(labels, "test")
    for length in range(1, 61):
        counts = torch.bincount(labels[order[:length]], minlength=5)
        assert counts.max() - counts.min() <= 1


def test_stratified_order_is_random_within_a_class() -> None:
    order = stratified_order(torch.zeros(100, dtype=torch.int64), "test").tolist()
    assert order != sorted(order)


def test_subset_is_stratified_fixed_and_nested() -> None:
    small, large = splits(subset=20), splits(subset=50)
    assert torch.bincount(small.train.labels).tolist() == [5] * 4
    assert set(numbers(small.train)) < set(numbers(large.train))
    assert numbers(small.train) == numbers(splits(subset=20).train) == sorted(numbers(small.train))
    assert numbers(small.test) == numbers(splits().test)


def test_validation_takes_a_stratified_share_of_the_training_images_and_leaves_the_test_set() -> None:
    tuned = splits(validation=0.1)
    held, kept = numbers(tuned.test), numbers(tuned.train)
    assert len(held) == 20
    assert torch.bincount(tuned.test.labels).tolist() == [5] * 4
    assert sorted(held + kept) == list(range(200))


def test_validation_is_the_same_for_every_subset() -> None:
    tuned = splits(validation=0.1, subset=40)
    assert numbers(tuned.test) == numbers(splits(validation=0.1).test)
    assert len(tuned.train) == 40
    assert not set(numbers(tuned.train)) & set(numbers(tuned.test))


@pytest.mark.parametrize(
    ("choice", "label"),
    [
        ({}, "Data"),
        ({"subset": 100}, "Data, 100 images"),
        ({"validation": 0.1}, "Data, validation 0.1"),
        ({"validation": 0.1, "subset": 100}, "Data, validation 0.1, 100 images"),
    ],
)
def test_label_says_so_and_the_baseline_goes(choice: dict[str, Any], label: str) -> None:
    result = splits(baseline="published", **choice)
    assert result.label == label
    assert result.baseline == (None if choice else "published")


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"subset": 0}, "dataset.subset=0: give a number from 1 to 200"),
        ({"subset": 201}, "dataset.subset=201: give a number from 1 to 200"),
        ({"validation": 1.0}, "dataset.validation=1.0"),
        ({"validation": -0.1}, "dataset.validation=-0.1"),
        ({"validation": 0.001}, "would hold out 0 of 200"),
        ({"validation": 0.5, "subset": 101}, "from 1 to 100"),
        ({"mean": None}, "go together"),
        ({"std": None}, "go together"),
        ({"mean": [0.5]}, "three numbers each"),
        ({"std": [0.5, 0.0, 0.5]}, "std above 0"),
        ({"validaton": 0.2}, "unknown key dataset.validaton; accepted by every data set: label"),
        ({"mean": 0.5}, "dataset.mean is 0.5, but must be of type list or tuple"),
        ({"subset": 20.0}, "dataset.subset is 20.0, but must be of type int"),
        ({"validation": "0.2"}, "dataset.validation is '0.2', but must be of type float or int"),
        ({"augmentation": "flip"}, "must be of type Augmentation"),
    ],
)
def test_a_choice_that_cannot_be_fulfilled_is_named(choice: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        splits(**choice)


def test_classes_of_which_nothing_is_held_out_are_told(caplog: pytest.LogCaptureFixture) -> None:
    labels = [0] * 80 + [1] * 80 + [2, 2]
    options: dict[str, Any] = {"label": "Data", "mean": [0.5] * 3, "std": [0.5] * 3, "validation": 0.1}
    found = make_splits(numbered(labels), numbered([0, 1, 2], first=200), 3, 4, classes=("a", "b", "c"), **options)
    assert found.label == "Data, validation 0.1, 1 of 3 classes untested"
    assert "c among them, no image is held out" in caplog.text


@pytest.mark.parametrize(
    ("common", "whole"),
    [({"label": "Set"}, None), ({"label": "Mine", "baseline": "set"}, None), ({"label": "Mine"}, (4, 200, 4))],
    ids=["by label", "by baseline", "given"],
)
def test_a_published_set_that_is_not_whole_says_so_in_its_label_and_has_no_baseline(
    monkeypatch: pytest.MonkeyPatch, common: dict[str, Any], whole: tuple[int, int, int] | None
) -> None:
    monkeypatch.setattr(module, "PUBLISHED", dict.fromkeys(("Set", "set"), (4, 200, 4)))
    common = {"baseline": "other", "mean": [0.5] * 3, "std": [0.5] * 3, **common}
    label, baseline = common["label"], common["baseline"]

    def outcome(train: list[int], test: list[int], **options: Any) -> tuple[str, str | None]:
        found = make_splits(numbered(train), numbered(test, 200), 4, 4, whole=whole, **options, **common)
        return found.label, found.baseline

    train, test = [i % 4 for i in range(200)], [0, 1, 2, 3]
    assert outcome(train, test) == (label, baseline)
    assert outcome(train[:-1], test) == (f"{label}, 199 and 4 images", None)
    assert outcome(train, test[:3]) == (f"{label}, 200 and 3 images", None)
    assert outcome([0, *train[1:-1], 0], test) == (f"{label}, other files", None)  # of unequal classes
    assert outcome(train, [0, 1, 2, 2]) == (f"{label}, other files", None)  # one class missing
    assert outcome(train, test, intact=False) == (f"{label}, other files", None)
    assert outcome(train[:-1], test, intact=False) == (f"{label}, 199 and 4 images", None)
    coarse = [one // 2 for one in train], [one // 2 for one in test]
    fewer = make_splits(numbered(coarse[0]), numbered(coarse[1], 200), 2, 4, whole=whole, **common)
    assert (fewer.label, fewer.baseline) == (f"{label}, 2 classes", None)
    assert outcome(train, test, variant="coarse") == (f"{label}, coarse", None)
    assert outcome(train, test[:3], variant="coarse", subset=8) == (
        f"{label}, 200 and 3 images, coarse, 8 images",
        None,
    )
    monkeypatch.setitem(module.CONTENTS, baseline, "a digest by class")
    assert outcome(train, test) == (f"{label}, other pixels", None)
    assert outcome(train, test, variant="coarse") == (f"{label}, coarse", None)  # has other classes


def test_the_counts_of_published_sets_are_those_in_the_configurations() -> None:
    """Every data set that has a baseline, or is called by a published name, says its counts in its first line."""
    known = 0
    for file in sorted((Path(__file__).parents[1] / "configs" / "dataset").glob("*.yaml")):
        text = file.read_text()
        node = yaml.safe_load(text)
        counts = module.PUBLISHED.get(node["label"]) or module.PUBLISHED.get(node["baseline"])
        assert counts or node["baseline"] is None
        if counts and "root" in node and "imagenet_wds" not in node["_target_"]:
            known += 1
            assert all(f"{number:,}" in text.split("# Source")[0] for number in counts), file.name
    assert known >= 6


def test_test_images_that_are_training_images_are_counted_in_the_label(caplog: pytest.LogCaptureFixture) -> None:
    """As where files were copied instead of moved. Those of published sets are what all others measure on."""
    common: dict[str, Any] = {"mean": [0.5] * 3, "std": [0.5] * 3}
    train, test = numbered([i % 4 for i in range(40)]), numbered([0, 1, 2, 3], first=37)
    assert make_splits(train, test, 4, 4, label="Set", whole=(4, 40, 4), **common).label == "Set"
    assert make_splits(train, test, 4, 4, label="Mine", validation=0.5, **common).label == "Mine, validation 0.5"
    assert caplog.text == ""
    label = make_splits(train, test, 4, 4, label="Mine", **common).label
    assert label == "Mine, 3 of 4 test images known from training"
    assert "Mine: 3 of 4 test images are training images too" in caplog.text


def test_a_class_without_training_images_is_refused() -> None:
    with pytest.raises(UserError, match="classes differ: the class 3 has test images and no training images"):
        make_splits(numbered([0, 1, 2]), numbered([0, 3]), 4, 4, label="Data")
    with pytest.raises(UserError, match="classes differ: the class owl has test images"):
        make_splits(numbered([0, 0]), numbered([0, 1]), 2, 4, ("cat", "owl"), label="Data")
    with pytest.raises(UserError, match="classes differ: the class 2 has test images"):  # more classes than names
        make_splits(numbered([0, 1]), numbered([0, 2]), 3, 4, ("cat", "owl"), label="Data")


def test_pixel_statistics_are_those_of_numpy() -> None:
    images = torch.randint(0, 256, (5000, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    images[:, 1] //= 3
    mean, std = pixel_statistics(images)
    scaled = images.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(mean, scaled.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, scaled.std((0, 2, 3)), rtol=1e-12)


def test_normalisation_is_computed_from_the_training_images_alone() -> None:
    result = splits(mean=None, std=None, subset=40)
    assert isinstance(result.train, Images)
    mean, std = pixel_statistics(result.train.images)
    assert (list(result.mean), list(result.std)) == (mean, std)


def test_a_constant_channel_is_centred_only() -> None:
    black = Images(torch.zeros(4, 3, 2, 2, dtype=torch.uint8), torch.arange(4))
    result = make_splits(black, black, 4, 2, label="black")
    assert (result.mean, result.std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 3, 4, 5, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2)),
    ],
)
def test_images_of_another_kind_are_refused(images: torch.Tensor, labels: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="must be"):
        Images(images, labels)


class Own:
    """A split of the user's own."""

    def __init__(self, labels: Any, count: int = 4) -> None:
        self.labels, self.count = labels, count

    def __len__(self) -> int:
        return self.count


def test_the_whole_tau_2020_is_known_by_its_counts() -> None:
    """Those of its README, which differ from class to class."""
    sizes = [1393, 1400, 1382, 1380, 1429, 1427, 1373, 1386, 1413, 1379], [296, *[297] * 8, 296]
    parts = (Own(torch.arange(10).repeat_interleave(torch.tensor(each)), sum(each)) for each in sizes)
    common: dict[str, Any] = {"label": "Mine", "mean": [0.5] * 3, "std": [0.5] * 3}
    whole = module.PUBLISHED["TAU 2020"]
    assert make_splits(*parts, 10, 128, files="of TAU", whole=whole, **common).label == "Mine"


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (Own([0, 1, 0, 1]), "`labels` must be an int64 tensor, one for each of the 4 training images, got list"),
        (Own(np.array([0, 1, 0, 1])), "got ndarray"),
        (Own(None), "got NoneType"),
        (Own(torch.zeros(4)), r"got torch\.float32 \(4,\)"),
        (Own(torch.arange(2)), r"got torch\.int64 \(2,\)"),
        (Own(torch.arange(0), 0), "has no training images"),
    ],
)
def test_a_split_without_images_or_labels_is_refused(own: Any, words: str) -> None:
    whole = splits()
    with pytest.raises(UserError, match=words):
        make_splits(own, whole.test, 4, 4, label="Own")
    with pytest.raises(UserError, match=words):
        replace(whole, train=own)
    with pytest.raises(UserError, match=words.replace("training", "test")):
        replace(whole, test=own)


def test_a_normalisation_of_other_pixels_is_refused_however_the_splits_were_made() -> None:
    with pytest.raises(UserError, match=r"dataset\.mean=\[125\.0, .* of pixels scaled to \[0, 1\]"):
        replace(splits(), mean=(125.0, 123.0, 114.0))
