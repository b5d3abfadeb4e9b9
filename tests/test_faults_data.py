"""The data and image rows of the fault table (D01-D29, I01-I15), by their ids.

Each row builds a dataset with the fault, runs the command line on it, and looks at the exit code,
the sentence, and what is reported. A row of the table has one case or several. Not shown, since it
needs Windows: paths of more than 260 characters there (D19).
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from PIL import ExifTags, Image

from autoft.cli.main import main
from autoft.data.dataset import name_images, read_images
from autoft.data.inputs.sample import write_sample
from autoft.data.pixels.decode import decode, to_square
from autoft.data.pixels.ondemand import DecodedOnTheFly
from autoft.data.reading import Reading
from autoft.errors import DataError

RNG = np.random.default_rng(0)
NOBODY = 65534
ONE_TRIAL = ("--trials", "1", "--time", "200s", "--export", "onnx")
RSS_LIMIT = 300 * 2**20


@dataclass
class Desk:
    """A folder to build in, and the command line."""

    root: Path
    capture: pytest.CaptureFixture[str]
    request: pytest.FixtureRequest

    def photo(self, path: str, seed: int | None = None, size: tuple[int, int] = (24, 20)) -> Path:
        """Write one noise image, different from all others unless `seed` repeats."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        rng = RNG if seed is None else np.random.default_rng(seed)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(file, "png")
        return file

    def classes(self, *names: str, count: int = 10) -> None:
        for name in names:
            for number in range(count):
                self.photo(f"{name}/{number:03d}.png")

    def autoft(self, *words: object) -> tuple[int, str, str]:
        self.capture.readouterr()
        code = main([str(word) for word in words])
        out, err = self.capture.readouterr()
        assert "Traceback" not in err
        return code, out, err

    def scan(self, *flags: object, path: str | Path = "") -> dict[str, Any]:
        """Scan, expect success, return the report."""
        code, out, err = self.autoft("data", "scan", self.root / path, "--json", *flags)
        assert code == 0, err
        report: dict[str, Any] = json.loads(out)
        return report

    def refused(self, *flags: object, path: str | Path = "", code: int = 3) -> str:
        """Scan, expect the exit code, return the one sentence."""
        got, out, err = self.autoft("data", "scan", self.root / path, *flags)
        assert got == code, (got, out, err)
        assert out == ""
        errors = [line for line in err.splitlines() if line.startswith("Error: ")]
        assert len(errors) == 1
        return errors[0]

    def split(self, *flags: object, path: str | Path = "") -> list[dict[str, str]]:
        """Split, return the rows that were written."""
        file = self.root.parent / "split.csv"
        code, _, err = self.autoft("data", "split", self.root / path, "--out", file, *flags)
        assert code == 0, err
        with file.open(newline="", encoding="utf-8", errors="surrogateescape") as lines:
            return list(csv.DictReader(lines))

    def manifest(self, name: str, text: str, encoding: str = "utf-8") -> Path:
        file = self.root / name
        file.write_bytes(text.encode(encoding))
        return file


Row = Callable[[Desk], None]
ROWS: dict[str, Row] = {}


def row(name: str) -> Callable[[Row], Row]:
    def keep(function: Row) -> Row:
        assert name not in ROWS
        ROWS[name] = function
        return function

    return keep


@pytest.fixture
def desk(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> Desk:
    monkeypatch.setenv("AUTOFT_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "data"
    root.mkdir()
    return Desk(root, capsys, request)


# --- D: datasets --------------------------------------------------------------------------------


@row("D01-missing")
def _(desk: Desk) -> None:
    error = desk.refused(path="nowhere")
    assert "nowhere" in error
    assert "does not exist" in error


@row("D01-a-file")
def _(desk: Desk) -> None:
    desk.manifest("notes.txt", "x")
    assert "notes.txt" in desk.refused(path="notes.txt")


@row("D01-unreadable")
def _(desk: Desk) -> None:
    scratch = Path(tempfile.mkdtemp())
    there = Desk(scratch / "data", desk.capture, desk.request)
    there.classes("cat", "dog")
    there.scan()  # imports all that is needed, while it can still be read
    scratch.chmod(0o755)
    (there.root / "cat").chmod(0)
    try:
        with _without_rights():
            error = there.refused()
    finally:
        (there.root / "cat").chmod(0o755)
        shutil.rmtree(scratch)
    assert re.search(r"cat' cannot be read .*mode 0o0", error)


@contextmanager
def _without_rights() -> Iterator[None]:
    """Be another user for a moment where the tests run as root, who reads everything."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(before)


@row("D02-empty")
def _(desk: Desk) -> None:
    error = desk.refused()
    assert "No images" in error
    assert ".jpg" in error


@row("D02-no-image")
def _(desk: Desk) -> None:
    desk.manifest("a.txt", "x")
    desk.manifest("b.txt", "x")
    assert "2 .txt" in desk.refused()


@row("D03-one-class")
def _(desk: Desk) -> None:
    desk.classes("pets/cat", "pets/dog")
    error = desk.refused(path="pets/cat")
    assert "at least 2 classes" in error or "no class folders" in error
    assert f"Did you mean '{desk.root / 'pets'}'" in error
    assert f"Did you mean '{desk.root / 'pets'}'" in desk.refused()


@row("D04-empty-class")
def _(desk: Desk) -> None:
    desk.classes("cat", "dog")
    (desk.root / "emu").mkdir()
    report = desk.scan()
    assert report["excluded"] == [["emu", "empty class"]]
    assert list(report["classes"]) == ["cat", "dog"]
    assert report["found"] == 20
    assert desk.scan("--keep-empty")["classes"] == {"cat": 10, "dog": 10, "emu": 0}
    assert len(desk.split("--keep-empty")) == 20


@row("D05-small-class")
def _(desk: Desk) -> None:
    desk.classes("cat", "dog")
    desk.photo("emu/0.png")
    for command in ("scan", "split"):
        code, _, error = desk.autoft("data", command, desk.root)
        assert code == 3
        assert "'emu'" in error
    assert "--min-per-class drop" in error
    report = desk.scan("--min-per-class", "drop", "--max-bad", "0")
    assert list(report["classes"]) == ["cat", "dog"]
    assert report["excluded"] == [["emu/0.png", "in a class with too few images"]]
    assert report["left_out"] == 1
    assert len(desk.split("--min-per-class", "drop")) == 20
    for number in range(6):  # one image, however often it is there
        shutil.copy(desk.root / "emu" / "0.png", desk.root / "emu" / f"copy{number}.png")
    report = desk.scan("--min-per-class", "drop")
    assert list(report["classes"]) == ["cat", "dog"]
    assert report["left_out"] == 7


@row("D06-fewer-images-than-folds")
def _(desk: Desk) -> None:
    desk.classes("cat", "dog", count=40)
    desk.classes("emu", count=4)
    code, out, _ = desk.autoft("data", "split", desk.root)
    assert code == 0
    assert "note:" in out
    parts = {(each["label"], each["part"]) for each in desk.split()}
    assert {("emu", part) for part in ("train", "validation", "test")} <= parts


@row("D07-parts")
def _(desk: Desk) -> None:
    for part in ("Train", "dev", "test"):
        desk.classes(f"{part}/cat", f"{part}/dog", count=5)
    report = desk.scan()
    assert report["classes"] == {"cat": 15, "dog": 15}
    parts = {each["path"].split("/")[0]: each["part"] for each in desk.split()}
    assert parts == {"Train": "train", "dev": "validation", "test": "test"}


@row("D08-classes-differ")
def _(desk: Desk) -> None:
    desk.classes("train/cat", "train/dog", "test/cat", "test/emu")
    code, _, error = desk.autoft("data", "split", desk.root)
    assert code == 3
    assert "only in 'train': ['dog']" in error
    assert "only in 'test': ['emu']" in error


@row("D09-litter")
def _(desk: Desk) -> None:
    desk.classes("cat", "dog", ".ipynb_checkpoints", "__MACOSX/cat")
    for name in ("._0.png", "Thumbs.db", ".DS_Store"):
        (desk.root / "cat" / name).write_bytes(b"x")
    report = desk.scan()
    assert report["found"] == 20
    assert report["noticed"]["ignored"] == 5  # two folders and three files


@row("D10-mixed-depth")
def _(desk: Desk) -> None:
    desk.classes("cat", "dog/puppies")
    report = desk.scan()
    assert report["classes"] == {"cat": 10, "dog": 10}
    assert report["noticed"]["in sub-folders"] == 10


@row("D11-symlink-loop")
def _(desk: Desk) -> None:
    desk.classes("cat", "dog")
    (desk.root / "cat" / "loop").symlink_to(desk.root)
    (desk.root / "cat" / "dogs").symlink_to(desk.root / "dog")
    assert desk.scan()["classes"] == {"cat": 10, "dog": 10}


@row("D12-dangling-link")
def _(desk: Desk) -> None:
    desk.classes("cat", "dog", count=20)
    (desk.root / "cat" / "gone.png").symlink_to(desk.root / "nowhere.png")
    report = desk.scan()
    assert report["missing"] == 1
    assert report["excluded"][0][0] == "cat/gone.png"


@row("D13-link-outside")
def _(desk: Desk) -> None:
    desk.classes("cat", "dog")
    outside = Desk(desk.root.parent / "elsewhere", desk.capture, desk.request)
    outside.classes("emu")
    (desk.root / "emu").symlink_to(outside.root / "emu")
    error = desk.refused()
    assert "emu" in error
    assert "--follow-outside" in error
    assert desk.scan("--follow-outside")["classes"]["emu"] == 10


@row("D14-names-end-to-end")
def _(desk: Desk) -> None:
    names = ["猫 🐈", "قط", "CON", "x" * 200, "a\nb", "<script>", "[red]", "=1+1", "001"]
    for index, name in enumerate(names):
        for number in range(6):
            desk.photo(f"{name}/{number}.png", seed=100 * index + number, size=(64, 64))
    run, weights = desk.root.parent / "run", desk.request.getfixturevalue("tiny_weights")
    words = ["search", *ONE_TRIAL, "--dataset"]
    done = subprocess.run(
        [sys.executable, "-m", "autoft", *words, desk.root, "--weights", weights, "--out", run],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    assert result["classes"] == sorted(names)
    session = onnxruntime.InferenceSession(run / "best" / "model.onnx")
    told = session.get_modelmeta().custom_metadata_map
    assert json.loads(told["autoft.classes"]) == sorted(names)
    with (run / "predictions" / "test.csv").open(newline="", encoding="utf-8") as file:
        cells = {each["label"].removeprefix("'") for each in csv.DictReader(file)}
    assert cells == set(names)
    code, out, _ = desk.autoft("predict", run, desk.root / "a\nb")
    assert code == 0
    assert "a\\nb" in out


@row("D15-twins")
def _(desk: Desk) -> None:
    nfc, nfd = "caf\u00e9", unicodedata.normalize("NFD", "caf\u00e9")
    desk.classes(nfc, "dog", count=6)
    desk.classes(nfd, "Dog", "dog ", count=4)
    error = desk.refused()
    assert "'Dog' (" in error
    assert "caf\\xe9" in error
    assert "cafe\\u0301" in error
    report = desk.scan("--merge-classes")
    assert report["classes"] == {nfc: 10, "dog": 14}


@row("D16-labels-stay-strings")
def _(desk: Desk) -> None:
    labels = ["NA", "null", "001", "1.0", "True", "nan"]
    lines = ["path,label"]
    for index, label in enumerate(labels):
        for number in range(4):
            desk.photo(f"images/{index}-{number}.png")
            lines.append(f"images/{index}-{number}.png,{label}")
    desk.manifest("labels.csv", "\n".join(lines) + "\n")
    assert desk.scan(path="labels.csv")["classes"] == dict.fromkeys(sorted(labels), 4)
    assert {each["label"] for each in desk.split(path="labels.csv")} == set(labels)


@row("D17-hostile-names")
def _(desk: Desk) -> None:
    names = ["<script>alert(1)<", "[red]x[", "\x1b[31mred", "=cmd()", "a\nb"]
    desk.classes(*names, count=5)
    code, out, _ = desk.autoft("data", "scan", desk.root)
    assert code == 0
    assert "\x1b" not in out
    assert "[red]x[" in out
    assert set(desk.scan()["classes"]) == set(names)
    cells = [cell for each in desk.split() for cell in each.values()]
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@"))]


@row("D18-not-utf8")
def _(desk: Desk) -> None:
    desk.classes("cat", "dog")
    shutil.move(desk.root / "cat" / "000.png", os.fsencode(desk.root / "cat") + b"/\xff\xfe.png")
    (desk.root / "dog" / "000.png").write_bytes(b"")
    code, out, _ = desk.autoft("data", "scan", desk.root, "--json", "--max-bad", "1")
    out.encode("utf-8")
    assert code == 0
    assert json.loads(out)["usable"] == 19
    assert "cat/\udcff\udcfe.png" in {each["path"] for each in desk.split("--max-bad", "1")}


@row("D19-long-names")
def _(desk: Desk) -> None:
    desk.classes("cat", "dog")
    name = "x" * 251 + ".png"
    desk.photo(f"cat/{name}")
    assert desk.scan()["usable"] == 21
    assert f"cat/{name}" in {each["path"] for each in desk.split()}


def _listed(desk: Desk, *extra: str, header: str = "path,label") -> str:
    """Write eight images and return a manifest of them with more lines."""
    lines = [header]
    for number in range(8):
        desk.photo(f"{number}.png")
        lines.append(f"{number}.png,{'cat' if number % 2 else 'dog'}")
    return "\n".join([*lines, *extra]) + "\n"


@row("D20-missing-column")
def _(desk: Desk) -> None:
    desk.manifest("m.csv", _listed(desk, header="path,lable"))
    error = desk.refused(path="m.csv")
    assert "label" in error
    assert "lable" in error


@row("D20-duplicate-row")
def _(desk: Desk) -> None:
    desk.manifest("m.csv", _listed(desk, "3.png,cat"))
    error = desk.refused(path="m.csv")
    assert re.search(r"line 10\b", error)
    assert "3.png" in error


@row("D20-two-labels")
def _(desk: Desk) -> None:
    desk.manifest("m.csv", _listed(desk, "3.png,dog"))
    assert re.search(r"line 10\b", desk.refused(path="m.csv"))


@row("D20-path-missing")
def _(desk: Desk) -> None:
    gone = [f"gone{number}.png,cat" for number in range(13)]
    desk.manifest("m.csv", _listed(desk, *gone))
    error = desk.refused(path="m.csv")
    assert re.search(r"lines 10 .* 19\b", error)
    assert "gone12" not in error
    assert "3 more" in error


@row("D20-empty-path")
def _(desk: Desk) -> None:
    desk.manifest("m.csv", _listed(desk, ",cat"))
    assert re.search(r"line 10\b", desk.refused(path="m.csv"))


for _number, _path in enumerate(
    ["../x.png", "/etc/passwd", "file:///etc/passwd", "http://example.org/x.png", "a/../../x.png"]
):

    @row(f"D21-{_number}")
    def _(desk: Desk, path: str = _path) -> None:
        desk.manifest("m.csv", _listed(desk, f"{path},cat"))
        error = desk.refused(path="m.csv")
        assert re.search(r"line 10\b", error)
        assert path in error


@row("D22-bom-crlf")
def _(desk: Desk) -> None:
    text = _listed(desk).replace("\n", "\r\n")
    desk.manifest("m.csv", text, encoding="utf-8-sig")
    assert desk.scan(path="m.csv")["classes"] == {"cat": 4, "dog": 4}


@row("D22-semicolons")
def _(desk: Desk) -> None:
    desk.manifest("m.csv", _listed(desk).replace(",", ";"))
    assert "';'" in desk.refused(path="m.csv")


@row("D22-empty")
def _(desk: Desk) -> None:
    desk.manifest("m.csv", "")
    assert "empty" in desk.refused(path="m.csv")


@row("D23-no-label")
def _(desk: Desk) -> None:
    desk.manifest("m.csv", _listed(desk, "x.png,").replace("x.png", "8.png"))
    desk.photo("8.png")
    assert re.search(r"line 10\b", desk.refused(path="m.csv"))


@row("D23-float-labels")
def _(desk: Desk) -> None:
    text = _listed(desk).replace("cat", "0.25").replace("dog", "1.0")
    desk.manifest("m.csv", text)
    assert "regression" in desk.refused(path="m.csv")


@row("D23-several-labels")
def _(desk: Desk) -> None:
    desk.photo("8.png")
    desk.manifest("m.csv", _listed(desk, "8.png,cat|dog"))
    assert re.search(r"line 10\b", desk.refused(path="m.csv"))
    lines = [json.dumps({"path": f"{n}.png", "label": ["cat", "dog"][n % 2]}) for n in range(8)]
    lines.append(json.dumps({"path": "8.png", "label": ["cat", "dog"]}))
    desk.manifest("m.jsonl", "\n".join(lines) + "\n")
    assert re.search(r"line 9\b", desk.refused(path="m.jsonl"))


@row("D24-leak")
def _(desk: Desk) -> None:
    desk.classes("train/cat", "train/dog", "test/cat", "test/dog")
    shutil.copy(desk.root / "train" / "cat" / "003.png", desk.root / "test" / "cat" / "leak.png")
    error = desk.refused()
    assert "train/cat/003.png" in error
    assert "test/cat/leak.png" in error
    report = desk.scan("--allow-leak")
    assert report["noticed"]["in two parts with the same bytes"] == 2
    assert ["train/cat/003.png", "test/cat/leak.png"] in report["duplicate_files"]


@row("D25-near-duplicates")
def _(desk: Desk) -> None:
    x, y = np.meshgrid(np.linspace(0, 6, 200), np.linspace(0, 6, 160))
    for label, other in (("cat", 1.0), ("dog", 2.0)):
        for number in range(6):
            waves = np.sin(x * other + number) * np.cos(y * (1 + number) - other) * 120 + 128
            image = Image.fromarray(waves.astype(np.uint8)).convert("RGB")
            (desk.root / label).mkdir(exist_ok=True)
            image.save(desk.root / label / f"{number}.png")
    Image.open(desk.root / "cat" / "2.png").resize((150, 120)).save(
        desk.root / "cat" / "again.jpg", quality=70
    )
    assert desk.scan()["near_duplicates"] == 0
    report = desk.scan("--near-dup", "4")
    (found,) = report["near_duplicate_files"]
    assert found[:2] == ["cat/again.jpg", "cat/2.png"]
    assert found[2] <= 4
    parts = {each["path"]: (each["part"], each["fold"]) for each in desk.split("--near-dup", "4")}
    assert parts["cat/again.jpg"] == parts["cat/2.png"]


@row("D25-in-two-parts")
def _(desk: Desk) -> None:
    desk.classes("train/cat", "train/dog", "test/cat", "test/dog", count=4)
    waves = np.random.default_rng(3).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    image = Image.fromarray(waves).resize((160, 160), Image.Resampling.BICUBIC)
    image.save(desk.root / "train" / "cat" / "x.png")
    image.resize((120, 120)).save(desk.root / "test" / "cat" / "y.jpg")
    code, out, _ = desk.autoft("data", "scan", desk.root, "--near-dup", "6")
    assert code == 0
    assert "warning: 2 images are in two parts looking alike" in out


@row("D26-label-conflict")
def _(desk: Desk) -> None:
    desk.classes("cat", "dog", count=20)
    for number in range(5):
        name = f"{number:03d}.png"
        shutil.copy(desk.root / "cat" / name, desk.root / "dog" / f"copy-{name}")
    report = desk.scan()
    assert report["label_conflicts"] == 10
    assert ["dog/copy-000.png", "dog"] in report["conflicting_files"]
    for seed in range(3):
        parts = {each["path"]: each["part"] for each in desk.split("--seed", seed)}
        assert {parts[path] for path, _ in report["conflicting_files"]} == {"train"}


@row("D27-groups")
def _(desk: Desk) -> None:
    lines = ["path,label,group"]
    for number in range(60):
        desk.photo(f"{number}.png")
        lines.append(f"{number}.png,{'cat' if number % 3 else 'dog'},patient-{number // 4}")
    desk.manifest("m.csv", "\n".join(lines) + "\n")
    for seed in range(3):
        seen: dict[int, set[tuple[str, str]]] = {}
        for each in desk.split("--seed", seed, path="m.csv"):
            patient = int(Path(each["path"]).stem) // 4
            seen.setdefault(patient, set()).add((each["part"], each["fold"]))
        assert all(len(places) == 1 for places in seen.values())


@row("D28-imbalance")
def _(desk: Desk) -> None:
    desk.classes("common", count=3000)
    desk.classes("rare", count=3)
    code, out, _ = desk.autoft("data", "scan", desk.root)
    assert code == 0
    assert "imbalance 1000.0" in out
    assert "balanced accuracy" in out
    parts = [each["part"] for each in desk.split() if each["label"] == "rare"]
    assert sorted(parts) == ["test", "train", "validation"]


@row("D29-flipped-labels")
def _(desk: Desk) -> None:
    files = write_sample("digits", desk.root, limit=500)
    flipped = set()
    for number, file in enumerate(files):
        if number % 5 == 0:
            wrong = str((int(file.parent.name) + 1 + number % 9) % 10)
            target = file.rename(desk.root / wrong / file.name)
            flipped.add(str(target.relative_to(desk.root)))
    suspects = desk.root.parent / "suspects.csv"
    weights = desk.request.getfixturevalue("tiny_weights")
    run = desk.root.parent / "run"
    for words in (
        ["data", "profile", desk.root, "--offline", "--suspects", suspects],
        ["search", *ONE_TRIAL, "--dataset", desk.root, "--weights", weights, "--out", run],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "autoft", *words], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    with suspects.open(newline="", encoding="utf-8") as file:
        doubted = [each["path"] for each in csv.DictReader(file)]
    # A fifth of the labels are wrong: chance would make a fifth of the doubted ones wrong.
    first = doubted[: len(flipped) // 2]
    assert len(first) == len(flipped) // 2
    assert sum(path in flipped for path in first) > 0.6 * len(first)
    assert (run / "best" / "model.onnx").is_file()


# --- I: images ----------------------------------------------------------------------------------


def _with(desk: Desk, name: str, data: bytes) -> dict[str, Any]:
    """Put one file among forty sound ones and return the report."""
    desk.classes("cat", "dog", count=20)
    (desk.root / "cat" / name).write_bytes(data)
    return desk.scan()


def _encoded(file_format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(5).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, file_format, **options)
    return file.getvalue()


def _bad(name: str, data: bytes, reason: str) -> Row:
    def check(desk: Desk) -> None:
        report = _with(desk, name, data)
        assert report["corrupt"] == 1
        assert report["usable"] == 40
        ((path, why),) = report["excluded"]
        assert path == f"cat/{name}"
        assert reason in why

    return check


ROWS["I01-no-bytes"] = _bad("x.jpg", b"", "no image")
for _format, _suffix in (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")):
    _data = _encoded(_format)
    ROWS[f"I02-truncated-{_suffix}"] = _bad(f"x.{_suffix}", _data[: len(_data) // 2], "damaged")
ROWS["I03-html"] = _bad("x.jpg", b"<!doctype html><html><body>404</body></html>", "no image")
_EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
_SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="10" height="10"/>'
_PSD = b"8BPS\0\1" + bytes(6) + b"\0\3" + (10).to_bytes(4, "big") * 2 + b"\0\x08\0\3"
for _name, _data in (("eps", _EPS), ("svg", _SVG), ("psd", _PSD), ("hdf5", b"\x89HDF\r\n\x1a\n")):
    ROWS[f"I05-{_name}"] = _bad("x.jpg", _data + bytes(64), "no image")


@row("I04-other-suffix")
def _(desk: Desk) -> None:
    report = _with(desk, "x.jpg", _encoded("PNG"))
    assert report["usable"] == 41
    assert report["noticed"]["another format than the suffix says"] == 1


@row("I09-float-tiff")
def _(desk: Desk) -> None:
    file = io.BytesIO()
    Image.fromarray(np.full((20, 20), np.nan, np.float32)).save(file, "tiff")
    _bad("x.tif", file.getvalue(), "no defined range")(desk)


@row("I09-pages")
def _(desk: Desk) -> None:
    file = io.BytesIO()
    pages = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    pages[0].save(file, "tiff", save_all=True, append_images=pages[1:])
    report = _with(desk, "x.tif", file.getvalue())
    assert report["usable"] == 41
    assert report["noticed"]["first page of several"] == 1


for _format, _suffix in (("GIF", "gif"), ("PNG", "png"), ("WEBP", "webp")):

    @row(f"I11-animated-{_suffix}")
    def _(desk: Desk, file_format: str = _format, suffix: str = _suffix) -> None:
        file = io.BytesIO()
        frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue", "lime")]
        frames[0].save(file, file_format, save_all=True, append_images=frames[1:])
        report = _with(desk, f"x.{suffix}", file.getvalue())
        assert report["usable"] == 41
        assert report["noticed"]["first frame of an animation"] == 1


@row("I12-odd-sizes")
def _(desk: Desk) -> None:
    desk.classes("cat", "dog", count=40)
    desk.photo("cat/dot.png", size=(1, 1))
    desk.photo("cat/small.png", size=(9, 30))
    desk.photo("dog/line.png", size=(8, 20_000))
    report = desk.scan()
    assert report["left_out"] == 1
    assert report["excluded"] == [["cat/dot.png", "too small (1 x 1 pixels; see --min-side)"]]
    assert desk.scan("--min-side", "1")["usable"] == 83
    assert report["noticed"]["one side more than 20 times the other"] == 1


@row("I13-too-many-bad")
def _(desk: Desk) -> None:
    desk.classes("cat", "dog", count=19)
    for number in range(2):
        (desk.root / "cat" / f"bad{number}.jpg").write_bytes(b"<html>")
    assert desk.scan()["corrupt"] == 2
    (desk.root / "cat" / "bad2.jpg").write_bytes(b"<html>")
    error = desk.refused()
    assert "3 of 41 files" in error
    assert "cat/bad0.jpg" in error
    assert "--max-bad" in error
    assert desk.scan("--max-bad", "0.1")["corrupt"] == 3


@row("I14-changed-since-the-scan")
def _(desk: Desk) -> None:
    desk.classes("cat", "dog")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOFT_CACHE_LIMIT", "100KB")
        reading = Reading()
        listing = name_images(str(desk.root), reading, lambda *_: None)
        dataset = read_images(listing, reading, 224, lambda *_: None)
    assert isinstance(dataset.store, DecodedOnTheFly)
    catalog = dataset.catalog
    at = {path: int(row) for path, row in zip(catalog.paths, catalog.rows, strict=True)}
    desk.photo("cat/003.png")
    (desk.root / "dog" / "004.png").unlink()
    for path in ("cat/003.png", "dog/004.png"):
        with pytest.raises(DataError, match=f"data_changed.*{path}|{path}.*data_changed"):
            dataset.store.read(np.array([at[path]]))
    expected = to_square(decode(desk.root / "cat" / "005.png"), dataset.store.resize)
    found = dataset.store.read(np.array([at["cat/005.png"]]))
    np.testing.assert_array_equal(found[0], expected)


@row("I15-read-only-mount")
def _(desk: Desk) -> None:
    desk.classes("cat", "dog")
    (desk.root / "cat" / "bad.png").write_bytes(b"x")
    place = desk.root.parent / "mounted"
    place.mkdir()
    bind = subprocess.run(["mount", "--bind", desk.root, place], capture_output=True, text=True)
    if bind.returncode:
        pytest.skip(f"mounting is not allowed here: {bind.stderr.strip()}")
    try:
        options = "remount,bind,ro"
        subprocess.run(["mount", "-o", options, place], check=True, capture_output=True)
        with pytest.raises(OSError, match="Read-only"):
            (place / "cat" / "new.png").write_bytes(b"x")
        there = Desk(place, desk.capture, desk.request)
        assert there.scan()["usable"] == 20
        assert len(there.split()) == 20
    finally:
        subprocess.run(["umount", place], check=True)


@row("I15-nothing-written")
def _(desk: Desk) -> None:
    desk.classes("cat", "dog")
    (desk.root / "cat" / "bad.png").write_bytes(b"x")
    before = tree(desk.root)
    desk.scan()
    desk.split()
    assert tree(desk.root) == before


def tree(root: Path) -> str:
    """Hash names, times, modes and contents of everything below `root`."""
    digest = hashlib.sha256()
    for path in sorted([root, *root.rglob("*")]):
        status = path.lstat()
        times = (status.st_mtime_ns, status.st_ctime_ns)
        digest.update(f"{path} {times} {status.st_mode}".encode())
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


def _rows(desk: Desk) -> dict[str, Any]:
    """Read the dataset as a search does; return the stored pixels by path."""
    reading = Reading()
    listing = name_images(str(desk.root), reading, lambda *_: None)
    dataset = read_images(listing, reading, 64, lambda *_: None)
    catalog = dataset.catalog
    pixels = dataset.store.read(catalog.rows)
    return dict(zip(catalog.paths, pixels, strict=True))


COLOURS: dict[str, tuple[Any, tuple[int, int, int]]] = {
    "grey.png": (Image.new("L", (30, 30), 77), (77, 77, 77)),
    "grey-alpha.png": (Image.new("LA", (30, 30), (100, 128)), (177, 177, 177)),
    "palette.png": (Image.new("RGB", (30, 30), (255, 0, 0)).quantize(2), (255, 0, 0)),
    "bits.png": (Image.new("1", (30, 30), 1), (255, 255, 255)),
    "alpha.png": (Image.new("RGBA", (30, 30), (0, 0, 255, 51)), (204, 204, 255)),
    "cmyk.jpg": (Image.new("CMYK", (30, 30), (0, 255, 255, 0)), (255, 0, 0)),
    "ycbcr.jpg": (Image.new("YCbCr", (30, 30), (128, 128, 128)), (128, 128, 128)),
}


@row("I07-modes")
def _(desk: Desk) -> None:
    desk.classes("dog")
    (desk.root / "cat").mkdir()
    for name, (image, _) in COLOURS.items():
        image.save(desk.root / "cat" / name)
    clear = Image.new("P", (30, 30), 0)
    clear.putpalette([10, 20, 30])
    clear.save(desk.root / "cat" / "clear.png", transparency=0)
    pixels = _rows(desk)
    for name, (_, colour) in {**COLOURS, "clear.png": (None, (255, 255, 255))}.items():
        assert np.abs(pixels[f"cat/{name}"].astype(int) - colour).max() <= 1, name


def _png16(value: int, colour_type: int, channels: int) -> bytes:
    """Write a solid 16-bit PNG by hand: Pillow writes none in colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    line = b"\0" + struct.pack(">H", value) * (channels * 32)
    header = struct.pack(">IIBBBBB", 32, 32, 16, colour_type, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(line * 32)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@row("I08-sixteen-bits")
def _(desk: Desk) -> None:
    desk.classes("dog")
    (desk.root / "cat").mkdir()
    for value in (257 * 50, 257 * 200):
        (desk.root / "cat" / f"{value}.png").write_bytes(_png16(value, 0, 1))
        (desk.root / "cat" / f"{value}-rgb.png").write_bytes(_png16(value, 2, 3))
    pixels = _rows(desk)
    for value in (257 * 50, 257 * 200):
        for name in (f"{value}.png", f"{value}-rgb.png"):
            assert abs(pixels[f"cat/{name}"].mean() - value / 257) <= 1


@row("I10-orientation")
def _(desk: Desk) -> None:
    desk.classes("dog")
    upright = Image.fromarray(RNG.integers(0, 256, (40, 30, 3), dtype=np.uint8))
    (desk.root / "cat").mkdir()
    turns = [None, None, 0, 3, 1, 5, 4, 6, 2]  # Image.Transpose that each orientation asks for
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        turn = turns[orientation]
        # Stored so that the turn that the tag asks for gives the upright image.
        back = {None: None, 2: 4, 4: 2}.get(turn, turn)
        stored = upright if back is None else upright.transpose(Image.Transpose(back))
        stored.save(desk.root / "cat" / f"{orientation}.png", exif=exif)
    pixels = _rows(desk)
    expected = to_square(upright, pixels["cat/1.png"].shape[0])
    for orientation in range(1, 9):
        np.testing.assert_array_equal(pixels[f"cat/{orientation}.png"], expected)
        shown = decode(desk.root / "cat" / f"{orientation}.png")
        np.testing.assert_array_equal(np.asarray(shown), np.asarray(upright))


@row("I06-bombs")
def _(desk: Desk) -> None:
    desk.classes("cat", "dog", count=40)

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    packer = zlib.compressobj(9)
    lines = b"".join(packer.compress(bytes(2501)) for _ in range(20_000)) + packer.flush()
    for name, side, data in (("real", 20_000, lines), ("claimed", 50_000, lines[:1000])):
        header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
        body = chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
        (desk.root / "cat" / f"{name}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    # VmHWM is the peak of this program alone; ru_maxrss remembers the one that started it.
    script = (
        "import pathlib, re, sys; from autoft.cli.main import main; code = main(sys.argv[1:]); "
        "status = pathlib.Path('/proc/self/status').read_text(); "
        "print(int(re.search(r'VmHWM:\\s+(\\d+)', status)[1]) * 1024); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "data", "scan", desk.root, "--json"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    text, _, peak = done.stdout.strip().rpartition("\n")
    reasons = dict(json.loads(text)["excluded"])
    assert "pixels" in reasons["cat/real.png"]
    assert "pixels" in reasons["cat/claimed.png"]
    assert int(peak) < RSS_LIMIT


SEARCHED = {"D14-names-end-to-end", "D29-flipped-labels"}
IDS = {f"D{number:02d}" for number in range(1, 30)} | {f"I{n:02d}" for n in range(1, 16)}


def test_every_row_of_the_table_has_a_case() -> None:
    assert {name[:3] for name in ROWS} == IDS


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in SEARCHED)) for name in sorted(ROWS)],
)
def test_fault(name: str, desk: Desk) -> None:
    ROWS[name](desk)
