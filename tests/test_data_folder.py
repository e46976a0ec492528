"""A tree of images: decoded once, decoded again when it has changed, and named when something is wrong with it."""

import hashlib
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

from l2bn.data import folder as reader
from l2bn.data.folder import image_folder
from l2bn.data.splits import Images
from l2bn.errors import UserError
from official_formats import image_folder as write_tree
from official_formats import jpeg, pixels

NODE = {"train": "train", "test": "test"}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """12 training and 6 test images in two classes."""
    root = tmp_path / "my images, äöü"
    write_tree(root, NODE, 12, 6)
    return root


def read(root: Path, **options: Any) -> Any:
    return image_folder(str(root), **{"cache": str(root.parent / "cache"), "label": "folder", **options})


def expected(root: Path, part: str) -> torch.Tensor:
    files = sorted(file for file in (root / part).rglob("*") if file.is_file())
    return torch.stack([torch.from_numpy(np.array(Image.open(file).convert("RGB"))) for file in files]).permute(
        0, 3, 1, 2
    )


@pytest.fixture
def decodings(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders decoded so far."""
    folders = []
    decode = reader._decode

    def counted(tree: reader.Tree, image_size: int | None) -> torch.Tensor:
        folders.append(tree.folder)
        return decode(tree, image_size)

    monkeypatch.setattr(reader, "_decode", counted)
    return folders


def test_images_come_by_class_and_name(tree: Path) -> None:
    splits = read(tree)
    for part, split in (("train", splits.train), ("test", splits.test)):
        assert torch.equal(split.images, expected(tree, part))
    assert splits.train.labels.tolist() == [0] * 6 + [1] * 6
    assert splits.classes == ("cat", "dog")
    assert (splits.num_classes, splits.image_size) == (2, 32)


def test_the_tree_is_decoded_once(tree: Path, decodings: list[Path]) -> None:
    first, second = read(tree), read(tree)
    assert decodings == [tree / "train", tree / "test"]
    assert torch.equal(first.train.images, second.train.images)
    assert torch.equal(first.test.labels, second.test.labels)


def rewrite(tree: Path) -> None:
    (tree / "train" / "cat" / "0000.jpg").write_bytes(jpeg(pixels(1, 32, 32, seed=99)[0]))


def touch(tree: Path) -> None:
    """The same size, another content: only the time tells."""
    file = tree / "train" / "cat" / "0000.jpg"
    changed = file.stat().st_mtime_ns + 1_000_000
    file.write_bytes(file.read_bytes())
    os.utime(file, ns=(changed, changed))


def add(tree: Path) -> None:
    shutil.copy2(tree / "train" / "cat" / "0000.jpg", tree / "train" / "dog" / "new.jpg")


def remove(tree: Path) -> None:
    (tree / "test" / "dog" / "0001.jpg").unlink()


def rename(tree: Path) -> None:
    (tree / "test" / "dog" / "0001.jpg").rename(tree / "test" / "dog" / "z.jpg")


@pytest.mark.parametrize("change", [rewrite, touch, add, remove, rename])
def test_a_changed_tree_is_noticed(tree: Path, decodings: list[Path], change: Any) -> None:
    read(tree)
    change(tree)
    splits = read(tree)
    assert len(decodings) == 4
    assert torch.equal(splits.train.images, expected(tree, "train"))
    assert torch.equal(splits.test.images, expected(tree, "test"))
    read(tree)
    assert len(decodings) == 4


def test_a_damaged_cache_is_made_anew(tree: Path, decodings: list[Path]) -> None:
    first = read(tree)
    (file,) = (tree.parent / "cache").iterdir()
    file.write_bytes(file.read_bytes()[:-100])
    assert torch.equal(read(tree).train.images, first.train.images)
    assert len(decodings) == 4


def test_a_cache_serves_one_tree_and_one_size(tree: Path, decodings: list[Path]) -> None:
    other = tree.parent / "other" / tree.name
    shutil.copytree(tree, other)
    cache = str(tree.parent / "cache")
    for root, size in ((tree, None), (other, None), (tree, 16)):
        assert read(root, cache=cache, image_size=size).image_size == (size or 32)
    assert len(decodings) == 6


def test_the_users_cache_folder_is_the_default(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tree.parent / "home"))
    read(tree, cache=None)
    assert len(list((tree.parent / "home" / "l2bn").iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_named(tree: Path) -> None:
    (tree.parent / "cache").write_text("a file, where a folder should be")
    with pytest.raises(UserError, match=r"nothing can be kept in .*cache .*set dataset\.cache=FOLDER"):
        read(tree)


def test_a_full_disk_is_named_and_leaves_nothing(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(_: Any, file: Path, __: Any) -> None:
        file.write_bytes(b"half of it")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(reader, "save_file", half)
    with pytest.raises(UserError, match=r"No space left on device.*set dataset\.cache=FOLDER"):
        read(tree)
    assert not list(tree.parent.glob("cache/*"))


def test_image_size_cuts_out_the_centre_square(tree: Path) -> None:
    image = np.zeros((40, 100, 3), np.uint8)
    image[:, 28:72] = 200  # the filter looks two pixels past the square
    Image.fromarray(image).save(tree / "train" / "cat" / "0000.jpg", "PNG")
    splits = read(tree, image_size=20)
    assert splits.image_size == 20
    assert splits.train.images.shape == (12, 3, 20, 20)
    assert torch.equal(splits.train.images[0], torch.full((3, 20, 20), 200, dtype=torch.uint8))


def test_other_folder_names_may_be_given(tree: Path) -> None:
    (tree / "test").rename(tree / "val")
    assert len(read(tree, test="val").test) == 6


def test_files_that_are_no_images_are_left_alone(tree: Path) -> None:
    (tree / "train" / "cat" / "Thumbs.db").write_text("")
    (tree / "train" / "cat" / "._0000.jpg").write_text("what a Mac leaves behind")
    (tree / "train" / ".cache").mkdir()
    (tree / "train" / "README.txt").write_text("")
    (tree / "train" / "cat" / "deeper").mkdir()
    shutil.copy(tree / "train" / "cat" / "0000.jpg", tree / "train" / "cat" / "deeper" / "0.JPG")
    assert len(read(tree).train) == 13


def test_a_missing_folder_is_named(tree: Path) -> None:
    shutil.rmtree(tree / "test")
    with pytest.raises(UserError, match=r"no folder .*/test: images are looked for") as caught:
        read(tree)
    assert str(tree / "test") in str(caught.value)


def test_a_folder_without_classes_is_named(tree: Path) -> None:
    shutil.rmtree(tree / "train")
    (tree / "train").mkdir()
    with pytest.raises(UserError, match=r"no images in .*/train: it has no class folders"):
        read(tree)


def test_a_class_without_images_is_named(tree: Path) -> None:
    (tree / "train" / "zebra").mkdir()
    with pytest.raises(UserError, match=r"no images in .*/train/zebra"):
        read(tree)


@pytest.mark.parametrize(("here", "there"), [("train", "test"), ("test", "train")])
def test_classes_that_differ_are_named(tree: Path, here: str, there: str) -> None:
    shutil.copytree(tree / here / "cat", tree / here / "zebra")
    with pytest.raises(UserError, match=f"classes differ: zebra in .*/{here} but not in .*/{there}"):
        read(tree)


@pytest.mark.parametrize("name", ["0000.jpg", "0010.jpg"])
def test_a_truncated_file_is_named_and_nothing_is_kept(tree: Path, name: str) -> None:
    file = tree / "train" / "cat" / name
    file.write_bytes(file.read_bytes()[:400])
    with pytest.raises(UserError, match="cannot be decoded") as caught:
        read(tree)
    assert str(file) in str(caught.value)
    assert not list(tree.parent.glob("cache/*"))


@pytest.mark.parametrize(
    ("size", "words"),
    [((20, 30), r"20 x 30 pixels, no square"), ((16, 16), "16 pixels wide, .* is 32")],
)
def test_sizes_that_differ_are_named(tree: Path, size: tuple[int, int], words: str) -> None:
    file = tree / "train" / "dog" / "0003.jpg"
    Image.open(file).resize(size).save(file)
    with pytest.raises(UserError, match=words) as caught:
        read(tree)
    assert str(file) in str(caught.value)
    assert "dataset.image_size" in str(caught.value)


def test_training_and_test_images_of_other_sizes_are_named(tree: Path) -> None:
    for file in (tree / "test").rglob("*.jpg"):
        Image.open(file).resize((16, 16)).save(file)
    with pytest.raises(UserError, match="train are 32 pixels wide and those of test 16"):
        read(tree)


def test_a_link_to_nowhere_is_named(tree: Path) -> None:
    (tree / "train" / "cat" / "link.jpg").symlink_to(tree / "nowhere.jpg")
    with pytest.raises(UserError, match=r"link\.jpg cannot be read"):
        read(tree)


def test_image_size_must_be_positive(tree: Path) -> None:
    with pytest.raises(UserError, match=r"dataset\.image_size=0"):
        read(tree, image_size=0)


def unpack(shared_data: Path, folder: Path, of_each: int | None) -> Path:
    """The real photographs, or the first few of each class."""
    with tarfile.open(shared_data / "cifar10-images.tar.xz") as tar:
        tar.extractall(
            folder,
            [
                member
                for member in tar
                if member.isfile() and (of_each is None or int(Path(member.name).stem) < of_each)
            ],
            filter="data",
        )
    return folder


def test_real_photographs(shared_data: Path, tmp_path: Path) -> None:
    splits = read(unpack(shared_data, tmp_path / "cifar10", 3))
    assert (len(splits.train), len(splits.test), splits.num_classes) == (30, 30, 10)
    assert splits.classes[0] == "airplane"
    assert torch.equal(splits.train.images, expected(tmp_path / "cifar10", "train"))
    assert all(0.1 < value < 0.9 for value in (*splits.mean, *splits.std))


@pytest.mark.slow
def test_all_real_photographs(shared_data: Path, tmp_path: Path) -> None:
    root = unpack(shared_data, tmp_path / "cifar10", None)
    splits = read(root)
    assert torch.bincount(splits.train.labels).tolist() == [5000] * 10
    assert torch.bincount(splits.test.labels).tolist() == [1000] * 10
    # The constants of configs/dataset/cifar10_jpeg.yaml.
    assert [round(value, 4) for value in splits.mean] == [0.4913, 0.4821, 0.4465]
    assert [round(value, 4) for value in splits.std] == [0.2452, 0.2428, 0.2606]
    again = read(root)
    assert isinstance(again.train, Images)
    digests = [hashlib.sha256(s.train.images.numpy().tobytes()).hexdigest() for s in (splits, again)]
    assert digests[0] == digests[1]
