from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from autoft.data import doctor
from autoft.data.cache.files import machine_errors, write_json_atomic
from autoft.data.catalog import make_catalog
from autoft.data.dataset import default_image_size, name_images, read_images
from autoft.data.duplicates import (
    NearDuplicates,
    contradicted,
    first_of_row,
    join_groups,
    near_duplicates,
    perceptual_hashes,
)
from autoft.data.pixels.examine import examine
from autoft.data.pixels.scans import scan_path
from autoft.data.reading import NO_GROUP, Excluded, Reading
from autoft.errors import DataError, MachineError

RNG = np.random.default_rng(0)


def paint(path, size=(24, 20)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)


def dataset(root, *folders, count=3):
    for folder in folders:
        for number in range(count):
            paint(root / folder / f"{number}.png")
    return root


def read(root, **reading):
    calls = []
    how = Reading(**reading)
    listing = name_images(str(root), how, lambda *call: calls.append(call))
    result = read_images(listing, how, 64, lambda *call: calls.append(call))
    return result, calls


def catalog_of(root, **reading):
    return read(root, **reading)[0].catalog


def test_columns_follow_the_paths_and_the_store_holds_the_pixels(tmp_path):
    dataset(tmp_path / "data", "dog", "cat/deep/er")
    result, calls = read(tmp_path / "data")
    catalog = result.catalog
    assert catalog.classes == ("cat", "dog")
    assert [catalog.label_of(index) for index in range(6)] == ["cat"] * 3 + ["dog"] * 3
    assert catalog.paths[0] == "cat/deep/er/0.png"
    assert sorted(catalog.rows) == list(range(6))
    assert calls[-1] == ("decoding", 6, 6)
    pixels = result.store.read(catalog.rows[:1])
    assert pixels.shape == (1, 73, 73, 3)
    shown = Image.open(tmp_path / "data" / catalog.paths[0])
    assert abs(pixels.mean() - np.asarray(shown)[:, 2:22].mean()) < 8


def test_identical_bytes_share_a_row_and_a_group(tmp_path):
    dataset(tmp_path, "cat", "dog")
    shutil.copy(tmp_path / "cat" / "1.png", tmp_path / "cat" / "copy.png")
    os.link(tmp_path / "dog" / "0.png", tmp_path / "dog" / "linked.png")
    catalog = catalog_of(tmp_path)
    known = doctor.report(catalog)
    assert known["duplicates"] == 2
    assert ["cat/copy.png", "cat/1.png"] in known["duplicate_files"]
    at = {path: index for index, path in enumerate(catalog.paths)}
    for one, other in (("cat/1.png", "cat/copy.png"), ("dog/0.png", "dog/linked.png")):
        assert catalog.rows[at[one]] == catalog.rows[at[other]]
        assert catalog.groups[at[one]] == catalog.groups[at[other]]
    assert len(np.unique(catalog.groups)) == 6


def test_a_conflict_in_a_given_test_part_leaves_it(tmp_path):
    dataset(tmp_path, "train/a", "train/b", "test/a", "test/b", count=20)
    shutil.copy(tmp_path / "test" / "a" / "0.png", tmp_path / "test" / "b" / "copy.png")
    catalog = catalog_of(tmp_path)
    assert [entry.path for entry in catalog.excluded] == ["test/a/0.png", "test/b/copy.png"]
    assert doctor.report(catalog)["left_out"] == 2
    assert doctor.report(catalog)["corrupt"] == 0


def test_the_fingerprint_follows_the_content_and_not_place_or_time(tmp_path):
    root = dataset(tmp_path / "data", "cat", "dog")
    first = catalog_of(root).fingerprint
    moved = root.rename(tmp_path / "moved")
    os.utime(moved / "cat" / "0.png", ns=(1, 1))
    assert catalog_of(moved).fingerprint == first
    paint(moved / "cat" / "0.png")
    assert catalog_of(moved).fingerprint != first


def test_a_label_changes_the_fingerprint(tmp_path):
    root = dataset(tmp_path / "data", "cat", "dog")
    first = catalog_of(root).fingerprint
    (root / "cat" / "0.png").rename(root / "dog" / "9.png")
    assert catalog_of(root).fingerprint != first


def test_a_report_is_json_whatever_the_names(tmp_path):
    root = dataset(tmp_path / "data", "cät", "dog", count=20)
    (root / "dog" / "bad.png").write_bytes(b"")
    shutil.copy(root / "dog" / "0.png", os.fsencode(root / "dog") + b"/\xff.png")
    catalog = catalog_of(root)
    write_json_atomic(tmp_path / "catalog.json", doctor.report(catalog))
    data = json.loads((tmp_path / "catalog.json").read_text(encoding="ascii"))
    assert data["classes"] == {"cät": 20, "dog": 21}
    assert ["dog/\udcff.png", "dog/0.png"] in [
        sorted(pair)[::-1] for pair in data["duplicate_files"]
    ]
    assert doctor.headline(data) == (
        "42 found, 0 missing, 1 corrupt, 1 duplicates, 2 classes, imbalance 1.1"
    )
    assert catalog.excluded[0].path == "dog/bad.png"
    assert isinstance(catalog.excluded[0], Excluded)


def test_two_classes_must_be_left(tmp_path):
    dataset(tmp_path / "data", "cat", count=40)
    (tmp_path / "data" / "dog").mkdir()
    (tmp_path / "data" / "dog" / "bad.png").write_bytes(b"x")
    with pytest.raises(DataError, match="one class with images, 'cat'"):
        catalog_of(tmp_path / "data")


@pytest.mark.parametrize(
    ("short_side", "size"), [(8, 64), (32, 64), (56, 64), (100, 128), (160, 192), (500, 224)]
)
def test_small_images_are_not_blown_up(short_side, size):
    assert default_image_size(short_side) == size


@given(
    st.lists(
        st.tuples(st.integers(0, 8), st.integers(0, 3), st.integers(-1, 5)),
        min_size=1,
        max_size=60,
    )
)
def test_groups_are_the_connected_images(images):
    rows, parts, named = (np.array(column) for column in zip(*images, strict=True))
    groups = join_groups(rows, parts.astype(np.int8), named)
    expected = list(range(len(images)))

    def tied(i, j):
        part = max(images[i][1], 1), max(images[j][1], 1)  # in no part is as good as in train
        same_file = images[i][0] == images[j][0] and part[0] == part[1]
        return same_file or (images[i][2] != NO_GROUP and images[i][2] == images[j][2])

    for _ in images:  # the slow way: pull every pair of tied images together until nothing moves
        for i in range(len(images)):
            for j in range(i):
                if tied(i, j):
                    expected[i] = expected[j] = min(expected[i], expected[j])
    same = np.equal.outer(groups, groups)
    assert np.array_equal(same, np.equal.outer(expected, expected))
    assert groups[0] == 0
    assert set(groups) == set(range(groups.max() + 1))


def test_contradictions_and_copies_are_found_by_row():
    rows = np.array([3, 1, 3, 2, 1])
    assert contradicted(rows, np.array([0, 1, 1, 0, 1])).tolist() == [
        True,
        False,
        True,
        False,
        False,
    ]
    assert first_of_row(rows).tolist() == [0, 1, 0, 3, 1]


class Held:
    """Decoded images in memory."""

    def __init__(self, *images):
        self.pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
        self.rows = len(images)

    def read(self, rows):
        return self.pixels[rows]


@pytest.mark.parametrize("side", [24, 100])
def test_the_perceptual_hash_survives_encoding_and_tells_images_apart(side):
    def waves(seed):
        rng = np.random.default_rng(seed)
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        return coarse.resize((side, side), Image.Resampling.BICUBIC)

    originals = [waves(seed) for seed in range(12)]
    changed = [image.resize((77, 77)).resize((side, side)) for image in originals]
    hashes = perceptual_hashes(Held(*originals, *changed))
    near = near_duplicates(hashes, 6)
    assert {(a, b) for a, b, _ in near.pairs} == {(index, index + 12) for index in range(12)}
    assert (near.count, near.leader.tolist()) == (12, [*range(12), *range(12)])
    none = near_duplicates(hashes[:12], 6)
    assert (none.pairs, none.count, none.leader.tolist()) == ((), 0, list(range(12)))


def test_waiting_for_another_command_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("autoft.data.pixels.scans.PATIENCE", 0.01)
    listing = name_images(
        str(dataset(tmp_path, "cat", "dog", count=20)), Reading(), lambda *call: None
    )
    path = scan_path(listing)
    path.parent.mkdir(parents=True, exist_ok=True)
    calls = []
    with ThreadPoolExecutor(1) as elsewhere:
        other = FileLock(path.with_name(f".{path.name}.lock"), thread_local=False)
        elsewhere.submit(other.acquire).result()

        def progress(*call):
            calls.append(call)
            if call[0].startswith("waiting"):
                elsewhere.submit(other.release).result()

        read_images(listing, Reading(), 32, progress)
    assert calls[0] == ("waiting for another command that decodes the same images", 0, 0)


def test_flat_images_hash_alike_whatever_their_brightness():
    flat = [Image.new("RGB", (50, 50), (grey,) * 3) for grey in (0, 1, 90, 171, 255)]
    assert len(set(perceptual_hashes(Held(*flat)).tolist())) == 1


def test_near_duplicates_are_those_of_every_pair(monkeypatch):
    rng = np.random.default_rng(5)
    hashes = rng.integers(0, 2**64, 30, np.uint64)[rng.integers(0, 30, 200)]
    hashes ^= np.uint64(1) << rng.integers(0, 64, 200, np.uint64)
    expected = [
        (a, b, apart)
        for a in range(200)
        for b in range(a + 1, 200)
        if (apart := int(np.bitwise_count(hashes[a] ^ hashes[b]))) <= 2
    ]
    leader = list(range(200))
    for a, b, _ in expected:
        low, high = sorted((leader[a], leader[b]))
        leader = [low if one == high else one for one in leader]
    for block in (1, 8 * 200 * 7, 10**8):
        monkeypatch.setattr("autoft.data.duplicates.BLOCK_BYTES", block)
        near = near_duplicates(hashes, 2)
        assert list(near.pairs) == expected[:1000]
        assert near.count == len(expected)
        assert near.leader.tolist() == leader


def test_chains_that_meet_late_are_one():
    # 0, 1, 3, 7, ...: each looks like the next; listed so that sets join sets.
    chain = np.array([(1 << bits) - 1 for bits in (0, 3, 1, 4, 2, 5)], np.uint64)
    assert near_duplicates(chain, 1).leader.tolist() == [0] * 6


def test_many_look_alikes_take_little_memory():
    hashes = np.zeros(4000, np.uint64)
    tracemalloc.start()
    near = near_duplicates(hashes, 6)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (near.count, len(near.pairs)) == (4000 * 3999 // 2, 1000)
    assert not near.leader.any()
    assert peak < 64_000_000


def test_the_report_counts_all_look_alikes_and_names_some(tmp_path):
    dataset(tmp_path, "cat", "dog", count=20)
    catalog = catalog_of(tmp_path)
    leader = np.zeros(len(catalog), np.int64)
    near = NearDuplicates(leader, ((0, 1, 3),), 780)
    assert catalog.near_count == doctor.report(catalog)["near_duplicates"] == 0
    listing = name_images(str(tmp_path), Reading(), lambda *call: None)
    examined, _ = examine(listing, 32)
    known = make_catalog(listing, examined, Reading(), near)
    report = doctor.report(known)
    assert report["near_duplicates"] == 780
    assert report["near_duplicate_files"] == [["cat/1.png", "cat/0.png", 3]]
    assert len(np.unique(known.groups)) == 1


def test_json_is_whole_or_old_and_has_no_nan(tmp_path):
    path = tmp_path / "folder" / "x.json"
    write_json_atomic(path, {"score": float("nan"), "name": "é", "list": (1, float("inf"))})
    assert json.loads(path.read_text()) == {"score": None, "name": "é", "list": [1, None]}
    with pytest.raises(TypeError):
        write_json_atomic(path, {"x": object()})
    assert json.loads(path.read_text())["name"] == "é"
    (path.parent / "taken").mkdir()
    with pytest.raises(MachineError, match="could not be written"):
        write_json_atomic(path.parent / "taken", {})
    assert {file.name for file in path.parent.iterdir()} == {"x.json", "taken"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_a_full_disk_names_the_partition(tmp_path):
    match = r"the partition '/.*' is full"
    with pytest.raises(MachineError, match=match), machine_errors(tmp_path / "x"):
        Path("/dev/full").write_bytes(b"x")
