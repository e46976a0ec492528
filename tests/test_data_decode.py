"""Any image file becomes RGB with 8 bits a channel; a damaged one is named."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from l2bn.data.decode import read_rgb
from l2bn.errors import UserError
from official_formats import jpeg, pixels

RGB = pixels(1, 8, 8)[0]
GRAY = RGB[..., 0]


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def decoded(content: bytes) -> np.ndarray[Any, Any]:
    image = read_rgb(content, "name")
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_rgb_comes_back(kind: str) -> None:
    np.testing.assert_array_equal(decoded(encoded(Image.fromarray(RGB), kind)), RGB)


@pytest.mark.parametrize("mode", ["L", "LA"])
def test_gray_is_repeated(mode: str) -> None:
    content = encoded(Image.fromarray(GRAY).convert(mode), "PNG")
    np.testing.assert_array_equal(decoded(content), np.stack([GRAY] * 3, axis=-1))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(kind: str) -> None:
    wide = GRAY.astype(np.uint16) * 257  # 0 to 65535
    np.testing.assert_array_equal(decoded(encoded(Image.fromarray(wide), kind)), np.stack([GRAY] * 3, axis=-1))


def test_one_bit_is_black_and_white() -> None:
    content = encoded(Image.fromarray(GRAY > 127), "PNG")
    np.testing.assert_array_equal(decoded(content)[..., 1], np.where(GRAY > 127, 255, 0))


def test_cmyk_has_the_colours_of_its_inks() -> None:
    cyan = np.zeros((8, 8, 4), np.uint8)
    cyan[..., 0] = 255
    content = encoded(Image.fromarray(cyan, "CMYK"), "JPEG", quality=100)
    np.testing.assert_allclose(decoded(content).mean((0, 1)), [0, 255, 255], atol=2)


@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_what_is_transparent_shows_white(mode: str) -> None:
    alpha = np.zeros((8, 8), np.uint8)
    alpha[:, 4:] = 255
    image = Image.fromarray(np.dstack([np.full((8, 8, 3), 40, np.uint8), alpha]), "RGBA")
    found = decoded(encoded(image.convert("P") if mode == "P" else image, "PNG"))
    np.testing.assert_array_equal(found[:, :4], 255)
    np.testing.assert_allclose(found[:, 4:], 40, atol=10)  # the palette holds near colours


def test_a_palette_is_looked_up() -> None:
    flat = Image.fromarray(RGB).quantize(16)
    np.testing.assert_array_equal(decoded(encoded(flat, "PNG")), np.asarray(flat.convert("RGB")))


def test_the_name_of_a_file_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "really a.JPEG"
    path.write_bytes(encoded(Image.fromarray(RGB), "PNG"))
    np.testing.assert_array_equal(np.asarray(read_rgb(path, "name")), RGB)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no image",
        jpeg(pixels(1, 64, 64)[0])[:1500],
        encoded(Image.fromarray(pixels(1, 64, 64)[0]), "PNG")[:1500],
        encoded(Image.fromarray(RGB.astype(np.float32)[..., 0]), "TIFF"),
    ],
    ids=["empty", "text", "truncated JPEG", "truncated PNG", "floating point"],
)
def test_a_damaged_file_is_named(content: bytes) -> None:
    with pytest.raises(UserError, match=r"^some/file\.jpg: cannot be decoded \(.+\); replace or remove the file"):
        read_rgb(content, "some/file.jpg")


def test_a_file_that_went_away_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.jpg: the file is gone"):
        read_rgb(tmp_path / "gone.jpg", "gone.jpg")
