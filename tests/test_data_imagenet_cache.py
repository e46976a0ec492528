"""ImageNet's training images decoded once: the pixels of a plain resize, decoded again when a file has changed."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from l2bn.data import imagenet as module
from l2bn.data.folder import Tree, list_files
from l2bn.data.imagenet import DecodedImages, decode_once, imagenet
from l2bn.data.splits import PUBLISHED, Splits
from l2bn.errors import UserError
from official_formats import imagenet as write

SIDE = 24
COMMON: dict[str, Any] = {"label": "ImageNet", "baseline": "imagenet", "mean": [0.5] * 3, "std": [0.25] * 3}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path / "data", {"train": "train", "val": "val", "devkit": "devkit"}, 12, 8)
    return tmp_path / "data"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def read(root: Path, cache: Path, **options: Any) -> Splits:
    given = {"devkit": "devkit", "image_size": 16, "cache_side": SIDE, "cache": str(cache), **COMMON, **options}
    return imagenet(str(root), **given)


def opened(root: Path, cache: Path) -> tuple[Tree, DecodedImages]:
    tree = list_files(root / "train")
    return tree, decode_once(tree, SIDE, str(cache), lambda image: image)


def test_pixels_are_those_of_the_resized_files(root: Path, cache: Path) -> None:
    tree, images = opened(root, cache)
    assert len(images) == len(tree.paths()) == 12
    for index, path in enumerate(tree.paths()):
        with Image.open(path) as file:
            width, height = file.size
            scale = SIDE / min(width, height)
            size = int(width * scale), int(height * scale)
            expected = np.array(file.convert("RGB").resize(size, Image.Resampling.BILINEAR)).astype(int)
        image, label = images[index]
        assert (image.dtype, label) == (torch.uint8, tree.labels[index])
        assert min(image.shape[1:]) == SIDE
        assert np.abs(image.permute(1, 2, 0).numpy() - expected).max() <= 1


def test_files_are_decoded_once(root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, first = opened(root, cache)
    monkeypatch.setattr(module, "_write_decoded", lambda *_: pytest.fail("decoded again"))
    _, second = opened(root, cache)
    assert all(torch.equal(first[index][0], second[index][0]) for index in range(len(first)))


def test_a_changed_file_is_decoded_anew(root: Path, cache: Path) -> None:
    tree, before = opened(root, cache)
    pixels = before[0][0]
    Image.new("RGB", (50, 30)).save(tree.paths()[0], "JPEG")
    os.utime(tree.paths()[0], ns=(1, 1))
    _, after = opened(root, cache)
    assert after[0][0].shape == (3, SIDE, 40)
    assert not after[0][0].any()
    assert not torch.equal(after[0][0], pixels)


@pytest.mark.parametrize("length", [7, -1, -100])
def test_a_cache_that_was_cut_short_is_made_again(length: int, root: Path, cache: Path) -> None:
    _, before = opened(root, cache)
    pixels = [before[index][0] for index in range(len(before))]
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:length])
    _, after = opened(root, cache)
    assert all(torch.equal(after[index][0], image) for index, image in enumerate(pixels))


def test_a_cache_that_is_cut_short_or_removed_during_a_run_is_named(root: Path, cache: Path) -> None:
    _, images = opened(root, cache)
    content = images.file.read_bytes()
    images.file.write_bytes(content[: int(images.offset[-1]) + 1])
    with pytest.raises(UserError, match="was changed or replaced during the run"):
        images[len(images) - 1]
    images.file.unlink()
    with pytest.raises(UserError, match="cannot be read any more"):
        images[0]


def test_a_cache_that_another_run_has_replaced_gives_no_pixels(root: Path, cache: Path) -> None:
    """As when images were added and a second run has decoded them: its pixels lie elsewhere in the file."""
    tree, images = opened(root, cache)
    tree.paths()[0].unlink()
    _, others = opened(root, cache)
    assert len(others) == len(images) - 1
    assert others[0][0].shape[0] == 3
    with pytest.raises(UserError, match="was changed or replaced during the run"):
        images[0]


def test_two_runs_decode_the_images_once(root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, written = module._write_decoded, []

    def counted(*arguments: Any) -> None:
        written.append(arguments)
        write(*arguments)

    monkeypatch.setattr(module, "_write_decoded", counted)
    with ThreadPoolExecutor() as pool:
        both = list(pool.map(lambda _: opened(root, cache)[1], range(2)))
    assert torch.equal(both[0][5][0], both[1][5][0])
    assert len(written) == 1
    assert len(list(cache.iterdir())) == 1


def test_a_place_without_room_is_named_with_both_ways_out(root: Path, cache: Path) -> None:
    cache.write_text("a file, where a folder should be")
    with pytest.raises(UserError, match=r"dataset\.cache=FOLDER .*dataset\.cache_side=null"):
        opened(root, cache)


def test_a_damaged_file_is_named_and_leaves_nothing_behind(root: Path, cache: Path) -> None:
    (root / "train" / list_files(root / "train").names[3]).write_bytes(b"no image")
    with pytest.raises(UserError, match="cannot be decoded"):
        opened(root, cache)
    assert list(cache.iterdir()) == []


def test_training_images_come_from_the_cache_and_test_images_from_their_files(root: Path, cache: Path) -> None:
    kept, plain = read(root, cache), read(root, cache, cache_side=None)
    assert isinstance(kept.train, DecodedImages)
    assert torch.equal(kept.train.labels, plain.train.labels)
    for index in range(len(plain.test)):
        assert torch.equal(kept.test[index][0], plain.test[index][0])
    assert kept.train[0][0].shape == (3, 16, 16)


def test_other_pixels_are_another_data_set(root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PUBLISHED, "ImageNet", (4, 12, 8))
    kept, plain = read(root, cache), read(root, cache, cache_side=None)
    assert (kept.label, kept.baseline) == ("ImageNet, decoded at 24 pixels", None)
    assert (plain.label, plain.baseline) == ("ImageNet", "imagenet")


def test_a_validation_split_is_taken_from_the_cache_without_random_crops(root: Path, cache: Path) -> None:
    splits = read(root, cache, validation=1 / 3)
    assert (len(splits.train), len(splits.test)) == (8, 4)
    assert torch.equal(splits.test[0][0], splits.test[0][0])
    assert len({splits.train[0][0].sum().item() for _ in range(8)}) > 1


@pytest.mark.parametrize("side", [0, -5])
def test_a_side_without_pixels_is_refused(side: int, root: Path, cache: Path) -> None:
    with pytest.raises(UserError, match=rf"dataset.cache_side={side}"):
        read(root, cache, cache_side=side)
