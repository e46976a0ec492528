"""A batch is a pure function of (seed, epoch, step), whoever makes it.

One battery for the four ways of holding a data set: in memory, as files, as shards, as files decoded once.
"""

import contextlib
import dataclasses
import itertools
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from l2bn.data import imagenet as files
from l2bn.data import imagenet_wds as shards
from l2bn.data.augment import CropFlip
from l2bn.data.imagenet_wds import Shards
from l2bn.data.loader import Loader, evaluation_loader, training_loader
from l2bn.data.splits import Images, Splits, make_splits
from l2bn.errors import UserError
from l2bn.seeding import generator
from official_formats import imagenet, imagenet_wds

COMMON: dict[str, Any] = {"label": "data", "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
COUNT, BATCH = 50, 8


def in_memory() -> Splits:
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (COUNT, 3, 6, 6), dtype=torch.uint8, generator=random)
    # A label of its own tells a test which image it sees.
    return make_splits(
        Images(images, torch.arange(COUNT)),
        Images(images[:21], torch.arange(21)),
        COUNT,
        6,
        augmentation=CropFlip(2, True),
        **COMMON,
    )


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Splits]:
    folder = tmp_path_factory.mktemp("imagenet")
    imagenet(folder, {"train": "train", "val": "val", "devkit": "devkit"}, COUNT, 21)
    imagenet_wds(folder / "shards", {}, COUNT, 21)
    return {
        "memory": in_memory(),
        "files": numbered(files.imagenet(str(folder), devkit="devkit", image_size=16, **COMMON)),
        "decoded": numbered(
            files.imagenet(
                str(folder), devkit="devkit", image_size=16, cache_side=24, cache=str(folder / "cache"), **COMMON
            )
        ),
        "shards": numbered(
            shards.imagenet_wds(str(folder / "shards"), image_size=16, cache=str(folder / "cache"), **COMMON)
        ),
    }


def numbered(splits: Splits) -> Splits:
    train, test = (
        dataclasses.replace(split, labels=torch.arange(len(split)))  # type: ignore[type-var]
        for split in (splits.train, splits.test)
    )
    return dataclasses.replace(splits, train=train, test=test, num_classes=COUNT)


ON_DISK = ["files", "shards", "decoded"]  # in memory no workers are used


@pytest.fixture(params=["memory", *ON_DISK])
def splits(request: pytest.FixtureRequest, sources: dict[str, Splits]) -> Splits:
    return sources[request.param]


def train(splits: Splits, **options: Any) -> Loader:
    options = {"batch_size": BATCH, "seed": 0, "device": "cpu", **options}
    return training_loader(splits.train, splits=splits, **options)


def evaluate(splits: Splits, **options: Any) -> Loader:
    options = {"batch_size": BATCH, "device": "cpu", **options}
    return evaluation_loader(splits.test, splits=splits, **options)


def same(first: list[tuple[Tensor, Tensor]], second: list[tuple[Tensor, Tensor]]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, b) for pair in zip(first, second, strict=True) for a, b in zip(*pair, strict=True)
    )


def labels(batches: list[tuple[Tensor, Tensor]]) -> list[int]:
    return torch.cat([batch for _, batch in batches]).tolist()


def test_an_epoch_holds_each_sample_once_but_those_that_fill_no_batch(splits: Splits) -> None:
    loader = train(splits)
    batches = list(loader.epoch(0))
    assert len(batches) == len(loader) == COUNT // BATCH
    assert all(len(images) == len(targets) == BATCH for images, targets in batches)
    assert len(set(labels(batches))) == COUNT // BATCH * BATCH


def test_batches_are_normalised_float32(splits: Splits) -> None:
    (images, targets), *_ = train(splits).epoch(0)
    assert (images.dtype, targets.dtype) == (torch.float32, torch.int64)
    assert images.shape[1:] == (3, splits.image_size, splits.image_size)
    pixels = 255 * (images * torch.tensor(splits.std).view(3, 1, 1) + torch.tensor(splits.mean).view(3, 1, 1))
    torch.testing.assert_close(pixels, pixels.round(), rtol=0, atol=1e-3)
    assert pixels.round().min() >= 0
    assert pixels.round().max() <= 255


def test_same_seed_and_epoch_give_the_same_batches_and_others_do_not(splits: Splits) -> None:
    loader = train(splits)
    first = list(loader.epoch(3))
    assert same(first, list(loader.epoch(3)))
    assert same(first, list(train(splits).epoch(3)))
    for other in (train(splits).epoch(4), train(splits, seed=1).epoch(3)):
        assert labels(first) != labels(list(other))


def test_epochs_see_the_same_image_differently(splits: Splits) -> None:
    def of_image(number: int, epoch: int) -> Tensor:
        (found,) = [
            image
            for images, targets in train(splits, batch_size=10).epoch(epoch)
            for image, target in zip(images, targets, strict=True)
            if target == number
        ]
        return found

    assert sum(not torch.equal(of_image(number, 0), of_image(number, 1)) for number in range(10)) >= 8


@pytest.mark.parametrize("start", [1, 4, COUNT // BATCH])
def test_start_equals_skipping(splits: Splits, start: int) -> None:
    loader = train(splits)
    assert same(list(loader.epoch(1, start)), list(loader.epoch(1))[start:])


def test_start_does_not_make_the_batches_before(sources: dict[str, Splits]) -> None:
    opened = []

    class Watched(type(sources["files"].train)):  # type: ignore[misc]
        def __getitem__(self, index: int) -> Any:
            opened.append(index)
            return super().__getitem__(index)

    split = Watched(**vars(sources["files"].train))
    loader = training_loader(split, splits=sources["files"], batch_size=BATCH, seed=0, device="cpu")
    (batch,) = loader.epoch(0, len(loader) - 1)
    assert opened == batch[1].tolist()


@pytest.mark.parametrize("splits", ON_DISK, indirect=True)
@pytest.mark.parametrize("workers", [1, 2])
def test_number_of_workers_changes_nothing(splits: Splits, workers: int) -> None:
    with_workers, without = train(splits, workers=workers), train(splits)
    for epoch, start in ((0, 0), (1, 2)):
        assert same(list(with_workers.epoch(epoch, start)), list(without.epoch(epoch, start)))
    assert same(list(evaluate(splits, workers=workers).epoch(0)), list(evaluate(splits).epoch(0)))


@pytest.mark.parametrize("splits", ON_DISK, indirect=True)
def test_an_epoch_left_in_the_middle_does_not_disturb_the_next(splits: Splits) -> None:
    loader = train(splits, workers=2)
    for _ in loader.epoch(0):
        break
    assert same(list(loader.epoch(1)), list(train(splits).epoch(1)))


@pytest.mark.parametrize("world_size", [2, 4])
def test_slices_of_the_ranks_make_up_the_global_batch(splits: Splits, world_size: int) -> None:
    whole = list(train(splits).epoch(2))
    ranks = [list(train(splits, rank=rank, world_size=world_size).epoch(2)) for rank in range(world_size)]
    joined = [tuple(map(torch.cat, zip(*slices, strict=True))) for slices in zip(*ranks, strict=True)]
    assert same(whole, joined)  # type: ignore[arg-type]


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_batch_in_memory_is_what_numpy_makes_of_its_images(channels_last: bool) -> None:
    """Index, pad, crop, mirror and normalise, an image at a time and in float64."""
    splits, epoch = in_memory(), 3
    assert isinstance(splits.train, Images)
    assert isinstance(splits.augmentation, CropFlip)
    padding = splits.augmentation.padding
    mean, std = np.array(splits.mean)[:, None, None], np.array(splits.std)[:, None, None]
    steps = list(train(splits, channels_last=channels_last).epoch(epoch))
    assert len(steps) == COUNT // BATCH
    for step, (images, targets) in enumerate(steps):
        numbers = splits.augmentation.draw(BATCH, generator(0, "augmentation", epoch, step)).tolist()
        for image, index, (row, column, mirror) in zip(images, targets.tolist(), numbers, strict=True):
            pixels = splits.train.images[index].numpy()
            padded = np.pad(pixels, ((0, 0), (padding, padding), (padding, padding)))
            window = padded[:, row : row + 6, column : column + 6]
            expected = (window[:, :, :: -1 if mirror else 1] / 255 - mean) / std
            np.testing.assert_allclose(image.numpy(), expected, rtol=0, atol=1e-6)


def test_shards_are_shuffled_a_window_at_a_time(
    sources: dict[str, Splits], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "WINDOW", 2)
    split = sources["shards"].train.select(torch.arange(49))  # 7 samples in each of 7 shards
    assert isinstance(split, Shards)
    seen = labels(list(train(dataclasses.replace(sources["shards"], train=split), batch_size=7).epoch(0)))
    assert sorted(seen) == list(range(49))
    windows = split.shard[seen].split(14)
    assert [len(window.unique()) for window in windows] == [2, 2, 2, 1]
    assert all(len(window.unique_consecutive()) > 2 for window in windows[:3])
    assert windows[0].unique().tolist() != [0, 1]


def test_evaluation_is_in_order_with_nothing_dropped_or_augmented(splits: Splits) -> None:
    loader = evaluate(splits)
    batches = list(loader.epoch(0))
    assert len(batches) == len(loader) == 3
    assert labels(batches) == list(range(21))
    assert same(batches, list(loader.epoch(5)))
    pixels, _ = splits.test[20]
    expected = (pixels / 255 - torch.tensor(splits.mean).view(3, 1, 1)) / torch.tensor(splits.std).view(3, 1, 1)
    torch.testing.assert_close(batches[-1][0][-1], expected)


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_evaluation_is_shared_out_over_ranks(splits: Splits, world_size: int) -> None:
    seen: list[int] = []
    for rank in range(world_size):
        loader = evaluate(splits, rank=rank, world_size=world_size)
        batches = list(loader.epoch(0))
        assert len(batches) == len(loader)
        assert all(len(targets) for _, targets in batches)
        seen += labels(batches)
    assert sorted(seen) == list(range(21))


def test_channels_last_changes_the_layout_alone(splits: Splits) -> None:
    for make in (train, evaluate):
        plain, last = list(make(splits).epoch(0)), list(make(splits, channels_last=True).epoch(0))
        assert same(plain, last)
        assert all(images.is_contiguous(memory_format=torch.channels_last) for images, _ in last)
        assert all(images.is_contiguous() for images, _ in plain)


@pytest.mark.parametrize("batch_size", [COUNT + 1, 0, -4])
def test_a_batch_that_the_data_cannot_fill_is_refused(sources: dict[str, Splits], batch_size: int) -> None:
    with pytest.raises(UserError, match=rf"recipe.batch_size={batch_size}.* {COUNT} training images"):
        train(sources["memory"], batch_size=batch_size)


def test_a_batch_that_cannot_be_shared_out_is_refused(sources: dict[str, Splits]) -> None:
    with pytest.raises(UserError, match=r"recipe\.batch_size=8 is shared out over 3 devices"):
        train(sources["memory"], world_size=3)


def test_images_that_do_not_fit_on_the_device_are_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    loader = train(in_memory())
    monkeypatch.setattr(Tensor, "to", full)
    with pytest.raises(UserError, match=r"5\.4e-06 GB of images do not fit on cpu.* dataset\.image_size"):
        next(loader.epoch(0))


@pytest.mark.parametrize(
    ("splits", "workers"), [("memory", 0), *itertools.product(ON_DISK, [0, 2])], indirect=["splits"]
)
def test_global_random_state_is_left_alone(splits: Splits, workers: int) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    for _ in train(splits, workers=workers).epoch(0):
        pass
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_file_is_named_once_without_a_traceback(tmp_path: Path, workers: int) -> None:
    imagenet(tmp_path, {"train": "train", "val": "val", "devkit": "devkit"}, 8, 8)
    file = tmp_path / "val" / "ILSVRC2012_val_00000003.JPEG"
    file.write_bytes(file.read_bytes()[:500])
    splits = files.imagenet(str(tmp_path), devkit="devkit", image_size=16, **COMMON)
    with pytest.raises(UserError) as caught:
        list(evaluate(splits, workers=workers).epoch(0))
    assert "ILSVRC2012_val_00000003.JPEG: cannot be decoded" in str(caught.value)
    assert "Traceback" not in str(caught.value)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("start", [0, 2])
def test_a_gpu_gets_the_same_batches(splits: Splits, start: int) -> None:
    """Made ahead, on another stream and several steps at a time, while slow kernels keep the device busy."""
    on_cpu = list(train(splits).epoch(0, start))
    on_gpu = []
    for images, targets in train(splits, device="cuda").epoch(0, start):
        torch.cuda._sleep(2_000_000)  # cycles
        on_gpu.append((images + 0, targets + 0))  # read by the current stream only after the sleep
    torch.testing.assert_close([(images.cpu(), targets.cpu()) for images, targets in on_gpu], on_cpu)


class OnDisk:
    """A data set of the user's own, whose samples may be anything."""

    labels = torch.arange(COUNT) % 2

    def __init__(self, image: object, shift: int = 0) -> None:
        self.image, self.shift = image, shift

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.image, (index + self.shift) % 2

    def select(self, indices: torch.Tensor, like: Any = None) -> Any:
        return self


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("split", "said"),
    [
        (OnDisk(torch.zeros(3, 16, 16, dtype=torch.uint8)), ""),
        (OnDisk(torch.zeros(3, 16, 16)), r"must be a uint8 tensor of shape \(3, 16, 16\).* got torch.float32"),
        (OnDisk(torch.zeros(3, 14, 14, dtype=torch.uint8)), r"got torch.uint8 \(3, 14, 14\)"),
        (OnDisk("a path"), "got str"),
        (OnDisk(torch.zeros(3, 16, 16, dtype=torch.uint8), shift=1), "came with the label 1, but `labels` has 0"),
    ],
    ids=["right", "floats", "another size", "no tensor", "another label"],
)
def test_samples_that_are_not_what_a_split_gives_are_refused(
    split: OnDisk, said: str, workers: int, sources: dict[str, Splits]
) -> None:
    own = dataclasses.replace(sources["files"], test=split)
    expected = pytest.raises(UserError, match=said) if said else contextlib.nullcontext()
    with expected:
        list(evaluate(own, workers=workers).epoch(0))


def test_a_batch_without_room_in_shared_memory_ends_the_run(sources: dict[str, Splits]) -> None:
    """As in a container, whose /dev/shm has 64 MB: torch loses such a batch, and the run would wait for it."""
    own = OnDisk(torch.zeros(3, 400, 400, dtype=torch.uint8))
    splits = dataclasses.replace(sources["files"], test=own, image_size=400)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        with pytest.raises(UserError, match=r"no room for a batch in shared memory .*--shm-size=8g"):
            list(evaluate(splits, workers=2).epoch(0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Floats(CropFlip):
    def apply(self, images: Tensor, numbers: Tensor) -> Tensor:
        return images / 255


class Smaller(CropFlip):
    def apply(self, images: Tensor, numbers: Tensor) -> Tensor:
        return images[..., 1:, 1:]


@pytest.mark.parametrize(
    ("own", "got"), [(Floats(), r"torch\.float32 \(8, 3, 6, 6\)"), (Smaller(), r"\(8, 3, 5, 5\)")]
)
def test_an_augmentation_that_makes_something_else_is_refused(own: CropFlip, got: str) -> None:
    with pytest.raises(UserError, match=rf"must return uint8 images of shape \(8, 3, 6, 6\).* got .*{got}"):
        next(train(dataclasses.replace(in_memory(), augmentation=own)).epoch(0))


def test_labels_outside_the_classes_and_images_of_another_size_are_refused(sources: dict[str, Splits]) -> None:
    splits = sources["memory"]
    with pytest.raises(UserError, match="has one class: every answer"):
        dataclasses.replace(splits, num_classes=1)
    with pytest.raises(UserError, match=rf"from 0 to \d+; for {splits.num_classes - 1} classes give 0 to"):
        dataclasses.replace(splits, num_classes=splits.num_classes - 1)
    with pytest.raises(UserError, match=f"{splits.image_size} pixels wide, image_size is {splits.image_size + 1}"):
        dataclasses.replace(splits, image_size=splits.image_size + 1)
