"""From an image as Pillow opens it to 8 bits for each channel, upright."""

from typing import Any

import numpy as np
from PIL import Image

from ..errors import DataError

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's modes of images of so many channels
# The suffixes that are taken for images in folders, tar files and shards. Pillow reads all of them.
SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".jpe", ".jfif", ".avif", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".jp2", ".tga",
    ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip

_ORIENTATION, _BITS, _PHOTOMETRIC = 274, 258, 262  # tags of EXIF and TIFF
_TURNS = dict(
    zip(range(2, 9), (
        Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
        Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90,
    ), strict=True)
)  # fmt: skip
_FIRST = {"La": "LA", "RGBa": "RGBA", "LAB": "RGB"}  # modes that Pillow converts to few others


def mode_of(channels: int) -> str:
    """Return the mode of Pillow's images for a network's channels. `DataError` if image files have no such number."""
    if channels not in MODES:
        raise DataError(
            f"the network takes images of {channels} channels; image files give 1 (grey), 3 (RGB) or 4 (RGBA): set "
            "model.kwargs.in_chans or data.input_size"
        )
    return MODES[channels]


def eight_bits(image: Image.Image, mode: str) -> Image.Image:
    """Return an image in `mode`, which is L, RGB or RGBA, turned as its EXIF orientation says.

    Of 16 bits the high byte counts, as in Pillow's own 16-bit colours. Floats are from 0 to 1. Without an alpha channel
    in `mode`, transparent pixels have the colour that the file gives them.

    Raises:
        DataError: the file does not say which value is white.
    """
    image.load()
    turn = _turn(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _scaled(image)
    elif image.mode in _FIRST:
        image = image.convert(_FIRST[image.mode])
    if mode != "RGBA" and "transparency" in image.info:
        image = image.copy()
        del image.info["transparency"]  # Pillow warns of it
    if image.mode != mode:
        image = image.convert(mode)
    return image if turn is None else image.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        orientation: Any = image.getexif().get(_ORIENTATION)
    except Exception:  # damaged EXIF data, in an image that is whole
        return None
    return _TURNS.get(orientation) if isinstance(orientation, int) else None


def _scaled(image: Image.Image) -> Image.Image:
    """Return an image of one channel of more than 8 bits as L, or as LA if it has a transparent value."""
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    if image.mode == "F":
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
            raise DataError(
                f"its values are floats from {values.min():g} to {values.max():g}; expected 0 to 1, or whole numbers "
                "of 8 or 16 bits"
            )
        grey = np.rint(values * np.float32(255)).astype(np.uint8)
    else:
        # 32 bits hold the 16 of a PNG in older versions of Pillow, and of a PGM, which Pillow scales to 16
        if image.format == "FITS" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
            raise DataError(
                "its values are integers of 32 bits or with a sign, and no value is known to be white; "
                "expected 8 bits, or 16 without a sign"
            )
        bits = tags.get(_BITS, (16,))[0]
        grey = (np.clip(values.astype(np.int32), 0, 65535) >> (bits - 8)).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero; Pillow inverts up to 8 bits itself
        grey = 255 - grey
    found = Image.fromarray(grey)
    if isinstance(transparent := image.info.get("transparency"), int):
        found.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return found
