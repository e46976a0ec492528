"""CIFAR-10 and CIFAR-100 from archives in the official format, and from nothing else."""

import pickle
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchvision import datasets

from l2bn.data import cifar
from l2bn.data.archive import Archive
from l2bn.data.cifar import cifar10, cifar100, load_arrays
from l2bn.data.splits import Images, Splits
from l2bn.errors import UserError
from official_formats import cifar10 as write_cifar10
from official_formats import cifar100 as write_cifar100
from official_formats import cifar_batch, python2_pickle, tar_gz

COMMON: dict[str, Any] = {"label": "CIFAR", "baseline": "cifar"}


def pixels_of(split: Any) -> np.ndarray[Any, Any]:
    assert isinstance(split, Images)
    return split.images.numpy()


def test_cifar10_joins_the_batches_in_order(tmp_path: Path) -> None:
    write_cifar10(tmp_path, {}, 40, 20)
    splits = cifar10(str(tmp_path), download=False, **COMMON)
    batches = [cifar_batch(8, part, labels=10) for part in range(1, 6)]
    expected = np.concatenate([batch["data"] for batch in batches]).reshape(40, 3, 32, 32)
    np.testing.assert_array_equal(pixels_of(splits.train), expected)
    np.testing.assert_array_equal(pixels_of(splits.test).reshape(20, -1), cifar_batch(20, 6)["data"])
    assert splits.train.labels.tolist() == [i % 10 for _ in range(5) for i in range(8)]
    assert splits.classes == tuple(f"class {i}" for i in range(10))
    assert (splits.num_classes, splits.image_size) == (10, 32)


@pytest.mark.parametrize(("labels", "classes"), [("fine", 100), ("coarse", 20)])
def test_cifar100_reads_the_labels_asked_for(tmp_path: Path, labels: Any, classes: int) -> None:
    write_cifar100(tmp_path, {}, 40, 20)
    splits = cifar100(str(tmp_path), download=False, labels=labels, **COMMON)
    assert splits.train.labels.tolist() == [i % classes for i in range(40)]
    assert splits.classes == tuple(f"{labels} {i}" for i in range(classes))
    assert splits.num_classes == classes
    assert splits.baseline is None
    assert splits.label == "CIFAR, 40 and 20 images" + (", coarse" if labels == "coarse" else "")


@pytest.fixture
def official(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CIFAR-10 of 50 and 10 images, with the counts and checksums of these in the place of the official ones."""
    write_cifar10(tmp_path, {}, 50, 10)
    folder = tmp_path / "cifar-10-batches-py"
    monkeypatch.setattr(cifar, "COUNTS", (50, 10))
    for name in ("train_list", "test_list"):
        files = [[file, datasets.utils.calculate_md5(folder / file)] for file, _ in getattr(datasets.CIFAR10, name)]
        monkeypatch.setattr(datasets.CIFAR10, name, files)
    return folder


def test_the_official_files_keep_the_name_and_the_baseline(official: Path) -> None:
    splits = read(official.parent)
    assert (splits.label, splits.baseline) == ("CIFAR", "cifar")


def copy_a_batch(folder: Path) -> None:
    (folder / "data_batch_2").write_bytes((folder / "data_batch_1").read_bytes())


def drop_images(folder: Path) -> None:
    (folder / "data_batch_2").write_bytes(python2_pickle(cifar_batch(5, 2, labels=10)))


def drop_a_class(folder: Path) -> None:
    for file in [*folder.glob("data_batch_*"), folder / "test_batch"]:
        batch = load_arrays(file)
        batch["labels"] = [min(label, 8) for label in batch["labels"]]
        file.write_bytes(pickle.dumps(batch))


def other_pixels(folder: Path) -> None:
    (folder / "test_batch").write_bytes(python2_pickle(cifar_batch(10, 99, labels=10)))


@pytest.mark.parametrize(
    ("change", "label", "files"),
    [
        (copy_a_batch, "CIFAR, other files", "data_batch_2"),
        (drop_images, "CIFAR, 45 and 10 images", "data_batch_2"),
        (drop_a_class, "CIFAR, other files", "data_batch_1, data_batch_2"),
        (other_pixels, "CIFAR, other files", "test_batch"),
    ],
)
def test_other_files_are_said_in_the_label_and_have_no_baseline(
    official: Path, caplog: pytest.LogCaptureFixture, change: Any, label: str, files: str
) -> None:
    change(official)
    splits = read(official.parent)
    assert (splits.label, splits.baseline) == (label, None)
    assert f"not the official files, by their md5 sums: {files}" in caplog.text
    said = "is not the whole published" if "45" in label else "has as many images as the published"
    assert f"CIFAR {said}" in caplog.text


def test_torchvision_reads_the_same_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar10(tmp_path, {}, 40, 20)
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda _: True)
    monkeypatch.setattr(datasets.CIFAR10, "_load_meta", lambda _: None)  # that one checks an md5 sum, too
    reference = datasets.CIFAR10(tmp_path, train=True)
    ours = cifar10(str(tmp_path), download=False, **COMMON).train
    np.testing.assert_array_equal(pixels_of(ours).transpose(0, 2, 3, 1), reference.data)
    assert ours.labels.tolist() == reference.targets


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def archived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An archive on a server of its own, with its true checksum in the place of the official one."""
    served = tmp_path / "served" / "cifar-10-batches-py"
    write_cifar10(served.parent, {}, 40, 20)
    path = tar_gz(served)
    md5 = datasets.utils.calculate_md5(path)
    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(path.parent))) as server:
        threading.Thread(target=server.serve_forever).start()
        url = f"http://127.0.0.1:{server.server_port}/{path.name}"
        monkeypatch.setattr(cifar, "CIFAR10", Archive(url, md5, served.name))
        yield path
        server.shutdown()


def read(root: Path, download: bool = True) -> Splits:
    return cifar10(str(root), download=download, **COMMON)


def test_a_missing_archive_is_downloaded_once(archived: Path, tmp_path: Path) -> None:
    root = tmp_path / "new folder, äöü"
    first = read(root)
    archived.unlink()
    np.testing.assert_array_equal(pixels_of(first.train), pixels_of(read(root).train))
    assert sorted(path.name for path in root.iterdir()) == ["cifar-10-batches-py", archived.name]


def test_an_archive_that_was_put_there_by_hand_is_unpacked(archived: Path) -> None:
    root = archived.parent
    (root / "cifar-10-batches-py").rename(root / "moved away")
    assert len(read(root, download=False).train) == 40


def test_an_archive_with_another_checksum_is_refused(archived: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / archived.name).write_bytes(archived.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"has the md5 sum \w{32}, not \w{32}: it is damaged") as caught:
        read(root)
    assert str(root / archived.name) in str(caught.value)
    assert not (root / "cifar-10-batches-py").exists()


def test_a_download_with_another_checksum_is_not_kept(archived: Path, tmp_path: Path) -> None:
    archived.write_bytes(b"not what it was")
    with pytest.raises(UserError, match="cannot be downloaded"):
        read(tmp_path / "root")
    assert not list((tmp_path / "root").iterdir())


def test_a_download_that_breaks_off_is_named_and_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class BrokenOff(SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"1000\r\nonly a part")
            self.close_connection = True

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), BrokenOff) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        official = cifar.CIFAR10
        address = f"http://127.0.0.1:{server.server_port}/{official.file}"
        monkeypatch.setattr(cifar, "CIFAR10", Archive(address, official.md5, official.folder))
        with pytest.raises(UserError, match="cannot be downloaded"):
            read(tmp_path / "root")
        server.shutdown()
    assert not list((tmp_path / "root").iterdir())


@pytest.mark.parametrize("download", [False, True])
@pytest.mark.parametrize(("name", "function"), [("CIFAR10", cifar10), ("CIFAR100", cifar100)])
def test_what_is_missing_is_said_with_the_ways_to_provide_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, download: bool, name: str, function: Any
) -> None:
    official: Archive = getattr(cifar, name)
    unreachable = Archive((tmp_path / "nothing" / official.file).as_uri(), official.md5, official.folder)
    monkeypatch.setattr(cifar, name, unreachable)
    with pytest.raises(UserError) as caught:
        function(str(tmp_path / "root"), download=download, **COMMON)
    message = str(caught.value)
    for part in (
        str(tmp_path / "root"),
        official.file,
        official.folder,
        official.md5,
        unreachable.url,
        "dataset.root=",
        "dataset=image_folder",
    ):
        assert part in message
    assert ("cannot be downloaded" in message) == download


class Payload:
    """Pickled as a call that would write a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (Path.touch, (self.file,))


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_payload_is_refused_and_not_executed(tmp_path: Path, protocol: int) -> None:
    write_cifar10(tmp_path, {}, 40, 20)
    batch = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    trace = tmp_path / "executed"
    payload = {**cifar_batch(8, 3, labels=10), "extra": Payload(trace)}
    batch.write_bytes(pickle.dumps(payload, protocol))
    pickle.loads(batch.read_bytes())  # the payload is a live one
    assert trace.exists()
    trace.unlink()
    with pytest.raises(UserError, match="is refused, it is no pickle of plain arrays") as caught:
        cifar10(str(tmp_path), download=False, **COMMON)
    assert str(batch) in str(caught.value)
    assert not trace.exists()


@pytest.mark.parametrize(
    "name", ["os.system", "builtins.eval", "numpy.load", "numpy.core.multiarray.fromfile", "numpy.f2py.os"]
)
def test_the_unpickler_knows_arrays_only(tmp_path: Path, name: str) -> None:
    module, _, attribute = name.rpartition(".")
    file = tmp_path / "batch"
    file.write_bytes(f"c{module}\n{attribute}\n.".encode())
    with pytest.raises(UserError, match=f"it asks for {module}"):
        load_arrays(file)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_every_protocol_are_read(tmp_path: Path, protocol: int) -> None:
    batch = cifar_batch(4, 0, labels=10)
    (tmp_path / "batch").write_bytes(pickle.dumps(batch, protocol))
    found = load_arrays(tmp_path / "batch")
    np.testing.assert_array_equal(found.pop("data"), batch.pop("data"))
    assert found == batch


def test_no_other_encoding_is_called(tmp_path: Path) -> None:
    (tmp_path / "batch").write_bytes(b"c_codecs\nencode\n(Vtext\nVrot13\ntR.")
    with pytest.raises(UserError, match="it asks for the encoding rot13"):
        load_arrays(tmp_path / "batch")


def test_a_list_of_classes_that_is_not_the_official_one_is_named(tmp_path: Path) -> None:
    write_cifar10(tmp_path, {}, 40, 10)
    (meta,) = tmp_path.rglob("batches.meta")
    for content in ({}, {b"label_names": [b"cat"]}, {"label_names": [1, 2]}, {"label_names": 5}):
        meta.write_bytes(pickle.dumps(content))
        with pytest.raises(UserError, match=r"batches\.meta has no label_names: it is not the official file"):
            cifar10(str(tmp_path), download=False, **COMMON)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no .*data_batch_2"),
        (b"", "is refused"),
        (python2_pickle(cifar_batch(8, 2, labels=10))[:5000], "is refused"),
        (pickle.dumps([1, 2]), "holds no dictionary"),
        (pickle.dumps({"data": np.zeros((8, 3072), np.float32), "labels": [0] * 8}), "is no batch of CIFAR images"),
        (pickle.dumps({"data": np.zeros((3072, 8), np.uint8), "labels": [0] * 8}), "is no batch of CIFAR images"),
        (pickle.dumps({"data": np.zeros((8, 3072), np.uint8), "labels": [0] * 7}), "is no batch of CIFAR images"),
        (
            pickle.dumps({"data": np.zeros((8, 3072), np.uint8), "labels": [10] * 8}),
            "data_batch_2: labels outside the 10 classes",
        ),
    ],
)
def test_a_damaged_batch_is_named(tmp_path: Path, content: bytes | None, words: str) -> None:
    write_cifar10(tmp_path, {}, 40, 20)
    batch = tmp_path / "cifar-10-batches-py" / "data_batch_2"
    batch.unlink()
    if content is not None:
        batch.write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        cifar10(str(tmp_path), download=False, **COMMON)
    assert str(batch.parent) in str(caught.value)
