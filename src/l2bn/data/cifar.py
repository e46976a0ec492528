"""CIFAR-10 and CIFAR-100 from their official archives (the "python version").

A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009. An archive holds pickles of numpy
arrays. Reading a pickle can run any code, so these are read by an unpickler that accepts arrays only.
"""

import logging
import pickle
from pathlib import Path
from typing import Any, Literal, Unpack

import numpy as np
import numpy.typing as npt
import torch
from torchvision import datasets
from torchvision.datasets.utils import calculate_md5

from l2bn.data.archive import Archive, fetch, unpack
from l2bn.data.splits import Common, Images, Splits, make_splits
from l2bn.errors import UserError, expand

log = logging.getLogger(__name__)

CIFAR10 = Archive(datasets.CIFAR10.url, datasets.CIFAR10.tgz_md5, datasets.CIFAR10.base_folder)
CIFAR100 = Archive(datasets.CIFAR100.url, datasets.CIFAR100.tgz_md5, datasets.CIFAR100.base_folder)
COUNTS = 50_000, 10_000  # training and test images of both


def cifar10(root: str, download: bool = True, **common: Unpack[Common]) -> Splits:
    """50,000 training and 10,000 test images of 32 x 32 pixels in 10 classes.

    root: folder of the archive or of the unpacked `cifar-10-batches-py`. download: fetch a missing archive.
    """
    folder = _provide(CIFAR10, root, download)
    batches = [f"data_batch_{part}" for part in range(1, 6)]
    return _read(datasets.CIFAR10, folder, (batches, ["test_batch"]), "batches.meta", "label", common)


def cifar100(
    root: str, download: bool = True, labels: Literal["fine", "coarse"] = "fine", **common: Unpack[Common]
) -> Splits:
    """50,000 training and 10,000 test images of 32 x 32 pixels in 100 fine classes, or their 20 coarse ones.

    root: folder of the archive or of the unpacked `cifar-100-python`. With coarse labels there is no baseline.
    """
    folder = _provide(CIFAR100, root, download)
    return _read(datasets.CIFAR100, folder, (["train"], ["test"]), "meta", f"{labels}_label", common)


def _provide(archive: Archive, root: str, download: bool) -> Path:
    """The unpacked folder, from the archive if need be."""
    place = expand(root)
    folder = place / archive.folder
    if not folder.is_dir():
        remedy = (
            f"Looked for the folder {archive.folder} and the file {archive.file} in {place.absolute()}. "
            f"Either download {archive.url} (md5 {archive.md5}) by hand and put it there, "
            "or name the folder that holds it by dataset.root=FOLDER, "
            "or train on a folder of images by dataset=image_folder"
        )
        unpack(fetch(archive, place, download, remedy), place, archive.folder)
    return folder


def _read(
    official: type[datasets.CIFAR10],
    folder: Path,
    parts: tuple[list[str], list[str]],
    meta: str,
    key: str,
    common: Common,
) -> Splits:
    """The splits from the files of both parts; key: of the labels, as in `fine_labels` and `fine_label_names`."""
    classes = load_arrays(folder / meta).get(f"{key}_names")
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
        raise UserError(f"{folder / meta} has no {key}_names: it is not the official file; move {folder} away")
    train, test = (_images([folder / name for name in names], f"{key}s", len(classes)) for names in parts)
    md5 = dict([*official.train_list, *official.test_list])
    changed = [name for name in (*parts[0], *parts[1]) if calculate_md5(folder / name) != md5[name]]
    if changed:
        log.warning("%s: not the official files, by their md5 sums: %s", folder, ", ".join(changed))
    whole = (len(classes), *COUNTS)
    variant = "coarse" if key == "coarse_label" else ""
    return make_splits(
        train, test, len(classes), 32, tuple(classes), whole=whole, intact=not changed, variant=variant, **common
    )


def _images(files: list[Path], key: str, classes: int) -> Images:
    parts = []
    for file in files:
        batch = load_arrays(file)
        try:
            part = Images(torch.unflatten(torch.tensor(batch["data"]), 1, (3, 32, 32)), torch.tensor(batch[key]))
        except Exception as error:  # whatever stands in their place
            raise UserError(
                f"{file} is no batch of CIFAR images: `data`, uint8 of shape (N, 3072), and `{key}`, N labels, are "
                f"expected ({error!r}); unpack the official archive again"
            ) from error
        if not all(0 <= label < classes for label in part.labels.tolist()):
            raise UserError(f"{file}: labels outside the {classes} classes; unpack the official archive again")
        parts.append(part)
    return Images(torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts]))


# numpy keeps the function that rebuilds an array in a private module, which has moved.
_rebuild: Any = np.empty(0).__reduce__()[0]


def _encode(text: str, encoding: str) -> bytes:
    """Rebuild bytes as Python 3 writes them by the protocols of Python 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding}")
    return text.encode(encoding)


def _from_buffer(content: bytes, dtype: Any, shape: tuple[int, ...], order: Any) -> npt.NDArray[Any]:
    """Rebuild an array of protocol 5, as numpy does."""
    return np.frombuffer(content, dtype).reshape(shape, order=order)


_ALLOWED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _encode,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _rebuild for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
}


class _ArrayUnpickler(pickle.Unpickler):
    """Reads plain Python values and numpy arrays; a pickle that names anything else is refused before it runs."""

    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _ALLOWED[module, name]


def load_arrays(file: Path) -> dict[str, Any]:
    """A dictionary of plain values and numpy arrays from a pickle of any protocol, of Python 2 or 3.

    Raises `UserError` for a missing or damaged file, and for one that holds anything else.
    """
    try:
        with file.open("rb") as stream:
            content = _ArrayUnpickler(stream, encoding="latin1").load()
    except FileNotFoundError:
        raise UserError(f"no {file}: unpack the official archive again") from None
    # A mangled pickle can fail anywhere inside the unpickler.
    except Exception as error:
        raise UserError(f"{file} is refused, it is no pickle of plain arrays: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no dictionary: unpack the official archive again")
    return content
