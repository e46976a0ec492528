"""scripts/fetch_data.py makes a data set ready and says what it found; its mistakes are in test_commands.py."""

import re
from pathlib import Path

from PIL import Image

from conftest import Issue
from official_formats import imagenet, write


def test_what_was_found_is_printed(tmp_path: Path, issue: Issue) -> None:
    root, *others = write("cifar10", tmp_path)
    done = issue("fetch_data", "cifar10", root, "--config-dir", tmp_path, *others, "dataset.validation=0.0")
    assert done.out == "CIFAR-10, 40 and 20 images: 40 images to train on, 20 to test on, 10 classes\n"


def test_a_folder_of_images_is_called_by_its_name(tmp_path: Path, issue: Issue) -> None:
    done = issue("fetch_data", "image_folder", *write("image_folder", tmp_path / "My images, äöü"))
    assert done.out == "My images, äöü: 40 images to train on, 20 to test on, 2 classes\n"


def test_imagenet_is_packed_into_shards(tmp_path: Path, issue: Issue) -> None:
    imagenet(tmp_path, {"train": "train", "val": "val", "devkit": "ILSVRC2012_devkit_t12"}, 12, 8)
    shards = tmp_path / "shards"
    overrides = [f"dataset.root={shards}", f"dataset.cache={tmp_path}/cache"]
    done = issue("fetch_data", "imagenet_wds", *overrides, "--pack", tmp_path)
    assert "12 images to train on, 8 to test on, 4 classes" in done.out
    assert sorted(file.name for file in shards.iterdir()) == ["classes.txt", "train-000000.tar", "val-000000.tar"]


def test_a_figure_shows_a_training_image_of_each_class(tmp_path: Path, issue: Issue) -> None:
    command = ["fetch_data", "esc50", *write("esc50", tmp_path / "data"), "--figure"]
    figure = tmp_path / "figures" / "two.png"
    assert issue(*command, figure, "--classes", "rain,dog").out.endswith(f"2 classes\n{figure}\n")
    with Image.open(figure) as image:
        assert image.width > image.height > 100
    issue(*command, figure.with_suffix(".svg"))
    assert "<svg" in figure.with_suffix(".svg").read_text()
    told = issue(*command, figure, "--classes", "cat").err
    assert re.search(r"--classes: ESC-50, .* has no class cat; it has dog, rain\n$", told)
    digits = ("fetch_data", "digits", "dataset.subset=5", "--figure", figure, "--classes", "0,1,2,3,4,5,6,7,8,9")
    assert re.search(r"has no training image of [0-9]\n$", issue(*digits).err)
