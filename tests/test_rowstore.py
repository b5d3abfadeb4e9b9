"""Rows that are kept: given back as they were written, or computed again; never a wrong number."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from autoft.data.cache.entries import entries
from autoft.data.cache.files import cache_root
from autoft.errors import MachineError
from autoft.network.build import build
from autoft.network.pooling import KINDS, Pooling
from autoft.training import kept
from autoft.training.features import pooled_features
from autoft.training.job import Precision, Setup
from autoft.training.kept import remembered
from autoft.training.rowstore import Damaged, Layout, drop_rows, find_rows, fits_half, writing

KIND, KEY = "features", "k" * 32
LAYOUT = Layout(((2, 3), (4,)), "float16")
ROWS = np.array([2, 3, 5, 9])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("AUTOFT_CACHE", str(tmp_path / "cache"))
    kept._checked.clear()
    return tmp_path / "cache" / "autoft"


def tensors(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return what belongs to `rows`: a function of their numbers."""
    first = rows[:, None, None] + np.arange(6).reshape(2, 3) / 8
    return first.astype(np.float32), -(rows[:, None] + np.arange(4) / 4).astype(np.float32)


def write(rows=ROWS, key=KEY, layout=LAYOUT) -> bool:
    with writing(KIND, key, rows, layout) as writer:
        writer.add(*tensors(rows[:1]))
        writer.add(*tensors(rows[1:]))
        return writer.publish()


def check(rows: np.ndarray) -> None:
    reader = find_rows(KIND, KEY)
    assert reader is not None
    for found, expected in zip(reader.read(rows), tensors(rows), strict=True):
        assert found.dtype == reader.layout.dtype
        np.testing.assert_array_equal(found.astype(np.float32), expected)


def entry() -> Path:
    (found,) = (cache_root() / KIND).glob(f"{KEY}-*")
    return found


def test_rows_come_back_in_any_order() -> None:
    assert find_rows(KIND, KEY) is None
    assert write()
    assert find_rows(KIND, KEY[:-1]) is None
    for asked in ([2, 3, 5, 9], [9, 2], [3, 5, 2, 3, 3], []):
        check(np.array(asked, np.int64))
    with pytest.raises(KeyError, match="4"):
        find_rows(KIND, KEY).read(np.array([3, 4]))


def test_chunks_of_one_key_are_read_as_one_and_in_the_wider_format() -> None:
    write()
    write(np.array([1, 4, 5, 10]))
    reader = find_rows(KIND, KEY)
    assert reader.rows.tolist() == [1, 2, 3, 4, 5, 9, 10]
    assert reader.layout.dtype == "float16"
    check(np.array([10, 1, 2, 3, 4, 5, 9]))
    write(np.array([7, 8]), layout=replace(LAYOUT, dtype="float32"))
    assert find_rows(KIND, KEY).layout.dtype == "float32"
    check(np.array([8, 1, 2, 7]))
    drop_rows(KIND, KEY)
    assert find_rows(KIND, KEY) is None


def test_a_writer_refuses_what_does_not_fit() -> None:
    for rows in ([], [2, 1], [1, 1]):
        with (
            pytest.raises(ValueError, match="ascending"),
            writing(KIND, KEY, np.array(rows, np.int64), LAYOUT),
        ):
            pass
    with writing(KIND, KEY, ROWS, LAYOUT) as writer:
        with pytest.raises(ValueError, match="shapes"):
            writer.add(tensors(ROWS)[0])
        writer.add(*tensors(ROWS[:2]))
        with pytest.raises(ValueError, match="2 of 4"):
            writer.publish()
    assert entries() == []
    assert not list((cache_root() / KIND).glob(".building*"))


@pytest.mark.parametrize(
    ("numbers", "fits"),
    [
        ([1.0, -2.0], True),
        ([65504.0], True),
        ([0.0], True),
        ([65519.0], False),
        ([70000.0, 1.0], False),
        ([np.inf, 1.0], True),
        ([1e-6, 1e-7], False),
        ([1.0, 1e-9], True),
    ],
)
def test_numbers_that_half_precision_holds(numbers, fits) -> None:
    assert fits_half(np.array(numbers, np.float32)) is fits


# --- faults -------------------------------------------------------------------------------------


def flipped(name: str, offset: int) -> None:
    path = entry() / name
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def described(**changes: object) -> None:
    path = entry() / "about.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def truncated(name: str) -> None:
    path = entry() / name
    os.truncate(path, path.stat().st_size - 2)


FAULTS = {
    "deleted": lambda: shutil.rmtree(entry()),
    "values truncated": lambda: truncated("values"),
    "rows truncated": lambda: truncated("rows.i64"),
    "sums truncated": lambda: truncated("sums.u64"),
    "description truncated": lambda: truncated("about.json"),
    "values gone": lambda: (entry() / "values").unlink(),
    "bit of a value": lambda: flipped("values", 3),
    "bit of the last value": lambda: flipped("values", -1),
    "bit of a sum": lambda: flipped("sums.u64", 9),
    "bit of a row": lambda: flipped("rows.i64", 8),
    "another version": lambda: described(version=0),
    "another key": lambda: described(key="other"),
    "another dtype": lambda: described(dtype="float32"),
    "a dtype that there is not": lambda: described(dtype="float64"),
    "other shapes": lambda: described(shapes=[[3, 2], [4]]),
    "no description": lambda: (entry() / "about.json").write_text("[]"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_damaged_is_set_aside_and_can_be_written_again(fault) -> None:
    write()
    write(np.array([20]), key="other")  # lets go of the first
    assert find_rows(KIND, KEY) is not None  # opened, read and closed
    FAULTS[fault]()
    assert find_rows(KIND, KEY) is None
    assert not list((cache_root() / KIND).glob(f"{KEY}-*"))
    assert write()
    check(ROWS)


@pytest.mark.parametrize("place", range(0, 200, 7))
def test_no_bit_of_the_description_is_believed_blindly(place) -> None:
    write()
    write(np.array([20]), key="other")
    flipped("about.json", place)
    if find_rows(KIND, KEY) is not None:
        check(ROWS)


def test_every_bit_of_the_values_counts() -> None:
    rows = np.arange(200)
    for place in (0, 1001, 2500, 3999):
        write(rows)
        write(np.array([20]), key="other")
        flipped("values", place)
        with contextlib.suppress(Damaged):
            if (reader := find_rows(KIND, KEY)) is not None:
                reader.read(rows)
                pytest.fail("a wrong number was read")
        del reader
        assert find_rows(KIND, KEY) is None


@pytest.mark.parametrize(
    ("fault", "survives"),
    [
        ("deleted", True),
        ("values gone", True),
        ("values truncated", False),
        ("bit of the last value", False),
        ("description truncated", True),
    ],
)
def test_faults_while_rows_are_open(fault, survives) -> None:
    rows = np.arange(100)
    write(rows)
    write(np.array([20]), key="other")
    reader = find_rows(KIND, KEY)
    last = reader.read(rows[-2:-1])[0]  # the row before the last is proven, the last is as well
    reader._chunks[0]._proven[-1] = False  # as a long chunk has it, of which few are proven
    FAULTS[fault]()
    assert np.array_equal(reader.read(rows[-2:-1])[0], last)
    if survives:
        assert np.array_equal(reader.read(rows[-1:])[0], tensors(rows[-1:])[0])
    else:
        with pytest.raises(Damaged):
            reader.read(rows[-1:])
        assert find_rows(KIND, KEY) is None
    assert write(rows)
    check(rows)


def test_no_room_is_told_and_leaves_nothing(monkeypatch) -> None:
    monkeypatch.setenv("AUTOFT_CACHE_LIMIT", "100")
    assert not write()
    assert find_rows(KIND, KEY) is None
    assert entries() == []


def test_rows_that_are_read_are_not_evicted_and_others_are(monkeypatch) -> None:
    write()
    reader = find_rows(KIND, KEY)
    write(np.array([20]), key="other")
    size = sum(each.bytes for each in entries())
    monkeypatch.setenv("AUTOFT_CACHE_LIMIT", str(size + 300))
    write(np.array([20, 21]), key="next")
    assert find_rows(KIND, KEY) is not None
    del reader
    assert find_rows(KIND, KEY + "x") is None  # nobody has the first open any more
    write(np.array([20, 21]), key="next2")
    write(np.array([20, 21]), key="next3")
    assert find_rows(KIND, KEY) is None


def child(code: str, **more: object) -> subprocess.Popen[str]:
    head = (
        "import os, signal, sys, resource\nimport numpy as np\n"
        "from autoft.training.rowstore import *\n"
        f"rows = np.arange(1000)\nlayout = Layout(((64,),), 'float32')\nkey = {KEY!r}\n"
        "values = rows[:, None] + np.arange(64, dtype=np.float32) / 64\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", head + code], stdout=subprocess.PIPE, text=True, **more
    )


KILLED = """
with writing("features", key, rows, layout) as writer:
    writer.add(values[:500])
    os.kill(os.getpid(), signal.SIGKILL)
"""
WRITE = """
with writing("features", key, rows, layout) as writer:
    print("open", flush=True)
    sys.stdin.read()
    writer.add(values)
    print(writer.publish())
found, = find_rows("features", key).read(rows[::-1])
assert np.array_equal(found, values[::-1])
"""
LIMITED = """
resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
with writing("features", key, rows, layout) as writer:
    writer.add(values)
    print(writer.publish())
assert find_rows("features", key) is None
"""


def test_a_writer_that_is_killed_leaves_nothing_to_be_believed() -> None:
    assert child(KILLED).wait() == -signal.SIGKILL
    assert find_rows(KIND, KEY) is None
    write()
    check(ROWS)
    assert not list((cache_root() / KIND).glob(".building*"))


def test_two_writers_of_the_same_rows_both_succeed() -> None:
    both = [child(WRITE, stdin=subprocess.PIPE) for _ in range(2)]
    for each in both:
        assert each.stdout.readline() == "open\n"
    for each in both:
        each.stdin.close()
    assert [each.stdout.read() for each in both] == ["True\n"] * 2
    assert [each.wait() for each in both] == [0, 0]
    assert len(list((cache_root() / KIND).glob(f"{KEY}-*"))) == 1


def test_a_file_that_may_not_grow_is_no_room() -> None:
    process = child(LIMITED.replace("LIMIT, LIMIT", "100_000, 100_000"))
    assert process.communicate()[0] == "False\n"
    assert process.returncode == 0
    assert entries() == []


@pytest.mark.parametrize("size", ["64k", "260k"])
def test_a_full_disk_is_no_room(size, tmp_path, monkeypatch) -> None:
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        monkeypatch.setenv("AUTOFT_CACHE", str(place))
        monkeypatch.setenv("AUTOFT_CACHE_LIMIT", "10MB")
        monkeypatch.setattr("autoft.training.rowstore.make_room", lambda needed: None)
        rows = np.arange(20_000)
        assert not write(rows)
        assert find_rows(KIND, KEY) is None
        assert sum(each.bytes for each in entries()) == 0
        assert write()
        check(ROWS)
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_cache_that_cannot_be_written_says_so(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AUTOFT_CACHE", str(tmp_path / "file"))
    assert find_rows(KIND, KEY) is None
    with pytest.raises(MachineError, match="could not be written"):
        write()


# --- features -----------------------------------------------------------------------------------


@pytest.fixture
def setup(photos, tiny_sources, setup_in, tmp_path) -> Setup:
    return setup_in(photos, tiny_sources, tmp_path)


class Counted:
    """A backbone with its poolings, and how many images went through it."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.backbone = build(setup.sources["test_resnet.fixed"])
        self.pools = {kind: Pooling(self.backbone, kind, 64) for kind in KINDS}
        self.images = 0
        self.backbone.module.register_forward_hook(self._count)

    def _count(self, module, inputs, output) -> None:
        if len(inputs[0]) > 2:  # not the noise by which a pooling looks at the network
            self.images += len(inputs[0])

    def __call__(self, kind: str, part) -> np.ndarray:
        pre = self.setup.preprocess(self.backbone)
        return pooled_features(self.pools[kind], self.setup, part, pre, Precision(), network="n")


def fresh(counted: Counted, kind: str, part) -> np.ndarray:
    from autoft.data.views import evaluation_batches

    counted.backbone.module.eval()
    pre = counted.setup.preprocess(counted.backbone)
    (images,) = evaluation_batches(counted.setup.store, part.rows, pre, len(part))
    with torch.no_grad():
        return counted.pools[kind](images).numpy()


def test_one_pass_serves_all_poolings(setup) -> None:
    counted, part = Counted(setup), setup.train
    found = {kind: counted(kind, part) for kind in KINDS}
    assert counted.images == len(part)
    for kind in KINDS:
        expected = fresh(counted, kind, part)
        bound = 2**-11 * np.abs(expected) + 1e-5 * np.abs(expected).max()
        assert (np.abs(found[kind] - expected) <= bound).all()
    hooks = sum(len(each._forward_hooks) for each in counted.backbone.module.modules())
    assert hooks == sum(
        len(each._forward_hooks) for each in Counted(setup).backbone.module.modules()
    )


def test_features_of_several_calls_compose(setup) -> None:
    counted, part = Counted(setup), setup.train
    first = counted("native", part.take(np.arange(0, len(part), 2)))
    whole = counted("gem", part), counted("native", part)
    assert counted.images == len(part)
    assert np.array_equal(whole[1][::2], first)


@pytest.mark.parametrize("kind", KINDS)
def test_kept_features_that_are_wrong_are_found_out(setup, kind) -> None:
    counted, part = Counted(setup), setup.validation
    found = counted(kind, part)
    folder = cache_root() / "features"
    for path in list(folder.iterdir()):
        key, _, rest = path.name.partition("-")
        if path.name.startswith(".") or len(key) != 32 or not rest:
            continue
        reader = find_rows("features", key)
        values = reader.read(reader.rows)
        rows, layout = reader.rows, reader.layout
        shutil.rmtree(path)
        with writing("features", key, rows, layout) as writer:
            writer.add(*(each + np.float16(1) for each in values))
            assert writer.publish()
    kept._checked.clear()  # as another process begins
    assert np.array_equal(counted(kind, part), found)
    assert np.array_equal(counted(kind, part), found)


def test_kept_features_that_are_right_are_looked_at_once(setup) -> None:
    counted, part = Counted(setup), setup.validation
    counted("native", part)
    kept._checked.clear()
    before = counted.images
    for _ in range(3):
        counted("native", part)
    assert counted.images == before + kept.SPOT
    few = part.take(np.arange(kept.SPOT))
    kept._checked.clear()
    counted("native", few)
    assert counted.images == before + kept.SPOT


def test_features_beyond_half_precision_stay_exact() -> None:
    large = np.array([[1e5, 1.0], [3.0, 4.0]], np.float32)

    def compute(rows: np.ndarray):
        yield {"k": large[rows]}

    for _ in range(2):
        assert np.array_equal(remembered("k", np.arange(2), compute), large)
    assert find_rows("features", "k").layout.dtype == "float32"
