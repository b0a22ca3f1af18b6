"""The one door to a picture's pixels."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image


class Unreadable(OSError):
    """A sample whose file cannot be opened or decoded: named, counted and passed over in training, an error in
    evaluation. Nothing that happens to the pixels afterwards counts as that."""


def read_picture(source: Path | str | BinaryIO) -> Image.Image:
    """The RGB picture in a file, decoded; `Unreadable` if there is none or it is damaged."""
    try:
        picture = Image.open(source)
        if picture.mode.startswith("I;16"):  # of 16 bits, which Pillow would cut off at 255
            picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
        return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what PIL raises on bad files
        raise Unreadable(str(error)) from None
