from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from autoft.data.cache import cache_root
from autoft.data.catalog import Excluded, read_catalog
from autoft.data.decode import decode, to_square
from autoft.data.pixels import open_store
from autoft.errors import MachineError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(50):
        path = tmp_path / "data" / "ab"[number % 2] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    return tmp_path / "data"


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def counting():
    calls = []
    return calls, lambda done, total: calls.append((done, total))


def test_a_row_is_the_decoded_square_of_its_item(root, cache):
    catalog = read_catalog(str(root))
    store, excluded = open_store(catalog, 16)
    assert excluded == ()
    assert Path(store.path).is_relative_to(cache)
    assert store.array.shape == (50, 16, 16, 3)
    for item in catalog.items[::7]:
        expected = to_square(decode(catalog.open(item)), 16)
        np.testing.assert_array_equal(store.array[item.row], expected)


def test_pixels_cannot_be_written(root):
    store, _ = open_store(read_catalog(str(root)), 16)
    with pytest.raises(ValueError, match="read-only"):
        store.array[0] = 0


def test_a_whole_store_is_reused_and_other_sizes_are_other_stores(root):
    catalog = read_catalog(str(root))
    first, _ = open_store(catalog, 16)
    made = Path(first.path).stat().st_mtime_ns
    calls, progress = counting()
    again, _ = open_store(read_catalog(str(root)), 16, progress=progress)
    assert again == first
    assert calls == []
    assert Path(first.path).stat().st_mtime_ns == made
    assert open_store(catalog, 8, progress=progress)[0].path != first.path
    assert open_store(catalog, 16, interpolation="bicubic")[0].path != first.path
    assert calls[-1] == (50, 50)


def test_a_changed_file_is_decoded_again(root):
    before, _ = open_store(read_catalog(str(root)), 16)
    Image.new("RGB", (30, 30), "red").save(root / "a" / "00.png")
    after, _ = open_store(read_catalog(str(root)), 16)
    assert (after.array[0] == (255, 0, 0)).all()
    assert not (before.array[0] == (255, 0, 0)).all()


def torn(store):
    with Path(store.path).open("r+b") as file:
        file.truncate(1000)


def unfinished(store):
    Path(store.path).with_name("store.json").unlink()


def torn_description(store):
    path = Path(store.path).with_name("store.json")
    path.write_bytes(path.read_bytes()[:20])


def zeroed(store):
    with Path(store.path).open("r+b") as file:
        file.write(bytes(16 * 16 * 3))


@pytest.mark.parametrize("damage", [torn, unfinished, torn_description, zeroed])
def test_a_damaged_store_is_built_again(root, damage):
    catalog = read_catalog(str(root))
    store, _ = open_store(catalog, 16)
    pixels = np.array(store.array)
    damage(store)
    calls, progress = counting()
    again, _ = open_store(catalog, 16, progress=progress)
    assert calls
    np.testing.assert_array_equal(again.array, pixels)


def test_truncated_images_are_excluded_and_rows_stay(root):
    cut_in_half(root / "a" / "04.png")
    catalog = read_catalog(str(root))
    for _ in range(2):  # built, then reused
        store, excluded = open_store(catalog, 16)
        assert [entry.path for entry in excluded] == ["a/04.png"]
        assert isinstance(excluded[0], Excluded)
        assert "damaged" in excluded[0].reason
    less = catalog.without(excluded)
    assert len(less.items) == 49
    assert not store.array[2].any()
    for item in less.items[::5]:
        expected = to_square(decode(less.open(item)), 16)
        np.testing.assert_array_equal(store.array[item.row], expected)
        np.testing.assert_array_equal(open_store(less, 16)[0].array[item.row], expected)


def test_too_little_disk_is_said_before_starting(root):
    calls, progress = counting()
    with pytest.raises(MachineError, match=r"[\d,]{15,} bytes are needed.*free.*AUTOFT_CACHE"):
        open_store(read_catalog(str(root)), 1_000_000, progress=progress)
    assert calls == []


BUILD = """
import sys
from autoft.data.catalog import read_catalog
from autoft.data.pixels import open_store
calls = []
store, _ = open_store(read_catalog(sys.argv[1]), 512, progress=lambda *call: calls.append(call))
print("built" if calls else "reused", store.array.sum())
"""


def test_two_processes_build_once(root):
    command = [sys.executable, "-c", BUILD, str(root)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    results = sorted(process.communicate()[0].split() for process in both)
    assert [verb for verb, _ in results] == ["built", "reused"]
    assert results[0][1] == results[1][1]


def test_a_pickled_store_is_small_and_reads_the_same(root):
    store, _ = open_store(read_catalog(str(root)), 16)
    assert store.array.any()
    data = pickle.dumps(store)
    assert len(data) < 1000
    np.testing.assert_array_equal(pickle.loads(data).array, store.array)


def test_the_sample_is_stored_like_files():
    catalog = read_catalog("sample:digits")
    store, excluded = open_store(catalog, 32)
    assert (store.rows, excluded) == (1797, ())
    about = json.loads(Path(store.path).with_name("store.json").read_text())
    assert about["shape"] == [1797, 32, 32, 3]
    expected = to_square(decode(catalog.open(catalog.items[100])), 32)
    np.testing.assert_array_equal(store.array[100], expected)


def test_the_dataset_is_not_written_to(root, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in [root, *root.rglob("*")]}
    open_store(read_catalog(str(root)), 16)
    assert {path: path.stat().st_mtime_ns for path in [root, *root.rglob("*")]} == before
    assert cache_root() == tmp_path / "cache"
