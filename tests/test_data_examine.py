from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL
import pytest
from filelock import FileLock
from PIL import Image

from autoft.data.cache.files import cache_root
from autoft.data.cache.holding import release
from autoft.data.pixels.decode import Noticed, decode, to_square
from autoft.data.pixels.examine import examine, median_short_side
from autoft.data.pixels.ondemand import DecodedOnTheFly
from autoft.data.pixels.scans import distinct_files, scan_path
from autoft.data.pixels.store import PixelStore
from autoft.data.reading import Listing, file_stat
from autoft.errors import DataError, MachineError, UsageError

SIDE = 16


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOFT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache" / "autoft"


def listed(root, paths=None):
    """The listing of all files below `root`, or of `paths`; what it says beside is no matter."""
    if paths is None:
        paths = sorted(str(p.relative_to(root)) for p in root.rglob("*") if not p.is_dir())
    count = len(paths)
    stats = [file_stat((root / path).stat()) for path in paths]
    return Listing(
        name="data",
        root=str(root),
        paths=tuple(paths),
        label_names=("a",),
        labels=np.zeros(count, np.int32),
        parts=np.zeros(count, np.int8),
        groups=np.full(count, -1, np.int64),
        weights=np.ones(count, np.float32),
        stats=np.array(stats, np.int64).reshape(count, 4),
    )


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(40):
        pixels = rng.integers(0, 256, (20 + number, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return folder


class Calls:
    """What a progress function was told."""

    def __init__(self):
        self.made = []

    def __call__(self, done, total):
        self.made.append((done, total))


def looked_at(listing, resize=SIDE, **options):
    """Return what `examine` does, and how many files it looked at."""
    calls = Calls()
    examined, store = examine(listing, resize, progress=calls, **options)
    return examined, store, calls.made[-1][0] if calls.made else 0


def expected(root, path, resize=SIDE, interpolation="bilinear"):
    return to_square(decode(root / path), resize, interpolation)


def check(root, listing, examined, store):
    """Every usable image is its decoded square."""
    for path, row in zip(listing.paths, examined.rows, strict=True):
        if row >= 0:
            pixels = store.read(np.array([row]))[0]
            np.testing.assert_array_equal(pixels, expected(root, path, store.resize))


def test_every_file_is_hashed_measured_and_stored(root):
    listing = listed(root)
    examined, store, done = looked_at(listing)
    assert isinstance(store, PixelStore)
    assert (store.rows, store.resize, done) == (40, SIDE, 40)
    assert examined.rows.tolist() == list(range(40))
    assert examined.sizes.tolist() == [[24, 20 + number] for number in range(40)]
    assert dict(examined.reasons) == {}
    assert not examined.noticed.any()
    for path, digest in zip(listing.paths, examined.digests, strict=True):
        assert digest.tobytes() == hashlib.sha256((root / path).read_bytes()).digest()
    types = [getattr(examined, name).dtype for name in ("digests", "sizes", "noticed", "rows")]
    assert types == [np.uint8, np.int32, np.uint16, np.int64]
    check(root, listing, examined, store)


def test_a_second_look_reads_no_file(root):
    first, store, _ = looked_at(listed(root))
    hidden = root.with_name("hidden")
    listing = listed(root)
    root.rename(hidden)
    again, same, done = looked_at(listing)
    assert (same, done) == (store, 0)
    for name in ("digests", "sizes", "noticed", "rows"):
        np.testing.assert_array_equal(getattr(again, name), getattr(first, name))
    assert again.reasons == first.reasons


def test_a_use_of_a_scan_keeps_it_from_eviction(root):
    listing = listed(root)
    looked_at(listing)
    os.utime(scan_path(listing), (0, 0))
    looked_at(listing)
    assert scan_path(listing).stat().st_mtime > 0


def test_another_pillow_looks_again(root, monkeypatch):
    listing = listed(root)
    known = scan_path(listing)
    monkeypatch.setattr(PIL, "__version__", "0.1")
    assert scan_path(listing) != known


def test_a_cache_over_its_limit_shrinks_although_everything_is_found(root, monkeypatch):
    listing = listed(root)
    _, store, _ = looked_at(listing)
    other = cache_root() / "pixels" / "other"
    other.mkdir()
    (other / "file").write_bytes(bytes(30_000))
    folder = Path(store.path).parent
    release(folder)
    for used in (folder.with_name(f".{folder.name}.used"), scan_path(listing)):
        os.utime(used, (0, 0))  # what is needed now was used longest ago
    monkeypatch.setenv("AUTOFT_CACHE_LIMIT", "50kB")
    examined, same, done = looked_at(listing)
    assert (same, done, other.exists()) == (store, 0, False)
    check(root, listing, examined, same)
    assert scan_path(listing).exists()


def test_waiting_for_another_process_is_said_once(root, monkeypatch):
    monkeypatch.setattr("autoft.data.pixels.scans.PATIENCE", 0.01)
    path = scan_path(listed(root))
    path.parent.mkdir(parents=True)
    told = []
    with ThreadPoolExecutor(1) as elsewhere:
        other = FileLock(path.with_name(f".{path.name}.lock"), thread_local=False)
        elsewhere.submit(other.acquire).result()

        def waiting():
            told.append("waiting")
            elsewhere.submit(other.release).result()

        assert looked_at(listed(root), waiting=waiting)[2] == 40
        assert looked_at(listed(root), waiting=waiting)[2] == 0
    assert told == ["waiting"]


def test_other_sizes_and_interpolations_are_other_stores(root):
    listing = listed(root)
    _, first, _ = looked_at(listing)
    examined, small, done = looked_at(listing, 8)
    assert (small.resize, done) == (8, 40)
    check(root, listing, examined, small)
    _, cubic, done = looked_at(listing, interpolation="bicubic")
    np.testing.assert_array_equal(
        cubic.read(np.array([3]))[0], expected(root, "03.png", SIDE, "bicubic")
    )
    assert len({first.key, small.key, cubic.key}) == 3
    assert looked_at(listing)[1:] == (first, 0)


def test_a_changed_file_is_read_again(root):
    looked_at(listed(root))
    Image.new("RGB", (30, 30), "red").save(root / "00.png")
    examined, store, done = looked_at(listed(root))
    assert done == 40
    assert (store.read(examined.rows[:1]) == (255, 0, 0)).all()


def test_the_same_images_elsewhere_share_the_store(root, tmp_path):
    _, store, _ = looked_at(listed(root))
    shutil.copytree(root, tmp_path / "copy")
    _, same, done = looked_at(listed(tmp_path / "copy"))
    assert (same, done) == (store, 40)
    assert len(list((cache_root() / "pixels").iterdir())) == 2  # it, and who uses it


def test_d11_links_to_one_file_are_read_once(root):
    os.link(root / "03.png", root / "a-hard-link.png")
    (root / "b-link.png").symlink_to(root / "03.png")
    listing = listed(root)
    examined, store, done = looked_at(listing)
    assert (len(listing), done, store.rows) == (42, 40, 40)
    linked = [listing.paths.index(path) for path in ("03.png", "a-hard-link.png", "b-link.png")]
    assert len(set(examined.rows[linked].tolist())) == 1
    assert (examined.digests[linked] == examined.digests[linked[0]]).all()
    check(root, listing, examined, store)


def test_identical_files_share_a_row(root):
    shutil.copy(root / "03.png", root / "99.png")
    listing = listed(root)
    examined, store, done = looked_at(listing)
    assert (done, store.rows) == (41, 40)
    assert examined.rows[40] == examined.rows[3]
    check(root, listing, examined, store)


def test_rows_follow_the_order_of_the_paths_whatever_the_threads_do(root):
    shutil.copy(root / "20.png", root / "05b.png")
    one, store, _ = looked_at(listed(root), workers=1)
    shutil.rmtree(cache_root() / "scans")
    many, same, done = looked_at(listed(root), workers=7)
    assert done == 41
    assert same.key == store.key
    assert many.rows.tolist() == one.rows.tolist() == [*range(21), 6, *range(21, 40)]


def test_distinct_files_are_told_by_all_of_their_state():
    stats = np.array(
        [
            *([5, 1, 9, 70], [5, 1, 9, 60], [5, 1, 9, 70], [5, 2, 9, 60], [5, 1, 8, 70]),
            *([5, 1, 9, 0], [5, 1, 9, 0]),  # a disk that numbers no files
        ],
        np.int64,
    )
    files = distinct_files(stats)
    assert files.first.tolist() == [0, 1, 3, 4, 5, 6]
    assert files.which.tolist() == [0, 1, 0, 2, 3, 4, 5]


BAD = {
    "i01-empty.jpg": (b"", "no image of an accepted format"),
    "i02-half.png": (None, "damaged"),
    "i03-page.jpg": (b"<!doctype html><p>404", "no image of an accepted format"),
}


def spoil(root):
    for name, (content, _) in BAD.items():
        whole = (root / "03.png").read_bytes()
        (root / name).write_bytes(whole[: len(whole) // 2] if content is None else content)


def test_bad_files_are_excluded_with_a_reason(root):
    spoil(root)
    listing = listed(root)
    for done in (43, 0):  # looked at, then known
        examined, store, seen = looked_at(listing)
        assert (seen, store.rows) == (done, 40)
        reasons = {listing.paths[place]: why for place, why in examined.reasons.items()}
        assert sorted(reasons) == sorted(BAD)
        assert all(reasons[name].startswith(why) for name, (_, why) in BAD.items())
        bad = list(examined.reasons)
        assert (examined.rows[bad] == -1).all()
        assert not examined.sizes[bad].any()
        digest = hashlib.sha256((root / "i01-empty.jpg").read_bytes()).digest()
        assert examined.digests[listing.paths.index("i01-empty.jpg")].tobytes() == digest
        check(root, listing, examined, store)


def test_what_is_noticed_is_kept(root):
    shutil.copy(root / "00.png", root / "a.jpg")
    Image.new("L", (30, 30)).save(root / "b.png")
    listing = listed(root)
    for _ in range(2):
        examined, _, _ = looked_at(listing)
        assert examined.noticed[listing.paths.index("a.jpg")] == Noticed.WRONG_SUFFIX
        assert examined.noticed[listing.paths.index("b.png")] == Noticed.GREY
        assert np.count_nonzero(examined.noticed) == 2


def test_i14_a_file_that_vanishes_before_the_pass_is_missing(root):
    listing = listed(root)
    (root / "07.png").unlink()
    examined, store, _ = looked_at(listing)
    assert dict(examined.reasons) == {7: "missing"}
    assert (store.rows, examined.rows[7]) == (39, -1)
    assert not examined.digests[7].any()
    check(root, listing, examined, store)


def test_a_file_that_could_not_be_read_and_now_can_is_read(root):
    listing = listed(root)
    (root / "07.png").rename(root.with_name("away.png"))
    assert dict(looked_at(listing)[0].reasons) == {7: "missing"}
    assert looked_at(listing)[2] == 0
    root.with_name("away.png").rename(root / "07.png")
    examined, store, done = looked_at(listing)
    assert (done, dict(examined.reasons), store.rows) == (40, {}, 40)


def test_a_folder_in_the_place_of_a_file_cannot_be_read(root):
    listing = listed(root)
    (root / "07.png").unlink()
    (root / "07.png").mkdir()
    assert looked_at(listing)[0].reasons[7].startswith("cannot be read (")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_d01_a_file_without_permission_cannot_be_read(root):
    listing = listed(root)
    (root / "07.png").chmod(0)
    assert looked_at(listing)[0].reasons[7] == "cannot be read (Permission denied)"
    (root / "07.png").chmod(0o600)
    assert dict(looked_at(listing)[0].reasons) == {}


def test_no_usable_image_is_for_the_catalog_to_refuse(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jpg").write_bytes(b"<html>")
    examined, store, _ = looked_at(listed(tmp_path / "data"))
    assert (store.rows, list(examined.reasons)) == (0, [0])
    examined, store, _ = looked_at(listed(tmp_path / "data", []))
    assert (store.rows, len(examined.rows), dict(examined.reasons)) == (0, 0, {})


def test_d18_names_that_are_no_text_are_read(root):
    name = os.fsdecode(b"caf\xe9\n\xff.png")
    (root / "00.png").rename(root / name)
    listing = listed(root)
    examined, store, _ = looked_at(listing)
    assert dict(examined.reasons) == {}
    check(root, listing, examined, store)
    assert looked_at(listing)[2] == 0


def test_a_large_file_is_hashed_and_decoded_without_being_taken_into_memory(root, monkeypatch):
    monkeypatch.setattr("autoft.data.pixels.examine.LARGE", 100)
    listing = listed(root)
    examined, store, _ = looked_at(listing)
    assert examined.digests[0].tobytes() == hashlib.sha256((root / "00.png").read_bytes()).digest()
    check(root, listing, examined, store)


def test_i15_the_dataset_is_not_written_to(root):
    before = {path: path.stat().st_mtime_ns for path in [root, *root.rglob("*")]}
    looked_at(listed(root))
    assert {path: path.stat().st_mtime_ns for path in [root, *root.rglob("*")]} == before


def tear(path):
    path.write_bytes(path.read_bytes()[:-20])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 8
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


def shorten(path):
    with np.load(path) as kept:
        columns = dict(kept)
    np.savez(path, **{**columns, "rows": columns["rows"][:-1]})


@pytest.mark.parametrize("damage", [tear, flip, empty, shorten])
def test_a_damaged_scan_is_made_anew(root, damage):
    listing = listed(root)
    first, store, _ = looked_at(listing)
    damage(scan_path(listing))
    again, same, done = looked_at(listing)
    assert (done, same) == (40, store)
    np.testing.assert_array_equal(again.digests, first.digests)
    assert looked_at(listing)[2] == 0


def test_a_store_damaged_under_its_reader_is_decoded_anew_by_the_next_command(root):
    listing = listed(root)
    _, store, _ = looked_at(listing)
    with Path(store.path).open("r+b") as file:
        file.seek(1000)
        file.write(b"damage")
    fresh = pickle.loads(pickle.dumps(store))
    with pytest.raises(MachineError, match="repeat the command"):
        fresh.read(np.arange(store.rows))
    examined, healed, done = looked_at(listing)
    assert (healed, done) == (store, 40)
    check(root, listing, examined, healed)


def test_unknown_interpolation_is_a_usage_error(root):
    with pytest.raises(UsageError, match="Did you mean 'bilinear'"):
        examine(listed(root), SIDE, interpolation="bilinaer")


def test_a_cache_that_is_a_file_is_a_machine_error(root, cache):
    cache.write_text("")
    with pytest.raises(MachineError, match="could not be written"):
        examine(listed(root), SIDE)


def test_a_consumer_that_stops_leaves_nothing_half_made(root, cache):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        examine(listed(root), SIDE, progress=stop)
    left = [path.name for kind in cache.iterdir() for path in kind.iterdir()]
    assert left == [f".{scan_path(listed(root)).name}.lock"]


def test_median_short_side_reads_headers_of_an_even_sample(root):
    (root / "50.png").write_bytes(b"no image")
    listing = listed(root)
    assert median_short_side(listing) == 24
    assert median_short_side(listing, sample=2) == 20  # the first; the last is no image
    assert median_short_side(listed(root, [])) == 0
    assert not cache_root().exists()


# ---- where the disk is short


@pytest.fixture
def no_room(monkeypatch):
    monkeypatch.setenv("AUTOFT_CACHE_LIMIT", "10kB")


@pytest.mark.usefixtures("no_room")
def test_without_room_images_are_decoded_on_the_fly_to_the_same_pixels(root, monkeypatch):
    spoil(root)
    listing = listed(root)
    examined, store, done = looked_at(listing)
    assert isinstance(store, DecodedOnTheFly)
    assert (store.rows, store.resize, done) == (40, SIDE, 43)
    assert "AUTOFT_CACHE_LIMIT" in store.why
    check(root, listing, examined, store)
    rows = np.array([7, 0, 7, 39])
    flying = store.read(rows)
    assert store.read(rows[:0]).shape == (0, SIDE, SIDE, 3)
    assert looked_at(listing)[1:] == (store, 0)
    monkeypatch.setenv("AUTOFT_CACHE_LIMIT", "10MB")
    examined, kept, done = looked_at(listing)
    assert isinstance(kept, PixelStore)
    assert (kept.key, done) == (store.key, 43)
    np.testing.assert_array_equal(kept.read(rows), flying)


@pytest.mark.usefixtures("no_room")
def test_only_the_path_of_the_list_is_pickled(root):
    listing = listed(root)
    examined, store, _ = looked_at(listing)
    store.read(np.arange(3))
    pickled = pickle.dumps(store)
    assert len(pickled) < 1000
    check(root, listing, examined, pickle.loads(pickled))


@pytest.mark.usefixtures("no_room")
@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda path: path.unlink(), "is gone"),
        (lambda path: path.write_bytes(b"another"), "has changed"),
        (lambda path: Image.new("RGB", (9, 9)).save(path), "has changed"),
    ],
)
def test_i14_data_that_change_under_a_search_are_named(root, change, what):
    _, store, _ = looked_at(listed(root))
    change(root / "05.png")
    assert store.read(np.array([4])).shape == (1, SIDE, SIDE, 3)
    with pytest.raises(DataError, match=rf"data_changed: .*05\.png' {what}.*another --out"):
        store.read(np.array([4, 5]))


@pytest.mark.usefixtures("no_room")
def test_i14_a_file_that_comes_back_is_read(root, monkeypatch):
    _, store, _ = looked_at(listed(root))
    away = root.with_name("away.png")
    (root / "05.png").rename(away)
    monkeypatch.setattr(
        "autoft.data.pixels.ondemand.time.sleep", lambda seconds: away.rename(root / "05.png")
    )
    np.testing.assert_array_equal(store.read(np.array([5]))[0], expected(root, "05.png"))


@pytest.mark.usefixtures("no_room")
def test_a_list_of_files_that_has_gone_is_an_error_and_is_made_anew(root):
    listing = listed(root)
    _, store, _ = looked_at(listing)
    (Path(store.path) / "ends.npy").write_bytes(b"")
    with pytest.raises(MachineError, match="repeat the command"):
        pickle.loads(pickle.dumps(store)).read(np.arange(1))
    examined, again, done = looked_at(listing)
    assert (again, done) == (store, 0)
    check(root, listing, examined, pickle.loads(pickle.dumps(again)))


def test_a_disk_without_room_counts_like_the_budget(root, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(10**12, 0, 20_000))
    assert isinstance(looked_at(listed(root))[1], DecodedOnTheFly)


def test_a_disk_that_fills_up_during_the_pass_does_not_end_it(root, tmp_path, monkeypatch):
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(place)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a small disk cannot be mounted here ({error})")
    try:
        usage = namedtuple("usage", "total used free")
        # As if another program took the space just after it was asked for.
        monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(10**12, 0, 10**12))
        monkeypatch.setenv("AUTOFT_CACHE", str(place / "cache"))
        listing = listed(root)
        examined, store, _ = looked_at(listing, 32)
        assert isinstance(store, DecodedOnTheFly)
        assert "full" in store.why
        check(root, listing, examined, store)
        assert not list((place / "cache" / "autoft" / "pixels").glob(".building-*"))
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


# ---- several processes

PASS = """
import os, signal, sys
from pathlib import Path
import numpy as np
sys.path.insert(0, sys.argv[1])
from autoft.data.pixels import decode
from autoft.data.pixels.examine import examine
from test_data_examine import SIDE, listed

def told(done, total):
    print("pass", done, flush=True)
    if len(sys.argv) > 3 and done >= int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

examined, store = examine(listed(Path(sys.argv[2])), SIDE, progress=told, workers=1)
print("sum", int(store.read(np.arange(store.rows)).sum()), flush=True)
assert not {"torch", "torchvision", "sklearn", "scipy", "timm"} & set(sys.modules)
"""


def start(root, *more):
    command = [sys.executable, "-c", PASS, str(Path(__file__).parent), str(root), *map(str, more)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_processes_at_once_decode_once(root):
    outputs = [process.communicate()[0].split("\n") for process in [start(root), start(root)]]
    sums = {line for lines in outputs for line in lines if line.startswith("sum")}
    passes = [any(line.startswith("pass") for line in lines) for lines in outputs]
    assert len(sums) == 1
    assert sorted(passes) == [False, True]


@pytest.mark.parametrize("after", [16, 40])
def test_a_process_killed_in_the_pass_leaves_the_next_to_do_it(root, cache, after):
    killed = start(root, after)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert list((cache / "pixels").glob(".building-*"))
    listing = listed(root)
    examined, store, done = looked_at(listing)
    assert done == 40
    check(root, listing, examined, store)
    assert not list((cache / "pixels").glob(".building-*"))


@pytest.mark.shared
def test_photographs_are_read_once_and_known_after(shared_root):
    root = shared_root / "data" / "hymenoptera"
    listing = listed(root)
    examined, store, done = looked_at(listing, 64)
    assert done == len(listing)
    assert looked_at(listing, 64)[1:] == (store, 0)
    assert dict(examined.reasons) == {}
