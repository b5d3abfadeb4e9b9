from __future__ import annotations

import csv
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoft.data.catalog import Catalog, Item
from autoft.data.split import Split, make_split, read_split, write_split
from autoft.errors import DataError


def catalog_of(counts, parts=("",)):
    """A catalog of `counts[label]` images in each of the parts."""
    items = [
        Item(f"{part}/{label}/{number}.png", label, part)
        for part in parts
        for label, count in counts.items()
        for number in range(count)
    ]
    return Catalog("data", "/data", tuple(sorted(counts)), tuple(items))


def labels_of(catalog, positions):
    return Counter(catalog.items[position].label for position in positions)


@given(
    counts=st.dictionaries(st.text("abcd", min_size=1), st.integers(3, 80), min_size=2),
    seed=st.integers(0, 2**32),
)
def test_parts_are_disjoint_complete_stratified_and_repeatable(counts, seed):
    catalog = catalog_of(counts)
    split = make_split(catalog, seed)
    together = split.train + split.validation + split.test
    assert sorted(together) == list(range(len(catalog.items)))
    assert make_split(catalog, seed) == split
    for part, share in ((split.train, 0.6), (split.validation, 0.2), (split.test, 0.2)):
        found = labels_of(catalog, part)
        for label, count in counts.items():
            assert found[label] >= 1
            assert abs(found[label] - share * count) <= 2


def test_another_seed_gives_another_split_of_the_same_sizes():
    catalog = catalog_of({"a": 40, "b": 60})
    one, two = make_split(catalog, 0), make_split(catalog, 1)
    assert (len(one.train), len(one.validation), len(one.test)) == (60, 20, 20)
    assert len(two.test) == 20
    assert one.test != two.test
    assert one.hash != two.hash
    assert one.hash == make_split(catalog, 0).hash


@pytest.mark.parametrize(
    ("total", "validation", "test"),
    [(1_000, 200, 200), (2_000, 320, 400), (30_000, 5_100, 4_500), (100_000, 10_000, 15_000)],
)
def test_shares_follow_the_size(total, validation, test):
    split = make_split(catalog_of({"a": total // 2, "b": total // 2}), 0)
    assert (len(split.validation), len(split.test)) == (validation, test)


def test_many_small_classes_do_not_shift_the_total():
    split = make_split(catalog_of({str(label): 7 for label in range(100)}), 0)
    assert (len(split.test), len(split.validation)) == (140, 140)


def test_given_parts_are_respected():
    catalog = catalog_of({"a": 10, "b": 20}, parts=("train", "val", "test"))
    split = make_split(catalog, 0)
    for part, positions in (
        ("train", split.train),
        ("val", split.validation),
        ("test", split.test),
    ):
        assert {catalog.items[position].part for position in positions} == {part}
        assert len(positions) == 30


def test_a_given_test_part_is_never_trained_on():
    catalog = catalog_of({"a": 10, "b": 20}, parts=("train", "test"))
    split = make_split(catalog, 0)
    assert {catalog.items[position].part for position in split.test} == {"test"}
    assert {catalog.items[p].part for p in split.train + split.validation} == {"train"}
    assert labels_of(catalog, split.validation).keys() == {"a", "b"}


@pytest.mark.parametrize(
    ("parts", "enough"),
    [(("",), 3), (("train", "test"), 2), (("train", "val"), 2), (("train", "val", "test"), 1)],
)
def test_a_class_needs_one_image_for_each_part_to_be_cut(parts, enough):
    split = make_split(catalog_of({"a": enough, "b": 9}, parts), 0)
    assert len(split.train) >= 2
    if enough > 1:
        with pytest.raises(DataError, match=f"'a' has {enough - 1}; expected at least {enough}"):
            make_split(catalog_of({"a": enough - 1, "b": 9}, parts), 0)


def test_a_class_lost_while_decoding_is_named():
    catalog = catalog_of({"a": 9, "b": 9})
    gone = [item for item in catalog.items if item.label == "a"]
    with pytest.raises(DataError, match="'a' has 0"):
        make_split(catalog.without(gone), 0)


def test_a_split_survives_its_file_whatever_the_names(tmp_path):
    names = ["a,b", 'a"b', "a\nb", "a\r\nb", "猫", "\udcff\udcfe", "=1+1"]
    items = tuple(
        Item(f"{label}/{name}.png", label) for label in ("x", "y\udcff") for name in names
    )
    catalog = Catalog("data", "/data", ("x", "y\udcff"), items)
    split = make_split(catalog, 3)
    write_split(tmp_path / "split.csv", catalog, split)
    assert read_split(tmp_path / "split.csv", catalog) == split
    with (tmp_path / "split.csv").open(newline="", errors="surrogateescape") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == ["path", "label", "part"]
    assert len(lines) == len(items)


def test_a_split_that_does_not_fit_the_catalog_is_refused(tmp_path):
    catalog = catalog_of({"a": 5, "b": 5})
    write_split(tmp_path / "s.csv", catalog, make_split(catalog, 0))
    with pytest.raises(DataError, match=r"/a/0\.png.*start a new run"):
        read_split(tmp_path / "s.csv", catalog.without(catalog.items[:1]))
    twice = (tmp_path / "s.csv").read_text() + "/a/0.png,a,test\n"
    (tmp_path / "twice.csv").write_text(twice)
    with pytest.raises(DataError, match="named once"):
        read_split(tmp_path / "twice.csv", catalog)
    with pytest.raises(DataError, match="cannot be read"):
        read_split(tmp_path / "none.csv", catalog)


def test_positions_are_plain_integers():
    split = make_split(catalog_of({"a": 5, "b": 5}), np.int64(0))
    assert isinstance(split, Split)
    assert all(type(position) is int for position in split.train + split.validation + split.test)
