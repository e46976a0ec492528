"""ImageNet from its files: labels by wnid, the devkit's numbers, crops, and files that are not quite JPEG."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest

from l2bn.data.imagenet import evaluation_transform, imagenet, training_transform
from l2bn.data.loader import evaluation_loader, training_loader
from l2bn.data.splits import Split, Splits, pixel_statistics
from l2bn.errors import UserError
from official_formats import WNIDS, deny, imagenet_train, jpeg, pixels
from official_formats import imagenet as write

NODE = {"train": "train", "val": "val", "devkit": "devkit"}
COMMON: dict[str, Any] = {"label": "ImageNet", "mean": [0.5] * 3, "std": [0.25] * 3}


def read(root: Path, **options: Any) -> Splits:
    return imagenet(str(root), **{"devkit": "devkit", "image_size": 16, **COMMON, **options})


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    write(tmp_path, NODE, 12, 8)
    return tmp_path


def contents(split: Split) -> list[tuple[int, bytes]]:
    return sorted((label, image.numpy().tobytes()) for image, label in map(split.__getitem__, range(len(split))))


def test_classes_are_numbered_by_the_order_of_their_wnids(tree: Path) -> None:
    splits = read(tree)
    assert splits.classes == WNIDS == tuple(sorted(WNIDS))
    assert splits.train.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert (splits.num_classes, splits.image_size) == (4, 16)


def test_a_flat_validation_folder_gets_its_classes_from_the_devkit(tree: Path) -> None:
    # The devkit that the tests write numbers the wnids backwards, and the images in turn.
    assert read(tree).test.labels.tolist() == [3, 2, 1, 0, 3, 2, 1, 0]


def test_a_flat_validation_folder_may_be_incomplete(tree: Path) -> None:
    (tree / "val" / "ILSVRC2012_val_00000002.JPEG").unlink()
    assert read(tree).test.labels.tolist() == [3, 1, 0, 3, 2, 1, 0]


def test_a_sorted_validation_folder_needs_no_devkit(tree: Path) -> None:
    flat = read(tree)
    before = contents(flat.test)
    for index, label in enumerate(flat.test.labels.tolist(), start=1):
        folder = tree / "val" / WNIDS[label]
        folder.mkdir(exist_ok=True)
        name = f"ILSVRC2012_val_{index:08}.JPEG"
        (tree / "val" / name).rename(folder / name)
    assert contents(read(tree, devkit="nowhere").test) == before


def test_the_users_files_are_not_touched(tree: Path) -> None:
    def state() -> list[tuple[str, int, int]]:
        return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(tree.rglob("*"))]

    before = state()
    list(evaluation_loader(read(tree).test, splits=read(tree), batch_size=4, device="cpu").epoch(0))
    assert state() == before


def test_evaluation_shows_the_centre_and_training_windows_of_it() -> None:
    image = torch.from_numpy(pixels(1, 90, 60)[0]).permute(2, 0, 1).contiguous()
    centre = evaluation_transform(28)(image)
    assert (centre.shape, centre.dtype) == ((3, 28, 28), torch.uint8)
    expected = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((32, 48), Image.Resampling.BILINEAR)
    expected = expected.crop((2, 10, 30, 38))
    difference = torch.from_numpy(np.array(expected)).permute(2, 0, 1).int() - centre.int()
    assert difference.abs().max() <= 1
    crops = [training_transform(28)(image) for _ in range(6)]
    assert all((crop.shape, crop.dtype) == ((3, 28, 28), torch.uint8) for crop in crops)
    assert len({crop.sum().item() for crop in crops}) > 1


def test_training_windows_have_8_to_100_percent_of_the_area_and_half_of_them_are_mirrored() -> None:
    """Of an image whose pixels tell their column and their row."""
    ramp = torch.arange(256, dtype=torch.uint8).expand(256, 256)
    image = torch.stack([ramp, ramp.T, ramp])
    transform = training_transform(32)
    torch.manual_seed(0)
    corners = torch.stack([transform(image)[:2, ::31, ::31] for _ in range(1000)]).double()
    width = (corners[:, 0, 0, 1] - corners[:, 0, 0, 0]) / 256 * 32 / 31  # below 0 in a mirror
    height = (corners[:, 1, 1, 0] - corners[:, 1, 0, 0]) / 256 * 32 / 31
    assert binomtest(int((width < 0).sum()), 1000).pvalue > 1e-4
    area, proportion = width.abs() * height, width.abs() / height
    assert (float(area.min()), float(area.max())) == pytest.approx((0.08, 1), abs=0.03)
    assert (float(proportion.min()), float(proportion.max())) == pytest.approx((3 / 4, 4 / 3), abs=0.05)


def test_evaluation_resizes_224_from_256() -> None:
    smaller_side = 300
    ramp = torch.arange(smaller_side).repeat(3, smaller_side, 1).mul(255 / smaller_side).to(torch.uint8)
    centre = evaluation_transform(224)(ramp)[0, 0].float()
    margin = (256 - 224) / 2 / 256 * 255
    assert abs(centre[0] - margin) < 2
    assert abs(centre[-1] - (255 - margin)) < 2


def encoded(array: np.ndarray[Any, Any], mode: str, kind: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).convert(mode).save(stream, kind)
    return stream.getvalue()


def test_files_of_every_kind_become_rgb(tree: Path) -> None:
    """The real ImageNet holds CMYK and gray JPEG files and a PNG that is called JPEG."""
    rgb = pixels(1, 50, 40)[0]
    contents = [encoded(rgb, "CMYK", "JPEG"), encoded(rgb, "L", "JPEG"), encoded(rgb, "RGBA", "PNG")]
    contents.append(encoded(rgb, "P", "PNG"))
    for index, content in enumerate(contents):
        (tree / "train" / WNIDS[0] / f"kind_{index}.JPEG").write_bytes(content)
    splits = read(tree)
    loader = training_loader(splits.train, splits=splits, batch_size=16, seed=0, device="cpu", workers=2)
    ((images, _),) = loader.epoch(0)
    assert images.shape == (16, 3, 16, 16)


def test_normalisation_must_be_given(tree: Path) -> None:
    with pytest.raises(UserError, match=r"dataset\.mean and dataset\.std must be given"):
        read(tree, mean=None, std=None)


def test_photographs_are_turned_where_asked(tree: Path, tmp_path: Path) -> None:
    """As a camera writes them: wide, with a note that the left side is up."""
    image = Image.fromarray(np.arange(24 * 48 * 3, dtype=np.uint8).reshape(24, 48, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    for path in tree.glob("*/*/*.JPEG"):
        image.save(path, exif=exif)
    for options in ({}, {"cache_side": 24, "cache": str(tmp_path / "cache")}):
        lying, turned = (read(tree, **options, **asked).train for asked in ({}, {"upright": True}))
        for split in (lying, turned):
            object.__setattr__(split, "transform", lambda pixels: pixels)
        assert lying[0][0].shape == (3, 24, 48)
        assert turned[0][0].shape == (3, 48, 24)


def test_a_label_is_needed(tree: Path) -> None:
    with pytest.raises(UserError, match=r"dataset\.label is empty"):
        imagenet(str(tree), devkit="devkit", image_size=16, mean=[0.5] * 3, std=[0.25] * 3)


@pytest.mark.parametrize("folder", ["train", "val"])
def test_a_missing_imagenet_is_said_with_what_to_do(tree: Path, folder: str) -> None:
    (tree / folder).rename(tree / "elsewhere")
    with pytest.raises(UserError) as caught:
        read(tree)
    for part in (str(tree), "https://image-net.org", "ILSVRC2012_img_train.tar", "dataset.root="):
        assert part in str(caught.value)
    with pytest.raises(UserError, match="no Imagenette in") as caught:
        read(tree, label="Imagenette")
    assert "ILSVRC" not in str(caught.value)


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda root: (root / "devkit/data/meta.mat").unlink(), r"no .*meta\.mat: .* need the devkit"),
        (lambda root: (root / "devkit/data/meta.mat").write_bytes(b"MATLAB"), r"meta\.mat cannot be read"),
        (
            lambda root: (root / "devkit/data/ILSVRC2012_validation_ground_truth.txt").write_text("77\n"),
            "cannot be read",
        ),
        (
            lambda root: (root / "devkit/data/ILSVRC2012_validation_ground_truth.txt").write_text("1\n"),
            r"ILSVRC2012_val_00000002\.JPEG: not the name of a validation image",
        ),
        (lambda root: (root / "val/cat.JPEG").write_bytes(b""), r"cat\.JPEG: not the name of a validation image"),
        (lambda root: [f.unlink() for f in (root / "val").iterdir()], "no images in .*/val"),
        (lambda root: (root / "train" / WNIDS[1]).rename(root / "train/n99999999"), f"is of {WNIDS[1]}"),
        (lambda root: (root / "val" / WNIDS[1]).mkdir(), f"val holds 8 images and folders .{WNIDS[1]}"),
    ],
)
def test_what_does_not_fit_is_named(tree: Path, break_it: Any, words: str) -> None:
    break_it(tree)
    with pytest.raises(UserError, match=words):
        read(tree)


@pytest.mark.parametrize("name", ["._ILSVRC2012_val_00000001.JPEG", ".ipynb_checkpoints/x.JPEG", "@eaDir/x.JPEG"])
def test_what_systems_leave_in_a_flat_validation_folder_is_passed_over(tree: Path, name: str) -> None:
    (tree / "val" / name).parent.mkdir(exist_ok=True)
    (tree / "val" / name).write_bytes(b"no image")
    assert len(read(tree).test) == 8


def test_what_is_left_out_of_a_flat_validation_folder_is_counted(
    tree: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tree / "val" / "MD5SUMS").write_text("")
    assert len(read(tree).test) == 8
    assert "/val: left out: 1 without a suffix" in caplog.text


def test_a_validation_folder_that_cannot_be_listed_is_named(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deny(monkeypatch, tree / "val")
    with pytest.raises(UserError, match=r"/val cannot be read: Permission denied"):
        read(tree)


def test_training_images_by_another_name_are_no_test_images(tree: Path) -> None:
    (tree / "again").symlink_to("train")
    with pytest.raises(UserError, match="are one folder"):
        read(tree, val="again")


def test_a_test_on_the_training_images_is_said_in_the_label(tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read(tree, val="train", label="Mine", baseline=None).label == "Mine, tested on its training images"
    assert "accuracy is measured on training images" in caplog.text
    caplog.clear()
    assert "tested" not in read(tree, val="train", label="Mine", baseline=None, validation=0.5).label
    assert caplog.text == ""


def test_classes_that_differ_are_named(tmp_path: Path) -> None:
    for part in ("train", "val"):
        imagenet_train(tmp_path / part, 8)
    (tmp_path / "val" / WNIDS[0]).rename(tmp_path / "val" / "n99999999")
    with pytest.raises(UserError, match=f"classes differ: {WNIDS[0]} in .*/train but not in .*/val"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["a blank.JPEG", "äöü.JPEG"])
def test_any_file_name_works(tree: Path, name: str) -> None:
    (tree / "train" / WNIDS[0] / name).write_bytes(jpeg(pixels(1, 30, 30)[0]))
    splits = read(tree)
    assert len([splits.train[index] for index in range(13)]) == 13


def test_real_photographs(photographs: Path) -> None:
    splits = read(photographs, train="imagenet-samples", val="imagenet-samples", image_size=224)
    assert (len(splits.train), splits.num_classes) == (100, 100)
    loader = evaluation_loader(splits.test, splits=splits, batch_size=25, device="cpu", workers=2)
    images = torch.cat([images for images, _ in loader.epoch(0)])
    assert images.shape == (100, 3, 224, 224)
    # The constants of configs/dataset/imagenet.yaml are those of photographs like these.
    mean, std = pixel_statistics(images.mul_(0.25).add_(0.5).mul_(255).round_().to(torch.uint8))
    np.testing.assert_allclose(mean, [0.485, 0.456, 0.406], atol=0.03)
    np.testing.assert_allclose(std, [0.229, 0.224, 0.225], atol=0.05)
