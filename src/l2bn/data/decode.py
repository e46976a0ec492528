"""Image files of any kind to RGB with 8 bits a channel."""

import io
import struct
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
from PIL import ExifTags, Image, ImageFile, ImageOps

from l2bn.data.cache import content_of, tracked
from l2bn.errors import UserError
from l2bn.processes import available_cores, follow_parent

T = TypeVar("T")

CHUNK = 16  # images that a decoding process takes at a time
WORTH_A_PROCESS = 64  # images
BITS_PER_SAMPLE = 258  # a tag of TIFF
ORIENTATION = ExifTags.Base.Orientation
LEAST_FILLED = 64  # bytes of zeros at a file's end
DAMAGE = OSError, SyntaxError, ValueError, EOFError, struct.error  # by which Pillow's readers report it


def read_rgb(source: Path | bytes | bytearray, name: str, *, upright: bool = False) -> Image.Image:
    """Decode a file or its bytes: grayscale repeated, CMYK converted, transparency on white.

    upright: turn the image as its EXIF orientation says, which cameras leave to the viewer.
    Raises `UserError` with `name` if it is damaged, cut short, no image, or a PNG, TIFF or PGM with more than 8
    bits a channel; Pillow scales others to 8.
    """
    content = content_of(source) if isinstance(source, Path) else bytes(source)
    try:
        if _is_zero_filled(content):
            raise ValueError("its end is filled with zeros")
        with Image.open(io.BytesIO(content)) as image:
            if _is_deep(image):
                raise ValueError("its pixels have more than 8 bits a channel: scale them to 8 bits")
            image.load()
            return _upright(_to_rgb(image), image) if upright else _to_rgb(image)
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


def _is_deep(image: ImageFile.ImageFile) -> bool:
    """Tell whether a PNG, TIFF or PGM has more than 8 bits a channel, of which Pillow would drop or clip some."""
    bits = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (8,))
    wide_png = any(";16B" in str(tile[-1]) for tile in image.tile)
    return image.mode[0] in "IF" or wide_png or max(bits) > 8


def _to_rgb(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def read_all(paths: list[Path], read: Callable[[Path], T], text: str) -> Generator[T, None, None]:
    """Yield the result of `read` for each path, in order, computed in parallel with a progress bar.

    By processes, because most of the time spent on a small image is spent in Python. Close it to cancel the rest.
    """
    count = min(available_cores(), len(paths) // WORTH_A_PROCESS + 1)
    with ProcessPoolExecutor(count, initializer=_set_up_worker) as workers:
        try:
            yield from tracked(_read_ahead(workers, paths, read, 2 * count), text, len(paths))
        except BrokenProcessPool as error:
            raise UserError(f"{text}: a process was killed, probably for lack of memory: {error}") from error
        except BaseException:
            workers.shutdown(cancel_futures=True)
            raise


def _set_up_worker() -> None:
    """Set up a process, with one thread: more would wait forever for those of the parent, left behind by a fork."""
    follow_parent()
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
