"""scripts/fetch_data.py makes a data set ready or ends with one message that says what to do."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from l2bn.errors import UserError
from l2bn.failures import told_plainly
from official_formats import imagenet, write

SCRIPT = Path(__file__).parents[1] / "scripts" / "fetch_data.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fetch_data", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_was_found_is_printed(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, *others = write("cifar10", tmp_path)
    script.main(["cifar10", root, "--config-dir", str(tmp_path), *others, "dataset.validation=0.0"])
    assert (
        capsys.readouterr().out == "CIFAR-10, 40 and 20 images: 40 images to train on, 20 to test on, 10 classes\n"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["imagenet"], ["https://image-net.org", "ILSVRC2012_img_train.tar"]),
        (["cifar100", "dataset.download=false"], ["cifar-100-python.tar.gz", "md5"]),
        (["nonsense"], ["nonsense", "cifar10"]),
        (["image_folder"], ["dataset.root"]),
        (["cifar10", "dataset.rot=x"], ["rot"]),
        (["image_folder", "dataset.root=~/x"], ["""'dataset.root="~/x"'"""]),
        (["image_folder", "dataset.root=/data/Übung"], ["""'dataset.root="/data/Übung"'"""]),
        (["image_folder", "dataset.root=a,b"], ["root"]),
        (["imagenet", "dataset.root='~nobodyhere/x'"], ["dataset.root=~nobodyhere/x", "no home folder"]),
        (
            ["imagenet_wds", "dataset.root=x", "dataset.train=/data/none-*.tar"],
            ["/data/none-*.tar", "dataset.root="],
        ),
        (["imagenet_wds", "--pack", "~nobodyhere/x"], ["--pack=~nobodyhere/x", "no home folder"]),
    ],
)
def test_what_is_missing_or_wrong_is_one_message(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught, told_plainly():
        script.main(arguments)
    for word in words:
        assert word in str(caught.value)


def test_a_folder_of_images_is_called_by_its_name(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script.main(["image_folder", *write("image_folder", tmp_path / "My images, äöü")])
    assert capsys.readouterr().out == "My images, äöü: 40 images to train on, 20 to test on, 2 classes\n"


def test_imagenet_is_packed_into_shards(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    imagenet(tmp_path, {"train": "train", "val": "val", "devkit": "ILSVRC2012_devkit_t12"}, 12, 8)
    shards = tmp_path / "shards"
    overrides = [f"dataset.root={shards}", f"dataset.cache={tmp_path}/cache"]
    script.main(["imagenet_wds", *overrides, "--pack", str(tmp_path)])
    assert "12 images to train on, 8 to test on, 4 classes" in capsys.readouterr().out
    assert sorted(file.name for file in shards.iterdir()) == ["classes.txt", "train-000000.tar", "val-000000.tar"]


def test_a_figure_shows_a_training_image_of_each_class(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = write("esc50", tmp_path / "data")
    figure = tmp_path / "figures" / "two.png"
    script.main(["esc50", *overrides, "--figure", str(figure), "--classes", "rain,dog"])
    assert capsys.readouterr().out.endswith(f"2 classes\n{figure}\n")
    with Image.open(figure) as image:
        assert image.width > image.height > 100
    script.main(["esc50", *overrides, "--figure", str(figure.with_suffix(".svg"))])
    assert "<svg" in figure.with_suffix(".svg").read_text()
    with pytest.raises(UserError, match=r"--classes: ESC-50, .* has no class cat; it has dog, rain$"):
        script.main(["esc50", *overrides, "--figure", str(figure), "--classes", "cat"])
    with pytest.raises(UserError, match=r"has no training image of [0-9]"):
        script.main(["digits", "dataset.subset=5", "--figure", str(figure), "--classes", "0,1,2,3,4,5,6,7,8,9"])
