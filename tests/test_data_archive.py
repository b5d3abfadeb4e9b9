from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from autoft.data.cache.files import cache_root
from autoft.data.inputs import archive
from autoft.data.inputs.dispatch import list_dataset
from autoft.data.reading import Reading
from autoft.errors import DataError, MachineError

READING = Reading()
CLASSES = {f"{label}/{n}.jpg": b"x" * n for label in ("cat", "dog") for n in range(1, 4)}
KINDS = ["zip", "tar", "tar.gz", "tgz", "tar.bz2", "tar.xz"]
_MODES = {"tar": "w", "tar.gz": "w:gz", "tgz": "w:gz", "tar.bz2": "w:bz2", "tar.xz": "w:xz"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOFT_CACHE", str(tmp_path / "cache"))


def pack(path, contents):
    """Write `contents`, names and bytes, into an archive of the kind that its name says."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as file:
            for name, data in contents.items():
                file.writestr(name, data)
        return path
    with tarfile.open(path, _MODES[path.name.partition(".")[2]]) as file:
        for name, data in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def tar_with(path, *infos, contents=CLASSES):
    with tarfile.open(pack(path, contents), "a") as file:
        for info in infos:
            file.addfile(info)
    return path


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def listed(path, reading=READING, progress=None):
    return list_dataset(str(path), reading, progress)


def entries():
    folder = cache_root() / "datasets"
    return sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top", ["", "top/", "./", "train/"])
def test_every_kind_is_unpacked_once(tmp_path, kind, top):
    contents = {top + name: data for name, data in CLASSES.items()}
    contents |= {top + "README.md": b"hello", "__MACOSX/cat/1.jpg": b"x"}
    path = pack(tmp_path / f"my pets.{kind}", contents)
    listing = listed(path)
    assert listing.name == "my pets"
    assert listing.label_names == ("cat", "dog")
    assert listing.paths == tuple(CLASSES)
    assert [Path(listing.root, p).read_bytes() for p in listing.paths] == list(CLASSES.values())
    assert listing.counts == {"ignored": 2}
    again = listed(path)
    assert (again.stats == listing.stats).all()
    assert len(entries()) == 1
    os.utime(path, ns=(1, 1))
    assert listed(path).root != listing.root


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_parts_manifests_and_metadata_are_found_inside(tmp_path, kind):
    parts = {f"data/{part}/{name}": b"x" for part in ("train", "test") for name in CLASSES}
    assert set(listed(pack(tmp_path / f"parts.{kind}", parts)).parts.tolist()) == {1, 3}
    flat = {"d/im/1.jpg": b"x", "d/im/2.jpg": b"y"}
    table = {"d/labels.csv": b"path,label\nim/1.jpg,a\nim/2.jpg,b\n"}
    listing = listed(pack(tmp_path / f"table.{kind}", flat | table))
    assert listing.lines.tolist() == [2, 3]
    assert listing.counts == {}
    more = {"d/im/3.jpg": b"z", "d/im/4.jpg": b"!"}
    listing = listed(pack(tmp_path / f"more.{kind}", flat | more | table))
    assert len(listing) == 2
    assert listing.counts == {"images in no row of the table": 2}
    table = {"d/metadata.jsonl": b'{"file_name": "im/1.jpg", "label": "a"}'}
    listing = listed(pack(tmp_path / f"hf.{kind}", {"d/im/1.jpg": b"x"} | table))
    assert listing.paths == ("im/1.jpg",)
    table = {"index.csv": b"name,number\ncat,1\n"}
    assert len(listed(pack(tmp_path / f"other.{kind}", CLASSES | table))) == 6


def test_empty_class_folders_are_kept(tmp_path):
    path = tar_with(tmp_path / "a.tar", special("emu", tarfile.DIRTYPE))
    assert listed(path).empty == ("emu",)


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize("name", ["../x.jpg", "cat/../../x.jpg", "/x.jpg", "C:/x.jpg"])
@pytest.mark.parametrize("last", ["x.jpg", "notes.txt"])
def test_members_that_escape_are_refused(tmp_path, kind, name, last):
    name = name.replace("x.jpg", last)
    before = sorted(tmp_path.rglob("*"))
    path = pack(tmp_path / f"a.{kind}", CLASSES | {name: b"evil"})
    with pytest.raises(DataError, match=rf"a\.{kind}' holds '{name}', which would land outside"):
        listed(path)
    left = [p for p in sorted(tmp_path.rglob("*")) if p not in before and p.name[0] != "."]
    assert left == [path, tmp_path / "cache", cache_root(), cache_root() / "datasets"]


def test_a_zip_of_windows_has_folders_and_does_not_escape(tmp_path):
    windows = {name.replace("/", "\\"): data for name, data in CLASSES.items()}
    assert listed(pack(tmp_path / "a.zip", windows)).label_names == ("cat", "dog")
    with pytest.raises(DataError, match="would land outside"):
        listed(pack(tmp_path / "b.zip", {"..\\x.jpg": b"x"}))


@pytest.mark.parametrize(
    ("infos", "reason"),
    [
        ([("cat/x.jpg", tarfile.SYMTYPE, "../../../../../etc/passwd")], "a link out of it"),
        ([("cat/x.jpg", tarfile.SYMTYPE, "/etc/passwd")], "a link out of it"),
        ([("cat/notes", tarfile.SYMTYPE, "../..")], "a link out of it"),
        ([("cat/x.jpg", tarfile.SYMTYPE, "x.jpg")], "a link out of it"),
        ([("cat/x.jpg", tarfile.LNKTYPE, "../../x.jpg")], "would land outside"),
        ([("cat/x.jpg", tarfile.LNKTYPE, "gone.jpg")], "a hard link to no file"),
        ([("cat/x.jpg", tarfile.CHRTYPE, "")], "a device or a pipe"),
        ([("cat/pipe", tarfile.FIFOTYPE, "")], "a device or a pipe"),
        (
            [("a", tarfile.SYMTYPE, "b/.."), ("b", tarfile.SYMTYPE, ".")],
            "a link out of it",
        ),
        ([("a", tarfile.SYMTYPE, "."), ("a/b", tarfile.SYMTYPE, "cat")], "below a link"),
    ],
)
def test_links_and_devices_that_leave_are_refused(tmp_path, infos, reason):
    path = tar_with(tmp_path / "a.tar", *(special(*info) for info in infos))
    with pytest.raises(DataError, match=reason):
        listed(path)
    assert entries() == []


def test_files_are_never_written_through_a_link(tmp_path):
    (tmp_path / "out").mkdir()
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        file.addfile(special("evil", tarfile.SYMTYPE, str(tmp_path / "out")))
        info = tarfile.TarInfo("evil/x.jpg")
        info.size = 1
        file.addfile(info, io.BytesIO(b"x"))
    listing = None
    try:
        listing = listed(tmp_path / "a.tar")
    except DataError:
        assert entries() == []
    assert listing is None or listing.label_names == ("evil",)
    assert not list((tmp_path / "out").iterdir())


def test_links_inside_are_kept(tmp_path):
    infos = [
        special("dog/4.jpg", tarfile.SYMTYPE, "../cat/1.jpg"),
        special("dog/5.jpg", tarfile.LNKTYPE, "cat/2.jpg"),
        special("dog/README", tarfile.SYMTYPE, "../README"),
        special("emu", tarfile.SYMTYPE, "cat"),
    ]
    listing = listed(tar_with(tmp_path / "a.tar", *infos))
    assert set(listing.paths) == {*CLASSES, "dog/4.jpg", "dog/5.jpg"}
    assert listing.counts == {"ignored": 1}


def test_links_in_a_zip(tmp_path):
    for name, target, fine in (("a", "1.jpg", True), ("b", "../../../x", False)):
        path = pack(tmp_path / f"{name}.zip", CLASSES)
        with zipfile.ZipFile(path, "a") as file:
            info = zipfile.ZipInfo("cat/9.jpg")
            info.create_system, info.external_attr = 3, 0o120777 << 16
            file.writestr(info, target)
        if fine:
            assert len(listed(path)) == 7
        else:
            with pytest.raises(DataError, match=r"'cat/9\.jpg', a link out of it"):
                listed(path)


def test_an_encrypted_zip_is_refused(tmp_path):
    path = pack(tmp_path / "a.zip", CLASSES)
    data = bytearray(path.read_bytes())
    start = data.index(b"PK\x01\x02")
    data[start + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"is encrypted \('cat/1\.jpg'\)"):
        listed(path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9])
def test_a_cut_archive_is_refused(tmp_path, kind, share):
    contents = {f"{c}/{n}.jpg": os.urandom(3000) for c in ("cat", "dog") for n in range(20)}
    path = pack(tmp_path / f"a.{kind}", contents)
    data = path.read_bytes()
    # At a boundary of blocks, where the parser of tar sees nothing wrong.
    path.write_bytes(data[: int(len(data) * share) // 512 * 512])
    with pytest.raises(DataError, match="cannot be read"):
        listed(path)
    assert entries() == []


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_a_damaged_archive_is_refused(tmp_path, kind):
    path = pack(tmp_path / f"a.{kind}", {f"cat/{n}.jpg": os.urandom(3000) for n in range(20)})
    data = bytearray(path.read_bytes())
    middle = len(data) // 2 // 3584 * 3584 if kind == "tar" else len(data) // 2
    data[middle : middle + 300] = bytes(300)
    path.write_bytes(data)
    with pytest.raises(DataError, match="cannot be read"):
        listed(path)
    (tmp_path / "b.zip").write_bytes(b"no zip")
    with pytest.raises(DataError, match="cannot be read"):
        listed(tmp_path / "b.zip")


def test_a_bomb_is_refused_before_it_fills_the_disk(tmp_path, monkeypatch):
    bomb = {"cat/1.jpg": bytes(1 << 20)}
    for kind in ("zip", "tar.gz"):
        path = pack(tmp_path / f"a.{kind}", bomb)
        monkeypatch.setattr(archive, "MAX_MEMBER_BYTES", (1 << 20) - 1)
        with pytest.raises(DataError, match=r"'cat/1.jpg' of 1,048,576 bytes"):
            listed(path)
        monkeypatch.undo()
        monkeypatch.setenv("AUTOFT_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(archive, "MAX_BYTES", (1 << 20) - 1)
        with pytest.raises(DataError, match="unpacks to"):
            listed(path)
        monkeypatch.setattr(archive, "MAX_BYTES", 1 << 40)
    monkeypatch.setattr(archive, "MAX_MEMBERS", 5)
    with pytest.raises(DataError, match="more than 5 members"):
        listed(pack(tmp_path / "b.tar", CLASSES))


def test_a_zip_that_states_more_than_the_disk_has_is_refused(tmp_path):
    path = pack(tmp_path / "a.zip", CLASSES)
    data = bytearray(path.read_bytes())
    start = data.index(b"PK\x01\x02")
    for _ in CLASSES:  # 6 x 1 GiB hardly fills a disk: state the most that 32 bits can
        data[start + 24 : start + 28] = (0xFFFFFFFE).to_bytes(4, "little")
        start = data.find(b"PK\x01\x02", start + 4)
    path.write_bytes(data)
    with pytest.raises((DataError, MachineError), match=r"4,294,967,294 bytes|are free"):
        listed(path)


def test_a_zip_member_that_gives_more_than_it_states_is_refused(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("cat/1.jpg", bytes(100_000))
    data = bytearray(path.read_bytes())
    start = data.index(b"PK\x01\x02")
    data[start + 24 : start + 28] = (10).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"cannot be read at 'cat/1\.jpg'"):
        listed(path)


def test_a_tar_header_that_states_a_long_name_is_refused(tmp_path):
    info = tarfile.TarInfo("long")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1 << 33
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(10_240))
    with pytest.raises(DataError, match="states 8,589,934,592 bytes"):
        listed(tmp_path / "a.tar")


def test_a_name_that_is_a_file_and_a_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="also holds a file or a folder"):
        listed(pack(tmp_path / "a.tar", {"cat.jpg": b"x", "cat.jpg/1.jpg": b"x"}))


def test_what_is_inside_may_not_lead_out_whatever_is_allowed(tmp_path):
    table = {"m.csv": b"path,label\n/etc/hostname,a\n"}
    with pytest.raises(DataError, match=r"Of the archive .*a\.tar', unpacked.*/etc/hostname"):
        listed(pack(tmp_path / "a.tar", table), Reading(follow_outside=True))


def test_progress_counts_members(tmp_path):
    calls = []
    listed(pack(tmp_path / "a.zip", CLASSES), progress=lambda *call: calls.append(call))
    assert (6, 6) in calls


KILLED = """
import sys
from autoft.data.inputs import archive
from autoft.data.inputs.dispatch import list_dataset
from autoft.data.reading import Reading
chunks, calls = archive._chunks, []
def slow(*arguments):
    calls.append(1)
    yield from chunks(*arguments)
    if len(calls) == 4:
        print("half", flush=True)
        sys.stdin.read()
archive._chunks = slow
list_dataset(sys.argv[1], Reading())
"""


def test_kill_in_mid_way_leaves_nothing_that_is_taken_for_whole(tmp_path):
    path = pack(tmp_path / "a.zip", CLASSES)
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with process:
        assert process.stdout.readline() == b"half\n"
        process.send_signal(signal.SIGKILL)
    assert [name.startswith(".building-") for name in entries()] == [True]
    assert len(listed(path)) == 6
    assert [name.startswith(".") for name in entries()] == [False]


def test_two_at_once_unpack_it_once(tmp_path):
    path = pack(tmp_path / "a.zip", CLASSES)
    command = [sys.executable, "-c", KILLED, str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as first:
        assert first.stdout.readline() == b"half\n"
        with subprocess.Popen(command, **pipes) as second:
            first.stdin.close()
            assert first.wait() == 0
            second.stdin.close()
            assert second.wait() == 0
            assert second.stdout.read() == b""
    assert len(entries()) == 1


def test_names_are_told_apart_by_their_ends():
    assert archive.is_archive(Path("a.TAR.GZ"))
    assert not archive.is_archive(Path("a.gz"))
