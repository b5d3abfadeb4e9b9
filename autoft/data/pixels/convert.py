"""What an opened image is, and the one conversion of it to upright 8-bit RGB."""

from __future__ import annotations

import enum
import struct
import zlib
from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin

MAX_PIXELS: Final = 100_000_000
EXTREME: Final = 20  # times the shorter side, beyond which little of an image is in its square
SUFFIXES: Final[Mapping[str, tuple[str, ...]]] = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "MPO": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),  # a JPEG that carries further images
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "BMP": (".bmp", ".dib"),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
}
STRIP: Final = 2**20  # pixels converted at once: large images would be in memory several times
_DEEP_MODES: Final = ("I", "I;16", "I;16L", "I;16B", "I;16N")
_MODES: Final = (
    *("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"),
    *_DEEP_MODES,
)
_GREY: Final = ("1", "L", "LA", *_DEEP_MODES)
_TURNS: Final = range(2, 9)  # EXIF orientations that are not upright
_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0  # of TIFF
DAMAGED: Final = (
    AssertionError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    AttributeError,
    RuntimeError,
    struct.error,
    zlib.error,
)
"""What Pillow's parsers are seen to raise on damaged bytes, beside OSError."""


class Noticed(enum.IntFlag):
    """What was found in an image and how it was converted; nothing here excludes an image."""

    WRONG_SUFFIX = 1
    FIRST_FRAME = 2
    FIRST_PAGE = 4
    ALPHA = 8
    DEEP = 16
    GREY = 32
    CMYK = 64
    TURNED = 128
    EXTREME = 256


NOTICED_WORDS: Final[Mapping[Noticed, str]] = {
    Noticed.WRONG_SUFFIX: "another format than the suffix says",
    Noticed.FIRST_FRAME: "first frame of an animation",
    Noticed.FIRST_PAGE: "first page of several",
    Noticed.ALPHA: "transparency laid on white",
    Noticed.DEEP: "more than 8 bits, scaled to 8",
    Noticed.GREY: "grey",
    Noticed.CMYK: "CMYK",
    Noticed.TURNED: "turned as its EXIF orientation says",
    Noticed.EXTREME: f"one side more than {EXTREME} times the other",
}


def refusal(image: Image.Image) -> str:
    """Say why the header alone rules the image out, or nothing."""
    if image.width * image.height > MAX_PIXELS:
        return f"{image.width} x {image.height} pixels are too many"
    # "I" is 32-bit, except that Pillow reads a 16-bit PGM into it, scaled to 0..65535.
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
        return f"its pixels ({image.mode}, not 8 or 16 bits) have no defined range"
    return "" if image.mode in _MODES else f"its colours ({image.mode}) are not supported"


def several(image: Image.Image) -> Noticed:
    """Tell whether the header names more than one image; a GIF has no such header."""
    if image.format in ("PNG", "WEBP") and getattr(image, "is_animated", False):
        return Noticed.FIRST_FRAME
    if image.format == "TIFF" and getattr(image, "is_animated", False):
        return Noticed.FIRST_PAGE
    return Noticed(0)


def has_second_frame(image: Image.Image) -> bool:
    """Look for a second frame of a GIF, after its pixels are read: it moves the reader."""
    try:
        return bool(getattr(image, "is_animated", False))
    except (OSError, *DAMAGED):
        return False  # what follows the first frame is damaged, and not used


def exif_orientation(getexif: Callable[[], Image.Exif]) -> int:
    """Return 1..8; 1, upright, also where the EXIF is damaged, as other readers do."""
    try:
        orientation = getexif().get(ExifTags.Base.Orientation, 1)
    except (OSError, *DAMAGED):
        return 1
    return orientation if orientation in _TURNS else 1


def convert(image: Image.Image) -> tuple[Image.Image, Noticed]:
    """Return the opened image upright in 8-bit RGB, and what that took."""
    raw, noticed = _raw_mode(image)
    turned = _tiff_tag(image, ExifTags.Base.Orientation)
    image.load()
    if image.mode in _GREY or raw.startswith("LA"):
        noticed |= Noticed.GREY
    if image.mode == "CMYK":
        noticed |= Noticed.CMYK
    # After the pixels: a PNG may have its EXIF behind them, and Pillow turns a TIFF with them.
    if exif_orientation(image.getexif) != 1:
        ImageOps.exif_transpose(image, in_place=True)
        noticed |= Noticed.TURNED
    elif turned in _TURNS:
        noticed |= Noticed.TURNED
    if image.mode in _DEEP_MODES:
        return _shallow(image, raw), noticed
    if image.has_transparency_data:
        rgb, transparent = _on_white(image, bool(noticed & Noticed.DEEP))
        return rgb, noticed | transparent
    return _rgb(image), noticed


def _raw_mode(image: Image.Image) -> tuple[str, Noticed]:
    """Return how the pixels lie in the file, in Pillow's words, and whether they are deep."""
    tiles = getattr(image, "tile", [])
    arguments = tiles[0].args if tiles else ""
    raw = arguments if isinstance(arguments, str) else str(arguments[0] if arguments else "")
    deep = ";16" in raw or ";12" in raw
    if image.format == "PPM" and not isinstance(arguments, str):
        deep = arguments[1] > 255
    return raw, Noticed.DEEP if deep else Noticed(0)


def _rgb(image: Image.Image) -> Image.Image:
    """Return `image` as RGB; as it is where it is RGB, for `Image.convert` would copy it."""
    return image if image.mode == "RGB" else image.convert("RGB")


def _tiff_tag(image: Image.Image, tag: int) -> int:
    """Return an entry of a TIFF's header; 1, which is the default of both, where there is none."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return 1
    value = image.tag_v2.get(tag, 1)
    return value if isinstance(value, int) else 1


def _shallow(image: Image.Image, raw: str) -> Image.Image:
    """Scale grey of 12 or 16 bits to 8; Pillow alone would clip it."""
    top = 4095 if raw.startswith("I;12") else 65535
    table = ((np.arange(65536).clip(max=top) * 255 + top // 2) // top).astype(np.uint8)
    if _tiff_tag(image, _PHOTOMETRIC) == _WHITE_IS_ZERO:
        table = 255 - table
    if (transparent := image.info.get("transparency")) is not None:
        table[transparent] = 255
    return _by_strips(
        image, lambda strip: Image.fromarray(table[np.asarray(strip)]).convert("RGB")
    )


def _by_strips(image: Image.Image, paint: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Return RGB of what `paint` makes of `image`, from top to bottom; it knows single pixels."""
    width, height = image.size
    rows = max(1, STRIP // width)
    if rows >= height:
        return paint(image)
    whole = Image.new("RGB", image.size)
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(top + rows, height)))
        whole.paste(paint(strip), (0, top))
    return whole


def _on_white(image: Image.Image, deep: bool) -> tuple[Image.Image, Noticed]:
    """Lay an image with transparency on white; Pillow alone would drop it."""
    colour = image.info.get("transparency")
    if deep and isinstance(colour, tuple):
        # The one transparent colour is given in 16 bits, and Pillow has kept 8 of each pixel.
        image.info["transparency"] = tuple(value >> 8 for value in colour)
    noticed = Noticed(0)

    def paint(strip: Image.Image) -> Image.Image:
        nonlocal noticed
        layer = strip if strip.mode == "RGBA" else strip.convert("RGBA")
        if layer.getchannel("A").getextrema()[0] == 255:
            return layer.convert("RGB")
        noticed = Noticed.ALPHA
        white = Image.new("RGBA", layer.size, "white")
        white.alpha_composite(layer)
        return white.convert("RGB")

    return _by_strips(image, paint), noticed
