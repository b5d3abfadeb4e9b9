"""How a trial comes by what its frozen stages give: again in every step, or kept; pure arithmetic.

The cost model: an epoch of training runs the tail for every image, and beside it either makes a
view and runs the prefix, or reads what crosses the cut. What is kept is computed once for each
view. Costs are measured (`costs.py`), never derived from numbers of operations: those tell too
little for networks whose first stages wait for memory.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import psutil

from autoft.data.cache.entries import cache_limit, entries
from autoft.data.cache.files import cache_root, existing
from autoft.training.job import Costs, Mode, Sharing
from autoft.training.recipe import whole_epochs

FEWEST_VIEWS: Final = 4  # of an image that is augmented and kept ...
MOST_VIEWS: Final = 8
EPOCHS_A_VIEW: Final = 3  # ... else one for so many epochs
MUST_SAVE: Final = 0.05  # of the time of computing again
LEAST_SHARE: Final = 0.25  # of the forward pass before the cut: less saves little and keeps much
PLENTY: Final = 0.1  # of the room: what needs no more of it may be kept for less
BY_THE_WAY: Final = 0.1  # of what computing takes may writing take of all that is kept by the way
MAY_USE: Final = 0.5  # of what is free in memory and on the disk
MEMORY_BANDWIDTH: Final = 4e9  # bytes a second that are gathered from memory at the least
READ_BYTES: Final = 32_000_000  # of the test of reading


@dataclass(frozen=True)
class Room:
    """Bytes that may be used of main memory, the disk of the cache, and the device (0: none).

    `bandwidth` is how many bytes of what is stored are read in a second, as measured.
    """

    ram: int
    disk: int
    device: int
    bandwidth: float


@dataclass(frozen=True)
class Work:
    """What a trial has to do: its images and epochs, and what is done to the images.

    `kept` views are stored already. With `smaller` most epochs train on smaller images.
    `together` trials could take their steps together.
    """

    train: int
    validation: int
    epochs: int
    augmented: bool
    mixed: bool
    kept: int = 0
    smaller: bool = False
    together: int = 1


def views_for(costs: Costs, cut: int, work: Work) -> int:
    """Return how many views of each image are kept: more where an image is seen more often.

    Views that are seen again and again teach less than new ones do. But making them shall not
    take longer than the training does: behind a deep cut fewer views buy more epochs.
    """
    if not work.augmented:
        return 1
    wanted = min(MOST_VIEWS, max(FEWEST_VIEWS, math.ceil(work.epochs / EPOCHS_A_VIEW)))
    made = max(costs.view, costs.prefix[cut])
    afforded = int(work.epochs * costs.tail[cut] / made) if made > 0 else wanted
    return max(1, min(wanted, afforded))


def predict(costs: Costs, cut: int, work: Work, room: Room) -> Mapping[Mode, float]:
    """Return the seconds of a whole trial that freezes `cut` stages, by how it shares them.

    A way that is not possible is absent; to compute again always is there. Of trials that take
    their steps together it is what each adds.
    """
    again = costs.prefix[cut] + costs.tail[cut]
    again *= share_of_smaller(costs, work.epochs) if work.smaller else 1.0
    scored = costs.prefix[cut] + costs.score[cut]
    epoch = work.train * max(costs.view, again) + work.validation * scored
    found: dict[Mode, float] = {"rerun": work.epochs * epoch}
    if work.smaller or not cut or not costs.bytes[cut]:
        return found
    if work.together > 1:
        found["live"] = work.epochs * _live_epoch(costs, cut, work)
    if work.mixed:
        return found
    needed = bytes_kept(costs, cut, work)
    stored = max(0, needed - _there(costs, cut, work))
    if needed <= room.ram:
        found["ram"] = _made(costs, cut, work, kept=0) + _epochs(
            costs, cut, work, MEMORY_BANDWIDTH
        )
    if stored <= room.disk:
        made = _made(costs, cut, work, kept=work.kept)
        written = stored / room.bandwidth
        found["disk"] = made + written + _epochs(costs, cut, work, room.bandwidth)
        if needed <= room.device:
            loaded = needed / room.bandwidth
            found["device"] = made + written + loaded + _epochs(costs, cut, work, math.inf)
    return found


def share_of_smaller(costs: Costs, epochs: int) -> float:
    """Return the share of its time that training takes where the last epochs see images whole."""
    whole = whole_epochs(epochs) / epochs
    return (1 - whole) * costs.smaller + whole


def choose(costs: Costs, cut: int, work: Work, room: Room) -> Sharing:
    """Return the way that takes the least time; to compute again, unless another saves clearly."""
    found = {
        mode: seconds
        for mode, seconds in predict(costs, cut, work, room).items()
        if mode in ("rerun", "live") or _worth_keeping(costs, cut, work, room, mode)
    }
    mode = min(found, key=lambda each: (found[each], each != "rerun"))
    if mode == "ram" and found.get("disk", math.inf) <= (1 + MUST_SAVE) * found["ram"]:
        mode = "disk"  # where it serves later trials, too
    saves = 1 - found[mode] / found["rerun"] if found["rerun"] > 0 else 0.0
    if mode == "rerun" or saves < MUST_SAVE:
        return Sharing()
    return Sharing(mode, cut, 0 if mode == "live" else views_for(costs, cut, work))


def on_the_way(costs: Costs, cut: int, work: Work, room: Room, speed: float) -> tuple[int, ...]:
    """Return the earlier cuts to keep, ascending, when the first `cut` stages run for all views.

    Trials that freeze fewer stages find them there. They are those that such a trial would keep
    on the disk, as long as writing `speed` bytes a second hardly takes time beside computing and
    room is plenty.
    """
    found, left = list[int](), PLENTY * room.disk
    seconds_left = BY_THE_WAY * max(costs.prefix[cut], costs.view)  # for an image
    for earlier in range(cut - 1, 0, -1):
        size, written = bytes_kept(costs, earlier, work), costs.bytes[earlier] / speed
        wanted = choose(costs, earlier, work, room).mode in ("disk", "device")
        if wanted and written <= seconds_left and size <= left:
            found.insert(0, earlier)
            left, seconds_left = left - size, seconds_left - written
    return tuple(found)


def seconds(costs: Costs, cut: int, work: Work, room: Room) -> float:
    """Return the seconds of a whole trial in the way that is chosen for it."""
    return predict(costs, cut, work, room)[choose(costs, cut, work, room).mode]


def bytes_kept(costs: Costs, cut: int, work: Work) -> int:
    """Return the bytes of all views that the epochs of a trial need, and of the validation part.

    A view is made when an epoch first needs it.
    """
    return costs.bytes[cut] * (work.train * _views_used(costs, cut, work) + work.validation)


def _views_used(costs: Costs, cut: int, work: Work) -> int:
    return min(views_for(costs, cut, work), max(1, work.epochs))


def _there(costs: Costs, cut: int, work: Work) -> int:
    """Return the bytes of what is needed and is stored already."""
    kept = min(work.kept, _views_used(costs, cut, work))
    return costs.bytes[cut] * (work.train * kept + (work.validation if kept else 0))


def _made(costs: Costs, cut: int, work: Work, *, kept: int) -> float:
    """Return the seconds of running the prefix for all views but those `kept`."""
    views = max(0, _views_used(costs, cut, work) - kept)
    validation = 0 if kept else work.validation
    run = costs.prefix[cut]
    return views * work.train * max(costs.view, run) + validation * run


def _epochs(costs: Costs, cut: int, work: Work, bandwidth: float) -> float:
    """Return the seconds of all epochs behind the cut, read beside the computation."""
    read = costs.bytes[cut] / bandwidth
    trained = work.train * max(costs.tail[cut], read)
    scored = work.validation * max(costs.score[cut], read)
    return work.epochs * (trained + scored)


def reads_too_slowly(costs: Costs, cut: int, bandwidth: float) -> bool:
    """Tell whether at `bandwidth` a step on what is kept takes longer than computing it again."""
    again = max(costs.view, costs.prefix[cut] + costs.tail[cut])
    return costs.bytes[cut] / bandwidth > again


def _live_epoch(costs: Costs, cut: int, work: Work) -> float:
    """Return the seconds that each of several trials takes for an epoch, all in step."""
    run = costs.prefix[cut] / work.together
    trained = max(costs.view / work.together, run + costs.tail[cut])
    return work.train * trained + work.validation * (run + costs.score[cut])


def _worth_keeping(costs: Costs, cut: int, work: Work, room: Room, mode: Mode) -> bool:
    """Tell whether enough lies before the cut; a small share is kept only where room is plenty."""
    if costs.prefix[cut] >= LEAST_SHARE * costs.prefix[-1]:
        return True
    size = {"ram": room.ram, "disk": room.disk, "device": room.device}[mode]
    return bytes_kept(costs, cut, work) <= PLENTY * size


# --- what there is -------------------------------------------------------------------------------


def room_of(device: str) -> Room:
    """Measure what may be used: half of the free memory and disk, within the cache's limit."""
    return Room(
        ram=int(MAY_USE * free_memory()),
        disk=_free_disk(),
        device=_free_on(device),
        bandwidth=bandwidth(),
    )


def free_memory() -> int:
    """Return the bytes of main memory that can be taken: of the machine, and of a container."""
    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:
        most = int((group / "memory.max").read_text())
        return min(free, max(0, most - int((group / "memory.current").read_text())))
    except (OSError, ValueError):  # no container, or one without a limit, which says "max"
        return free


def _free_disk() -> int:
    """Return what may still be kept: what others hold of the cache does not make room."""
    free = shutil.disk_usage(existing(cache_root())).free
    held = sum(each.bytes for each in entries() if each.held)
    return int(MAY_USE * max(0, min(free, cache_limit() - held)))


def _free_on(device: str) -> int:
    if not device.startswith("cuda"):
        return 0
    import torch  # only workers have a device

    return int(MAY_USE * torch.cuda.mem_get_info(torch.device(device))[0])


@cache
def writing() -> float:
    """Return how many bytes a second are brought to the cache's disk; measured once in a process.

    A disk that only takes them into memory at first is asked to bring them down.
    """
    block = os.urandom(READ_BYTES // 4)
    try:
        with tempfile.TemporaryFile(dir=existing(cache_root())) as file:
            began = time.perf_counter()
            file.write(block)
            file.flush()
            os.fsync(file.fileno())
            return len(block) / max(time.perf_counter() - began, 1e-6)
    except OSError:  # a cache that cannot be written keeps nothing either
        return 1.0


@cache
def bandwidth() -> float:
    """Return how many bytes a second are read of what was just written to the cache's disk.

    They come from the system's page cache, as those of a trial do that was written by the same
    or a neighbouring process; rows are gathered from there no faster than from memory. Measured
    once in a process, in some 50 ms.
    """
    folder = existing(cache_root())
    block = os.urandom(READ_BYTES // 16)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            for _ in range(16):
                file.write(block)
            file.flush()
            took = []
            for _ in range(2):
                began = time.perf_counter()
                file.seek(0)
                while file.read(1 << 20):
                    pass
                took.append(time.perf_counter() - began)
    except OSError:  # a cache that cannot be written keeps nothing either
        return 1.0
    return min(MEMORY_BANDWIDTH, READ_BYTES / max(min(took), 1e-6))
