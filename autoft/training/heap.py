"""Freed memory stays with the process: the next step wants it again.

The C library of Linux gives large blocks back to the system as soon as they are freed, and every
batch of activations then is asked for anew, page by page, each cleared first. On two cores that
was about half of the time of a forward pass of MobileNetV2 with 64 images and of a step of
training on 32; about a tenth with ResNet-18 (docs/results/speed.md).
"""

from __future__ import annotations

import ctypes
import gc
from functools import cache
from typing import Final

import psutil

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # as malloc.h of glibc has them
MOST: Final = 2**31 - 1  # what an int holds: larger blocks go back as before
AHEAD: Final = 2**28  # bytes that are taken at once
SHARE: Final = 8  # of the memory an eighth at most is kept


@cache
def settle() -> None:
    """Have this process compute as workers do: freed memory is kept, and what is there by now too.

    What was imported stays for good: Python need not look at it again whenever it looks for
    garbage, which trials make and which is large.
    """
    keep_freed_memory()
    gc.collect()
    gc.freeze()


@cache
def keep_freed_memory() -> bool:
    """Have this process keep what it frees, up to 2 GiB; tell whether the C library can do so.

    Once in a process, by the thread that computes: others have heaps of their own.
    """
    kept = min(MOST, psutil.virtual_memory().total // SHARE)
    wanted = {M_MMAP_THRESHOLD: MOST, M_TRIM_THRESHOLD: kept, M_TOP_PAD: min(AHEAD, kept)}
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another system, or another C library
        return False
    return all(mallopt(name, value) == 1 for name, value in wanted.items())
