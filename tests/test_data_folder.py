"""A tree of images: decoded once, decoded again when it has changed, and named when something is wrong with it."""

import hashlib
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import composed
from l2bn.data import folder as reader
from l2bn.data.folder import image_folder
from l2bn.data.splits import Images
from l2bn.errors import UserError
from l2bn.training.plan import PlannedRun, composing, plan_run
from official_formats import deny, jpeg, pixels
from official_formats import image_folder as write_tree

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


def test_images_come_by_class_and_name(tree: Path) -> None:
    splits = read(tree)
    for part, split in (("train", splits.train), ("test", splits.test)):
        assert torch.equal(split.images, expected(tree, part))
    assert splits.train.labels.tolist() == [0] * 6 + [1] * 6
    assert splits.classes == ("cat", "dog")
    assert (splits.num_classes, splits.image_size) == (2, 32)


def test_the_tree_is_decoded_once(tree: Path, decodings: list[int]) -> None:
    first, second = read(tree), read(tree)
    assert decodings == [12, 6]
    assert torch.equal(first.train.images, second.train.images)
    assert torch.equal(first.test.labels, second.test.labels)


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_changed_tree_is_decoded_again(tree: Path, decodings: list[int], part: str) -> None:
    """test_data_cache.py has the changes that count."""
    read(tree)
    (tree / part / "cat" / "0000.jpg").write_bytes(jpeg(pixels(1, 32, 32, seed=99)[0]))
    splits = read(tree)
    assert decodings == [12, 6, 12 if part == "train" else 6]
    assert torch.equal(splits.train.images, expected(tree, "train"))
    assert torch.equal(splits.test.images, expected(tree, "test"))


def test_a_cache_serves_one_tree_and_one_size(tree: Path, decodings: list[int]) -> None:
    other = tree.parent / "other" / tree.name
    shutil.copytree(tree, other)
    cache = str(tree.parent / "cache")
    for root, size in ((tree, None), (other, None), (tree, 16)):
        assert read(root, cache=cache, image_size=size).image_size == (size or 32)
    assert len(decodings) == 6


def test_a_cache_serves_all_paths_to_a_tree(
    tree: Path, decodings: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tree.parent)
    (tree.parent / "link").symlink_to(tree)
    for root in (tree, Path(tree.name), Path("link"), tree / "train" / ".."):
        read(root, cache=str(tree.parent / "cache"))
    assert len(decodings) == 2


def test_image_size_cuts_out_the_centre_square(tree: Path) -> None:
    image = np.zeros((40, 100, 3), np.uint8)
    image[:, 28:72] = 200  # the filter looks two pixels past the square
    Image.fromarray(image).save(tree / "train" / "cat" / "0000.jpg", "PNG")
    splits = read(tree, image_size=20)
    assert splits.image_size == 20
    assert splits.train.images.shape == (12, 3, 20, 20)
    assert torch.equal(splits.train.images[0], torch.full((3, 20, 20), 200, dtype=torch.uint8))


def test_a_photograph_is_turned_as_its_camera_was_held(tree: Path) -> None:
    image, exif = pixels(1, 32, 32)[0], Image.Exif()
    exif[0x0112] = 6  # the left side is up
    Image.fromarray(image).save(tree / "train" / "cat" / "0000.jpg", "PNG", exif=exif)
    upright = torch.from_numpy(np.rot90(image, -1).copy()).permute(2, 0, 1)
    assert torch.equal(read(tree).train.images[0], upright)


def test_other_folder_names_may_be_given(tree: Path) -> None:
    (tree / "test").rename(tree / "val")
    assert len(read(tree, test="val").test) == 6


def test_files_that_are_no_images_are_left_alone(tree: Path) -> None:
    (tree / "train" / "cat" / "Thumbs.db").write_text("")
    (tree / "train" / ".cache").mkdir()
    (tree / "train" / "README.txt").write_text("")
    (tree / "train" / "cat" / "deeper").mkdir()
    shutil.copy(tree / "train" / "cat" / "0000.jpg", tree / "train" / "cat" / "deeper" / "0.JPG")
    assert len(read(tree).train) == 13


LAYOUTS = [
    (["train/a", "val/a"], "test", r": train, val\."),
    (["Training/a", "Testing/a"], "train", r": Testing, Training\."),
    (["cat", "dog"], "train", r": cat, dog\."),
    ([], "train", r": none\."),
    (None, "train", r": none\."),
]


@pytest.mark.parametrize(("folders", "missing", "words"), LAYOUTS)
def test_a_missing_part_is_named_with_the_folders_and_options_there_are(
    tmp_path: Path, folders: list[str] | None, missing: str, words: str
) -> None:
    root = tmp_path / "set"
    for folder in folders or []:
        (root / folder).mkdir(parents=True)
    if folders is not None:
        root.mkdir(exist_ok=True)
    with pytest.raises(UserError, match=words) as caught:
        read(root)
    assert f"no folder {root / missing}" in str(caught.value)
    for option in ("dataset.root=FOLDER", "dataset.train=NAME dataset.test=NAME", "dataset.validation=0.2"):
        assert option in str(caught.value)


@pytest.mark.parametrize("parts", [("train", "train"), (".", ".")])
def test_one_folder_serves_as_both_parts_with_a_share_held_out(
    tree: Path, parts: tuple[str, str], decodings: list[int]
) -> None:
    root = tree if parts[0] == "train" else tree / "train"
    options = {"train": parts[0], "test": parts[1]}
    splits = read(root, **options, validation=0.5)
    assert (len(splits.train), len(splits.test), len(decodings)) == (6, 6, 1)
    with pytest.raises(UserError, match=r"are one folder .*dataset\.validation=0\.2"):
        read(root, **options)


def test_a_link_from_test_to_train_is_refused(tree: Path) -> None:
    shutil.rmtree(tree / "test")
    (tree / "test").symlink_to("train")
    with pytest.raises(UserError, match="are one folder"):
        read(tree)


def test_a_single_class_is_refused_with_the_folder_that_may_be_meant(tree: Path) -> None:
    for part in ("train", "test"):
        (tree / part).rename(tree / "moved")
        (tree / part).mkdir()
        (tree / "moved").rename(tree / part / "images")
    with pytest.raises(UserError, match=r"only one class .*images: .*dataset\.train=train/images"):
        read(tree)
    assert len(read(tree, train="train/images", test="test/images").classes) == 2


def test_parts_are_not_taken_for_classes(tree: Path) -> None:
    for root, part in ((tree, "."), (tree.parent, tree.name)):
        with pytest.raises(UserError, match=r"test, train in .* are parts of a data set") as caught:
            read(root, train=part, test=part, validation=0.5)
        assert f"dataset.root={tree} without dataset.train and dataset.test" in str(caught.value)
    for old, new in (("cat", "test"), ("dog", "train")):  # these hold no classes
        (tree / "train" / old).rename(tree / "train" / new)
    assert read(tree / "train", train=".", test=".", validation=0.5).classes == ("test", "train")


LEFT_BEHIND = (
    *("._0000.jpg", ".ipynb_checkpoints/0-checkpoint.jpg", "@eaDir/0.jpg/SYNOPHOTO_THUMB_M.jpg"),
    *(".Trash-1000/files/0.jpg", ".thumbnails/0.png", "__MACOSX/0.jpg", "$RECYCLE.BIN/0.jpg", "lost+found/0.jpg"),
)


@pytest.mark.parametrize("place", ["train", "train/cat", "train/cat/deeper"])
def test_what_systems_leave_behind_is_passed_over_at_every_depth(tree: Path, place: str) -> None:
    for name in LEFT_BEHIND:
        (tree / place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tree / "train" / "cat" / "0000.jpg", tree / place / name)
    assert len(reader.list_files(tree / "train").names) == 12


def test_links_that_lead_back_multiply_nothing(tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tree / "train" / "cat" / "all").symlink_to("..")
    (tree / "train" / "cat" / "dogs").symlink_to("../dog")
    (tree / "elsewhere").mkdir()
    shutil.copy(tree / "train" / "cat" / "0000.jpg", tree / "elsewhere" / "0.jpg")
    for name in ("one", "two"):
        (tree / "train" / "dog" / name).symlink_to(tree / "elsewhere")
    found = reader.list_files(tree / "train")
    assert torch.bincount(found.labels).tolist() == [6, 7]
    for link in ("cat/all", "cat/dogs", "dog/two"):
        assert f"link to a folder that is listed already ({link})" in caplog.text


def test_a_class_that_is_a_link_to_another_is_refused(tree: Path) -> None:
    (tree / "train" / "kitten").symlink_to("cat")
    with pytest.raises(UserError, match=r"kitten is the same folder as cat"):
        read(tree)


@pytest.mark.parametrize("place", ["train", "train/cat", "train/cat/deeper"])
def test_a_folder_that_cannot_be_listed_is_named(tree: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tree / place).mkdir(exist_ok=True)
    deny(monkeypatch, tree / place)
    with pytest.raises(UserError, match=f"/{place} cannot be read: Permission denied"):
        read(tree)


@pytest.mark.parametrize("place", ["train", "train/cat"])
@pytest.mark.parametrize("target", ["/disk/not/mounted", "third"], ids=["nowhere", "itself"])
def test_a_link_to_a_folder_that_is_not_there_is_named(tree: Path, place: str, target: str) -> None:
    (tree / place / "third").symlink_to(target)
    with pytest.raises(UserError, match=f"/{place}/third cannot be read"):
        read(tree)


def test_what_is_left_out_is_counted_in_one_line(tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("0.jfif", "1.jpe", "2.JPG", "3", "4.jpg?itok=x", "5.txt", "6.txt"):
        shutil.copy(tree / "train" / "cat" / "0000.jpg", tree / "train" / "dog" / name)
    shutil.copy(tree / "train" / "cat" / "0000.jpg", tree / "train" / "0.jpg")
    assert len(reader.list_files(tree / "train").names) == 15
    (line,) = caplog.messages
    for words in ("left out: 2 .txt", "1 without a suffix", "1 .jpg?itok=x", "1 .jpg outside the class folders"):
        assert words in line


def test_a_root_of_an_unknown_user_is_named() -> None:
    with pytest.raises(UserError, match=r"dataset\.root=~nobodyhere/x: no home folder is known for ~nobodyhere"):
        image_folder("~nobodyhere/x", label="x")


def planned(*overrides: str) -> PlannedRun:
    with composing(["dataset=image_folder", *overrides]) as (_, rest):
        return plan_run(*composed(rest))


def test_the_name_of_the_root_is_the_label_and_part_of_the_hash(tmp_path: Path) -> None:
    first, moved, other = (planned(f"dataset.root={tmp_path}/{name}") for name in ("a/cats", "b/cats/", "a/dogs"))
    assert first.config["dataset"]["label"] == moved.identity["dataset"]["label"] == "cats"
    assert (first.hash, first.cell) == (moved.hash, moved.cell)
    assert other.hash != first.hash
    assert (first.cell.dataset, other.cell.dataset) == ("image_folder,label=cats", "image_folder,label=dogs")
    named = planned(f"dataset.root={tmp_path}/a/dogs", "dataset.label=cats")
    assert (named.hash, named.cell) == (first.hash, first.cell)


def test_a_link_counts_by_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "v3").mkdir()
    (tmp_path / "current").symlink_to("v3")
    assert planned(f"dataset.root={tmp_path}/current/.").config["dataset"]["label"] == "current"


def test_called_from_python_the_label_is_the_same(tree: Path) -> None:
    assert image_folder(str(tree), cache=str(tree.parent / "cache")).label == tree.name


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
    with pytest.raises(UserError, match=r"test images are 16 pixels wide, image_size is 32; .*dataset\.image_size"):
        read(tree)


def test_a_link_to_nowhere_is_named(tree: Path) -> None:
    (tree / "train" / "cat" / "link.jpg").symlink_to(tree / "nowhere.jpg")
    with pytest.raises(UserError, match=r"link\.jpg cannot be read"):
        read(tree)


def test_image_size_must_be_positive(tree: Path) -> None:
    with pytest.raises(UserError, match=r"dataset\.image_size=0"):
        read(tree, image_size=0)


def test_counts_must_be_three(tree: Path) -> None:
    with pytest.raises(UserError, match=r"dataset\.counts=\[100, 500\]: give three numbers"):
        read(tree, counts=[100, 500])


def test_the_digest_of_a_tree_shows_its_progress(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    reader.list_files(tree / "train").digest()
    assert "checking" in capsys.readouterr().err


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
