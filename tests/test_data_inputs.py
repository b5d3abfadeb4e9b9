from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from autoft.data.inputs.dispatch import list_dataset
from autoft.data.inputs.folders import better_root
from autoft.data.inputs.sample import write_sample
from autoft.data.reading import NO_GROUP, PARTS, Excluded, Reading
from autoft.errors import DataError, UsageError

READING = Reading()
FOLLOW = Reading(follow_outside=True)


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")


def dataset(root, *folders, count=3):
    for folder in folders:
        for number in range(count):
            touch(root / folder / f"{number}.png")
    return root


def listed(root, reading=READING):
    return list_dataset(str(root), reading)


def labels(listing):
    return [listing.label_names[code] for code in listing.labels]


def tree_hash(root):
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        digest.update(f"{path} {path.lstat().st_mtime_ns} {path.lstat().st_mode}".encode())
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


def test_columns_have_an_entry_an_image(tmp_path):
    listing = listed(dataset(tmp_path / "pets", "dog", "cat/deep/er"))
    assert listing.name == "pets"
    assert listing.root == os.path.realpath(tmp_path / "pets")
    assert listing.paths[0] == "cat/deep/er/0.png"
    assert labels(listing) == ["cat"] * 3 + ["dog"] * 3
    assert listing.parts.tolist() == [0] * 6
    assert listing.groups.tolist() == [NO_GROUP] * 6
    assert listing.weights.tolist() == [1.0] * 6
    for path, row in zip(listing.paths, listing.stats.tolist(), strict=True):
        status = Path(listing.root, path).stat()
        assert row == [status.st_size, status.st_mtime_ns, status.st_dev, status.st_ino]
    types = [c.dtype for c in (listing.labels, listing.parts, listing.groups, listing.weights)]
    assert types == [np.int32, np.int8, np.int64, np.float32]
    assert listing.lines is None


def test_listing_leaves_the_dataset_as_it_was_and_opens_no_image(tmp_path):
    root = dataset(tmp_path, "cat", "dog")
    (root / "cat" / "0.png").chmod(0)
    before = tree_hash(root / "dog")
    assert len(listed(root)) == 6
    assert tree_hash(root / "dog") == before


def test_d01_missing_path_is_named_with_a_near_one(tmp_path):
    dataset(tmp_path / "flowers", "a", "b")
    with pytest.raises(DataError, match=r"flower' does not exist.*Did you mean '.*flowers'"):
        listed(tmp_path / "flower")
    with pytest.raises(DataError, match="does not exist"):
        listed(tmp_path / "flowers" / "a" / "0.png" / "b")
    with pytest.raises(DataError, match="does not exist"):
        list_dataset("a\0b", READING)


def test_d01_a_file_of_another_kind_is_named(tmp_path):
    (tmp_path / "data.rar").write_bytes(b"x")
    with pytest.raises(DataError, match=r"data\.rar' is a file of another kind.*\.csv.*\.zip"):
        listed(tmp_path / "data.rar")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
@pytest.mark.parametrize("closed", ["", "cat"])
def test_d01_unreadable_folder_is_named_with_its_mode(tmp_path, closed):
    folder = dataset(tmp_path / "data", "cat", "dog") / closed
    folder.chmod(0)
    try:
        with pytest.raises(DataError, match=r"cannot be read.*mode 0o0"):
            listed(tmp_path / "data")
    finally:
        folder.chmod(0o755)


@pytest.mark.parametrize("scheme", ["s3://x/y", "https://x/y.zip", "hf:owner/name", "samples:x"])
def test_unknown_schemes_are_usage_errors(scheme):
    with pytest.raises(UsageError, match="hf://owner/name"):
        list_dataset(scheme, READING)


def test_near_schemes_are_suggested():
    with pytest.raises(UsageError, match=r"Did you mean 'hf://'"):
        list_dataset("hf:owner/name", READING)


def test_d02_no_image_lists_suffixes_and_what_was_found(tmp_path):
    with pytest.raises(DataError, match=r"no files.*\.jpg"):
        listed(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"1 \.txt"):
        listed(tmp_path)


def test_a_manifest_in_a_folder_without_classes_is_suggested(tmp_path):
    dataset(tmp_path, "")
    (tmp_path / "labels.csv").write_text("path,label\n")
    with pytest.raises(DataError, match=r"3 images but no class folders.*labels\.csv"):
        listed(tmp_path)


def test_better_root_suggests_the_folder_that_has_more(tmp_path):
    root = dataset(tmp_path / "data", "cat/a", "cat/b")
    assert f"Did you mean '{root}/cat'" in better_root(root, listed(root).paths)
    dataset(tmp_path / "pets", "cat", "dog")
    assert f"Did you mean '{tmp_path}/pets'" in better_root(tmp_path / "pets" / "cat", ["0.png"])


def test_d04_empty_classes_are_named_apart(tmp_path):
    dataset(tmp_path / "one", "cat", "dog")
    (tmp_path / "one" / "emu" / "deep").mkdir(parents=True)
    assert listed(tmp_path / "one").empty == ("emu",)
    dataset(tmp_path / "two", "train/cat", "train/dog", "test/cat", "test/dog")
    for folder in ("train/emu", "test/emu"):
        (tmp_path / "two" / folder).mkdir()
    assert listed(tmp_path / "two").empty == ("emu",)


@pytest.mark.parametrize("val", ["val", "valid", "validation", "dev", "Val"])
def test_d07_train_val_test_folders_are_parts(tmp_path, val):
    dataset(tmp_path, "train/cat", "train/dog", f"{val}/cat", f"{val}/dog", "test/cat", "test/dog")
    listing = listed(tmp_path)
    assert listing.label_names == ("cat", "dog")
    found = {p.split("/")[0]: PARTS[n] for p, n in zip(listing.paths, listing.parts, strict=True)}
    assert found == {"train": "train", val: "val", "test": "test"}


def test_a_class_may_be_called_train(tmp_path):
    assert listed(dataset(tmp_path, "train", "bus")).label_names == ("bus", "train")


def test_parts_beside_other_folders_are_ambiguous(tmp_path):
    with pytest.raises(DataError, match="cannot be told apart"):
        listed(dataset(tmp_path, "train/a", "test/a", "more/a"))


def test_unlabelled_test_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=r"test' holds 3 images but no class folders"):
        listed(dataset(tmp_path, "train/a", "train/b", "test"))


def test_d09_litter_is_ignored_and_counted(tmp_path):
    dataset(tmp_path, "cat", "dog", ".ipynb_checkpoints", "__MACOSX/cat", "cat/.ipynb_checkpoints")
    for name in ("._0.png", "Thumbs.db", ".DS_Store", "notes.txt"):
        touch(tmp_path / "cat" / name)
    listing = listed(tmp_path)
    assert listing.label_names == ("cat", "dog")
    assert len(listing) == 6
    assert not listing.excluded
    assert listing.counts == {"ignored": 7}


def test_d10_mixed_depth_is_noted(tmp_path):
    listing = listed(dataset(tmp_path, "a", "b/sub", "b/sub/sub"))
    assert labels(listing) == ["a"] * 3 + ["b"] * 6
    assert listing.counts == {"in sub-folders": 6}


def test_loose_images_beside_classes_are_excluded(tmp_path):
    dataset(tmp_path, "cat", "dog")
    touch(tmp_path / "1.png")
    assert listed(tmp_path).excluded == (Excluded("1.png", "not in a class folder"),)


def test_d11_loops_end_and_links_never_relabel(tmp_path):
    dataset(tmp_path / "data", "cat", "dog")
    dataset(tmp_path / "elsewhere", "", count=4)
    (tmp_path / "data" / "cat" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "cat" / "self").symlink_to("self")
    (tmp_path / "data" / "cat" / "all").symlink_to(tmp_path)
    (tmp_path / "data" / "cat" / "dogs").symlink_to(tmp_path / "data" / "dog")
    (tmp_path / "data" / "dog" / "cats").symlink_to(tmp_path / "data" / "cat")
    (tmp_path / "data" / "emu").symlink_to(tmp_path / "elsewhere")
    listing = listed(tmp_path / "data", FOLLOW)
    assert labels(listing) == ["cat"] * 3 + ["dog"] * 3 + ["emu"] * 4
    assert len({tuple(row) for row in listing.stats[:, 2:].tolist()}) == 10


def test_d12_dangling_link_is_recorded(tmp_path):
    dataset(tmp_path, "cat", "dog")
    (tmp_path / "cat" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert listed(tmp_path).excluded == (Excluded("cat/gone.png", "missing (dangling link)"),)


def test_what_is_no_regular_file_is_recorded(tmp_path):
    dataset(tmp_path, "cat", "dog")
    os.mkfifo(tmp_path / "cat" / "pipe.png")
    assert listed(tmp_path).excluded == (Excluded("cat/pipe.png", "not a regular file"),)


@pytest.mark.parametrize("link", ["cat/out.png", "emu"])
def test_d13_links_that_leave_are_refused_unless_allowed(tmp_path, link):
    dataset(tmp_path / "data", "cat", "dog")
    target = dataset(tmp_path / "elsewhere", "") / ("0.png" if link.endswith("png") else "")
    (tmp_path / "data" / link).symlink_to(target)
    with pytest.raises(
        DataError, match=rf"lead out of it \(1\): '{link}'.*elsewhere.*--follow-outside"
    ):
        listed(tmp_path / "data")
    assert len(listed(tmp_path / "data", FOLLOW)) == (7 if link.endswith("png") else 9)


def test_d13_a_link_out_and_in_again_and_a_sibling_of_like_name(tmp_path):
    dataset(tmp_path / "data", "cat", "dog")
    dataset(tmp_path / "data-more", "")
    (tmp_path / "data" / "dog" / "again.png").symlink_to("../../data/cat/0.png")
    assert len(listed(tmp_path / "data")) == 7
    (tmp_path / "data" / "dog" / "like.png").symlink_to(tmp_path / "data-more" / "0.png")
    with pytest.raises(DataError, match=r"dog/like\.png"):
        listed(tmp_path / "data")


def test_the_root_may_be_a_link(tmp_path):
    dataset(tmp_path / "data", "cat", "dog")
    (tmp_path / "link").symlink_to("data")
    assert listed(tmp_path / "link").root == os.path.realpath(tmp_path / "data")


@pytest.mark.parametrize("name", ["猫 🐈", "قط", "CON", "x" * 200, "a\nb", "<script>", "[red]"])
def test_d14_any_folder_name_is_a_class(tmp_path, name):
    assert name in listed(dataset(tmp_path, name, "dog")).label_names


def test_d18_d19_names_of_bytes_and_of_255_bytes(tmp_path):
    dataset(tmp_path, "cat", "dog")
    touch(tmp_path / "cat" / ("x" * 251 + ".png"))
    shutil.copy(tmp_path / "dog" / "0.png", os.fsencode(tmp_path / "dog") + b"/\xff.png")
    listing = listed(tmp_path)
    assert "dog/\udcff.png" in listing.paths
    assert len(listing) == 8


def test_progress_ends_with_the_number_of_images(tmp_path):
    calls = []
    dataset(tmp_path, "cat", "dog")
    list_dataset(str(tmp_path), READING, lambda done, total: calls.append((done, total)))
    assert calls[-1] == (6, 0)


def test_sample_digits_is_a_folder_of_files(tmp_path):
    listing = list_dataset("sample:digits", READING)
    assert listing.name == "digits"
    assert listing.label_names == tuple("0123456789")
    assert len(listing) == 1797
    again = list_dataset("sample:digits", READING)
    assert again.paths == listing.paths
    assert (again.stats == listing.stats).all()
    files = write_sample("digits", tmp_path, limit=10)
    assert {path.parent.name for path in files} == set(listing.label_names)
    brightest = []
    for file in files:
        with Image.open(file) as image:
            assert (image.size, image.mode) == ((32, 32), "RGB")
            brightest.append(image.getextrema()[0][1])
        same = Path(listing.root, file.relative_to(tmp_path)).read_bytes()
        assert file.read_bytes() == same
    assert max(brightest) == 255


def test_unknown_sample_suggests_a_known_one():
    with pytest.raises(UsageError, match="Did you mean 'digits'"):
        list_dataset("sample:digit", READING)
