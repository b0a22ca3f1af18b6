"""The one door to a picture's pixels."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM", "GIF")
"""By content, whatever the file is called: collections from the web have GIFs named .jpg."""
MAX_ASPECT = 100
"""A picture of a few bytes can be a line of millions of pixels, which a resize to a given short side makes huge."""


class Unreadable(OSError):
    """A sample whose file cannot be opened or decoded: named, counted and passed over in training, an error in
    evaluation. Nothing that happens to the pixels afterwards counts as that."""


def read_picture(source: Path | str | BinaryIO) -> Image.Image:
    """The RGB picture in a file, decoded; `Unreadable` if there is none, or it is damaged or too large.

    Integers of more than 8 bits are scaled to 8 by 1/257; floating point is refused, for its range is not known. As
    Pillow's ``convert("RGB")`` has it, transparency is left out (what color it covers comes to light), CMYK is
    converted without a profile, and an EXIF rotation is not applied. Of an animation it is the first frame.
    """
    try:
        if isinstance(source, Path | str) and not stat.S_ISREG(os.stat(source).st_mode):
            raise Unreadable("it is a folder, pipe or device")  # a pipe would be waited for
        with Image.open(source, formats=FORMATS) as image:  # reads the header alone, and refuses sizes beyond reason
            short, long = sorted(image.size)
            if long > MAX_ASPECT * short:
                raise Unreadable(f"it is {image.width} x {image.height} px; its sides may be 1 to {MAX_ASPECT} at most")
            if image.mode == "F":
                raise Unreadable("its pixels are floating-point numbers; expected integers")
            return (_from_16_bits(image) if image.mode.startswith("I") else image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what PIL raises on bad files
        raise error if isinstance(error, Unreadable) else Unreadable(str(error)) from None


def _from_16_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise Unreadable(f"its pixels reach from {values.min()} to {values.max()}; expected at most 16 bits")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))
