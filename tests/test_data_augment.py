"""Augmentation: windows of the padded image, half of them mirrored; spectrograms shifted and masked."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, chisquare

from l2bn.data.augment import CropFlip, ShiftMask


def random_images(count: int, size: int, seed: int = 0) -> torch.Tensor:
    """Pixels from 1 to 255, so that no window of one looks like the padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


@settings(max_examples=50)
@given(
    st.integers(0, 5),
    st.integers(1, 7),
    st.integers(1, 6),
    st.booleans(),
    st.sampled_from([torch.contiguous_format, torch.channels_last]),
    st.integers(0, 1000),
)
def test_output_is_the_drawn_window_of_the_padded_image(
    padding: int, size: int, count: int, flip: bool, memory_format: torch.memory_format, seed: int
) -> None:
    augmentation = CropFlip(padding, flip)
    images = random_images(count, size, seed).contiguous(memory_format=memory_format)
    numbers = augmentation.draw(count, torch.Generator().manual_seed(seed))
    outputs = augmentation.apply(images, numbers)
    padded = F.pad(images, [padding] * 4)
    for output, image, (row, column, mirror) in zip(outputs, padded, numbers.tolist(), strict=True):
        window = image[:, row : row + size, column : column + size]
        assert torch.equal(output, window.flip(-1) if mirror else window)
    assert numbers[:, :2].min() >= 0
    assert numbers[:, :2].max() <= 2 * padding
    assert set(numbers[:, 2].tolist()) <= ({0, 1} if flip else {0})


def test_offsets_are_uniform_and_half_of_the_images_are_mirrored() -> None:
    numbers = CropFlip(4, True).draw(20_000, torch.Generator().manual_seed(0))
    windows = torch.bincount(numbers[:, 0] * 9 + numbers[:, 1], minlength=81)
    assert chisquare(windows.numpy()).pvalue > 0.01
    assert binomtest(int(numbers[:, 2].sum()), 20_000).pvalue > 0.01


def test_samples_of_a_batch_differ_from_each_other() -> None:
    images = random_images(1, 8).repeat(200, 1, 1, 1)
    outputs = CropFlip(2, True)(images, torch.Generator().manual_seed(0))
    assert len(torch.unique(outputs, dim=0)) == 50  # 25 windows, mirrored or not


def test_the_generator_alone_decides() -> None:
    images = random_images(16, 8)
    first, second = (CropFlip()(images, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, CropFlip()(images, torch.Generator().manual_seed(4)))


def test_input_is_left_as_it_was() -> None:
    images = random_images(16, 8)
    before = images.clone()
    CropFlip()(images, torch.Generator().manual_seed(0))
    assert torch.equal(images, before)


# Shift and mask: of spectrograms.


@settings(max_examples=50)
@given(
    st.integers(0, 9),
    st.integers(0, 9),
    st.integers(0, 9),
    st.integers(1, 7),
    st.sampled_from([torch.contiguous_format, torch.channels_last]),
    st.integers(0, 1000),
)
def test_a_spectrogram_is_shifted_and_one_stretch_of_either_axis_is_its_mean(
    shift: int, time: int, frequency: int, size: int, memory_format: torch.memory_format, seed: int
) -> None:
    augmentation = ShiftMask(shift, time, frequency)
    images = random_images(4, size, seed).contiguous(memory_format=memory_format)
    numbers = augmentation.draw(4, torch.Generator().manual_seed(seed))
    for output, image, drawn in zip(augmentation.apply(images, numbers), images, numbers.tolist(), strict=True):
        offset = drawn[0] % (2 * shift + 1) - shift
        expected = image.roll(-offset, 2).clone()
        mean = (image.double().mean((1, 2), keepdim=True) + 0.5).floor().to(torch.uint8)
        for axis, longest, (length, start) in ((2, time, drawn[1:3]), (1, frequency, drawn[3:5])):
            length %= min(longest, size) + 1
            expected.narrow(axis, start % (size - length + 1), length).copy_(
                mean.expand_as(expected.narrow(axis, 0, length))
            )
        assert torch.equal(output, expected)


def test_shifts_and_masks_are_uniform() -> None:
    """On an image whose pixels tell their place, with a mean that no pixel has."""
    size, count = 8, 20_000
    row = 10 * torch.arange(1, size + 1, dtype=torch.uint8)
    images = row.expand(count, 3, size, size).clone()
    shifted = ShiftMask(3, 0, 0)(images, torch.Generator().manual_seed(0))[:, 0, 0, 0]
    offsets = torch.bincount(shifted.long() // 10, minlength=9)[[6, 7, 8, 1, 2, 3, 4]]
    assert int(offsets.sum()) == count
    assert chisquare(offsets.numpy()).pvalue > 0.01
    for masked in (
        ShiftMask(0, 4, 0)(images, torch.Generator().manual_seed(1))[:, 0, 0, :] == 45,
        ShiftMask(0, 0, 4)(images, torch.Generator().manual_seed(1))[:, 0, :, 0] == 45,
    ):
        assert chisquare(torch.bincount(masked.sum(1), minlength=5).numpy()).pvalue > 0.01
        first = masked[masked.sum(1) == 2].int().argmax(1)
        assert chisquare(torch.bincount(first, minlength=7).numpy()).pvalue > 0.01
        assert ((masked.int().diff(dim=1) == 1).sum(1) + masked[:, 0].int() <= 1).all()  # one stretch


def test_the_spectrograms_of_a_batch_are_changed_each_by_its_own_numbers() -> None:
    images = random_images(1, 8).repeat(50, 1, 1, 1)
    assert len(torch.unique(ShiftMask(4, 2, 2)(images, torch.Generator().manual_seed(0)), dim=0)) > 40
    before = images.clone()
    assert torch.equal(ShiftMask(0, 0, 0)(images, torch.Generator()), images)
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", ["shift", "time", "frequency"])
@pytest.mark.parametrize("value", [-1, 5000])
def test_a_shift_or_mask_that_no_image_can_have_is_refused(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name}={value}: give a number of pixels from 0 to 4096"):
        ShiftMask(**{"shift": 0, "time": 0, "frequency": 0, name: value})


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_makes_the_same_images() -> None:
    images = random_images(16, 8)
    for augmentation in (CropFlip(), ShiftMask(4, 3, 3)):
        on_cpu, on_gpu = (
            augmentation(images.to(d), torch.Generator().manual_seed(0)).cpu() for d in ("cpu", "cuda")
        )
        assert torch.equal(on_cpu, on_gpu)
