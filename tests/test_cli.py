"""The command line: fast to start, one sentence and a documented exit code for every error."""

from __future__ import annotations

import csv
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

import autoft.cli.plugins
from autoft.api import load
from autoft.cli.flags import SEARCH
from autoft.cli.main import main
from autoft.cli.search import command_line
from autoft.cli.summary import interval, show
from autoft.search.folder import RunFolder
from autoft.search.settings import Settings, read_settings
from autoft.values import Estimate, Part, Status, TrialConfig, TrialResult

HEAVY = ("torch", "torchvision", "timm", "optuna", "sklearn", "onnx", "onnxruntime", "ray")
USAGE_ERRORS = [
    (["serach"], "Did you mean 'search'?"),
    (["search", "--trails", "3"], "--trials"),
    (["search", "./data"], "unexpected extra argument"),
    (["search"], "--dataset is not given"),
    (["search", "--dataset", "x", "--trials", "many"], "--trials 'many'"),
    (["search", "--dataset", "x", "--time", "soon"], "write 90s, 15m"),
    (["search", "--dataset", "x", "--metric", "f2"], "'macro_f1'"),
    (["search", "--dataset", "x", "--config", "none.toml"], "none.toml cannot be read"),
    (["resume"], "RUN"),
    (["resume", "nowhere"], "nowhere is no run folder"),
    (["leaderboard", "nowhere"], "nowhere is no run folder"),
    (["plugins"], "Missing command"),
    (["plugins", "list", "--kind", "heads"], "Did you mean 'head'?"),
    (["--no-such-flag"], "--no-such-flag"),
]


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["search", "--help"], ["--version"], ["plugins", "list"], ["serach"]],
    ids=" ".join,
)
def test_light_commands_import_nothing_heavy(arguments: list[str]) -> None:
    assert heavy_after(arguments) == []


def heavy_after(arguments: list[str], heavy: tuple[str, ...] = (*HEAVY, "numpy")) -> list[str]:
    """Run a command in a fresh process and return which heavy modules it imported."""
    code = (
        "import sys; from autoft.cli.main import main; main(sys.argv[2:]);"
        "print('\\n' + ' '.join(m for m in sys.argv[1].split(',') if m in sys.modules))"
    )
    words = [sys.executable, "-c", code, ",".join(heavy), *arguments]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1].split()


def test_module_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == "autoft 0.1.0\n"
    done = subprocess.run([sys.executable, "-m", "autoft", "--version"], capture_output=True)
    assert done.stdout == b"autoft 0.1.0\n"


@pytest.mark.parametrize(("arguments", "words"), USAGE_ERRORS, ids=lambda v: " ".join(v[:60]))
def test_usage_error_is_one_sentence_and_exit_code_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("Error: ")
    assert words in err
    assert len(err.splitlines()) == 1


def test_missing_model_of_predict_is_data_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert main(["predict", str(tmp_path / "none"), str(tmp_path)]) == 3
    assert "does not exist" in capsys.readouterr().err


def test_bug_is_told_in_a_sentence_and_traced_on_demand(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(kind: str) -> None:
        raise ZeroDivisionError(f"while listing {kind}")

    monkeypatch.setattr(autoft.cli.plugins, "installed", fail)
    assert main(["plugins", "list"]) == 1
    plain = capsys.readouterr().err
    assert "This is a bug of autoft: ZeroDivisionError: while listing backbone." in plain
    assert "`autoft --debug plugins list`" in plain
    assert "Traceback" not in plain
    monkeypatch.setenv("AUTOFT_DEBUG", "1")
    assert main(["plugins", "list"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_is_exit_code_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(kind: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(autoft.cli.plugins, "installed", interrupt)
    assert main(["plugins", "list"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_flags_are_the_settings_with_their_defaults() -> None:
    fields = Settings.model_fields
    flags = {flag.name: flag for flag in SEARCH}
    assert set(flags) == set(fields) | {"config", "dry_run"}
    defaults = {name: read_settings({"dataset": "x"}).model_dump()[name] for name in fields}
    for name in ("metric", "device", "engine", "seed"):
        assert flags[name].default == str(defaults[name])
    assert flags["export"].default == ",".join(defaults["export"])
    assert read_settings({"dataset": "x", "time": flags["time"].default}).time == defaults["time"]


def test_printed_command_states_the_same_settings() -> None:
    settings = read_settings(
        {"dataset": "my data", "time": "1h30m", "heads": "linear,mlp", "offline": True, "seed": 3}
    )
    words = shlex.split(command_line(settings))
    assert words[:4] == ["autoft", "search", "--dataset", "my data"]
    words.remove("--offline")
    flags = dict(zip(words[2::2], words[3::2], strict=True))
    given = {flag[2:].replace("-", "_"): value for flag, value in flags.items()}
    assert read_settings({**given, "offline": True}) == settings


def test_interval_is_written_in_words() -> None:
    test = {"value": 0.9342, "low": 0.9141, "high": 0.9502, "n": 1736}
    assert interval(test) == "0.934 (95 % interval 0.914 to 0.950, 1,736 images)"


@pytest.fixture
def killed_run(tmp_path: Path) -> Path:
    """Return a run that was killed while it wrote its fourth trial."""
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.write_json("run.json", {})
    for number, score in enumerate([0.5, None, 0.75]):
        config = TrialConfig(Part("resnet18"), Part("freeze"), Part("mlp"), {})
        scores = () if score is None else (0.1, score)
        status: Status = "failed" if score is None else "done"
        folder.append_trial(TrialResult(number, config, status, scores, score, seconds=2.0))
    with (folder.path / "trials.jsonl").open("a") as file:
        file.write('{"number": 3, "conf')
    return folder.path


def test_leaderboard_of_a_killed_run_is_ordered(
    killed_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["leaderboard", str(killed_run)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows == [
        ["rank", "trial", "score", "backbone", "strategy", "head", "epochs", "seconds", "status"],
        ["1", "2", "0.7500", "resnet18", "freeze", "mlp", "2", "2.0", "done"],
        ["2", "0", "0.5000", "resnet18", "freeze", "mlp", "2", "2.0", "done"],
        ["3", "1", "-", "resnet18", "freeze", "mlp", "0", "2.0", "failed"],
    ]


def test_leaderboard_top_and_csv(killed_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["leaderboard", str(killed_run), "--top", "1"]) == 0
    out = capsys.readouterr().out
    assert "0.7500" in out
    assert "0.5000" not in out
    path = killed_run.parent / "out.csv"
    assert main(["leaderboard", str(killed_run), "--csv", str(path)]) == 0
    rows = list(csv.DictReader(path.open()))
    assert [float(row["score"]) for row in rows[:2]] == [0.75, 0.5]
    assert rows[2]["status"] == "failed"


RESULT = {
    "metric": "accuracy",
    "score": 0.93,
    "test": {"value": 0.912, "low": 0.9, "high": 0.923, "n": 736},
    "baseline": {"name": "head_only", "test": {"value": 0.8, "low": 0.7, "high": 0.9, "n": 736}},
    "winner": {"trial": 2, "backbone": "resnet18", "strategy": "freeze", "head": "m\x1blp"},
    "trials": {"done": 2, "stopped": 0, "failed": 1},
    "seconds": 61.0,
    "regime": {"text": "small and similar data", "first": ["freeze", "full"], "agreed": True},
}
PROOF = {"format": "onnx", "n": 200, "label_agreement": 1.0, "max_probability_difference": 2e-6}


def test_summary_says_what_was_found_and_how_to_use_it(
    killed_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    RunFolder(killed_run).write_json("result.json", RESULT)
    (killed_run / "best").mkdir()
    (killed_run / "best" / "parity.json").write_text(json.dumps([{**PROOF, "passed": True}]))
    show(killed_run, started=0.0)
    out = capsys.readouterr().out
    for words in (
        "1     2      0.7500",
        r"Winner: trial 2, backbone resnet18, strategy freeze, head m\x1blp.",
        "Test accuracy: 0.912 (95 % interval 0.900 to 0.923, 736 images)",
        "Baseline head_only: 0.800 (95 % interval 0.700 to 0.900, 736 images)",
        "Trials: 2 done, 0 stopped early, 1 failed, in 1:01 min.",
        "Regime: small and similar data; the search agreed (first there: freeze, full).",
        "onnx same labels (100.00% of 200 images, probabilities within 2.0e-06)",
        f"autoft predict {killed_run} IMAGE",
    ):
        assert words in out
    assert "already finished" not in out
    assert load(killed_run).best.test == Estimate(0.912, 0.9, 0.923, 736)


def test_summary_without_test_part_or_of_an_earlier_run_says_so(
    killed_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    otherwise = {**RESULT["regime"], "agreed": False, "first": ["full"]}
    changed = {**RESULT, "test": None, "baseline": None, "regime": otherwise}
    RunFolder(killed_run).write_json("result.json", changed)
    show(killed_run, started=time.time() + 60)
    out = capsys.readouterr().out
    assert "had already finished" in out
    assert "Test accuracy: not measured" in out
    assert "the search found otherwise (first there: full; better: freeze)" in out
    assert load(killed_run).best.test is None


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """Return a model that says which of three colours is the strongest."""
    nodes = [
        helper.make_node("GlobalAveragePool", ["images"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["logits"]),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, 8, 8])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 3])
    graph = helper.make_graph(nodes, "colours", [images], [logits])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    preprocess = {"image_size": 8, "resize": 8, "interpolation": "bilinear"}
    preprocess |= {"mean": [0.0] * 3, "std": [1.0] * 3}
    metadata = {"classes": ["red", "gr\x1b[2Jeen", "blue"], "preprocess": preprocess}
    helper.set_model_props(model, {f"autoft.{k}": json.dumps(v) for k, v in metadata.items()})
    onnx.save(model, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    Image.new("RGB", (9, 8), (250, 0, 0)).save(folder / "a.png")
    Image.new("RGB", (8, 9), (0, 250, 0)).save(folder / "deep" / "b.JPG")
    (folder / "deep" / "c.jpg").write_text("no image")
    (folder / "notes.txt").write_text("not looked at")
    return folder


def test_predict_labels_all_and_exits_3_for_the_unreadable(
    artifact: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(artifact), str(photos), str(photos / "a.png")]) == 3
    out, err = capsys.readouterr()
    lines = [line.replace(str(photos), "photos") for line in out.splitlines()]
    assert [line.rsplit(maxsplit=1)[0] for line in lines] == [
        "photos/a.png  red", r"photos/deep/b.JPG  gr\x1b[2Jeen", "photos/a.png  red",
    ]  # fmt: skip
    assert "c.jpg" in err
    assert "1 of 4 images could not be read" in err


def test_predict_top_and_csv(
    artifact: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, image = photos / "out.csv", photos / "a.png"
    code = main(["predict", str(artifact), str(image), "--top", "2", "--csv", str(table)])
    assert code == 0
    assert len(capsys.readouterr().out.split()) == 5
    row = next(csv.DictReader(table.open()))
    assert row["label"] == "red"
    assert float(row["probability"]) > float(row["probability_2"])


def test_predict_leaves_torch_alone(artifact: Path, photos: Path) -> None:
    arguments = ["predict", str(artifact), str(photos / "a.png")]
    assert heavy_after(arguments, HEAVY) == ["onnx", "onnxruntime"]


def test_predict_without_images_is_data_error(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["predict", str(artifact), str(tmp_path / "empty")]) == 3
    assert "There is no image in" in capsys.readouterr().err


def test_doctor_names_every_library_and_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for what in ("python", "torch", "onnxruntime", "onnxscript", "memory", "cache", "devices"):
        assert any(line.split()[1] == what for line in out.splitlines()), what
