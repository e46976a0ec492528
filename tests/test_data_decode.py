"""Any image file becomes RGB with 8 bits a channel; a damaged one is named."""

import functools
import io
import os
import select
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from l2bn.data.decode import CHUNK, read_all, read_rgb
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


RAMP = np.tile(np.arange(256), (8, 1))


@pytest.mark.parametrize("tags", [{281: 4095}, {281: (4095,)}])
def test_a_range_that_the_file_states_is_used(tags: dict[int, Any]) -> None:
    content = encoded(Image.fromarray((RAMP * 16).astype(np.uint16)), "TIFF", tiffinfo=tags)
    np.testing.assert_array_equal(decoded(content)[..., 0], RAMP)


def tiff(shape: tuple[int, int], bits: int, packed: bytes, white_is_zero: bool = False, kind: int = 1) -> bytes:
    """An uncompressed gray TIFF; `kind` is 1 for unsigned values, 2 for signed ones."""
    height, width = shape
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, 0 if white_is_zero else 1), (273, 8)]
    tags += [(278, height), (279, len(packed)), (339, kind)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return (
        b"II*\0" + struct.pack("<I", 8 + len(packed)) + packed + struct.pack("<H", len(tags)) + entries + bytes(4)
    )


def tiff_of_12_bits(values: np.ndarray[Any, Any]) -> bytes:
    """Two values of 12 bits in three bytes, as cameras write them."""
    pairs = values.reshape(-1, 2).astype(np.uint32)
    packed = (pairs[:, 0] << 12 | pairs[:, 1]).astype(">u4").view(np.uint8).reshape(-1, 4)[:, 1:].tobytes()
    return tiff((values.shape[0], values.shape[1]), 12, packed)


def test_white_may_be_zero() -> None:
    shape = RAMP.shape[0], RAMP.shape[1]
    wide, narrow = (RAMP * 257).astype("<u2").tobytes(), RAMP.astype(np.uint8).tobytes()
    for bits, content in ((16, wide), (8, narrow)):
        np.testing.assert_array_equal(decoded(tiff(shape, bits, content))[..., 0], RAMP)
        np.testing.assert_array_equal(decoded(tiff(shape, bits, content, white_is_zero=True))[..., 0], 255 - RAMP)


def test_signed_values_have_no_range_and_are_refused() -> None:
    content = (RAMP * 256 - 2**15).astype("<i2").tobytes()
    with pytest.raises(UserError, match="signed pixels have no fixed range"):
        decoded(tiff((RAMP.shape[0], RAMP.shape[1]), 16, content, kind=2))


def test_twelve_bits_are_scaled_by_the_depth_of_the_file() -> None:
    np.testing.assert_array_equal(decoded(tiff_of_12_bits(RAMP * 16))[..., 0], RAMP)


@pytest.mark.parametrize("bits", [10, 12])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_few_of_sixteen_bits_are_refused_instead_of_nearly_black(kind: str, bits: int) -> None:
    content = encoded(Image.fromarray((RAMP << (bits - 8)).astype(np.uint16)), kind)
    with pytest.raises(UserError, match=r"use at most 12 bits .* scale them to 8 bits or to all 16"):
        decoded(content)


def png_of_16_bits(rgb: np.ndarray[Any, Any], key: tuple[int, int, int] | None = None) -> bytes:
    """RGB with 16 bits a channel, which Pillow reads but does not write; `key`: the transparent colour."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width, _ = rgb.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rgb)
    transparency = b"" if key is None else chunk(b"tRNS", struct.pack(">HHH", *key))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + transparency + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_colours_of_sixteen_bits_are_scaled_and_few_of_them_refused() -> None:
    wide = RGB.astype(np.uint16) * 257
    np.testing.assert_array_equal(decoded(png_of_16_bits(wide)), RGB)
    for few in (RGB.astype(np.uint16) * 16, RGB.astype(np.uint16)):  # of the second Pillow keeps zeros alone
        with pytest.raises(UserError, match="use at most 12 bits"):
            decoded(png_of_16_bits(few))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_the_width_of_an_image_is_not_its_depth(kind: str) -> None:
    for mode in ("RGB", "L"):
        image = Image.new(mode, (16, 16), 3 if mode == "L" else (3, 3, 3))
        assert (decoded(encoded(image, kind)) == 3).all()


def test_black_of_sixteen_bits_stays_black() -> None:
    assert not decoded(encoded(Image.fromarray(np.zeros((8, 8), np.uint16)), "PNG")).any()


def test_values_of_32_bits_have_no_range_and_are_refused() -> None:
    with pytest.raises(UserError, match="32-bit pixels have no fixed range"):
        decoded(encoded(Image.fromarray(RAMP.astype(np.int32)), "TIFF"))


def test_gray_of_sixteen_bits_in_the_portable_format_is_scaled() -> None:
    content = b"P5 256 8 4095\n" + (RAMP * 16).astype(">u2").tobytes()
    np.testing.assert_allclose(decoded(content)[..., 0], RAMP, atol=1)


@pytest.mark.parametrize(("mode", "key"), [("RGB", (255, 0, 0)), ("L", 76), ("P", 1), ("1", 1), ("I;16", 30000)])
def test_a_transparent_colour_shows_white(mode: str, key: Any) -> None:
    image = Image.new(mode, (4, 4), key)
    if mode == "P":
        image.putpalette([0, 0, 0, 255, 0, 0])
    assert (decoded(encoded(image, "PNG", transparency=key)) == 255).all()


def test_a_transparent_colour_of_sixteen_bits_shows_white() -> None:
    wide = np.full((4, 4, 3), 50_000, np.uint16)
    wide[:2] = (65535, 0, 257)
    found = decoded(png_of_16_bits(wide, (65535, 0, 257)))
    assert (found[:2] == 255).all()
    assert (found[2:] == 50_000 >> 8).all()


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
        encoded(Image.fromarray(RGB), "AVIF").replace(b"av01", b"av02"),
    ],
    ids=["empty", "text", "truncated JPEG", "truncated PNG", "floating point", "damaged AVIF"],
)
def test_a_damaged_file_is_named(content: bytes) -> None:
    with pytest.raises(UserError, match=r"^some/file\.jpg: cannot be decoded \(.+\); replace the file"):
        read_rgb(content, "some/file.jpg")


def half_zeros(content: bytes) -> bytes:
    return content[: len(content) // 2] + bytes(len(content) - len(content) // 2)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("JPEG", {}), ("WEBP", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("AVIF", {})],
    ids=str,
)
def test_a_download_that_was_broken_off_is_named(kind: str, options: dict[str, Any]) -> None:
    """Zeros stand for what is missing, and decoders show gray or black; zeros behind a whole file are harmless."""
    content = encoded(Image.fromarray(pixels(1, 64, 64)[0]), kind, **options)
    with pytest.raises(UserError, match="its end is filled with zeros"):
        read_rgb(half_zeros(content), "name")
    np.testing.assert_array_equal(decoded(content + bytes(4096)), decoded(content))


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("orientation", [0, *range(1, 10)])
def test_a_photograph_is_turned_as_its_camera_says_where_that_is_asked(orientation: int, mode: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(pixels(1, 8, 8)[0]).convert(mode)
    content = encoded(stored, "PNG", exif=exif)
    turned = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(read_rgb(content, "name", upright=True)), turned)
    np.testing.assert_array_equal(decoded(content), np.asarray(stored.convert("RGB")))
    assert (turned == decoded(content)).all() == (orientation in (0, 1, 9))


def test_a_file_that_went_away_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.jpg cannot be read: No such file or directory; restore the file"):
        read_rgb(tmp_path / "gone.jpg", "gone.jpg")


def noted(path: Path, folder: Path) -> str:
    (folder / path.name).touch()
    return path.name


def test_images_are_decoded_in_order_and_not_far_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where results are written to a slow disk, they must not fill the memory in the meantime."""
    monkeypatch.setattr("l2bn.data.decode.available_cores", lambda: 2)
    paths = [Path(str(number)) for number in range(40 * CHUNK)]
    results = read_all(paths, functools.partial(noted, folder=tmp_path), "")
    assert next(results) == "0"
    time.sleep(1)
    assert len(list(tmp_path.iterdir())) <= 6 * CHUNK
    assert list(results) == [path.name for path in paths[1:]]


def threads(_: Path) -> int:
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN, "Ctrl-C would print a traceback of each process"
    return torch.get_num_threads()


def test_decoding_processes_have_one_thread_each() -> None:
    """A fork leaves the threads of a run behind, and the resizing of an image would wait for them."""
    torch.set_num_threads(2)
    try:
        assert list(read_all([Path("1")], threads, "")) == [1]
    finally:
        torch.set_num_threads(1)


def test_decoding_processes_end_with_a_killed_run(tmp_path: Path) -> None:
    """They hold its output: a pipe from it, as to `tee`, would never end."""
    code = "import time; from pathlib import Path; from l2bn.data.decode import read_all\n"
    code += "results = read_all([Path('1')] * 200, str, '')\n"
    code += "next(results), print('begun', flush=True), time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "begun\n"
        os.kill(process.pid, signal.SIGKILL)
        assert select.select([process.stdout], [], [], 10)[0], "somebody holds it"
        assert process.stdout.read() == ""
