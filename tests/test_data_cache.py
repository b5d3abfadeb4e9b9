from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from autoft.data.cache import entries
from autoft.data.cache.entries import (
    Entry,
    NoRoom,
    building,
    cache_limit,
    clear,
    make_room,
    publish,
)
from autoft.data.cache.files import cache_root
from autoft.data.cache.holding import hold, release
from autoft.errors import MachineError, UsageError
from autoft.training.kept import remembered


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("AUTOFT_CACHE_LIMIT", "1000")
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache" / "autoft"


def put(name, size=100, age=0.0, kind="pixels"):
    """Make an entry of `size` bytes that was last used `age` seconds ago."""
    folder = cache_root() / kind / name
    folder.mkdir(parents=True)
    (folder / "file").write_bytes(bytes(size))
    hold(folder)
    release(folder)
    used = time.time() - age
    os.utime(folder.with_name(f".{name}.used"), (used, used))
    return folder


def names():
    return [entry.name for entry in entries.entries()]


HOLD = """
import sys
from pathlib import Path
from autoft.data.cache.holding import hold
hold(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder():
    """Start processes that hold an entry until they are told to end, or killed."""
    started = []

    def start(entry):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(entry)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_entries_are_folders_and_files_of_every_kind(cache):
    put("store", size=70, age=100)
    put("unpacked", size=5, kind="datasets")
    (cache / "scans").mkdir()
    (cache / "scans" / "scan.npz").write_bytes(bytes(30))
    (cache / "scans" / ".scan.npz.lock").touch()
    found = {(entry.kind, entry.name): entry for entry in entries.entries()}
    assert {key: entry.bytes for key, entry in found.items()} == {
        ("datasets", "unpacked"): 5,
        ("pixels", "store"): 70,
        ("scans", "scan.npz"): 30,
    }
    assert time.time() - found["pixels", "store"].last_used == pytest.approx(100, abs=20)
    assert time.time() - found["scans", "scan.npz"].last_used == pytest.approx(0, abs=20)
    assert not any(entry.held for entry in found.values())
    assert found["pixels", "store"].path == cache / "pixels" / "store"


def test_nothing_beside_the_kinds_is_looked_at(cache):
    foreign = [
        cache / "letters" / "novel.txt",
        cache / "letters" / ".trash-novel" / "1.txt",
        cache / "letters" / ".building-shed" / "plan.txt",
        cache / "letters" / f".{'0' * 32}.tmp",
        cache / ".git" / "HEAD",
        cache / "notes.txt",
    ]
    for path in foreign:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(600))
        os.utime(path, (0, 0))
    put("mine")
    (cache / "letters").chmod(0o500)
    before = sorted(cache.rglob("*"))
    make_room(900)
    assert names() == ["mine"]
    assert sorted(cache.rglob("*")) == before
    with pytest.raises(UsageError, match="no kind 'letters'"):
        clear("letters")
    assert [entry.name for entry in clear().removed] == ["mine"]
    assert all(path.read_bytes() == bytes(600) for path in foreign)
    (cache / "letters").chmod(0o700)


LOOK = """
import os
from autoft.data.cache.entries import clear, entries, make_room
if os.geteuid() == 0:
    os.setuid(65534)  # root may read everything
make_room(100)
print([entry.name for entry in entries()], [entry.name for entry in clear().removed])
"""


def test_a_foreign_folder_that_may_not_be_read_is_no_matter(monkeypatch):
    with tempfile.TemporaryDirectory() as place:  # pytest's own is closed to other users
        monkeypatch.setenv("AUTOFT_CACHE", place)
        put("mine")
        for path in [Path(place), *Path(place).rglob("*")]:
            if os.geteuid() == 0:
                os.chown(path, 65534, 65534)
        closed = Path(place, "private")
        closed.mkdir()
        closed.chmod(0o700 if os.geteuid() == 0 else 0)
        command = [sys.executable, "-c", LOOK]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        closed.chmod(0o700)
        assert done.stdout == "['mine'] ['mine']\n", done.stderr
        assert closed.is_dir()


@pytest.mark.parametrize("look", [entries.entries, clear, lambda: make_room(1)])
def test_a_kind_that_cannot_be_listed_is_a_machine_error(cache, look):
    cache.mkdir()
    (cache / "pixels").write_text("")
    with pytest.raises(MachineError, match="pixels' could not be"):
        look()


def test_an_absent_cache_is_empty(cache):
    assert entries.entries() == []
    assert clear() == entries.Cleared((), ())
    make_room(1000)
    assert not cache.exists()


def test_what_was_used_longest_ago_goes_first_and_only_as_much_as_needed():
    for name, age in {"b": 20, "a": 30, "d": 0, "c": 10}.items():
        put(name, age=age)
    make_room(600)
    assert names() == ["a", "b", "c", "d"]
    make_room(750)
    assert names() == ["c", "d"]


def test_a_use_saves_an_entry():
    for name, age in {"a": 30, "b": 20}.items():
        put(name, age=age)
    hold(cache_root() / "pixels" / "a")
    release(cache_root() / "pixels" / "a")
    make_room(850)
    assert names() == ["a"]


def test_what_a_living_process_holds_is_kept(holder):
    held, _ = put("held", age=1000), put("idle")
    process = holder(held)
    assert {entry.name: entry.held for entry in entries.entries()} == {"held": True, "idle": False}
    make_room(900)
    assert names() == ["held"]
    with pytest.raises(NoRoom, match=r"901 bytes more do not fit.*1,000.*100 of it are in use"):
        make_room(901)
    process.kill()  # -9: the lock falls with its holder
    process.wait()
    make_room(901)
    assert names() == []


def test_this_process_counts_as_living():
    folder = put("mine")
    hold(folder)
    with pytest.raises(NoRoom):
        make_room(950)
    assert clear().kept[0].name == "mine"
    release(folder)
    make_room(950)
    assert names() == []


def test_nothing_is_evicted_in_vain(holder):
    held, _ = put("held", size=500), put("idle")
    holder(held)
    with pytest.raises(NoRoom, match="AUTOFT_CACHE_LIMIT"):
        make_room(501)
    assert names() == ["held", "idle"]


def disk(monkeypatch, free, total=10**12):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(total, total - free, free))


def test_the_disk_counts_as_well_as_the_budget(monkeypatch):
    put("old", size=300, age=10)
    put("new", size=300)
    disk(monkeypatch, free=50)
    make_room(200)
    assert names() == ["new"]
    with pytest.raises(NoRoom, match=r"50 are free on the partition"):
        make_room(400)


def test_what_others_are_building_counts():
    with building("pixels") as folder:
        (folder / "file").write_bytes(bytes(600))
        with pytest.raises(NoRoom):
            make_room(401)
        make_room(400)
    make_room(1000)


def test_a_held_entry_that_has_gone_is_held_anew():
    folder = put("a")
    hold(folder)
    shutil.rmtree(cache_root())
    put("a")
    hold(folder)
    assert [entry.held for entry in entries.entries()] == [True]
    release(folder)
    assert [entry.held for entry in entries.entries()] == [False]


def test_holding_before_there_is_an_entry_keeps_the_place(cache):
    folder = cache / "pixels" / "later"
    hold(folder)
    make_room(0)  # sweeps
    folder.mkdir()
    assert [entry.held for entry in entries.entries()] == [True]
    folder.rmdir()
    release(folder)
    assert list((cache / "pixels").iterdir()) == []


def test_a_built_entry_appears_whole_and_replaces_an_old_one(cache):
    old = put("a", size=1)
    with building("pixels") as folder:
        (folder / "file").write_bytes(bytes(2))
        assert names() == ["a"]
        publish(folder, old, lambda: False)
    assert [(entry.name, entry.bytes, entry.held) for entry in entries.entries()] == [
        ("a", 2, True)
    ]
    assert sorted(path.name for path in (cache / "pixels").iterdir()) == [".a.used", "a"]
    release(old)


def race(monkeypatch, entry, contents):
    """Let others publish `contents` just after the entry in the way was taken away."""
    rename_away, waiting = entries._rename_away, list(contents)

    def overtaken(path):
        trash = rename_away(path)
        if path == entry and waiting:
            entry.mkdir()
            (entry / "file").write_bytes(waiting.pop(0))
        return trash

    monkeypatch.setattr(entries, "_rename_away", overtaken)


@pytest.mark.parametrize(
    ("others", "kept"), [([b"other"], b"other"), ([b"torn", b"torn"], b"own"), ([], b"own")]
)
def test_who_publishes_second_keeps_what_is_whole(cache, monkeypatch, others, kept):
    entry = put("a", size=1)
    race(monkeypatch, entry, others)
    with building("pixels") as folder:
        (folder / "file").write_bytes(b"own")
        publish(folder, entry, lambda: (entry / "file").read_bytes() == b"other")
    assert (entry / "file").read_bytes() == kept
    assert [each.held for each in entries.entries()] == [True]
    assert sorted(path.name for path in (cache / "pixels").iterdir()) == [".a.used", "a"]
    release(entry)


def test_a_building_that_fails_leaves_nothing(cache):
    with pytest.raises(FileExistsError), building("pixels") as folder:
        folder.mkdir()
    assert list((cache / "pixels").iterdir()) == []


BUILD = """
import sys
from autoft.data.cache.entries import building
with building("pixels") as folder:
    (folder / "file").write_bytes(bytes(500))
    print("building", flush=True)
    sys.stdin.read()
"""


def test_the_leftovers_of_a_killed_process_are_swept_and_those_of_a_living_one_are_not(cache):
    started = [
        subprocess.Popen(
            [sys.executable, "-c", BUILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(2)
    ]
    try:
        for process in started:
            process.stdout.readline()
        (cache / "pixels" / ".trash-0").mkdir()
        assert len(list((cache / "pixels").glob(".building-*"))) == 2
        make_room(0)
        assert len(list((cache / "pixels").glob(".building-*"))) == 2
        assert not list((cache / "pixels").glob(".trash-*"))
        started[0].kill()
        started[0].wait()
        make_room(500)
        assert len(list((cache / "pixels").glob(".building-*"))) == 1
        started[1].communicate()  # the end of its input lets it finish
        assert list((cache / "pixels").glob(".*building*")) == []
    finally:
        for process in started:
            process.kill()
            process.communicate()


def test_torn_temporary_files_go_when_they_are_old(cache):
    (cache / "scans").mkdir(parents=True)
    for age, name in ((0, "0" * 32), (10**6, "1" * 32)):
        path = cache / "scans" / f".{name}.tmp"
        path.touch()
        os.utime(path, (time.time() - age,) * 2)
    make_room(0)
    assert [path.name for path in (cache / "scans").iterdir()] == [f".{'0' * 32}.tmp"]


def test_clear_by_kind_and_age(holder):
    put("old", age=1000)
    put("new")
    put("data", age=1000, kind="datasets")
    holder(put("used", age=1000))
    os.utime(cache_root() / "pixels" / ".used.used", (0, 0))
    cleared = clear("pixels", older_than=500)
    assert [(entry.name, entry.bytes) for entry in cleared.removed] == [("old", 100)]
    assert [entry.name for entry in cleared.kept] == ["used"]
    assert names() == ["data", "new", "used"]
    assert [entry.name for entry in clear().removed] == ["data", "new"]


def test_an_unknown_kind_is_a_usage_error():
    with pytest.raises(UsageError, match=r"'pixel'; expected.*Did you mean 'pixels'"):
        clear("pixel")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("50GB", 50 * 10**9),
        ("800 mb", 800 * 10**6),
        ("1.5TiB", 3 * 2**39),
        ("123", 123),
        ("64kB", 64_000),
        ("2g", 2 * 10**9),
    ],
)
def test_the_limit_is_a_size(monkeypatch, text, size):
    monkeypatch.setenv("AUTOFT_CACHE_LIMIT", text)
    assert cache_limit() == size


@pytest.mark.parametrize("text", ["much", "-1GB", "1XB", "iB", "1e9", "GB"])
def test_a_limit_that_is_no_size_is_a_usage_error(monkeypatch, text):
    monkeypatch.setenv("AUTOFT_CACHE_LIMIT", text)
    with pytest.raises(UsageError, match=r"AUTOFT_CACHE_LIMIT is .*such as 50GB"):
        cache_limit()


@pytest.mark.parametrize(("total", "limit"), [(10**12, 10**11), (10**11, 2 * 10**10)])
def test_by_default_a_fifth_of_the_disk_but_at_most_100_gb(monkeypatch, total, limit):
    monkeypatch.delenv("AUTOFT_CACHE_LIMIT")
    disk(monkeypatch, free=0, total=total)
    assert cache_limit() == limit


@pytest.mark.parametrize(
    "act", [lambda root: hold(root / "pixels" / "a"), lambda root: make_room(1), lambda _: clear()]
)
def test_a_cache_that_is_a_file_is_a_machine_error(cache, act):
    cache.write_text("")
    with pytest.raises(MachineError, match=r"could not be written.*expected a folder"):
        act(cache)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_cannot_be_written_is_a_machine_error(cache):
    cache.mkdir(mode=0o500)
    with pytest.raises(MachineError, match="Permission denied"):
        hold(cache / "pixels" / "a")


def test_features_make_room_before_they_are_written(cache):
    put("old", size=900, age=10)
    rows = np.arange(3)
    found = remembered("k", rows, lambda rows: iter([{"k": np.ones((len(rows), 2), np.float32)}]))
    assert found.tolist() == [[1, 1]] * 3
    assert [entry.kind for entry in entries.entries()] == ["features"]
    assert sum(entry.bytes for entry in entries.entries()) <= 1000


def test_features_that_have_no_room_are_given_but_not_kept(cache):
    hold(put("used", size=900))
    asked = []

    def compute(rows):
        asked.append(rows.tolist())
        yield {"k": np.ones((len(rows), 2), np.float32)}

    for _ in range(2):
        assert remembered("k", np.arange(3), compute).tolist() == [[1, 1]] * 3
    assert asked == [[0, 1, 2]] * 2
    assert names() == ["used"]
    release(cache / "pixels" / "used")


def test_an_entry_is_a_value():
    assert Entry("pixels", "a", 1, 0.0, False) == Entry("pixels", "a", 1, 0.0, False)
    assert Entry("pixels", "a", 1, 0.0, False).path == Path(cache_root(), "pixels", "a")
