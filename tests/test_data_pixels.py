from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL
import psutil
import pytest

from autoft.data.cache.entries import building, clear
from autoft.data.cache.files import cache_root
from autoft.data.pixels.store import (
    PixelStore,
    Store,
    StoreWriter,
    checksum,
    find_store,
    store_key,
)
from autoft.errors import MachineError

ROWS, SIDE = 50, 16


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOFT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache" / "autoft"


IMAGES = np.random.default_rng(0).integers(0, 256, (ROWS, SIDE, SIDE, 3), dtype=np.uint8)
DIGESTS = np.stack(
    [np.frombuffer(hashlib.sha256(image.tobytes()).digest(), np.uint8) for image in IMAGES]
)
KEY = store_key(DIGESTS, SIDE, "bilinear")


def build(images=IMAGES, key=KEY):
    with building("pixels") as folder, StoreWriter(folder, len(images), SIDE) as writer:
        for image in images:
            writer.add(image, checksum(image))
        return writer.publish(key)


def found():
    return find_store(KEY, ROWS, SIDE)


def every(store):
    return store.read(np.arange(store.rows))


def test_rows_are_what_was_written_in_any_order():
    store: Store = build()
    assert (store.rows, store.resize, store.key) == (ROWS, SIDE, KEY)
    np.testing.assert_array_equal(every(store), IMAGES)
    rows = np.array([7, 0, 7, 49])
    np.testing.assert_array_equal(store.read(rows), IMAGES[rows])
    assert store.read(rows[:0]).shape == (0, SIDE, SIDE, 3)
    store.read(rows)[:] = 0  # a copy
    np.testing.assert_array_equal(store.read(rows), IMAGES[rows])


@pytest.mark.parametrize("rows", [[-1], [0, ROWS]])
def test_a_row_that_there_is_not_is_an_error(rows):
    with pytest.raises(IndexError, match="a store of 50"):
        build().read(np.array(rows))


def test_a_whole_store_is_found_again():
    assert found() is None
    store = build()
    assert found() == store
    assert Path(store.path).is_relative_to(cache_root())
    assert find_store(store_key(DIGESTS, 8, "bilinear"), ROWS, 8) is None


def test_keys_name_the_content():
    other = DIGESTS.copy()
    other[3, 3] ^= 1
    keys = [
        KEY,
        store_key(DIGESTS, 8, "bilinear"),
        store_key(DIGESTS, SIDE, "bicubic"),
        store_key(DIGESTS[::-1], SIDE, "bilinear"),
        store_key(other, SIDE, "bilinear"),
    ]
    assert len(set(keys)) == len(keys)
    assert store_key(DIGESTS.copy(), SIDE, "bilinear") == KEY


def test_another_pillow_has_other_keys(monkeypatch):
    monkeypatch.setattr(PIL, "__version__", "0.1")
    assert store_key(DIGESTS, SIDE, "bilinear") != KEY


def test_a_store_that_another_process_has_published_is_kept():
    store = build()
    inode = Path(store.path).stat().st_ino
    assert build() == store
    assert Path(store.path).stat().st_ino == inode
    flip(store)
    assert build() == store
    np.testing.assert_array_equal(every(found()), IMAGES)


def test_only_the_path_is_pickled():
    store = build()
    every(store)  # opened
    pickled = pickle.dumps(store)
    assert len(pickled) < 500
    np.testing.assert_array_equal(every(pickle.loads(pickled)), IMAGES)


def flip(store):
    with Path(store.path).open("r+b") as file:
        file.seek(20 * SIDE * SIDE * 3 + 5)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))


def truncate(store):
    os.truncate(store.path, 1000)


def flip_sums(store):
    with Path(store.path).with_name("sums.u64").open("r+b") as file:
        file.seek(20 * 8)
        file.write(b"\0\0\0")


def shorten_sums(store):
    os.truncate(Path(store.path).with_name("sums.u64"), 8)


@pytest.mark.parametrize("damage", [flip, truncate, flip_sums, shorten_sums])
def test_damage_is_seen_when_a_row_is_first_read_and_heals(damage):
    store = build()
    damage(store)
    assert store.read(np.array([0])).shape == (1, SIDE, SIDE, 3)  # as yet unharmed
    with pytest.raises(MachineError, match=r"damaged \(.*set aside; repeat the command"):
        store.read(np.array([20]))
    assert found() is None
    np.testing.assert_array_equal(every(build()), IMAGES)
    np.testing.assert_array_equal(every(found()), IMAGES)


def unfinish(store):
    Path(store.path).with_name("store.json").unlink()


def tear(store):
    path = Path(store.path).with_name("store.json")
    path.write_bytes(path.read_bytes()[:20])


def age(store):
    path = Path(store.path).with_name("store.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 1}))


def lose_the_pixels(store):
    Path(store.path).unlink()


@pytest.mark.parametrize(
    "damage", [flip, truncate, flip_sums, shorten_sums, unfinish, tear, age, lose_the_pixels]
)
def test_damage_is_found_when_a_small_store_is_opened(damage):
    damage(build())
    assert found() is None


def test_a_row_is_proven_once_a_process():
    store = build()
    store.read(np.array([20]))
    flip(store)
    assert store.read(np.array([20])).shape == (1, SIDE, SIDE, 3)
    with pytest.raises(MachineError):
        pickle.loads(pickle.dumps(store)).read(np.array([20]))


def test_a_file_cut_short_under_its_reader_is_an_error_and_not_the_end_of_the_process():
    store = build()
    every(store)
    truncate(store)
    with pytest.raises(MachineError, match="it ends before row 1"):
        every(store)


def test_a_store_that_has_gone_is_an_error():
    store = build()
    Path(store.path).unlink()
    with pytest.raises(MachineError, match=r"No such file.*repeat the command"):
        every(store)


READ = """
import pickle, sys
from pathlib import Path
import numpy as np
import psutil
from autoft.data.pixels.store import find_store
store = pickle.loads(bytes.fromhex(sys.argv[1]))
store.read(np.arange(1))
before = psutil.Process().memory_full_info().uss
total = sum(int(store.read(np.array([row])).sum()) for row in range(store.rows))
print(total, psutil.Process().memory_full_info().uss - before, flush=True)
sys.stdin.read()
"""


def reader(store):
    return subprocess.Popen(
        [sys.executable, "-c", READ, pickle.dumps(store).hex()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_second_reader_adds_next_to_no_memory():
    images = np.broadcast_to(IMAGES[None], (200, *IMAGES.shape)).reshape(-1, SIDE, SIDE, 3)
    store = build(images)
    every(store)
    process = reader(store)
    total, added = map(int, process.communicate()[0].split())
    assert total == int(images.sum(dtype=np.int64))
    assert added < 0.05 * images.nbytes  # 384 kB, of which most is what Python itself takes


def test_a_store_in_use_by_another_process_is_not_cleared():
    store = build()
    process = reader(store)
    process.stdout.readline()
    code = (
        "import autoft.data.cache.entries as e; print(len(e.clear().kept), len(e.clear().removed))"
    )
    command = [sys.executable, "-c", code]
    other = subprocess.run(command, capture_output=True, text=True, check=True)
    assert other.stdout.split() == ["1", "0"]
    process.communicate()


def test_the_file_is_closed_with_its_store():
    store = build()
    process = psutil.Process()
    before = process.num_fds()
    fresh = pickle.loads(pickle.dumps(store))
    every(fresh)
    del fresh
    assert process.num_fds() <= before


KILLED = """
import os, signal, sys
import numpy as np
from autoft.data.cache.entries import building
from autoft.data.pixels.store import StoreWriter, checksum
images = np.load(sys.argv[1])
with building("pixels") as folder, StoreWriter(folder, len(images), images.shape[1]) as writer:
    for number, image in enumerate(images):
        if number == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        writer.add(image, checksum(image))
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("after", [0, 20, ROWS])
def test_a_process_killed_while_it_writes_leaves_nothing_that_is_taken_for_whole(
    tmp_path, cache, after
):
    np.save(tmp_path / "images.npy", IMAGES)
    command = [sys.executable, "-c", KILLED, str(tmp_path / "images.npy"), str(after)]
    assert subprocess.run(command, check=False).returncode == -9
    assert len(list((cache / "pixels").glob(".building-*"))) == 1
    assert found() is None
    clear()  # sweeps
    assert list((cache / "pixels").iterdir()) == []
    build()
    np.testing.assert_array_equal(every(found()), IMAGES)


def test_the_size_to_come_is_seen_while_a_store_is_written(cache):
    with building("pixels") as folder, StoreWriter(folder, 1000, SIDE) as writer:
        assert (folder / "pixels.u8").stat().st_size == 1000 * SIDE * SIDE * 3
        writer.add(IMAGES[0], checksum(IMAGES[0]))
        store = writer.publish(KEY)
    assert Path(store.path).stat().st_size == SIDE * SIDE * 3
    assert store.rows == 1


def test_a_store_of_no_images_is_a_store():
    store = build(IMAGES[:0])
    assert find_store(KEY, 0, SIDE) == store
    assert store.read(np.arange(0)).shape == (0, SIDE, SIDE, 3)


@pytest.fixture
def tiny_disk(tmp_path):
    """A disk of 64 kB, mounted for one test."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a small disk cannot be mounted here ({error})")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_ends_the_writing_and_gives_back_what_was_taken(tiny_disk, monkeypatch):
    monkeypatch.setenv("AUTOFT_CACHE", str(tiny_disk / "cache"))
    with building("pixels") as folder, StoreWriter(folder, 2 * ROWS, SIDE) as writer:
        for image in [*IMAGES, *IMAGES]:
            writer.add(image, checksum(image))
        assert (folder / "pixels.u8").stat().st_size == 0
        assert writer.publish(KEY) is None
    assert find_store(KEY, 2 * ROWS, SIDE) is None


def test_a_store_is_a_value():
    assert PixelStore("a", 1, 2, "k") == PixelStore("a", 1, 2, "k")
