from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from autoft.data.inputs.dispatch import list_dataset
from autoft.data.reading import NO_GROUP, PARTS, Reading
from autoft.errors import DataError, MachineError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

READING = Reading()
FOLLOW = Reading(follow_outside=True)
FORMATS = ["csv", "tsv", "jsonl", "ndjson", "parquet"]


def files(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


@pytest.fixture
def four(tmp_path):
    files(tmp_path, "im/1.jpg", "im/2.jpg", "im/3.jpg", "im/4.jpg")
    return tmp_path


def write(path, header, *rows):
    """Write a manifest of whichever format the suffix of `path` says."""
    if path.suffix == ".parquet":
        pq.write_table(
            pa.Table.from_pylist([dict(zip(header, r, strict=True)) for r in rows]), path
        )
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerows([header, *rows])
    else:
        lines = [json.dumps(dict(zip(header, row, strict=True))) for row in rows]
        path.write_text("\n".join(lines) + "\n")
    return path


def text(root, content, name="m.csv"):
    (root / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return root / name


def listed(path, reading=READING):
    return list_dataset(str(path), reading)


def labels(listing):
    return [listing.label_names[code] for code in listing.labels]


def named(column):
    """A manifest of two rows, with labels in `column`."""
    return f"path,label\nim/1.jpg,{column[0]}\nim/2.jpg,{column[1]}\n"


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_listing(four, kind):
    header = ["path", "label", "split", "group", "weight"]
    rows = [
        ["im/4.jpg", "b", "train", "p1", "2"],
        ["im/2.jpg", "a", "Valid", "p2", "0.5"],
        ["./im//1.jpg", "b", "dev", "p1", "1"],
        ["im/3.jpg", "c", "", "", "1e3"],
    ]
    listing = listed(write(four / f"my.{kind}", header, *rows))
    assert listing.name == "my"
    assert listing.root == os.path.realpath(four)
    assert listing.paths == ("im/4.jpg", "im/2.jpg", "im/1.jpg", "im/3.jpg")
    assert labels(listing) == ["b", "a", "b", "c"]
    assert [PARTS[part] for part in listing.parts] == ["train", "val", "val", ""]
    assert listing.groups.tolist() == [0, 1, 0, NO_GROUP]
    assert listing.weights.tolist() == [2.0, 0.5, 1.0, 1000.0]
    first = 2 if kind in ("csv", "tsv") else 1
    assert listing.lines.tolist() == list(range(first, first + 4))
    for path, row in zip(listing.paths, listing.stats.tolist(), strict=True):
        status = Path(listing.root, path).stat()
        assert row == [status.st_size, status.st_mtime_ns, status.st_dev, status.st_ino]


@pytest.mark.parametrize("path", ["path", "file_name", "filename", "image", "image_path", "FILE "])
@pytest.mark.parametrize("label", ["label", "class", "target"])
def test_columns_have_many_names(four, path, label):
    listing = listed(text(four, f"x,{path},{label}\n9,im/1.jpg,a\n9,im/2.jpg,b\n"))
    assert labels(listing) == ["a", "b"]


def test_canonical_names_win_and_others_must_be_clear(four):
    listing = listed(text(four, "path,file_name,label\nim/1.jpg,zzz,a\n"))
    assert listing.paths == ("im/1.jpg",)
    with pytest.raises(DataError, match=r"several columns.*the label.*'class', 'target'"):
        listed(text(four, "path,class,target\nim/1.jpg,a,1\n"))


@pytest.mark.parametrize("kind", FORMATS)
def test_d16_labels_are_the_text_that_is_there(four, kind):
    written = ["001", "NA", "null", "True"]
    rows = [[f"im/{n}.jpg", label] for n, label in enumerate(written, 1)]
    assert labels(listed(write(four / f"m.{kind}", ["path", "label"], *rows))) == written
    rows = [[f"im/{n}.jpg", label] for n, label in enumerate(["1.0", "nan", "None", " a"], 1)]
    listing = listed(write(four / f"m.{kind}", ["path", "label"], *rows))
    assert labels(listing) == ["1.0", "nan", "None", " a"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("values", "expected"),
    [([7, 10], ["7", "10"]), ([True, False], ["true", "false"]), ([1.0, 2.0], ["1.0", "2.0"])],
)
def test_d16_numbers_and_truth_values_become_their_text(four, kind, values, expected):
    rows = [[f"im/{n}.jpg", value] for n, value in enumerate(values, 1)]
    assert labels(listed(write(four / f"m.{kind}", ["path", "label"], *rows))) == expected


@pytest.mark.parametrize(
    "name", ["<script>", "[/red]", "=cmd()", "\x1b[31m", "a\nb", "[x]", "a|b"]
)
def test_d17_labels_that_mean_something_elsewhere_are_text(four, name):
    rows = [["im/1.jpg", name], ["im/2.jpg", "other"]]
    assert labels(listed(write(four / "m.csv", ["path", "label"], *rows))) == [name, "other"]


def test_d18_a_path_of_bytes_that_are_no_utf8(four):
    (Path(os.fsdecode(os.fsencode(four) + b"/\xff.jpg"))).write_bytes(b"x")
    listing = listed(text(four, b"path,label\n\xff.jpg,a\nim/1.jpg,b\n"))
    assert listing.paths[0] == "\udcff.jpg"


def test_d20_missing_column_with_a_guess(four):
    with pytest.raises(DataError, match=r"no column for the label.*'lable'.*Did you mean 'lable'"):
        listed(text(four, "path,lable\nim/1.jpg,a\n"))
    with pytest.raises(DataError, match=r"no column for the path"):
        listed(text(four, "label,x\na,1\n"))
    with pytest.raises(DataError, match="first line that names the columns"):
        listed(text(four, "im/1.jpg,a\nim/2.jpg,b\n"))


@pytest.mark.parametrize("kind", FORMATS)
def test_d20_all_errors_of_the_rows_are_named_at_once(four, kind):
    rows = [
        ["im/1.jpg", "a"],
        ["im/1.jpg", "a"],
        ["./im/1.jpg", "b"],
        ["", "a"],
        *[[f"gone/{n}.jpg", "a"] for n in range(13)],
        ["im", "a"],
        ["im/2.jpg", ""],
    ]
    with pytest.raises(DataError) as caught:
        listed(write(four / f"m.{kind}", ["path", "label"], *rows))
    message, first = str(caught.value), 2 if kind in ("csv", "tsv") else 1
    word = "row" if kind == "parquet" else "line"
    assert "18 unusable rows" in message
    assert f"the same path again in {word} {first + 1} ('im/1.jpg', also {first})" in message
    assert f"again with another label in {word} {first + 2}" in message
    assert f"no path in {word} {first + 3}" in message
    assert f"{word}s {first + 4} ('gone/0.jpg'), {first + 5}" in message
    assert "gone/9.jpg') and 3 more" in message
    assert "gone/10" not in message
    assert f"no regular file in {word} {first + 17} ('im')" in message
    assert f"no label in {word} {first + 18}" in message


def test_lines_are_physical(four):
    listing = listed(text(four, 'path,label\n\n"im/1.jpg","a\nb"\r\n\r\nim/2.jpg,c\n'))
    assert listing.lines.tolist() == [3, 6]
    assert labels(listing) == ["a\nb", "c"]
    with pytest.raises(DataError, match=r"another number of cells than the header in line 3 \(1"):
        listed(text(four, "path,label\nim/1.jpg,a\nim/2.jpg\n"))
    with pytest.raises(DataError, match=r"another number of cells .* in line 2 \(3 for 2\)"):
        listed(text(four, "path,label\nim/1.jpg,a,b\n"))
    assert len(listed(text(four, "path,label\nim/1.jpg,a,,\n"))) == 1
    with pytest.raises(DataError, match="cannot be read at line 3"):
        listed(text(four, 'path,label\nim/1.jpg,a\nim/2.jpg,"b\nim/3.jpg,c\n'))


OUT = ["../x.jpg", "im/../../x.jpg", "/etc/passwd", "im/..", "C:/x.jpg"]
NEVER = [
    "file:///etc/passwd",
    "http://x/y.jpg",
    "hf://a/b.jpg",
    "a\0b.jpg",
    "..\\x.jpg",
    "\\\\h\\x",
]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("path", OUT + NEVER)
def test_d21_paths_that_lead_out_are_refused(four, kind, path):
    rows = [["im/1.jpg", "a"], [path, "b"]]
    line = 3 if kind in ("csv", "tsv") else 2
    with pytest.raises(DataError, match=rf" in (line|row) {line} \(") as caught:
        listed(write(four / f"m.{kind}", ["path", "label"], *rows))
    assert ("--follow-outside" in str(caught.value)) == (path in OUT)


def test_d21_with_leave_paths_may_lead_out_but_urls_never(tmp_path):
    files(tmp_path, "out/1.jpg", "in/2.jpg")
    far = tmp_path / "out" / "1.jpg"
    manifest = text(tmp_path / "in", f"path,label\n{far},a\n../out/1.jpg,a\n2.jpg,b\n")
    listing = listed(manifest, FOLLOW)
    assert listing.paths == (str(far), "../out/1.jpg", "2.jpg")
    assert all(Path(listing.root, path).is_file() for path in listing.paths)
    with pytest.raises(DataError, match="a URL"):
        listed(text(tmp_path / "in", "path,label\nfile:///etc/passwd,a\n"), FOLLOW)


@pytest.mark.parametrize("link", ["out.jpg", "folder"])
def test_d13_links_of_a_manifest_that_leave_are_refused(tmp_path, link):
    files(tmp_path, "out/1.jpg", "in/2.jpg")
    target = tmp_path / "out" / ("1.jpg" if link == "out.jpg" else "")
    (tmp_path / "in" / link).symlink_to(target)
    (tmp_path / "in" / "ok.jpg").symlink_to("2.jpg")
    path = link if link == "out.jpg" else "folder/1.jpg"
    manifest = text(tmp_path / "in", f"path,label\nok.jpg,a\n{path},b\n")
    with pytest.raises(DataError, match=r"out of the manifest's folder.*in line 3 .*link"):
        listed(manifest)
    assert len(listed(manifest, FOLLOW)) == 2


def test_d22_bom_and_crlf_are_fine(four):
    assert labels(listed(text(four, b"\xef\xbb\xbfpath,label\r\nim/1.jpg,a\r\n"))) == ["a"]
    line = b'\xef\xbb\xbf{"path": "im/1.jpg", "label": "a"}\r\n\r\n'
    assert labels(listed(text(four, line, "m.jsonl"))) == ["a"]


def test_d22_wrong_separators_are_explained(four):
    with pytest.raises(DataError, match=r"separated by ';'; expected ','"):
        listed(text(four, "path;label\nim/1.jpg;a\n"))
    with pytest.raises(DataError, match=r"separated by a tab; expected ','.*\.tsv"):
        listed(text(four, "path\tlabel\nim/1.jpg\ta\n"))
    with pytest.raises(DataError, match="separated by ','; expected a tab"):
        listed(text(four, "path,label\nim/1.jpg,a\n", "m.tsv"))


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_d22_empty_manifests_are_explained(four, kind):
    with pytest.raises(DataError, match="is empty"):
        listed(text(four, "", f"m.{kind}"))
    with pytest.raises(DataError, match="is empty"):
        listed(text(four, "\n\n", f"m.{kind}"))


def test_d22_manifests_without_rows_or_of_another_kind_are_explained(four):
    with pytest.raises(DataError, match="names no image"):
        listed(text(four, "path,label\n"))
    with pytest.raises(DataError, match="UTF-16"):
        listed(text(four, "path,label\nim/1.jpg,a\n".encode("utf-16")))
    with pytest.raises(DataError, match=r"more than 1,048,576 characters"):
        listed(text(four, "path,label\n" + "x" * (1 << 21)))
    with pytest.raises(DataError, match=r"no JSON object in line 1 .*\[1\]"):
        listed(text(four, "[1]\n", "m.jsonl"))
    with pytest.raises(DataError, match=r"no JSON object in line 2 \('\{\"path\"'"):
        listed(text(four, '{"path": "im/1.jpg", "label": "a"}\n{"path"\n', "m.jsonl"))
    with pytest.raises(DataError, match="cannot be read"):
        listed(text(four, b"PAR1 no parquet PAR1", "m.parquet"))


def test_d23_labels_that_are_lists(four):
    for label in (["a"], [], {"a": 1}):
        with pytest.raises(DataError, match=r"several labels for one image.* in line 1"):
            listed(text(four, json.dumps({"path": "im/1.jpg", "label": label}), "m.jsonl"))
    table = pa.table({"path": ["im/1.jpg", "im/2.jpg"], "label": [["a", "b"], ["c"]]})
    pq.write_table(table, four / "m.parquet")
    with pytest.raises(DataError, match=r"several labels for one image.* in rows 1"):
        listed(four / "m.parquet")


@pytest.mark.parametrize("cell", ['["a", "b"]', "['a']", "b|c", "c; b"])
def test_d23_cells_of_several_labels_are_named(four, cell):
    rows = [["im/1.jpg", "b"], ["im/2.jpg", cell], ["im/3.jpg", "c"]]
    with pytest.raises(DataError, match=r"several labels for one image.* in line 3 "):
        listed(write(four / "m.csv", ["path", "label"], *rows))


def test_d23_joined_labels_are_known_by_each_other(four):
    rows = [["im/1.jpg", "a|b"], ["im/2.jpg", "b|c"], ["im/3.jpg", "c|a"]]
    with pytest.raises(DataError, match=r"several labels for one image.* in lines 2 .* 3 .* 4 "):
        listed(write(four / "m.csv", ["path", "label"], *rows))
    rows = [["im/1.jpg", "animal|cat"], ["im/2.jpg", "animal|dog"], ["im/3.jpg", "plant"]]
    assert len(listed(write(four / "m.csv", ["path", "label"], *rows))) == 3


@pytest.mark.parametrize("kind", FORMATS)
def test_d23_fractions_look_like_regression(four, kind):
    rows = [["im/1.jpg", 1.5], ["im/2.jpg", 2.0]]
    line = 2 if kind in ("csv", "tsv") else 1
    with pytest.raises(DataError, match=rf"looks like regression.* in (line|row) {line} "):
        listed(write(four / f"m.{kind}", ["path", "label"], *rows))


def test_d23_numbers_beside_names_are_names(four):
    assert labels(listed(text(four, named(["1.5", "b"])))) == ["1.5", "b"]
    assert labels(listed(text(four, named(["1.0", "2"])))) == ["1.0", "2"]


@pytest.mark.parametrize("label", [None, float("nan"), "", "  "])
def test_d23_no_label_is_named(four, label):
    for kind in ("jsonl", "parquet"):
        rows = [["im/1.jpg", label], ["im/2.jpg", label]]
        with pytest.raises(DataError, match=r"no label in (line|row)s 1, 2"):
            listed(write(four / f"m.{kind}", ["path", "label"], *rows))


def test_unknown_splits_and_weights_are_named(four):
    with pytest.raises(DataError, match=r"unknown split.* in line 2 \('trian' Did you mean"):
        listed(text(four, "path,label,split\nim/1.jpg,a,trian\n"))
    for weight in ("0", "-1", "nan", "inf", "x", "", "1e99"):
        with pytest.raises(DataError, match="no finite number above 0 in line 2"):
            listed(text(four, f"path,label,weight\nim/1.jpg,a,{weight}\n"))


def test_rows_of_json_may_name_different_things(four):
    rows = [
        {"path": "im/1.jpg", "label": "a"},
        {"split": "test", "file_name": "im/2.jpg", "class": "b", "path": None, "x": [1]},
        {"file_name": "im/2.jpg", "class": "b", "split": "test"},
        {"path": "im/3.jpg"},
    ]
    lines = [json.dumps(row) for row in rows]
    with pytest.raises(DataError, match=r"no path in line 2; no label in line 4\."):
        listed(text(four, "\n".join(lines), "m.jsonl"))
    listing = listed(text(four, "\n".join([lines[0], lines[2]]), "m.jsonl"))
    assert [PARTS[part] for part in listing.parts] == ["", "test"]


def test_paths_that_are_no_text_are_named(four):
    rows = [{"path": {"bytes": "x"}, "label": "a"}, {"path": 3, "label": "a"}]
    with pytest.raises(DataError, match=r"something else than a path .* in lines 1, 2"):
        listed(text(four, "\n".join(map(json.dumps, rows)), "m.jsonl"))
    with pytest.raises(DataError, match=r"no such file.* in line 1"):
        listed(text(four, '{"path": "\\ud800.jpg", "label": "a"}', "m.jsonl"))


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_hugging_face_metadata_in_a_folder(four, kind):
    write(four / "im" / f"metadata.{kind}", ["file_name", "label"], ["1.jpg", "a"], ["2.jpg", "b"])
    (four / "im" / "notes.txt").write_text("x")
    listing = listed(four / "im")
    assert listing.paths == ("1.jpg", "2.jpg")
    assert listing.name == "im"
    assert listing.counts == {"images in no row of the table": 2, "ignored": 1}


def test_hugging_face_metadata_in_parts(tmp_path):
    files(tmp_path, "train/a/1.jpg", "train/2.jpg", "validation/1.jpg", "test/1.jpg")
    header = ["file_name", "label"]
    write(tmp_path / "train/metadata.csv", header, ["a/1.jpg", "x"], ["2.jpg", "y"])
    write(tmp_path / "validation/metadata.jsonl", header, ["1.jpg", "x"])
    with pytest.raises(DataError, match=r"test' holds no such file"):
        listed(tmp_path)
    write(tmp_path / "test/metadata.csv", ["file_name", "text"], ["1.jpg", "hello"])
    with pytest.raises(DataError, match=r"test/metadata\.csv' has no label column"):
        listed(tmp_path)
    write(tmp_path / "test/metadata.csv", header, ["1.jpg", "y"])
    listing = listed(tmp_path)
    assert dict(zip(listing.paths, (PARTS[part] for part in listing.parts), strict=True)) == {
        "train/a/1.jpg": "train",
        "train/2.jpg": "train",
        "validation/1.jpg": "val",
        "test/1.jpg": "test",
    }
    assert labels(listing) == ["y", "x", "y", "x"]


def test_metadata_without_labels_leaves_class_folders_to_say_them(tmp_path):
    files(tmp_path, "cat/1.jpg", "dog/1.jpg", "3.jpg")
    write(tmp_path / "metadata.csv", ["file_name", "text"], ["cat/1.jpg", "a cat"])
    listing = listed(tmp_path)
    assert listing.label_names == ("cat", "dog")
    assert listing.counts["metadata files without labels"] == 1
    for folder in ("cat", "dog"):
        (tmp_path / folder / "1.jpg").unlink()
    with pytest.raises(DataError, match=r"metadata\.csv' has no label column.*'text'"):
        listed(tmp_path)


def test_two_metadata_files_are_ambiguous(four):
    for kind in ("csv", "jsonl"):
        write(four / f"metadata.{kind}", ["file_name", "label"], ["im/1.jpg", "a"])
    with pytest.raises(DataError, match=r"metadata\.csv and metadata\.jsonl"):
        listed(four)


def test_parquet_without_pyarrow_says_what_to_install(four, monkeypatch):
    path = write(four / "m.parquet", ["path", "label"], ["im/1.jpg", "a"])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MachineError, match=r"pip install 'autoft\[parquet\]'"):
        listed(path)


def test_progress_knows_the_rows_of_parquet_and_not_of_csv(four):
    calls = []
    rows = [["im/1.jpg", "a"], ["im/2.jpg", "b"]]
    for kind in ("csv", "parquet"):
        path = write(four / f"m.{kind}", ["path", "label"], *rows)
        list_dataset(str(path), READING, lambda *call: calls.append(call))
    assert calls == [(2, 0), (2, 2)]


MEASURE = """
import resource, sys
from autoft.data.inputs.dispatch import list_dataset
from autoft.data.reading import Reading
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
listing = list_dataset(sys.argv[1], Reading())
print(len(listing), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_d22_memory_is_bounded_by_the_rows(tmp_path):
    rows = 60_000
    (tmp_path / "0.jpg").write_bytes(b"x")
    (tmp_path / "im").mkdir()
    with (tmp_path / "m.csv").open("w") as file:
        file.write("path,label,group\n")
        for number in range(rows):
            if number % 20_000 == 0:
                (tmp_path / f"{number}.jpg").write_bytes(b"x")
            (tmp_path / "im" / f"{number}.jpg").hardlink_to(
                tmp_path / f"{number // 20_000 * 20_000}.jpg"
            )
            file.write(f"im/{number}.jpg,{number % 10},{number % 1000}\n")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "m.csv")],
        capture_output=True,
        text=True,
        check=True,
    )
    count, used = map(int, done.stdout.split())
    assert count == rows
    assert used < 400 * rows
