"""Small data sets of random images, written as the official archives and trees are, for the readers to read.

`write(name, folder)` serves every file of configs/dataset: the writer is chosen by the file's `_target_`, so that a
second YAML of a known source needs none of its own.
"""

import errno
import gzip
import io
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import soundfile
import yaml
from PIL import Image
from scipy.io import savemat

CONFIGS = Path(__file__).parents[1] / "configs" / "dataset"
WNIDS = ("n01440764", "n01443537", "n02085620", "n03000134")


def write(name: str, folder: Path, train: int = 40, test: int = 20) -> list[str]:
    """Write a stand-in for the data of configs/dataset/`name`.yaml into `folder`; return the overrides for it."""
    node = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    function = node["_target_"].rpartition(".")[2]
    WRITERS[function](folder, node, train, test)
    overrides = {"root": str(folder), "download": False, "cache": str(folder / "cache")}
    return [f"dataset.{key}={_quoted(value)}" for key, value in overrides.items() if key in node]


def _quoted(value: str | bool) -> str:
    """For Hydra's grammar, in which a bare path may hold neither blanks nor commas."""
    return str(value).lower() if isinstance(value, bool) else "'" + value.replace("'", "\\'") + "'"


def pixels(count: int, height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray[Any, Any]:
    """(count, height, width, channels) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, channels), dtype=np.uint8)


def jpeg(image: np.ndarray[Any, Any]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=95)
    return stream.getvalue()


class Python2Pickler(pickle._Pickler):  # type: ignore[name-defined,misc]
    """Writes what Python 2 wrote in 2009: strings as bytes without an encoding, numpy under its old name."""

    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, protocol=2, fix_imports=True)

    def save_string(self, value: str | bytes) -> None:
        content = value if isinstance(value, bytes) else value.encode("latin1")
        self.write(b"T" + len(content).to_bytes(4, "little") + content)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_string

    def save_global(self, value: Any, name: str | None = None) -> None:
        module = value.__module__.replace("numpy._core", "numpy.core")
        self.write(f"c{module}\n{value.__name__}\n".encode())
        self.memoize(value)

    dispatch[type] = dispatch[type(lambda: None)] = dispatch[type(len)] = save_global


def python2_pickle(content: Any) -> bytes:
    stream = io.BytesIO()
    Python2Pickler(stream).dump(content)
    return stream.getvalue()


def cifar_batch(count: int, seed: int, **labels: int) -> dict[str, Any]:
    """A batch of an official archive; `labels`: number of classes for each kind of label."""
    batch: dict[str, Any] = {name: [i % classes for i in range(count)] for name, classes in labels.items()}
    batch["data"] = pixels(count, 32, 32, seed=seed).transpose(0, 3, 1, 2).reshape(count, -1)
    batch["batch_label"] = f"batch {seed}"
    batch["filenames"] = [f"image_{i}.png" for i in range(count)]
    return batch


def cifar10(folder: Path, _: dict[str, Any], train: int, test: int) -> None:
    files = {f"data_batch_{part}": cifar_batch(train // 5, part, labels=10) for part in range(1, 6)}
    files["test_batch"] = cifar_batch(test, 6, labels=min(10, train // 5))  # of classes that are trained
    files["batches.meta"] = {"label_names": [f"class {i}" for i in range(10)], "num_vis": 3072}
    _write_pickles(folder / "cifar-10-batches-py", files)


def cifar100(folder: Path, _: dict[str, Any], train: int, test: int) -> None:
    files = {
        "train": cifar_batch(train, 1, fine_labels=100, coarse_labels=20),
        "test": cifar_batch(test, 2, fine_labels=100, coarse_labels=20),
        "meta": {
            "fine_label_names": [f"fine {i}" for i in range(100)],
            "coarse_label_names": [f"coarse {i}" for i in range(20)],
        },
    }
    _write_pickles(folder / "cifar-100-python", files)


def _write_pickles(folder: Path, files: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(python2_pickle(content))


def tar_gz(folder: Path) -> Path:
    """Pack a folder as the official CIFAR archives are, beside it."""
    path = folder.with_name(f"{folder.name}.tar.gz")
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, folder.name)
    return path


def idx(values: np.ndarray[Any, Any]) -> bytes:
    """The IDX format of MNIST, for unsigned bytes."""
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes([0, 0, 8, values.ndim]) + sizes + values.astype(np.uint8).tobytes()


def fashion_mnist(folder: Path, _: dict[str, Any], train: int, test: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", train), ("t10k", test)):
        images = pixels(count, 28, 28, 1, seed=count)[..., 0]
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.arange(count) % 10)))


def image_folder(folder: Path, node: dict[str, Any], train: int, test: int) -> None:
    for part, count in ((node["train"], train), (node["test"], test)):
        for index, image in enumerate(pixels(count, 32, 32, seed=count)):
            place = folder / part / ("cat", "dog")[index % 2]
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{index:04}.jpg").write_bytes(jpeg(image))


def photographs(count: int, seed: int) -> list[bytes]:
    """JPEG files of different sizes and proportions."""
    sizes = [(64, 96), (90, 60), (80, 80)]
    return [jpeg(pixels(1, *sizes[i % 3], seed=seed + i)[0]) for i in range(count)]


def imagenet_train(folder: Path, count: int) -> None:
    for index, content in enumerate(photographs(count, seed=0)):
        wnid = WNIDS[index % len(WNIDS)]
        (folder / wnid).mkdir(parents=True, exist_ok=True)
        (folder / wnid / f"{wnid}_{index}.JPEG").write_bytes(content)


def imagenet(folder: Path, node: dict[str, Any], train: int, test: int) -> None:
    """The training tree, and the validation images as they come: in one folder, with the devkit."""
    imagenet_train(folder / node["train"], train)
    if node["val"] == node["train"]:
        return
    (folder / node["val"]).mkdir()
    for index, content in enumerate(photographs(test, seed=1000), start=1):
        (folder / node["val"] / f"ILSVRC2012_val_{index:08}.JPEG").write_bytes(content)
    imagenet_devkit(folder / node["devkit"] / "data", test)


def imagenet_devkit(folder: Path, count: int) -> None:
    """ILSVRC numbers run against the order of the wnids, and the inner nodes of the tree come after the leaves."""
    folder.mkdir(parents=True)
    kinds = [("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "f8")]
    rows = [(number, wnid, "a word", "a gloss", 0) for number, wnid in enumerate(reversed(WNIDS), start=1)]
    rows.append((len(WNIDS) + 1, "n00001740", "entity", "a gloss", len(WNIDS)))
    savemat(folder / "meta.mat", {"synsets": np.array(rows, dtype=kinds).reshape(-1, 1)})
    truth = "".join(f"{1 + index % len(WNIDS)}\n" for index in range(count))
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text(truth)


def imagenet_wds(folder: Path, _: dict[str, Any], train: int, test: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for part, count, seed in (("train", train, 0), ("val", test, 1000)):
        contents = photographs(count, seed)
        for start in range(0, count, 7):
            with tarfile.open(folder / f"{part}-{start // 7:06}.tar", "w") as tar:
                for index in range(start, min(start + 7, count)):
                    add_member(tar, f"{index:06}.jpg", contents[index])
                    add_member(tar, f"{index:06}.cls", str(index % len(WNIDS)).encode())


def write_clip(path: Path, index: int) -> None:
    """Half a second of noise at 8 kHz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.random.default_rng(index).normal(0, 0.1, 4000), 8000)


def esc50(folder: Path, _: dict[str, Any], train: int, test: int) -> None:
    """The test clips are fold 1, the training clips are spread over folds 2 to 5."""
    lines = ["filename,fold,target,category,esc10,src_file,take"]
    for index in range(train + test):
        fold, target = (1, index % 2) if index < test else (2 + (index - test) // 2 % 4, (index - test) % 2)
        name = f"{fold}-{100000 + index}-A-{target}.wav"
        write_clip(folder / "audio" / name, index)
        category, esc10 = (("dog", True), ("rain", False))[target]
        lines.append(f"{name},{fold},{target},{category},{esc10},{100000 + index},A")
    (folder / "meta").mkdir(parents=True)
    (folder / "meta" / "esc50.csv").write_text("\n".join(lines) + "\n")


def tau2020(folder: Path, _: dict[str, Any], train: int, test: int) -> None:
    (folder / "evaluation_setup").mkdir(parents=True)
    for part, count in (("train", train), ("evaluate", test)):
        lines = ["filename\tscene_label"]
        for index in range(count):
            scene = ("airport", "bus", "metro")[index % 3]
            location = 2000 + index // 6 if part == "train" else 1000
            name = f"audio/{scene}-lisbon-{location}-{index:05}-a.wav"
            write_clip(folder / name, index + 1000 * (part == "train"))
            lines.append(f"{name}\t{scene}")
        (folder / "evaluation_setup" / f"fold1_{part}.csv").write_text("\n".join(lines) + "\n")


def sound_folder(folder: Path, node: dict[str, Any], train: int, test: int) -> None:
    for part, count in ((node["train"], train), (node["test"], test)):
        for index in range(count):
            write_clip(folder / part / ("cat", "dog")[index % 2] / f"{index:04}.wav", index + 1000 * count)


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def deny(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Refuse to list a folder, as to a user without the right to; the tests may run as root, who has it."""
    scandir = os.scandir

    def checked(path: Any) -> Any:
        if Path(path) == folder:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", checked)


def digits(*_: Any) -> None:
    """Come with the package."""


WRITERS = {
    writer.__name__: writer
    for writer in (
        *(cifar10, cifar100, digits, fashion_mnist, image_folder, imagenet, imagenet_wds),
        *(esc50, tau2020, sound_folder),
    )
}
