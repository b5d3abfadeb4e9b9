"""Memory that a worker frees stays with it, where the C library can be told so."""

from __future__ import annotations

import subprocess
import sys

import pytest

from autoft.training import heap

PROGRAM = """
import resource, sys
import numpy as np
from autoft.training.heap import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def work():
    np.ones(64_000_000, np.uint8)  # asked for, touched and freed again

if sys.argv[1] == "kept" and not keep_freed_memory():
    sys.exit(3)
work()
before = faults()
for _ in range(20):
    work()
print(faults() - before)
"""


def page_faults(mode: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=False
    )
    if done.returncode == 3:
        pytest.skip("this C library cannot be told to keep what is freed")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_what_is_freed_is_not_asked_for_again() -> None:
    assert page_faults("kept") < page_faults("as usual") / 10


def test_another_c_library_is_left_as_it_is(monkeypatch) -> None:
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda _: object())
    assert heap.keep_freed_memory.__wrapped__() is False
