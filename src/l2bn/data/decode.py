"""One image file of any kind to RGB with 8 bits a channel."""

import io
import struct
from pathlib import Path

import numpy as np
from PIL import Image

from l2bn.errors import UserError


def read_rgb(source: Path | bytes, name: str) -> Image.Image:
    """Decode a file or its bytes: grayscale repeated, CMYK converted, 16 bits scaled to 8, transparency on white.

    Raises `UserError` with `name` if it is damaged, cut short or no image.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            image.load()
            return _to_rgb(image)
    except FileNotFoundError:
        raise UserError(f"{name}: the file is gone; it was there when its folder was listed") from None
    # Pillow's decoders report damage by all of these.
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise UserError(f"{name}: cannot be decoded ({error}); replace or remove the file") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # `convert` would clip 16-bit gray values at 255
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
