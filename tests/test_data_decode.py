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


RAMP = np.tile(np.arange(256, dtype=np.uint8), (8, 1))


def tiff(bits: int, packed: bytes, photometric: int = 1, channels: int = 1) -> bytes:
    """An uncompressed TIFF of the ramp's shape, one channel behind the other; 0: white is zero, 1: gray, 2: RGB."""
    tags = [(256, 256), (257, 8), (258, bits), (259, 1), (262, photometric), (273, 8), (277, channels)]
    tags += [(278, 8), (279, len(packed)), (284, min(channels, 2))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return (
        b"II*\0" + struct.pack("<I", 8 + len(packed)) + packed + struct.pack("<H", len(tags)) + entries + bytes(4)
    )


def test_white_may_be_zero() -> None:
    np.testing.assert_array_equal(decoded(tiff(8, RAMP.tobytes()))[..., 0], RAMP)
    np.testing.assert_array_equal(decoded(tiff(8, RAMP.tobytes(), photometric=0))[..., 0], 255 - RAMP)


def png_of_16_bits(content: bytes) -> bytes:
    """A PNG whose header says 16 bits a channel; Pillow reads RGB of this kind and does not write it."""
    header = content[12:24] + b"\x10" + content[25:29]
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


@pytest.mark.parametrize(
    "content",
    [
        encoded(Image.fromarray(RAMP.astype(np.uint16)), "PNG"),
        png_of_16_bits(encoded(Image.fromarray(RGB), "PNG")),
        b"P5 256 8 4095\n" + (RAMP * np.uint16(16)).astype(">u2").tobytes(),
        tiff(12, bytes(8 * 256 * 3 // 2)),
        encoded(Image.fromarray(RAMP.astype(np.uint16)), "TIFF"),
        tiff(16, bytes(8 * 256 * 2 * 3), photometric=2, channels=3),
        encoded(Image.fromarray(RAMP.astype(np.int32)), "TIFF"),
        encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
    ],
    ids=["PNG", "RGB PNG", "PGM", "12-bit TIFF", "16-bit TIFF", "RGB TIFF", "32-bit TIFF", "float TIFF"],
)
def test_more_than_eight_bits_a_channel_are_refused(content: bytes) -> None:
    with pytest.raises(UserError, match=r"more than 8 bits a channel: scale them to 8 bits\); replace the file"):
        decoded(content)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_the_width_of_an_image_is_not_its_depth(kind: str) -> None:
    for mode in ("RGB", "L"):
        image = Image.new(mode, (16, 16), 3 if mode == "L" else (3, 3, 3))
        assert (decoded(encoded(image, kind)) == 3).all()


@pytest.mark.parametrize(("mode", "key"), [("RGB", (255, 0, 0)), ("L", 76), ("P", 1), ("1", 1)])
def test_a_transparent_colour_shows_white(mode: str, key: Any) -> None:
    image = Image.new(mode, (4, 4), key)
    if mode == "P":
        image.putpalette([0, 0, 0, 255, 0, 0])
    assert (decoded(encoded(image, "PNG", transparency=key)) == 255).all()


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
        encoded(Image.fromarray(RGB), "AVIF").replace(b"av01", b"av02"),
    ],
    ids=["empty", "text", "truncated JPEG", "truncated PNG", "damaged AVIF"],
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
