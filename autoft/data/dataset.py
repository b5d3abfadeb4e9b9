"""From a name to decoded images: list, choose a size, look at every file once, join the two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from autoft.data import duplicates, rules
from autoft.data.catalog import Catalog, make_catalog
from autoft.data.inputs.dispatch import list_dataset
from autoft.data.pixels.examine import examine, median_short_side
from autoft.data.pixels.store import Store
from autoft.data.reading import Listing, Reading

CROP: Final = 0.875  # the share of the resized square that the network sees, as timm's default
SMALLEST: Final = 64  # pixels: smaller images are enlarged to at least this
STEP: Final = 32  # image sizes are multiples of this
USUAL_SIZE: Final = 224

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is (0: unknown)."""


@dataclass(frozen=True)
class Dataset:
    """A dataset that has been read: what there is, and the pixels of it."""

    catalog: Catalog
    store: Store
    image_size: int


def name_images(dataset: str, reading: Reading, progress: Progress) -> Listing:
    """Find the images of `dataset` and their labels without opening one.

    Raises:
        AutoftError: it cannot be found or used; the sentence says what to do.
    """

    def tell(done: int, total: int) -> None:
        if done:
            progress("listing", done, total)

    listing = list_dataset(dataset, reading, tell)
    return rules.settle_names(listing, reading)


def read_images(
    listing: Listing, reading: Reading, image_size: int | None, progress: Progress
) -> Dataset:
    """Decode every file of `listing` once, into a store that later runs find again.

    Raises:
        DataError: the rules of `reading` refuse what was seen.
        MachineError: the cache cannot be written.
    """
    size = image_size or default_image_size(median_short_side(listing))
    examined, store = examine(
        listing,
        round(size / CROP),
        progress=lambda done, total: progress("decoding", done, total),
        waiting=lambda: progress("waiting for another command that decodes the same images", 0, 0),
    )
    near = None
    if reading.near_dup is not None:
        hashes = duplicates.perceptual_hashes(
            store, lambda done, total: progress("hashing", done, total)
        )
        near = duplicates.near_duplicates(
            hashes, reading.near_dup, lambda done, total: progress("comparing", done, total)
        )
    return Dataset(make_catalog(listing, examined, reading, near), store, size)


def default_image_size(short_side: int) -> int:
    """Return the usual size, or less where the images themselves are smaller."""
    enlarged = -(-int(short_side / CROP) // STEP) * STEP
    return min(USUAL_SIZE, max(SMALLEST, enlarged))
