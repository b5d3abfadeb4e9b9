"""The benchmarks of speed: what each writes, and the one table that is made of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "benchmarks" / "speed"

pytestmark = pytest.mark.usefixtures("scripts")


def test_goals_of_all_files_are_one_table_in_order_and_what_no_file_has_is_named(tmp_path):
    from goals import Line, write_results
    from summary import summary

    tails = [Line("P10", "again", 4.6, 5, 8), Line("P3", "a step", 2.17, 1.8, 2)]
    write_results(tmp_path / "a.json", "Three rounds.", tails)
    seconds = Line("P2", "epochs", 0.4, 0.5, 0.3, "", less=True)
    write_results(tmp_path / "b.json", "Two rounds.", [seconds])
    (tmp_path / "c.json").write_text(json.dumps({"not": "of goals"}))

    told = summary(tmp_path)

    rows = [line for line in told.splitlines() if line.startswith("| P")]
    assert rows == [
        "| P2 | epochs | **0.4** | <= 0.5 | <= 0.3 | must |",
        "| P3 | a step | **2.17 x** | >= 1.8 | >= 2 | stretch |",
        "| P10 | again | **4.6 x** | >= 5 | >= 8 | **missed** |",
    ]
    missing = [f"P{number}" for number in range(1, 18) if number not in (2, 3, 10)]
    assert f"Not measured: {', '.join(missing)}." in told
    assert "`a.json`: Three rounds." in told
    assert "`b.json`: Two rounds." in told
    assert "c.json" not in told


def test_rows_are_read_as_they_were_written(tmp_path):
    from goals import Line, read_lines, write_results

    lines = [Line("P1", "heads", 400.0, 150, 400, detail={"s": [1.0]}, part="heads")]
    write_results(tmp_path / "a.json", "Here.", lines, numbers=[1, 2])
    assert read_lines(tmp_path / "a.json") == lines
    assert json.loads((tmp_path / "a.json").read_text("utf-8"))["numbers"] == [1, 2]


def test_parts_that_are_not_measured_again_stay(tmp_path):
    from goals import Line, write_results
    from sharing import before

    kept = Line("P3", "a step", 2.0, 1.8, 2, part="tails")
    write_results(tmp_path / "a.json", "Here.", [kept, Line("P9", "gone", 1, 1, 1, part="old")])
    assert before(tmp_path / "a.json") == [kept]
    assert before(tmp_path / "none.json") == []


def run_script(name, *arguments, path=""):
    return subprocess.run(
        [sys.executable, str(SCRIPTS / name), *arguments],
        env={"PYTHONPATH": str(path), "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_settings_of_the_device_are_timed_in_both_kinds_of_process(tmp_path):
    out, page = tmp_path / "out.json", tmp_path / "page.md"
    asked = ["test_resnet", "--size", "32", "--rounds", "1", "--device", "cpu"]
    done = run_script("device.py", *asked, "--json", out, "--page", page, path=SCRIPTS.parent)
    assert done.returncode == 0, done.stderr
    (measured,) = json.loads(out.read_text("utf-8"))["measured"]
    for work in ("step", "forward"):
        assert len(measured["found"][work]) == 4  # two formats in two kinds of process
        assert all(len(each) == 1 and each[0] > 0 for each in measured["found"][work].values())
    (line,) = json.loads(out.read_text("utf-8"))["lines"]
    step = measured["found"]["step"]
    assert line["value"] == pytest.approx(step["fp32 as usual"][0] / step["chosen worker"][0])
    assert (line["must"], line["stretch"]) == (0.97, 1.0)  # no network that P17 names
    assert "test_resnet | step |" in page.read_text("utf-8")


def test_a_worker_alone_keeps_what_it_frees(monkeypatch):
    import argparse

    import device

    settled = []
    monkeypatch.setattr(device, "settle", lambda: settled.append("worker"))
    monkeypatch.setattr(device, "keep_freed_memory", lambda: settled.append("kept") or True)
    monkeypatch.setattr(device.torch, "set_num_threads", lambda _: None)  # those of the tests
    form = json.dumps({"bf16": False, "channels_last": True})
    asked = argparse.Namespace(names=["test_resnet"], size=32, device="cpu", format=form)
    for process, expected in (("as usual", []), ("worker", ["kept", "worker"])):
        settled.clear()
        told = device.in_process(argparse.Namespace(**vars(asked), process=process))
        assert settled == expected
        assert all(told[work][form] > 0 for work in told for form in ("fp32", "chosen"))


def test_sides_begin_in_turns():
    from device import in_turn

    assert [in_turn("ab", number)[0] for number in range(4)] == ["a", "b", "a", "b"]


def test_the_benchmark_of_the_embedded_backbone_starts_by_itself():
    done = run_script("embedded.py", "--help")
    assert done.returncode == 0, done.stderr


def test_the_share_of_the_controlling_process_is_of_all_processor_time():
    from controller import against
    from goals import Line

    trained = [
        Line("P1", "heads", 400, 150, 400, detail={"cold": {"processor": [1.0, 3.0, 2.0]}}),
        Line("P8", "search", 12, 8, 20, detail={"shared": {"processor": [90.0]}}),
        Line("P3", "a step", 2, 1.8, 2),
    ]
    heads, search = against(0.0625, 0.34090909, trained)  # 32 heads: 2 s; 100 and 11 trials: 10 s
    assert heads.value == pytest.approx(50)
    assert search.value == pytest.approx(10, abs=0.01)
    assert (heads.must, search.must) == (15, 5)


def test_heads_in_packs_have_the_goals_of_their_size():
    import argparse

    from heads import Compared, goals
    from timing import Times

    def compared(features, classes, apart):
        alone, together = Times([], [60.0]), Times([], [10.0])
        return Compared(features, classes, alone, together, apart, 32, 0.1)

    found = [compared(512, 37, 1e-6), compared(192, 10, 5e-4)]
    asked = argparse.Namespace(kind="linear", heads=32)
    packed, apart = goals(asked, found)
    assert (packed.goal, packed.value, packed.must, packed.verdict) == ("P6", 6, 4, "must")
    assert (apart.goal, apart.value, apart.verdict) == ("P7", 5e-4, "**missed**")
    (apart,) = goals(argparse.Namespace(kind="mlp", heads=32), found)  # P6 asks for linear ones
    assert apart.goal == "P7"


def test_photographs_are_made_where_none_are_given(tmp_path):
    from data import PHOTOGRAPH, photographs
    from PIL import Image

    folder = Path(photographs(tmp_path / "made", 4))
    files = sorted(folder.glob("*/*.jpg"))
    assert {file.parent.name for file in files} == {"0", "1"}
    assert len(files) == 4
    assert {Image.open(file).size for file in files} == {PHOTOGRAPH}
    assert len({file.read_bytes() for file in files}) == 4
