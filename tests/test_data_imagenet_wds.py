"""Shards: the same images and labels as the files they were packed from, found by an index."""

import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset

from conftest import Train
from l2bn.data import imagenet_wds as module
from l2bn.data.folder import list_files
from l2bn.data.imagenet import imagenet
from l2bn.data.imagenet_wds import Shards, imagenet_wds, pack, pack_imagenet
from l2bn.data.loader import evaluation_loader
from l2bn.data.splits import Splits
from l2bn.errors import UserError
from l2bn.seeding import generator
from official_formats import WNIDS, add_member, deny, jpeg, pixels
from official_formats import imagenet as write_files
from official_formats import imagenet_wds as write_shards

NODE = {"train": "train", "val": "val", "devkit": "ILSVRC2012_devkit_t12"}
COMMON: dict[str, Any] = {"label": "ImageNet", "mean": [0.5] * 3, "std": [0.25] * 3}


def read(root: Path, **options: Any) -> Splits:
    return imagenet_wds(str(root), **{"image_size": 16, "cache": str(root.parent / "cache"), **COMMON, **options})


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    write_shards(tmp_path / "shards", {}, 20, 8)
    return tmp_path / "shards"


def test_samples_come_in_order_with_their_classes(shards: Path) -> None:
    splits = read(shards)
    assert splits.train.labels.tolist() == [index % 4 for index in range(20)]
    assert isinstance(splits.train, Shards)
    assert splits.train.shard.tolist() == [0] * 7 + [1] * 7 + [2] * 6
    assert (len(splits.test), splits.num_classes, splits.classes) == (8, 4, ())


def test_packed_files_hold_what_the_files_hold(tmp_path: Path) -> None:
    write_files(tmp_path, NODE, 12, 8)
    pack_imagenet(tmp_path, tmp_path / "packed")
    files, shards = imagenet(str(tmp_path), image_size=16, **COMMON), read(tmp_path / "packed")
    assert shards.classes == files.classes == WNIDS

    def content(split: Any) -> list[tuple[int, bytes]]:
        split = split.select(torch.arange(len(split)), like=files.test)  # without random crops
        return sorted(
            (label, image.numpy().tobytes()) for image, label in map(split.__getitem__, range(len(split)))
        )

    assert content(files.test) == content(shards.test)
    assert content(files.train) == content(shards.train)


def test_packing_shuffles_and_fills_the_shards(tmp_path: Path) -> None:
    write_files(tmp_path, NODE, 12, 8)
    assert pack(list_files(tmp_path / "train"), tmp_path / "packed", "train", samples=5) == 3
    pack(list_files(tmp_path / "train"), tmp_path / "packed", "val", samples=12)
    splits = read(tmp_path / "packed")
    assert isinstance(splits.train, Shards)
    assert torch.bincount(splits.train.shard).tolist() == [5, 5, 2]
    labels = splits.train.labels.tolist()
    assert labels != sorted(labels)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its files to the collector
def test_webdataset_reads_what_was_packed(tmp_path: Path) -> None:
    write_files(tmp_path, NODE, 12, 8)
    pack(list_files(tmp_path / "train"), tmp_path / "packed", "train")
    dataset = webdataset.WebDataset(str(tmp_path / "packed" / "train-000000.tar"), shardshuffle=False)
    labels = [label for _, label in dataset.decode("pil").to_tuple("jpg", "cls")]
    assert sorted(labels) == sorted([0, 1, 2, 3] * 3)


def test_packing_over_shards_is_refused(shards: Path, tmp_path: Path) -> None:
    write_files(tmp_path, NODE, 12, 8)
    with pytest.raises(UserError, match=r"holds train-\*\.tar already"):
        pack(list_files(tmp_path / "train"), shards, "train")


def test_the_index_is_made_once_and_again_when_a_shard_has_changed(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = []
    samples = module._samples
    monkeypatch.setattr(module, "_samples", lambda file: listed.append(file.name) or samples(file))
    first, second = read(shards), read(shards)
    assert len(listed) == 3 + 2
    assert torch.equal(first.test[3][0], second.test[3][0])
    with tarfile.open(shards / "val-000001.tar", "a") as tar:
        add_member(tar, "new.jpg", jpeg(pixels(1, 30, 30)[0]))
        add_member(tar, "new.cls", b"3")
    assert len(read(shards).test) == 9
    assert len(listed) == 3 + 2 + 2


@pytest.mark.parametrize("end", ["\n", "", "\n\n", "\r\n"])
def test_names_of_classes_come_from_the_file(shards: Path, end: str) -> None:
    (shards / "classes.txt").write_text("\n".join(f"class {i}" for i in range(6)) + end, newline="")
    splits = read(shards)
    assert (splits.num_classes, splits.classes[5]) == (6, "class 5")
    (shards / "classes.txt").write_text("only\n")
    with pytest.raises(UserError, match=r"classes\.txt names 1 classes, but a sample has the class number 3"):
        read(shards)


@pytest.mark.parametrize("extra", ["._0.png", "__MACOSX/._0.png", "README.md", "__index__", "LICENSE", "notes.txt"])
def test_members_that_are_no_samples_are_passed_over(shards: Path, extra: str) -> None:
    with tarfile.open(shards / "train-000001.tar", "a") as tar:
        add_member(tar, extra, b"x")
    assert len(read(shards).train) == 20


def write_labels(folder: Path, part: str, shards: list[list[int]]) -> None:
    image = jpeg(pixels(1, 8, 8)[0])
    folder.mkdir(exist_ok=True)
    for number, labels in enumerate(shards):
        with tarfile.open(folder / f"{part}-{number:06}.tar", "w") as tar:
            for index, label in enumerate(labels):
                add_member(tar, f"{index:06}.jpg", image)
                add_member(tar, f"{index:06}.cls", str(label).encode())


@pytest.mark.parametrize(
    ("train", "val", "words"),
    [
        ([1, 2], [1, 2], "no sample has 0: number the classes from 0"),
        ([0, 1], [0, 1, 7], "go up to 7, but no sample has 2"),
        ([0, 1], [1, 2], "the class 2 has test images and no training images"),
    ],
)
def test_classes_without_training_images_are_refused(
    tmp_path: Path, train: list[int], val: list[int], words: str
) -> None:
    write_labels(tmp_path, "train", [train])
    write_labels(tmp_path, "val", [val])
    with pytest.raises(UserError, match=words):
        read(tmp_path)


def test_named_classes_may_lack_images_on_both_sides(tmp_path: Path) -> None:
    for part in ("train", "val"):
        write_labels(tmp_path, part, [[1, 2]])
    (tmp_path / "classes.txt").write_text("a\nb\nc\nd")
    assert read(tmp_path).num_classes == 4


CLASSES, SHARDS, SAMPLES = 10, 10, 60


@pytest.mark.parametrize(
    ("order", "mixed"),
    [
        ("by class", False),
        ("by class, several shards each", False),
        ("in two halves", False),
        ("one class prevails", False),
        ("shuffled", True),
        ("dealt in turn", True),
    ],
)
def test_batches_of_shards_in_the_order_of_classes_hold_all_classes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    order: str,
    mixed: bool,
) -> None:
    monkeypatch.setattr(module, "WINDOW", 1)
    random = np.random.default_rng(0)
    labels = np.arange(SHARDS * SAMPLES) % CLASSES
    if order == "by class":
        labels.sort()
    elif order == "by class, several shards each":
        labels = np.sort(labels % 5)
    elif order == "in two halves":
        labels = np.concatenate([random.permutation(labels % 5), 5 + random.permutation(labels % 5)])[::2]
    elif order == "one class prevails":
        labels = np.where(random.random(len(labels)) < 0.8, np.arange(len(labels)) // SAMPLES, labels)
    elif order == "shuffled":
        random.shuffle(labels)
    write_labels(tmp_path, "train", labels.reshape(SHARDS, -1).tolist())
    write_labels(tmp_path, "val", [sorted(set(labels.tolist()))])
    split = read(tmp_path).train
    assert isinstance(split, Shards)
    assert split.mixed == mixed
    assert ("train-*.tar" in caplog.text) == (not mixed)
    for part in (split, split.select(torch.arange(0, len(split), 2))):
        drawn = part.order(generator(0, "permutation", 0))
        assert drawn.sort().values.tolist() == list(range(len(part)))
        batches = drawn.split(32)[: len(part) // 32]
        share = torch.bincount(part.labels) / len(part)
        uniform = float((1 - (1 - share) ** 32).sum())  # expected number of classes of 32 random samples
        found = np.mean([len(part.labels[batch].unique()) for batch in batches])
        assert found > 0.9 * uniform


def test_shards_that_are_both_training_and_test_set_are_refused(shards: Path) -> None:
    with pytest.raises(UserError, match=r"matches both dataset\.train=\*-\*\.tar and dataset\.val"):
        read(shards, train="*-*.tar")
    held_out = read(shards, train="train-*.tar", val="train-*.tar", validation=0.2)
    assert (len(held_out.train), len(held_out.test)) == (16, 4)


def test_shards_may_lie_anywhere(shards: Path, tmp_path: Path) -> None:
    splits = read(tmp_path / "nowhere", train=f"{shards}/train-*.tar", val=f"{shards}/val-*.tar")
    assert (len(splits.train), len(splits.test)) == (20, 8)


def test_a_folder_that_cannot_be_listed_is_named(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deny(monkeypatch, shards)
    with pytest.raises(UserError, match=r"/shards cannot be read: Permission denied"):
        read(shards)


def test_a_shard_that_is_removed_during_a_run_is_named(shards: Path) -> None:
    split = read(shards).train
    (shards / "train-000001.tar").unlink()
    with pytest.raises(UserError, match=r"train-000001\.tar cannot be read any more"):
        split[10]


def test_packing_that_fails_leaves_no_shard(tmp_path: Path) -> None:
    write_files(tmp_path, NODE, 12, 8)
    tree = list_files(tmp_path / "train")
    (tmp_path / "train" / tree.names[3]).unlink()
    with pytest.raises(UserError, match=r"cannot be packed .* no train-\*\.tar was written"):
        pack(tree, tmp_path / "packed", "train", samples=2)
    assert not list((tmp_path / "packed").iterdir())


def damage_image(shards: Path) -> None:
    """Overwrite the middle of the second validation image, so that the tar file itself stays whole."""
    splits = read(shards)
    assert isinstance(splits.test, Shards)
    content = bytearray((shards / "val-000000.tar").read_bytes())
    start, size = int(splits.test.offset[1]), int(splits.test.size[1])
    content[start : start + size] = bytes(size)
    (shards / "val-000000.tar").write_bytes(content)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_named_with_its_shard(shards: Path, workers: int) -> None:
    damage_image(shards)
    splits = read(shards)
    loader = evaluation_loader(splits.test, splits=splits, batch_size=4, device="cpu", workers=workers)
    with pytest.raises(UserError, match=r"val-000000\.tar: 000001\.jpg: cannot be decoded"):
        list(loader.epoch(0))


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([], "no samples in .*train-000001.tar"),
        ([("a.jpg", b"x")], r"train-000001\.tar: the sample a needs an image .* but has \.jpg"),
        ([("a.cls", b"1")], "the sample a needs an image"),
        ([("a.jpg", b"x"), ("a.cls", b"cat")], r"train-000001\.tar: the class of the sample a is b'cat'"),
        ([("in/a.jpg", b"x"), ("in/a.cls", b"-1")], r"train-000001\.tar: the class of the sample in/a is b'-1'"),
        ([("a.jpg", b"x"), ("a.cls", b"1000000")], r"the class of the sample a is .* from 0 to 999999"),
        ([("a.jpg", b"x"), ("a.cls", b"1"), ("a.jpg", b"x")], r"train-000001\.tar holds a\.jpg twice"),
        ([("a.jpg", b"x"), ("a.cls", b"1"), ("a.cls", b"2")], r"train-000001\.tar holds a\.cls twice"),
    ],
)
def test_a_shard_that_holds_no_samples_is_named(shards: Path, members: list[tuple[str, bytes]], words: str) -> None:
    with tarfile.open(shards / "train-000001.tar", "w") as tar:
        for name, content in members:
            add_member(tar, name, content)
    with pytest.raises(UserError, match=words):
        read(shards)


@pytest.mark.parametrize("length", [0, 700, 3000])
def test_a_truncated_shard_is_named(shards: Path, length: int) -> None:
    file = shards / "train-000001.tar"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(UserError, match=r"train-000001\.tar"):
        read(shards)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "a flipped bit in a header": lambda tar: (
        tar[: 8 * 512 + 3] + bytes([tar[8 * 512 + 3] ^ 1]) + tar[8 * 512 + 4 :]
    ),
    "two files in one": lambda tar: tar + tar,
    "cut at the end of a member": lambda tar: tar.rstrip(b"\0") + b"\0" * (-len(tar.rstrip(b"\0")) % 512),
    "cut within the next header": lambda tar: tar[: 8 * 512 + 100],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_loses_no_samples_in_silence(shards: Path, damage: str) -> None:
    """tarfile takes what is no header for the end."""
    with tarfile.open(shards / "train-000001.tar", "w") as tar:
        for index in range(4):  # a header and a block of content each
            add_member(tar, f"{index}.cls", b"0")
            add_member(tar, f"{index}.jpg", b"x" * 400)
    file = shards / "train-000001.tar"
    read(shards)
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    with pytest.raises(UserError, match=r"train-000001\.tar (is cut short or damaged after|cannot be read)"):
        read(shards)


def test_a_name_with_a_second_dot_is_refused(shards: Path) -> None:
    """The name of a sample ends at its first dot."""
    with tarfile.open(shards / "train-000001.tar", "a") as tar:
        add_member(tar, "IMG_1.edit.jpg", b"x")
        add_member(tar, "IMG_1.edit.cls", b"0")
    with pytest.raises(UserError, match=r"IMG_1 needs an image .* has \.edit\.cls, \.edit\.jpg; .* first dot"):
        read(shards)


def test_missing_shards_are_said_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path)
    for part in (str(tmp_path), "train-*.tar", "dataset.root=", "--pack", "https://image-net.org"):
        assert part in str(caught.value)


@pytest.fixture
def packed(photographs: Path, tmp_path: Path) -> Path:
    """The real photographs in shards of 30, as both parts."""
    for part in ("train", "val"):
        assert pack(list_files(photographs / "imagenet-samples"), tmp_path / "shards", part, samples=30) == 4
    return tmp_path / "shards"


def test_real_photographs(packed: Path, photographs: Path) -> None:
    splits = read(packed, image_size=64)
    classes = list_files(photographs / "imagenet-samples").classes
    assert (len(splits.train), splits.num_classes, splits.classes) == (100, 100, classes)
    loader = evaluation_loader(splits.test, splits=splits, batch_size=50, device="cpu", workers=2)
    assert sorted(torch.cat([labels for _, labels in loader.epoch(0)]).tolist()) == list(range(100))


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["bn", "l2bn"])
@pytest.mark.parametrize("backbone", ["imagenet_resnet18", "imagenet_mobilenet_v2"])
@pytest.mark.parametrize("source", ["imagenet_samples", "imagenet_wds"])
def test_real_photographs_go_from_file_to_accuracy(
    source: str, backbone: str, norm: str, packed: Path, photographs: Path, train: Train
) -> None:
    root = photographs if source == "imagenet_samples" else packed
    record = train(
        *(f"dataset={source}", f"dataset.root={root}", f"dataset.cache={packed.parent / 'cache'}"),
        *(f"backbone={backbone}", f"norm={norm}", "recipe=short", "recipe.epochs=1", "recipe.batch_size=25"),
        *("recipe.lr=0.01", "compute.workers=2", "compute.device=cpu", "progress=false"),
    )
    assert record.status == "finished"
    assert (record.updates, record.train_images, record.test_images) == (4, 100, 100)
    assert record.baseline is None
