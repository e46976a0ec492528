"""Image files of any kind to RGB with 8 bits a channel."""

import io
import re
import signal
import struct
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps

from l2bn.data.cache import content_of, tracked
from l2bn.errors import UserError
from l2bn.processes import available_cores, end_with_parent

T = TypeVar("T")

CHUNK = 16  # images that a decoding process takes at a time
WORTH_A_PROCESS = 64  # images
BITS_PER_SAMPLE, PHOTOMETRIC, LARGEST_VALUE, SAMPLE_FORMAT = 258, 262, 281, 339  # tags of TIFF
WHITE_IS_ZERO, SIGNED = 0, 2  # values of the second and the last
ORIENTATION = ExifTags.Base.Orientation
LEAST_FILLED = 64  # bytes of zeros at a file's end
DAMAGE = OSError, SyntaxError, ValueError, EOFError, struct.error  # by which Pillow's readers report it
DIM = 4096  # a 16-bit image that stays below holds at most 12 bits of its 16: it would be nearly black


def read_rgb(source: Path | bytes | bytearray, name: str, *, upright: bool = False) -> Image.Image:
    """Decode a file or its bytes: grayscale repeated, CMYK converted, 16 bits scaled to 8, transparency on white.

    upright: turn the image as its EXIF orientation says, which cameras leave to the viewer.
    Raises `UserError` with `name` if it is damaged, cut short, no image, or has a range that it does not state.
    """
    content = content_of(source) if isinstance(source, Path) else bytes(source)
    try:
        if _is_zero_filled(content):
            raise ValueError("its end is filled with zeros")
        with Image.open(io.BytesIO(content)) as image:
            wide = any(re.search(";16[BLN]", str(tile[-1])) for tile in image.tile)  # of which Pillow keeps 8 bits
            image.load()
            return _upright(_to_rgb(image, wide), image) if upright else _to_rgb(image, wide)
    except (*DAMAGE, RuntimeError, Image.DecompressionBombError) as error:
        raise UserError(f"{name}: cannot be decoded ({error}); replace the file") from error


def _upright(decoded: Image.Image, image: Image.Image) -> Image.Image:
    exif = Image.Exif()
    with suppress(*DAMAGE):  # a damaged tag turns nothing
        exif[ORIENTATION] = image.getexif().get(ORIENTATION, 1)
        decoded.info["exif"] = exif.tobytes()
        return ImageOps.exif_transpose(decoded)
    return decoded


def _is_zero_filled(content: bytes) -> bool:
    """Tell whether a broken download left zeros for the rest, which decoders take for gray or black."""
    end = content.rstrip(b"\0")
    if len(content) - len(end) < LEAST_FILLED:
        return False
    if content[:2] == b"\xff\xd8":  # JPEG: no end of the image behind its last scan
        return end.rfind(b"\xff\xd9") < end.rfind(b"\xff\xda")
    if content[:4] == b"\x89PNG":
        return end.rfind(b"IEND") < end.rfind(b"IDAT")
    whole = 0
    if content[8:12] == b"WEBP":
        whole = 8 + int.from_bytes(content[4:8], "little")
    elif content[4:8] == b"ftyp":  # AVIF: boxes, each with its length
        while (length := int.from_bytes(content[whole : whole + 4])) >= 8:
            whole += length
    return len(end) + LEAST_FILLED <= whole


def _to_rgb(image: Image.Image, wide: bool) -> Image.Image:
    if image.mode.startswith("I"):
        return _from_integers(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range")
    if wide and np.asarray(image.convert("RGB")).max() < DIM >> 8:
        raise _too_dim()
    if image.has_transparency_data:
        key = image.info.get("transparency")
        if wide and isinstance(key, tuple):
            image.info["transparency"] = tuple(value >> 8 for value in key)
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _from_integers(image: Image.Image) -> Image.Image:
    """Gray values of more than 8 bits, which Pillow's `convert` would clip at 255."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(BITS_PER_SAMPLE, (16,))[0]
    stated = tags.get(LARGEST_VALUE)
    if stated is None and bits > 16:
        raise ValueError(f"{bits}-bit pixels have no fixed range")
    if tags.get(SAMPLE_FORMAT, (1,))[0] == SIGNED:
        raise ValueError("signed pixels have no fixed range")
    white = (stated if isinstance(stated, int) else stated[0]) if stated is not None else 2**bits - 1
    values = np.asarray(image).astype(np.int64)
    if white == 2**16 - 1 and 0 < values.max() < DIM:
        raise _too_dim()
    gray = (values.clip(0, white) * 256 // (white + 1)).astype(np.uint8)
    key = image.info.get("transparency")
    if isinstance(key, int):
        gray[values == key] = 255
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:  # which Pillow turns round for 8 bits alone
        gray = 255 - gray
    return Image.fromarray(gray).convert("RGB")


def _too_dim() -> ValueError:
    return ValueError(
        "its 16-bit pixels use at most 12 bits and would be nearly black: scale them to 8 bits or to all 16"
    )


def read_all(paths: list[Path], read: Callable[[Path], T], text: str) -> Generator[T, None, None]:
    """Yield the result of `read` for each path, in order, computed in parallel with a progress bar.

    By processes, because most of the time spent on a small image is spent in Python. Close it to cancel the rest.
    """
    count = min(available_cores(), len(paths) // WORTH_A_PROCESS + 1)
    with ProcessPoolExecutor(count, initializer=_serve) as workers:
        try:
            yield from tracked(_read_ahead(workers, paths, read, 2 * count), text, len(paths))
        except BrokenProcessPool as error:
            raise UserError(f"{text}: a process was killed, probably for lack of memory: {error}") from error
        except BaseException:
            workers.shutdown(cancel_futures=True)
            raise


def _serve() -> None:
    """Set up a process: it ends with its parent, leaves Ctrl-C to it, and has one thread.

    More would wait forever for those of the parent, which a fork leaves behind.
    """
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def _read_ahead(
    workers: ProcessPoolExecutor, paths: list[Path], read: Callable[[Path], T], ahead: int
) -> Generator[T, None, None]:
    """Yield the results in order, with `ahead` chunks in work: results that wait for a slow disk take memory."""
    chunks = (paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK))
    pending = deque(workers.submit(_read_chunk, read, chunk) for chunk in islice(chunks, ahead))
    while pending:
        results = pending.popleft().result()
        pending.extend(workers.submit(_read_chunk, read, chunk) for chunk in islice(chunks, 1))
        yield from results


def _read_chunk(read: Callable[[Path], T], paths: list[Path]) -> list[T]:
    return [read(path) for path in paths]
