"""The images are part of a run: other images are refused where it is resumed, skipped, evaluated or published."""

import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import yaml
from PIL import Image

from conftest import ROOT, AtUpdate, Train, planned, train_in
from l2bn.data.folder import image_folder
from l2bn.data.imagenet import imagenet
from l2bn.data.splits import CONTENTS, PUBLISHED, Images, _classes_digest, digest, make_splits
from l2bn.errors import UserError
from l2bn.publication import publish
from l2bn.records import SUMMARY, InvalidRecordError, Record
from l2bn.training.existing import analyze, evaluate_run, replay
from l2bn.training.plan import PlannedRun, check_images
from l2bn.training.sweep import run_sweep

GRAY = {"label": "Gray", "mean": [0.5] * 3, "std": [0.5] * 3}


def draw(root: Path, parts: tuple[str, str] = ("train", "test"), seed: int = 0) -> Path:
    """Eight noise images of each of two classes in each part, as bitmaps: all of one size in bytes."""
    random = np.random.default_rng(seed)
    for part in parts:
        for name in ("a", "b"):
            (root / part / name).mkdir(parents=True, exist_ok=True)
            for number in range(8):
                pixels = random.integers(0, 256, (16, 16, 3), np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{number}.bmp")
    return root


def swap(one: Path, other: Path) -> None:
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)


CHANGES: dict[str, Callable[[Path], object]] = {
    "content": lambda folder: swap(folder / "a/0.bmp", folder / "a/1.bmp"),
    "label": lambda folder: (folder / "a/0.bmp").rename(folder / "b/8.bmp"),
    "name": lambda folder: (folder / "a/0.bmp").rename(folder / "a/8.bmp"),
    "one image less": lambda folder: (folder / "a/0.bmp").unlink(),
    "another size": lambda folder: Image.new("RGB", (16, 16)).convert("L").save(folder / "a/0.bmp"),
}


@pytest.mark.parametrize(("part", "change"), [*(("train", change) for change in CHANGES), ("test", "content")])
def test_a_folder_in_memory_is_told_by_names_labels_and_contents(tmp_path: Path, part: str, change: str) -> None:
    def read(root: Path, cache: str) -> object:
        return image_folder(str(root), cache=str(tmp_path / cache), **GRAY).fingerprint

    root = draw(tmp_path / "root")
    before = read(root, "cache")
    assert read(root, "cache") == before  # from the cache
    root = root.rename(tmp_path / "elsewhere")
    assert read(root, "another cache") == before
    CHANGES[change](root / part)
    assert read(root, "third cache")["files"] != before["files"]


@pytest.mark.parametrize(
    ("part", "change"), [*(("train", change) for change in CHANGES if change != "content"), ("val", "name")]
)
def test_images_decoded_when_asked_are_told_by_names_labels_and_sizes(
    tmp_path: Path, part: str, change: str
) -> None:
    root = draw(tmp_path / "root", ("train", "val"))
    before = imagenet(str(root), image_size=8, **GRAY).fingerprint
    assert before["pixels"] is None
    root = root.rename(tmp_path / "elsewhere")
    assert imagenet(str(root), image_size=8, **GRAY).fingerprint == before
    CHANGES[change](root / part)
    assert imagenet(str(root), image_size=8, **GRAY).fingerprint != before


class OnAccess:
    """A split of a user's own, whose labels do not tell it from others."""

    labels = torch.arange(4) % 2

    def __len__(self) -> int:
        return 4


def test_own_images_that_are_told_by_their_labels_alone_get_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """As the folders of CIFAR-10-C, which have equal labels."""
    own: Any = OnAccess()
    before = make_splits(own, own, 2, 8, **GRAY).fingerprint
    (message,) = caplog.messages
    assert "Gray: labels alone tell its images from others" in message
    caplog.clear()
    found = [make_splits(own, own, 2, 8, files=digest([each]), **GRAY).fingerprint for each in ("fog", "snow")]
    assert caplog.messages == []
    assert before["files"] not in [found[0]["files"], found[1]["files"]]
    assert found[0] != found[1]


def test_a_subset_is_of_the_same_images(tmp_path: Path) -> None:
    root = draw(tmp_path / "root")
    whole, part = (image_folder(str(root), cache=str(tmp_path), subset=n, **GRAY) for n in (None, 4))
    assert len(part.train) == 4
    assert part.fingerprint == whole.fingerprint


def test_a_digest_knows_where_one_part_ends_and_what_shape_it_has() -> None:
    zeros = torch.zeros(4, dtype=torch.uint8)
    parts = [["ab", "c"], ["a", "bc"], ["abc"], [zeros], [zeros.view(2, 2)], [zeros[:2], zeros[2:]], [zeros.bool()]]
    assert len({digest(part) for part in parts}) == len(parts)
    assert digest([zeros.view(2, 2).t()]) == digest([zeros.view(2, 2)])
    rows = torch.arange(6000, dtype=torch.uint8).view(3000, 2)
    assert digest([rows.t().contiguous().t()]) == digest([rows])
    whole = hashlib.sha256(b"torch.uint8 (3000, 2) " + hashlib.sha256(rows.numpy().tobytes()).digest())
    assert digest([rows]) == whole.hexdigest()[:32]


def run(root: Path) -> tuple[str, ...]:
    return (
        *("dataset=image_folder", f"dataset.root={root}", f"dataset.cache={root.parent}", "dataset.label=noise"),
        *("recipe.epochs=2", "recipe.batch_size=8", "norm=bn", "progress=false"),
    )


def test_a_run_on_other_images_is_refused_until_its_own_are_back(
    tmp_path: Path, train: Train, at_update: AtUpdate, caplog: pytest.LogCaptureFixture
) -> None:
    own, other = draw(tmp_path / "own"), draw(tmp_path / "other", seed=1)
    whole = train(*run(own), f"runs_dir={tmp_path / 'whole'}")

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    at_update(4, stop)  # in the second epoch
    with pytest.raises(KeyboardInterrupt):
        train(*run(own))
    with pytest.raises(UserError, match=r"other images than those present[\s\S]*dataset\.label=NAME"):
        train(*run(other))
    record = train(*run(own))
    assert record.last == whole.last | {key: record.last[key] for key in ("seconds", "images_per_second")} | {
        "peak_memory_bytes": record.last["peak_memory_bytes"]
    }
    assert record.images == whole.images

    for again in (
        lambda: train(*run(other)),
        lambda: evaluate_run(record.folder, "cpu", str(other)),
        lambda: analyze(record.folder, device="cpu", root=str(other)),
        lambda: replay(record.folder, str(tmp_path / "replayed"), str(other)),
    ):
        with pytest.raises(UserError, match="other images than those present"):
            again()
    assert not (tmp_path / "replayed").exists()
    assert train(*run(own)) == record
    converted = shutil.copytree(own, tmp_path / "converted")
    for path in list(converted.rglob("*.bmp")):
        with Image.open(path) as image:
            image.save(path.with_suffix(".png"))
        path.unlink()
    assert train(*run(converted)) == record, "a lossless conversion is the same images"
    shutil.rmtree(own)
    assert train(*run(own)) == record
    assert "its images cannot be compared with those present" in caplog.text


def test_equal_files_that_decode_to_other_pixels_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    check_images({"files": "a", "pixels": "b"}, {"files": "a", "pixels": "c"}, Path("run"))
    assert "run was made on the same files decoded to other pixels" in caplog.text
    for pixels in ("c", None):
        with pytest.raises(UserError):
            check_images({"files": "a", "pixels": pixels and "b"}, {"files": "c", "pixels": pixels}, Path("run"))
    check_images(None, {"files": "a", "pixels": "b"}, Path("run"))


def test_a_record_from_before_fingerprints_reads_and_is_written_as_it_was(tmp_path: Path, train: Train) -> None:
    record = train("dataset.subset=64", "recipe.epochs=1", "norm=bn", "progress=false")
    assert record.images is not None
    old = replace(record, images=None)
    old.write()
    content = (record.folder / SUMMARY).read_bytes()
    assert "images" not in json.loads(content)
    again = Record.read(record.folder)
    assert again == old
    again.write()
    assert (record.folder / SUMMARY).read_bytes() == content
    for wrong in ("abc", {"files": 1, "pixels": None}, {"files": "a"}):
        (record.folder / SUMMARY).write_text(json.dumps(json.loads(content) | {"images": wrong}))
        with pytest.raises(InvalidRecordError, match="images"):
            Record.read(record.folder)


def test_runs_on_other_images_are_not_published_beside_one_another(tmp_path: Path, train: Train) -> None:
    own, other = draw(tmp_path / "own"), draw(tmp_path / "other", seed=1)
    first = train(*run(own))
    publish(first.folder, tmp_path / "records")
    second = train(*run(other), "seed=1")
    with pytest.raises(InvalidRecordError, match="other images than"):
        publish(second.folder, tmp_path / "records")
    os.utime(own)
    third = train(*run(own), "seed=2")
    publish(third.folder, tmp_path / "records")


def test_a_sweep_over_other_images_is_refused_before_it_starts(tmp_path: Path) -> None:
    own, other = draw(tmp_path / "own"), draw(tmp_path / "other", seed=1)
    runs = tmp_path / "runs"
    train_in(runs, *run(own))

    def sweep(root: Path) -> list[PlannedRun]:
        return planned(*run(root), "seed=0,1", f"runs_dir={runs}")

    with pytest.raises(UserError, match="other images than those present"):
        run_sweep(sweep(other), pytest.fail)
    launched = []
    run_sweep(sweep(own), lambda jobs: launched.extend(jobs) or [])  # type: ignore[func-returns-value]
    assert len(launched) == 1


def test_a_folder_is_whole_by_the_counts_that_are_given(tmp_path: Path) -> None:
    """Classes, and images of each in training and test."""
    root = draw(tmp_path / "root")

    def read() -> tuple[str, str | None]:
        splits = image_folder(str(root), cache=str(tmp_path), counts=[2, 8, 8], baseline="published", **GRAY)
        return splits.label, splits.baseline

    assert read() == ("Gray", "published")
    (root / "train/a/0.bmp").unlink()
    assert read() == ("Gray, 15 and 16 images", None)


def test_other_pixels_than_the_official_ones_have_no_published_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the names of files and classes and their order."""

    def read(name: str) -> tuple[str, str | None]:
        splits = image_folder(str(tmp_path / name), cache=str(tmp_path / "cache"), baseline="own", **GRAY)
        return splits.label, splits.baseline

    draw(tmp_path / "official")
    arrays = image_folder(str(tmp_path / "official"), cache=str(tmp_path / "cache"), **GRAY)
    monkeypatch.setitem(PUBLISHED, "own", (2, 16, 16))
    monkeypatch.setitem(CONTENTS, "own", _classes_digest(arrays.train, arrays.test))
    assert read("official") == ("Gray", "own")
    shutil.copytree(tmp_path / "official", tmp_path / "renamed")
    for part in ("train", "test"):
        (tmp_path / "renamed" / part / "a").rename(tmp_path / "renamed" / part / "z")
    assert read("renamed") == ("Gray", "own")
    shutil.copytree(tmp_path / "official", tmp_path / "other")
    swap(tmp_path / "other/train/a/0.bmp", tmp_path / "other/train/b/0.bmp")
    assert read("other") == ("Gray, other pixels", None)
    shutil.copytree(tmp_path / "official", tmp_path / "leaking")
    shutil.copy(tmp_path / "leaking/test/a/0.bmp", tmp_path / "leaking/train/a/new.bmp")
    assert read("leaking") == ("Gray, 17 and 16 images, 1 of 16 test images known from training", None)


def mosaics(shared_data: Path, part: str) -> Iterator[npt.NDArray[np.uint8]]:
    """The images of each class of CIFAR-100, side by side, without loss."""
    with tarfile.open(shared_data / "cifar100.tar") as tar:
        for member in tar:
            if member.name.startswith(f"cifar100/{part}/") and member.isfile():
                yield np.array(Image.open(io.BytesIO(tar.extractfile(member).read())))  # type: ignore[union-attr]


@pytest.mark.slow
def test_contents_of_cifar100(shared_data: Path) -> None:
    splits = []
    for part, count in (("train", 500), ("test", 100)):
        found = map(torch.from_numpy, mosaics(shared_data, part))
        images = torch.cat([mosaic.unfold(0, 32, 32).unfold(1, 32, 32).flatten(0, 1) for mosaic in found])
        splits.append(Images(images, torch.arange(100).repeat_interleave(count)))
        assert images.shape == (100 * count, 3, 32, 32)
    assert _classes_digest(*splits) == CONTENTS["cifar100"]


@pytest.mark.slow
def test_constants_of_cifar100(shared_data: Path) -> None:
    """Those of cifar100.yaml and of cifar100_png.yaml are those of the images."""
    total, squares, pixels = np.zeros(3), np.zeros(3), 0
    for mosaic in mosaics(shared_data, "train"):
        total += (mosaic / 255).sum((0, 1))
        squares += ((mosaic / 255) ** 2).sum((0, 1))
        pixels += mosaic.shape[0] * mosaic.shape[1]
    assert pixels == 50_000 * 32 * 32
    mean = total / pixels
    std = np.sqrt(squares / pixels - mean**2)
    for name in ("cifar100", "cifar100_png"):
        node = yaml.safe_load((ROOT / f"configs/dataset/{name}.yaml").read_text())
        np.testing.assert_allclose([node["mean"], node["std"]], [mean, std], atol=5e-5)
