"""Measure what decoding once is worth: views (goal P11), the scan, memory, and a second search.

    PYTHONPATH=benchmarks python benchmarks/speed/data.py [--dataset FOLDER]
        [--weights DIR] [--images N] [--json OUT]

Without a folder of photographs `--images` of them are generated: blotches with grain, in JPEG.

Two ways of one thing are run in turns, on one thread, so that a slow moment of the machine meets
both alike; the time is that of the CPU. Markdown tables go to stdout: medians of `ROUNDS` rounds
and, in brackets, the least and the most. The cache is a temporary one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import torch
from goals import Line, where, write_results
from PIL import Image
from torch.utils.data import default_collate
from torchvision import transforms
from torchvision.datasets.folder import pil_loader

from autoft.data.inputs.dispatch import list_dataset
from autoft.data.pixels.decode import to_square
from autoft.data.pixels.examine import examine
from autoft.data.pixels.store import Store
from autoft.data.reading import Listing, Reading
from autoft.data.views import evaluation_batches, training_batches
from autoft.values import IMAGENET_MEAN, IMAGENET_STD, Preprocess

ROUNDS = 7
BATCH = 32
CROPPED = "random resized crop, flip"
SIZE, RESIZE = 224, 256
PRE = Preprocess(SIZE, RESIZE)
PHOTOGRAPH, GRAIN = (320, 240), 4.0  # width and height, and how far grain lies from the mean
SEARCH_TIME = "20m"  # enough for both to do the same: one trial ends them long before

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Pair:
    """CPU milliseconds an image of two ways of one thing, a number a round."""

    name: str
    usual: list[float]
    ours: list[float]

    def ratios(self) -> list[float]:
        """Return how many times as fast ours was, by round."""
        return [usual / ours for usual, ours in zip(self.usual, self.ours, strict=True)]


def in_turns(name: str, images: int, usual: Callable[[], None], ours: Callable[[], None]) -> Pair:
    """Run both ways in turns; the first round, which fills caches, is left out."""
    pair = Pair(name, [], [])
    for number in range(ROUNDS + 1):
        for way, kept in ((usual, pair.usual), (ours, pair.ours)):
            began = time.process_time()
            way()
            if number:
                kept.append(1000 * (time.process_time() - began) / images)
    return pair


# --- what is measured ---------------------------------------------------------------------------


def compare_views(files: Sequence[Path], store: Store, rows: Rows) -> list[Pair]:
    """Compare batches from the store with ImageFolder's: decode, the same crop, normalise."""
    end = [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    flip = transforms.RandomHorizontalFlip()
    shorter = transforms.Resize(RESIZE)
    part = transforms.RandomResizedCrop(SIZE, scale=(0.5, 1.0))
    crops = {
        "random crop, flip": ([shorter, transforms.RandomCrop(SIZE), flip], "shift_flip"),
        CROPPED: ([part, flip], "crop_flip"),
        "centre crop (scoring)": ([shorter, transforms.CenterCrop(SIZE)], ""),
    }
    return [
        in_turns(
            name,
            len(files),
            partial(decode_each, files, transforms.Compose([*first, *end])),
            partial(read_views, store, rows, augment),
        )
        for name, (first, augment) in crops.items()
    ]


def decode_each(files: Sequence[Path], transform: Callable[[Image.Image], torch.Tensor]) -> None:
    """Do what a loader over torchvision's ImageFolder does in each epoch."""
    for start in range(0, len(files), BATCH):
        default_collate([transform(pil_loader(str(f))) for f in files[start : start + BATCH]])


def read_views(store: Store, rows: Rows, augment: str) -> None:
    """Run through one epoch of the store's views; without augmentation those that are scored."""
    if not augment:
        for _ in evaluation_batches(store, rows, PRE, BATCH):
            pass
        return
    for _ in training_batches(
        store,
        rows,
        np.zeros(len(rows), np.int64),
        PRE,
        num_classes=2,
        weights=np.ones(len(rows), np.float32),
        augment=augment,
        mix="none",
        batch_size=BATCH,
        seed=0,
        epoch=0,
    ):
        pass


def compare_scan(listing: Listing, cache: Path) -> list[Pair]:
    """Compare the one pass over new files with the least it can do: to decode, and to resize."""
    files = [Path(listing.root, path) for path in listing.paths]
    numbers = count()

    def decode() -> None:
        for file in files:
            with Image.open(file) as image:
                image.load()

    def decode_and_resize() -> None:
        for file in files:
            to_square(pil_loader(str(file)), RESIZE)

    def scan() -> None:
        os.environ["AUTOFT_CACHE"] = str(cache / f"scan-{next(numbers)}")
        examine(listing, RESIZE, workers=1)

    return [
        in_turns("decoding", len(files), decode, scan),
        in_turns("decoding and resizing", len(files), decode_and_resize, scan),
    ]


def memory_of_second_reader(store: Store) -> int:
    """Return the bytes that reading all of the store adds to a second process beside this one."""
    read_all(store)
    # A fresh process: a forked one would share this one's memory.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        added = pool.apply(memory_of_reading, (store,))
    store.read(np.zeros(1, np.int64))  # the first reader lived until here
    return int(added)


def memory_of_reading(store: Store) -> int:
    """Return the bytes that are this process's alone after reading every row, less before."""
    before = int(psutil.Process().memory_full_info().uss)
    read_all(store)
    return int(psutil.Process().memory_full_info().uss) - before


def read_all(store: Store) -> None:
    """Read every row, one by one, so that no batch of copies is counted as part of the store."""
    for row in range(store.rows):
        store.read(np.array([row]))


def time_second_search(dataset: str, weights: str, cache: Path) -> tuple[float, float]:
    """Search twice; return the seconds until the second had its pixels, and its first trial.

    They count from the moment at which the command reaches the data.
    """
    environment = {**os.environ, "AUTOFT_CACHE": str(cache / "searches")}
    command = [sys.executable, "-m", "autoft", "search", "--dataset", dataset]
    command += ["--weights", weights, "--offline", "--trials", "1", "--export", "onnx"]
    command += ["--time", SEARCH_TIME]
    for out in ("first", "second"):
        asked = [*command, "--out", str(cache / out)]
        subprocess.run(asked, check=True, env=environment, capture_output=True)
    at: dict[str, float] = {}
    for line in (cache / "second" / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        name = f"phase {event['name']}" if event["kind"] == "phase" else event["kind"]
        at.setdefault(name, event["at"])
    return at["scan"] - at["phase scan"], at["trial_start"] - at["phase scan"]


def goal(views: Sequence[Pair]) -> Line:
    """Return what P11 asks, and what was measured."""
    (pair,) = (each for each in views if each.name == CROPPED)
    what = (
        f"views from the store, {CROPPED}: {spread(pair.ours, 3)} ms an image, PIL "
        f"{spread(pair.usual, 3)} ms"
    )
    value = statistics.median(pair.usual) / statistics.median(pair.ours)
    return Line("P11", what, value, 3, 4.5)


# --- the command --------------------------------------------------------------------------------


def photographs(folder: Path, count: int) -> str:
    """Write images of the size of small photographs, of two classes, and return the folder."""
    rng = np.random.default_rng(0)
    for index in range(count):
        place = folder / str(index % 2)
        place.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(PHOTOGRAPH, Image.Resampling.BICUBIC), dtype=np.float32)
        grain = rng.normal(0, GRAIN, (*smooth.shape[:2], 1))
        pixels = np.clip(smooth + grain, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(place / f"{index}.jpg", quality=90)
    return str(folder)


def first_images(listing: Listing, limit: int) -> Listing:
    """Return at most `limit` images of the listing, evenly drawn over it."""
    chosen = np.unique(np.linspace(0, len(listing) - 1, limit).astype(np.int64))
    columns = ("labels", "parts", "groups", "weights", "stats", "lines")
    kept = {name: getattr(listing, name) for name in columns}
    return replace(
        listing,
        paths=tuple(listing.paths[index] for index in chosen),
        **{name: column[chosen] for name, column in kept.items() if column is not None},
    )


def spread(values: Sequence[float], digits: int) -> str:
    """Return the median and, in brackets, the least and the most."""
    middle = statistics.median(values)
    return f"{middle:.{digits}f} ({min(values):.{digits}f}..{max(values):.{digits}f})"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table with an empty line below."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"


def views_table(pairs: Sequence[Pair]) -> str:
    """Return the comparisons of views."""
    rows = (
        [p.name, spread(p.usual, 3), spread(p.ours, 3), rate(p.ours), spread(p.ratios(), 2)]
        for p in pairs
    )
    heads = ("CPU ms an image", "ImageFolder", "store", "images/s/core", "times as fast")
    return table(heads, rows)


def scan_table(pairs: Sequence[Pair]) -> str:
    """Return the comparisons of the scan."""
    rows = ([p.name, rate(p.usual), rate(p.ours), spread(p.ratios(), 2)] for p in pairs)
    heads = ("limit", "limit, images/s/core", "scan, images/s/core", "share of the limit")
    return table(heads, rows)


def rate(milliseconds: Sequence[float]) -> str:
    """Return the images a second at the median."""
    return f"{1000 / statistics.median(milliseconds):,.0f}"


def memory_sentence(store: Store, added: int) -> str:
    """Say what the second reader cost."""
    size = store.rows * store.resize**2 * 3
    return (
        f"A second reader added {added / 1e6:.2f} MB of memory to a store of {size / 1e6:.1f} MB: "
        f"{added / size:.2%} of it (goal: < 1 %).\n"
    )


def search_sentence(second: tuple[float, float] | None) -> str:
    """Say how soon the second search trained."""
    if second is None:
        return "A second search was not timed: it needs --weights.\n"
    return (
        f"A second search on the same data had its pixels {second[0]:.1f} s after the command "
        f"reached the data, and began its first trial after {second[1]:.1f} s (goal: < 5 s).\n"
    )


def main() -> None:
    """Measure, print the table, and write all numbers where asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--dataset", help="a folder of real photographs (default: generated ones)")
    parser.add_argument("--images", type=int, default=1000, help="how many of them at most")
    parser.add_argument("--weights", help="a folder of weights, for the second search")
    parser.add_argument("--json", type=Path, help="where to write every number")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        os.environ["AUTOFT_CACHE"] = folder
        dataset = asked.dataset or photographs(cache / "photographs", asked.images)
        listing = first_images(list_dataset(dataset, Reading()), asked.images)
        examined, store = examine(listing, RESIZE)
        usable = np.flatnonzero(examined.rows >= 0)
        files = [Path(listing.root, listing.paths[index]) for index in usable]
        views = compare_views(files, store, examined.rows[usable])
        added = memory_of_second_reader(store)
        scans = compare_scan(listing, cache)
        second = time_second_search(dataset, asked.weights, cache) if asked.weights else None
    sys.stdout.write(views_table(views) + scan_table(scans))
    sys.stdout.write(memory_sentence(store, added) + search_sentence(second))
    if asked.json:
        numbers: dict[str, Any] = {"added_bytes": added, "second_search_seconds": second}
        numbers |= {"views": list(map(asdict, views)), "scan": list(map(asdict, scans))}
        kind = "photographs" if asked.dataset else "generated images"
        about = f"{len(files)} {kind}, {ROUNDS} rounds in turns after one that warms up, "
        about += f"one thread; {where(load)}"
        write_results(asked.json, about, [goal(views)], **numbers)


if __name__ == "__main__":
    main()
