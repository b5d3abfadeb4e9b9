"""The one decoder of autoft: training, scoring, prediction and export read files only through it.

Pillow, not torchvision, because it can be held to an allow-list of formats and a pixel limit.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, TypeVar

import numpy as np
import numpy.typing as npt

# The plugins of FORMATS, imported so that Pillow never loads the rest (Ghostscript among them).
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from autoft.data.pixels.convert import (
    DAMAGED,
    EXTREME,
    MAX_PIXELS,
    SUFFIXES,
    convert,
    exif_orientation,
    has_second_frame,
    refusal,
    several,
)
from autoft.data.pixels.convert import NOTICED_WORDS as NOTICED_WORDS
from autoft.data.pixels.convert import Noticed as Noticed
from autoft.errors import DataError, UsageError, did_you_mean
from autoft.values import Preprocess

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Progress = Callable[[int, int], None]
_In = TypeVar("_In")
_Out = TypeVar("_Out")

IMAGE_SUFFIXES: Final = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
)
FORMATS: Final = tuple(
    plugin.format
    for plugin in (
        JpegImagePlugin.JpegImageFile,
        PngImagePlugin.PngImageFile,
        WebPImagePlugin.WebPImageFile,
        BmpImagePlugin.BmpImageFile,
        GifImagePlugin.GifImageFile,
        TiffImagePlugin.TiffImageFile,
        PpmImagePlugin.PpmImageFile,
    )
    if plugin.format
)
INTERPOLATIONS: Final = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
LARGE: Final = 10_000_000  # pixels above which images are decoded one at a time
_large = threading.Semaphore()
_SWAPPED: Final = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
_TOO_LARGE: Final = (Image.DecompressionBombError, Image.DecompressionBombWarning)


@dataclass(frozen=True, eq=False)
class Looked:
    """A whole image as RGB, its (width, height) in pixels, and what was noticed."""

    image: Image.Image
    noticed: Noticed

    @property
    def size(self) -> tuple[int, int]:
        """Return (width, height) in pixels after EXIF orientation."""
        return self.image.size


class BadImage(DataError):
    """A file that is no usable image; `reason` says why in a few words."""

    def __init__(self, name: str, reason: str) -> None:
        """Keep both as `args`, so that the exception can be pickled between processes."""
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        """Return the sentence for the user."""
        return (
            f"{self.name!r} cannot be used as an image: {self.reason}. Expected a whole "
            f"{', '.join(FORMATS)} file of at most {MAX_PIXELS:,} pixels; replace or remove it."
        )


def read_size(source: Path | BinaryIO) -> tuple[int, int]:
    """Return (width, height) in pixels after EXIF orientation, reading the header only.

    Raises:
        BadImage: the file is no image of an accepted format, or it has too many pixels.
    """
    with _opened(source) as image:
        # The base method: PngImageFile.getexif would decode the pixels to look behind them.
        orientation = exif_orientation(lambda: Image.Image.getexif(image))
        # Pillow has exchanged the sides of a TIFF already.
        swapped = orientation in _SWAPPED and image.format != "TIFF"
        width, height = image.size
    return (height, width) if swapped else (width, height)


def decode(source: Path | BinaryIO) -> Image.Image:
    """Return the whole image as RGB; the one conversion for every mode that a file may have.

    EXIF orientation is applied. Alpha, also of a palette or a transparent colour, is laid on
    white. Pixels of 12 or 16 bits are scaled to 8. Grey, palettes and CMYK (without a colour
    profile) become RGB as Pillow does it. Of an animation or a file with several pages the first
    is taken.

    Raises:
        BadImage: the file is no image, damaged, too large, or has float or 32-bit pixels.
    """
    with _opened(source) as image, _in_turn(image):
        return convert(image)[0]


def look(source: BinaryIO, suffix: str) -> Looked:
    """Return the image in `source` as `decode` gives it, and what was noticed.

    `suffix` is that of the file's name, such as ".jpg"; "" is never wrong.

    Raises:
        BadImage: as `decode`.
    """
    with _opened(source) as image, _in_turn(image):
        noticed = several(image)
        if suffix and suffix.lower() not in SUFFIXES[image.format or ""]:
            noticed |= Noticed.WRONG_SUFFIX
        converted, seen = convert(image)
        if max(converted.size) > EXTREME * min(converted.size):
            noticed |= Noticed.EXTREME
        if image.format == "GIF" and has_second_frame(image):
            noticed |= Noticed.FIRST_FRAME
    return Looked(converted, noticed | seen)


def check_interpolation(interpolation: str) -> None:
    """Refuse an unknown interpolation.

    Raises:
        UsageError: with the known ones.
    """
    if interpolation not in INTERPOLATIONS:
        raise UsageError(
            f"Unknown interpolation {interpolation!r}; expected one of "
            f"{', '.join(INTERPOLATIONS)}.{did_you_mean(interpolation, INTERPOLATIONS)}"
        )


def to_square(image: Image.Image, resize: int, interpolation: str = "bilinear") -> Pixels:
    """Return uint8 (resize, resize, 3): shorter side to `resize` (antialiased), centre square.

    Read-only: the array shares the bytes that Pillow gave.

    The square is cut while resizing: an image of 20,000 x 1 would otherwise grow to gigabytes.

    Raises:
        UsageError: `interpolation` is unknown.
    """
    check_interpolation(interpolation)
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    square = image.resize(
        (resize, resize), INTERPOLATIONS[interpolation], box=(left, top, left + side, top + side)
    )
    return np.asarray(square)


def centre_crop(pixels: Pixels, size: int) -> Pixels:
    """Return a view (..., size, size, 3) of the middle of `pixels` (..., R, R, 3).

    Raises:
        UsageError: `size` is larger than R.
    """
    side = pixels.shape[-2]
    if size > side:
        raise UsageError(
            f"Cannot crop {size} pixels from images stored at {side}; expected an image size "
            f"of at most {side}: store the images with resize >= {size}."
        )
    start = (side - size) // 2
    return pixels[..., start : start + size, start : start + size, :]


def normalise(pixels: Pixels, pre: Preprocess) -> Floats:
    """Return the network's input, float32 (N, 3, S, S) contiguous, of uint8 (N, R, R, 3).

    Raises:
        UsageError: `pre.image_size` is larger than R.
    """
    cropped = centre_crop(pixels, pre.image_size).transpose(0, 3, 1, 2)
    values = np.ascontiguousarray(cropped, dtype=np.float32)
    values /= np.float32(255)
    values -= np.array(pre.mean, np.float32).reshape(3, 1, 1)
    values /= np.array(pre.std, np.float32).reshape(3, 1, 1)
    return values


def in_threads(
    work: Callable[[_In], _Out],
    items: Sequence[_In],
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Iterator[_Out]:
    """Yield `work(item)` in order, computed by threads, since Pillow releases the GIL.

    At most 16 results a thread wait for the consumer, so memory stays bounded. `progress` is
    called with (done, total).
    """
    threads = workers or os.cpu_count() or 1
    ahead = 16 * threads
    remaining = iter(items)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="autoft-decode")
    waiting: deque[Future[_Out]] = deque()
    try:
        waiting.extend(pool.submit(work, item) for item in itertools.islice(remaining, ahead))
        for done in range(1, len(items) + 1):
            result = waiting.popleft().result()
            waiting.extend(pool.submit(work, item) for item in itertools.islice(remaining, 1))
            yield result
            if progress and (done % ahead == 0 or done == len(items)):
                progress(done, len(items))
    finally:  # also when the consumer stops early
        pool.shutdown(cancel_futures=True)


def _in_turn(image: Image.Image) -> contextlib.AbstractContextManager[object]:
    """Let the threads of a process decode one large image at a time, for the memory it takes."""
    return _large if image.width * image.height > LARGE else contextlib.nullcontext()


@contextlib.contextmanager
def _opened(source: Path | BinaryIO) -> Iterator[Image.Image]:
    """Open an image of an accepted format and size; what goes wrong inside becomes BadImage."""
    name = str(source) if isinstance(source, Path) else str(getattr(source, "name", "image"))
    try:
        with contextlib.ExitStack() as stack:
            # A stream, not a path: by a path's suffix Pillow would import other plugins.
            stream = source
            if isinstance(source, Path):
                stream = stack.enter_context(source.open("rb"))
            image = stack.enter_context(Image.open(stream, formats=FORMATS))
            if reason := refusal(image):
                raise BadImage(name, reason)
            yield image
    except BadImage:
        raise
    except _TOO_LARGE as error:
        raise BadImage(name, "too many pixels") from error
    except UnidentifiedImageError as error:
        raise BadImage(name, "no image of an accepted format") from error
    except OSError as error:
        # Pillow's own OSErrors, "image file is truncated" for one, have no errno.
        reason = f"cannot be read ({error.strerror})" if error.errno else f"damaged ({error})"
        raise BadImage(name, reason) from error
    except DAMAGED as error:
        raise BadImage(name, f"damaged ({error})") from error
