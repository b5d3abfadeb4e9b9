from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from autoft.data.cache import machine_errors, write_json_atomic
from autoft.data.catalog import Catalog, Excluded, check_bad, read_catalog
from autoft.data.decode import decode
from autoft.data.sample import write_sample
from autoft.errors import DataError, MachineError, UsageError


def paint(path, size=(12, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)


def dataset(root, *folders, count=3):
    for folder in folders:
        for number in range(count):
            paint(root / folder / f"{number}.png")
    return root


def tree_hash(root):
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        digest.update(f"{path} {path.lstat().st_mtime_ns} {path.lstat().st_mode}".encode())
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


def paths(catalog):
    return [item.path for item in catalog.items]


def test_labels_are_the_first_level_of_folders(tmp_path):
    dataset(tmp_path, "dog", "cat/deep/er")
    catalog = read_catalog(str(tmp_path))
    assert catalog.classes == ("cat", "dog")
    assert catalog.labels().tolist() == [0, 0, 0, 1, 1, 1]
    assert paths(catalog)[0] == "cat/deep/er/0.png"
    assert catalog.rows().tolist() == [0, 1, 2, 3, 4, 5]
    assert catalog.short_side == 10
    assert decode(catalog.open(catalog.items[0])).size == (12, 10)


def test_reading_leaves_the_dataset_as_it_was(tmp_path):
    root = dataset(tmp_path / "data", "cat", "dog", count=30)
    (root / "cat" / "bad.jpg").write_bytes(b"")
    before = tree_hash(root)
    assert read_catalog(str(root)).excluded[0].path == "cat/bad.jpg"
    assert tree_hash(root) == before


def test_d01_missing_path_and_file_are_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere.*does not exist"):
        read_catalog(str(tmp_path / "nowhere"))
    (tmp_path / "data.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"data\.zip.*is a file"):
        read_catalog(str(tmp_path / "data.zip"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
@pytest.mark.parametrize("closed", ["", "cat"])
def test_d01_unreadable_folder_is_named_with_its_mode(tmp_path, closed):
    folder = dataset(tmp_path / "data", "cat", "dog") / closed
    folder.chmod(0)
    try:
        with pytest.raises(DataError, match=r"cannot be read.*mode 0o0"):
            read_catalog(str(tmp_path / "data"))
    finally:
        folder.chmod(0o755)


def test_d02_no_image_lists_suffixes_and_what_was_found(tmp_path):
    with pytest.raises(DataError, match=r"no files.*\.jpg"):
        read_catalog(str(tmp_path))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"1 \.txt"):
        read_catalog(str(tmp_path))


def test_images_without_class_folders_are_an_error(tmp_path):
    dataset(tmp_path, "")
    with pytest.raises(DataError, match="3 images but no class folders"):
        read_catalog(str(tmp_path))


def test_d03_one_class_suggests_the_folder_that_has_more(tmp_path):
    root = dataset(tmp_path / "data", "cat/a", "cat/b", "dog")
    shutil.rmtree(root / "dog")
    with pytest.raises(DataError, match=rf"at least 2.*Did you mean '{root}/cat'"):
        read_catalog(str(root))
    dataset(tmp_path / "pets", "cat/young", "dog")
    for folder in ("cat", "dog"):
        paint(tmp_path / "pets" / folder / "0.png")
        with pytest.raises(DataError, match=rf"Did you mean '{tmp_path}/pets'"):
            read_catalog(str(tmp_path / "pets" / folder))


def test_d04_empty_class_is_dropped_and_recorded(tmp_path):
    dataset(tmp_path, "cat", "dog")
    (tmp_path / "emu").mkdir()
    catalog = read_catalog(str(tmp_path))
    assert catalog.classes == ("cat", "dog")
    assert catalog.excluded == (Excluded("emu", "empty class"),)


def test_d05_small_class_is_named(tmp_path):
    dataset(tmp_path, "cat", "dog")
    (tmp_path / "dog" / "0.png").unlink()
    with pytest.raises(DataError, match=r"'dog' has 2; expected at least 3"):
        read_catalog(str(tmp_path))


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_d07_train_val_test_folders_are_parts(tmp_path, val):
    dataset(tmp_path, "train/cat", "train/dog", f"{val}/cat", f"{val}/dog", "test/cat", "test/dog")
    catalog = read_catalog(str(tmp_path))
    assert catalog.classes == ("cat", "dog")
    assert {item.path.split("/")[0]: item.part for item in catalog.items} == {
        "train": "train",
        val: "val",
        "test": "test",
    }


def test_a_class_may_be_called_train(tmp_path):
    assert read_catalog(str(dataset(tmp_path, "train", "bus"))).classes == ("bus", "train")


def test_parts_beside_other_folders_are_ambiguous(tmp_path):
    with pytest.raises(DataError, match="cannot be told apart"):
        read_catalog(str(dataset(tmp_path, "train/a", "test/a", "more/a")))


def test_unlabelled_test_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=r"test' holds 3 images but no class folders"):
        read_catalog(str(dataset(tmp_path, "train/a", "train/b", "test")))


def test_d08_difference_of_classes_between_parts_is_named(tmp_path):
    dataset(tmp_path, "train/cat", "train/dog", "test/cat", "test/emu")
    with pytest.raises(DataError, match=r"only in 'train': \['dog'\]; only in 'test': \['emu'\]"):
        read_catalog(str(tmp_path))


def test_d09_litter_is_ignored(tmp_path):
    dataset(tmp_path, "cat", "dog", ".ipynb_checkpoints", "__MACOSX/cat", "cat/.ipynb_checkpoints")
    for name in ("._0.png", "Thumbs.db", ".DS_Store"):
        (tmp_path / "cat" / name).write_bytes(b"x")
    catalog = read_catalog(str(tmp_path))
    assert catalog.classes == ("cat", "dog")
    assert len(catalog.items) == 6
    assert not catalog.excluded


def test_d11_loops_end_and_links_never_relabel(tmp_path):
    dataset(tmp_path / "data", "cat", "dog")
    dataset(tmp_path / "elsewhere", "", count=4)
    (tmp_path / "data" / "cat" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "cat" / "all").symlink_to(tmp_path)
    (tmp_path / "data" / "cat" / "dogs").symlink_to(tmp_path / "data" / "dog")
    (tmp_path / "data" / "dog" / "cats").symlink_to(tmp_path / "data" / "cat")
    dataset(tmp_path / "stranger", "")
    (tmp_path / "data" / "emu").symlink_to(tmp_path / "elsewhere")
    catalog = read_catalog(str(tmp_path / "data"))
    assert [item.label for item in catalog.items] == ["cat"] * 3 + ["dog"] * 3 + ["emu"] * 4


def test_d12_dangling_link_is_recorded(tmp_path):
    dataset(tmp_path, "cat", "dog", count=20)
    (tmp_path / "cat" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert read_catalog(str(tmp_path)).excluded == (Excluded("cat/gone.png", "dangling link"),)


@pytest.mark.parametrize("name", ["猫 🐈", "قط", "CON", "x" * 200, "a\nb", "<script>", "[red]"])
def test_d14_any_folder_name_is_a_class(tmp_path, name):
    catalog = read_catalog(str(dataset(tmp_path, name, "dog")))
    assert name in catalog.classes


def test_i13_more_than_five_percent_bad_files_are_refused(tmp_path):
    dataset(tmp_path, "cat", "dog", count=19)
    for name in ("cat/bad.jpg", "dog/bad.jpg"):
        (tmp_path / name).write_bytes(b"<html>")
    catalog = read_catalog(str(tmp_path))
    assert [entry.path for entry in catalog.excluded] == ["cat/bad.jpg", "dog/bad.jpg"]
    (tmp_path / "cat" / "worse.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"3 of 41 files.*cat/bad\.jpg': no image"):
        read_catalog(str(tmp_path))
    with pytest.raises(DataError, match="3 of 40"):
        check_bad(catalog.without([Excluded("cat/0.png", "damaged")]))


def test_without_keeps_the_rows_of_the_others(tmp_path):
    catalog = read_catalog(str(dataset(tmp_path, "cat", "dog")))
    less = catalog.without([Excluded("cat/1.png", "damaged")])
    assert less.rows().tolist() == [0, 2, 3, 4, 5]
    assert less.excluded == (Excluded("cat/1.png", "damaged"),)


def test_fingerprint_follows_the_files_and_not_the_place(tmp_path):
    root = dataset(tmp_path / "data", "cat", "dog")
    first = read_catalog(str(root)).fingerprint()
    moved = root.rename(tmp_path / "moved")
    assert read_catalog(str(moved)).fingerprint() == first
    os.utime(moved / "cat" / "0.png", ns=(1, 1))
    assert read_catalog(str(moved)).fingerprint() != first


def test_catalog_survives_json(tmp_path):
    root = dataset(tmp_path / "data", "cät", "dog", count=20)
    (root / "dog" / "bad.png").write_bytes(b"")
    shutil.copy(root / "dog" / "0.png", os.fsencode(root / "dog") + b"/\xff.png")
    catalog = read_catalog(str(root))
    assert "dog/\udcff.png" in paths(catalog)
    write_json_atomic(tmp_path / "catalog.json", catalog.to_json())
    data = json.loads((tmp_path / "catalog.json").read_text(encoding="utf-8"))
    assert Catalog.from_json(data) == catalog


def test_progress_reaches_the_number_of_images(tmp_path):
    calls = []
    dataset(tmp_path, "cat", "dog")
    read_catalog(str(tmp_path), progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (6, 6)


def test_sample_digits_opens_like_the_files_it_writes(tmp_path):
    catalog = read_catalog("sample:digits")
    assert catalog.classes == tuple("0123456789")
    assert len(catalog.items) == 1797
    assert catalog.short_side == 32
    image = decode(catalog.open(catalog.items[3]))
    assert image.size == (32, 32)
    brightest = [decode(catalog.open(item)).getextrema()[0][1] for item in catalog.items[:10]]
    assert max(brightest) == 255
    files = write_sample("digits", tmp_path, limit=10)
    assert {path.parent.name for path in files} == set(catalog.classes)
    assert decode(files[3]).tobytes() == image.tobytes()


def test_unknown_sample_suggests_a_known_one():
    with pytest.raises(UsageError, match="Did you mean 'digits'"):
        read_catalog("sample:digit")


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
