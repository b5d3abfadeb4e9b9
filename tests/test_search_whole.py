"""Whole searches through the command line, as a user runs them: to the end, and cut off."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image

pytestmark = pytest.mark.slow

AUTOFT = (sys.executable, "-m", "autoft")
ENOUGH = 240  # seconds that any of these commands may take on a busy machine


def start(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*AUTOFT, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def run(*arguments: object, code: int = 0, **environment: str) -> str:
    process = start(*arguments, **environment)
    out, err = process.communicate(timeout=ENOUGH)
    assert process.returncode == code, f"{process.returncode}\n{out}\n{err}"
    return out + err


def search(photos: Path, weights: Path, out: Path, *more: object) -> list[object]:
    """Return a command that searches the two tiny networks, if `more` names no others."""
    tiny = ("--backbones", "test_resnet.fixed,test_byobnet.fixed")
    return [
        "search",
        "--dataset",
        photos,
        "--weights",
        weights,
        "--out",
        out,
        "--time",
        "200s",
        *(() if "--backbones" in more else tiny),
        *more,
    ]


def tree_hash(root: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        stat = path.stat()
        digest.update(f"{path} {stat.st_mtime_ns} {stat.st_size}".encode())
    return digest.hexdigest()


def trials(out: Path) -> list[dict]:
    """Return the trials that ended, without what scored one again on another fold."""
    file = out / "trials.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [each for each in map(json.loads, lines) if each["of"] is None]


def wait_for(condition, process: subprocess.Popen[str]) -> None:
    limit = time.time() + ENOUGH
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.time() < limit
        time.sleep(0.05)


@pytest.fixture(scope="module")
def finished(photos, tiny_weights, tmp_path_factory) -> Path:
    """A finished run of six trials."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    before = tree_hash(photos)
    run(*search(photos, tiny_weights, out, "--trials", 6, "--export", "onnx,torchscript,pt2"))
    assert tree_hash(photos) == before, "the data set was written to"
    return out


def test_a_search_leaves_a_proven_model_and_an_honest_number(finished, photos) -> None:
    result = json.loads((finished / "result.json").read_text())
    assert set(result) >= {
        "metric", "score", "test", "baseline", "winner", "trials", "seconds", "regime",
        "classes", "artifact", "versions",
    }  # fmt: skip
    assert sum(result["trials"].values()) == 6
    assert result["classes"] == ["blue", "green", "red"]
    assert result["test"]["value"] > 0.8
    assert result["test"]["low"] < result["test"]["value"] <= result["test"]["high"]
    assert set(result["backbones"]) == {"test_resnet.fixed", "test_byobnet.fixed"}
    assert {p["format"]: p["passed"] for p in result["parity"]} == {
        "onnx": True, "torchscript": True, "pt2": True,
    }  # fmt: skip
    best = finished / "best"
    for name in ("model.safetensors", "model.onnx", "model.ts", "model.pt2", "model.json",
                 "parity.json", "README.md"):  # fmt: skip
        assert (best / name).stat().st_size > 0
    scores = {t["number"]: t["score"] for t in trials(finished) if t["status"] != "failed"}
    won = scores[result["winner"]["trial"]]
    assert won == max(scores.values()) or result["finals"]
    assert result["score"] == pytest.approx(won, abs=0.02)  # bf16 in trials, fp32 here


def test_the_test_part_is_whole_and_was_never_trained_on(finished) -> None:
    rows = list(csv.DictReader((finished / "split.csv").open()))
    parts = {name: {r["path"] for r in rows if r["part"] == name} for name in
             {row["part"] for row in rows}}  # fmt: skip
    assert len(parts["test"]) == 24
    folds = Counter(row["fold"] for row in rows if row["part"] != "test")
    assert sorted(folds) == ["0", "1", "2", "3", "4"]
    assert all(19 <= count <= 20 for count in folds.values())
    assert len(parts["validation"]) == folds["0"]
    assert sum(map(len, parts.values())) == len(set().union(*parts.values())) == 120
    tested = {row["path"] for row in csv.DictReader((finished / "predictions/test.csv").open())}
    assert tested == parts["test"]


def test_the_onnx_file_alone_repeats_the_test_predictions(finished, photos) -> None:
    session = onnxruntime.InferenceSession(finished / "best/model.onnx")
    told = session.get_modelmeta().custom_metadata_map
    pre, classes = json.loads(told["autoft.preprocess"]), json.loads(told["autoft.classes"])
    rows = list(csv.DictReader((finished / "predictions/test.csv").open()))
    for row in rows:
        image = Image.open(photos / row["path"]).convert("RGB")
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        box = (left, top, left + side, top + side)
        image = image.resize((pre["resize"],) * 2, Image.Resampling.BILINEAR, box=box)
        cut = (pre["resize"] - pre["image_size"]) // 2
        kept = slice(cut, cut + pre["image_size"])
        pixels = np.asarray(image, np.float32)[kept, kept]
        ready = (pixels / 255 - np.float32(pre["mean"])) / np.float32(pre["std"])
        (logits,) = session.run(None, {"images": ready.transpose(2, 0, 1)[None]})
        assert classes[int(logits.argmax())] == row["predicted"]


def test_predict_needs_no_torch_and_agrees(finished, photos, tmp_path) -> None:
    out = tmp_path / "p.csv"
    run("predict", finished, photos / "red", photos / "blue", "--csv", out)
    rows = list(csv.DictReader(out.open()))
    assert len(rows) == 80
    right = [Path(row["path"]).parent.name == row["label"] for row in rows]
    assert np.mean(right) > 0.8


def test_the_same_command_again_shows_the_finished_run(finished, photos, tiny_weights) -> None:
    before = (finished / "trials.jsonl").read_bytes()
    again = search(photos, tiny_weights, finished, "--trials", 6, "--export", "onnx")
    assert "finished" in run(*again).lower()
    assert (finished / "trials.jsonl").read_bytes() == before


def test_T14_other_settings_on_the_same_folder_are_refused(  # noqa: N802 - the row's id
    finished, photos, tiny_weights
) -> None:
    told = run(*search(photos, tiny_weights, finished, "--heads", "mlp"), code=2)
    assert "heads was [], is ['mlp']" in told
    assert "Traceback" not in told


def test_another_trial_can_be_exported(finished, tmp_path) -> None:
    result = json.loads((finished / "result.json").read_text())
    out = tmp_path / "other"
    run("export", finished, "--trial", result["baseline"]["trial"], "--out", out,
        "--formats", "onnx")  # fmt: skip
    assert (out / "model.onnx").exists()
    assert json.loads((out / "model.json").read_text())["test"] is None


def test_exporting_again_keeps_the_test_number_and_every_proof(finished) -> None:
    result = json.loads((finished / "result.json").read_text())
    run("export", finished, "--formats", "onnx")
    card = json.loads((finished / "best/model.json").read_text())
    assert card["test"] == result["test"]
    assert [p["format"] for p in card["parity"]] == ["onnx", "torchscript", "pt2"]
    assert "Did you mean 'onnx'" in run("export", finished, "--formats", "onx", code=2)


def test_a_moved_run_still_predicts_and_lists(finished, photos, tmp_path) -> None:
    import shutil

    moved = tmp_path / "elsewhere"
    shutil.copytree(finished, moved)
    assert "blue" in run("predict", moved, photos / "blue/00.png")
    assert "linear" in run("leaderboard", moved)


def test_T02_a_killed_search_goes_on_where_it_was(  # noqa: N802 - the row's id
    photos, tiny_weights, tmp_path
) -> None:
    out = tmp_path / "killed"
    command = search(photos, tiny_weights, out, "--trials", 7, "--export", "onnx")
    process = start(*command)
    wait_for(lambda: len(trials(out)) >= 3, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = trials(out)
    run(*command)
    after = trials(out)
    assert after[: len(before)] == before
    numbers = [trial["number"] for trial in after]
    assert sorted(numbers) == list(range(7))
    assert (out / "best/model.onnx").exists()


def test_T01_the_death_of_a_worker_costs_no_trial(  # noqa: N802 - the row's id
    photos, tiny_weights, tmp_path
) -> None:
    import psutil

    out = tmp_path / "worker"
    process = start(*search(photos, tiny_weights, out, "--trials", 6, "--export", "onnx"))
    running = out / "trials/0003/config.json"
    wait_for(running.exists, process)
    for child in psutil.Process(process.pid).children(recursive=True):
        if "spawn_main" in " ".join(child.cmdline()):
            child.kill()
    printed, err = process.communicate(timeout=ENOUGH)
    assert process.returncode == 0, printed + err
    assert "SIGKILL" in err
    assert not [trial for trial in trials(out) if trial["status"] == "failed"]
    assert sorted(trial["number"] for trial in trials(out)) == list(range(6))


def test_T03_ctrl_c_keeps_the_best_and_resume_ends_the_run(  # noqa: N802 - the row's id
    photos, tiny_weights, tmp_path
) -> None:
    import psutil

    out = tmp_path / "stopped"
    process = start(*search(photos, tiny_weights, out, "--trials", 6, "--export", "onnx"))
    wait_for(lambda: len(trials(out)) >= 2, process)
    children = psutil.Process(process.pid).children(recursive=True)
    began = time.time()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert time.time() - began < 10
    assert process.returncode == 130, err
    assert "the best so far is trial" in err
    limit = time.time() + 5  # multiprocessing's own helper ends a moment after its parent
    while alive := [c for c in children if c.is_running() and c.status() != psutil.STATUS_ZOMBIE]:
        assert time.time() < limit, f"orphans were left: {alive}"
        time.sleep(0.1)
    assert (out / "leaderboard.csv").exists()
    run("export", out, "--formats", "onnx", "--out", tmp_path / "so-far")
    assert "blue" in run("predict", tmp_path / "so-far", photos / "blue/00.png")
    run("resume", out)
    assert len(trials(out)) == 6


def test_T17_the_same_seed_gives_the_same_trials(  # noqa: N802 - the row's id
    photos, tiny_weights, tmp_path
) -> None:
    found = []
    for name in ("one", "two"):
        out = tmp_path / name
        few = ("--trials", 3, "--strategies", "head_only", "--backbones", "test_resnet.fixed")
        run(*search(photos, tiny_weights, out, *few, "--export", "onnx", "--seed", 4))
        found.append([(t["config"], t["scores"]) for t in trials(out)])
    assert found[0] == found[1]


def test_T10_the_time_holds_and_there_is_always_a_model(  # noqa: N802 - the row's id
    photos, tiny_weights, tmp_path
) -> None:
    out = tmp_path / "short"
    run("search", "--dataset", photos, "--weights", tiny_weights, "--out", out, "--time", "1s",
        "--export", "onnx")  # fmt: skip
    assert len(trials(out)) == 1
    assert (out / "best/model.onnx").exists()


def test_the_ray_engine_runs_the_same_search(photos, tiny_weights, tmp_path) -> None:
    pytest.importorskip("ray")
    out = tmp_path / "ray"
    run(*search(photos, tiny_weights, out, "--trials", 5, "--engine", "ray", "--workers", 2,
                "--export", "onnx"))  # fmt: skip
    result = json.loads((out / "result.json").read_text())
    assert sum(result["trials"].values()) == 5
    assert result["trials"]["failed"] == 0
    assert result["test"]["value"] > 0.8
    assert (out / "best/model.onnx").exists()


def plugin_folder(root: Path, code: str) -> Path:
    """What `pip install --target` of a package with one function and one TOML line leaves."""
    (root / "scratch_head.py").write_text(code)
    info = root / "scratch_head-0.1.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: scratch-head\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[autoft.heads]\nscratch = scratch_head:scratch\n")
    return root


SCRATCH = """
from torch import nn

def scratch(num_features, num_classes):
    "Map features to logits through a bottleneck of eight."
    return nn.Sequential(nn.Linear(num_features, 8), nn.Tanh(), nn.Linear(8, num_classes))
"""


def test_a_third_party_plugin_is_listed_searched_and_exported(
    photos, tiny_weights, tmp_path
) -> None:
    path = {"PYTHONPATH": str(plugin_folder(tmp_path, SCRATCH))}
    assert re.search(r"head +scratch +scratch-head +0\.1 +ok", run("plugins", "list", **path))
    out = tmp_path / "run"
    run(*search(photos, tiny_weights, out, "--trials", 7, "--export", "onnx"), **path)
    used = [t for t in trials(out) if t["config"]["head"]["name"] == "scratch"]
    assert used
    assert all(trial["status"] != "failed" for trial in used)
    chosen = tmp_path / "chosen"
    run(*search(photos, tiny_weights, chosen, "--trials", 2, "--heads", "scratch",
                "--export", "onnx,torchscript"), **path)  # fmt: skip
    result = json.loads((chosen / "result.json").read_text())
    assert result["winner"]["head"] == "scratch"
    assert all(parity["passed"] for parity in result["parity"])


def test_a_broken_third_party_plugin_stops_nothing(photos, tiny_weights, tmp_path) -> None:
    path = {"PYTHONPATH": str(plugin_folder(tmp_path, "import no_such_thing\n" + SCRATCH))}
    listed = run("plugins", "list", COLUMNS="200", **path)
    assert "no_such_thing" in listed
    out = tmp_path / "run"
    told = run(*search(photos, tiny_weights, out, "--trials", 2, "--export", "onnx"), **path)
    assert "scratch" in told
    asked = search(photos, tiny_weights, tmp_path / "asked", "--heads", "scratch")
    assert "cannot be imported" in run(*asked, code=2, **path)


# --- bad input: one sentence, an exit code, nothing lost ----------------------------------------


def bad_data(root: Path, kind: str) -> Path:
    data = root / "data"
    if kind == "missing":
        return data
    data.mkdir()
    if kind in {"one-class", "text"}:
        for label in ("a",) if kind == "one-class" else ("a", "b"):
            (data / label).mkdir()
            for index in range(12):
                Image.new("RGB", (40, 40), (index * 9, 99, 9)).save(data / label / f"{index}.jpg")
    if kind == "text":
        for index in range(4):
            (data / "a" / f"text{index}.jpg").write_text("this is no photograph")
    return data


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "does not exist"),
        ("empty", "No images in"),
        ("one-class", "at least 2 classes"),
        ("text", "text0.jpg"),
    ],
    ids=["D01", "D02", "D03", "I03"],
)
def test_bad_data_is_one_sentence(tmp_path, tiny_weights, kind, words) -> None:
    data = bad_data(tmp_path, kind)
    told = run(*search(data, tiny_weights, tmp_path / "run"), code=3)
    assert words in told
    assert "Traceback" not in told
    assert not (tmp_path / "run/run.json").exists()  # the mended command may use the folder
    assert len([line for line in told.splitlines() if line.startswith("Error")]) == 1


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (("--backbones", "resnet81"), 2, "Did you mean"),
        (("--backbones", "test_resnet.fxed"), 2, "test_resnet.fixed"),
        (("--backbones", "resnet18.a1_in1k"), 4, "--weights"),
        (("--strategies", "freez"), 2, "Did you mean 'freeze'"),
        (("--heads", "liner"), 2, "Did you mean 'linear'"),
        (("--device", "cuda:7"), 4, "--device cpu"),
    ],
    ids=["backbone", "label", "N01", "strategy", "head", "T12"],
)
def test_a_name_that_cannot_be_had_is_one_sentence(
    photos, tiny_weights, tmp_path, flags, code, words
) -> None:
    out = tmp_path / "run"
    told = run(*search(photos, tiny_weights, out, "--offline", *flags), code=code)
    assert words in told
    assert "Traceback" not in told
    assert not trials(out)
    assert not (out / "split.csv").exists() or code == 4
