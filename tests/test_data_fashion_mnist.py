"""Fashion-MNIST from gzipped or plain IDX files, wherever they usually lie."""

import gzip
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision import datasets

from l2bn.data import fashion_mnist as module
from l2bn.data.fashion_mnist import ARCHIVES, DEBIAN, fashion_mnist
from l2bn.errors import UserError
from official_formats import fashion_mnist as write
from official_formats import idx, pixels

IMAGES = "train-images-idx3-ubyte.gz"


@pytest.fixture(autouse=True)
def _no_system_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a test reads its own files even where Debian's package is installed."""
    monkeypatch.setattr(module, "DEBIAN", tmp_path / "no system files")


def read(root: Path) -> Any:
    return fashion_mnist(str(root), download=False, label="fashion")


def unpacked(folder: Path) -> Path:
    for file in folder.glob("*.gz"):
        file.with_suffix("").write_bytes(gzip.decompress(file.read_bytes()))
        file.unlink()
    return folder


@pytest.mark.parametrize("below", ["", "FashionMNIST/raw"])
@pytest.mark.parametrize("form", ["gzipped", "plain"])
def test_gray_pixels_are_repeated_inside_a_black_border(tmp_path: Path, below: str, form: str) -> None:
    write(tmp_path / below, {}, 20, 10)
    if form == "plain":
        unpacked(tmp_path / below)
    splits = read(tmp_path)
    gray = torch.from_numpy(pixels(20, 28, 28, 1, seed=20)[..., 0])
    assert splits.train.images.shape == (20, 3, 32, 32)
    for channel in range(3):
        assert torch.equal(splits.train.images[:, channel, 2:30, 2:30], gray)
    assert int(splits.train.images.sum()) == 3 * int(gray.sum())
    assert splits.train.labels.tolist() == [i % 10 for i in range(20)]
    assert (len(splits.test), splits.num_classes, splits.image_size) == (10, 10, 32)
    assert splits.classes[9] == "Ankle boot"


def test_other_files_of_these_names_are_said_in_the_label_and_have_no_baseline(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MNIST, KMNIST and EMNIST have such files."""
    write(tmp_path, {}, 20, 10)
    for counts, change in (module.COUNTS, "20 and 10 images"), ((20, 10), "other files"):
        monkeypatch.setattr(module, "COUNTS", counts)
        found = fashion_mnist(str(tmp_path), download=False, label="Fashion-MNIST", baseline="published")
        assert (found.label, found.baseline) == (f"Fashion-MNIST, {change}", None)
        assert "MNIST, KMNIST and EMNIST" in caplog.text
    for name in module.MD5:
        content = gzip.decompress((tmp_path / f"{name}.gz").read_bytes())
        monkeypatch.setitem(module.MD5, name, hashlib.md5(content).hexdigest())
    for form in ("gzipped", "plain"):
        if form == "plain":
            unpacked(tmp_path)
        found = fashion_mnist(str(tmp_path), download=False, label="Fashion-MNIST", baseline="published")
        assert (found.label, found.baseline) == ("Fashion-MNIST", "published")


@pytest.mark.parametrize("highest", [10, 26])
def test_labels_above_nine_are_refused(tmp_path: Path, highest: int) -> None:
    write(tmp_path, {}, 20, 10)
    labels = tmp_path / "t10k-labels-idx1-ubyte.gz"
    labels.write_bytes(gzip.compress(idx(np.full(10, highest))))
    with pytest.raises(UserError, match=rf"t10k-labels-idx1-ubyte\.gz holds labels up to {highest}, not 0 to 9"):
        read(tmp_path)


def test_torchvision_reads_the_same_images(tmp_path: Path) -> None:
    write(tmp_path / "FashionMNIST" / "raw", {}, 20, 10)
    ours = read(tmp_path).test
    unpacked(tmp_path / "FashionMNIST" / "raw")
    reference = datasets.FashionMNIST(tmp_path, train=False)
    assert torch.equal(ours.images[:, 0, 2:30, 2:30], reference.data)
    assert torch.equal(ours.labels, reference.targets)


def test_what_is_missing_is_said_with_the_ways_to_provide_it(tmp_path: Path) -> None:
    write(tmp_path, {}, 20, 10)
    (tmp_path / IMAGES).unlink()
    with pytest.raises(UserError) as caught:
        read(tmp_path)
    archive = ARCHIVES[IMAGES.removesuffix(".gz")]
    for part in (str(tmp_path), archive.url, archive.md5, "dataset.root=", "dataset-fashion-mnist"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        gzip.compress(idx(pixels(20, 28, 28, 1)[..., 0]))[:-50],
        gzip.compress(idx(pixels(20, 28, 28, 1)[..., 0])[:-1]),
        gzip.compress(idx(pixels(20, 28, 28, 1))),
        gzip.compress(idx(pixels(20, 27, 28, 1)[..., 0])),
        b"no gzip",
        gzip.compress(b""),
    ],
    ids=["truncated", "too short", "four dimensions", "another size", "text", "empty"],
)
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    write(tmp_path, {}, 20, 10)
    (tmp_path / IMAGES).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(tmp_path)
    assert str(tmp_path / IMAGES) in str(caught.value)


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_debians_files_are_the_official_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DEBIAN", DEBIAN)
    splits = fashion_mnist(str(tmp_path), download=False, label="fashion", mean=None, std=None)
    assert splits.label == "fashion"  # by the md5 sums
    assert torch.bincount(splits.train.labels).tolist() == [6000] * 10
    assert torch.bincount(splits.test.labels).tolist() == [1000] * 10
    # The constants of configs/dataset/fashion_mnist.yaml.
    np.testing.assert_allclose(splits.mean, [0.2190] * 3, atol=5e-5)
    np.testing.assert_allclose(splits.std, [0.3318] * 3, atol=5e-5)
