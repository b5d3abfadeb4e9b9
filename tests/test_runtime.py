"""Prediction from an exported file without torch, and the README that does it without autoft."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from torch import nn

from autoft.data.pixels.decode import decode, normalise, to_square
from autoft.errors import DataError, UsageError
from autoft.export import runtime
from autoft.export.artifact import write_card
from autoft.export.onnx import metadata_of, to_onnx
from autoft.export.runtime import Prediction, load, top, write_csv
from autoft.values import Preprocess

CLASSES = ["猫", "<script>alert(1)</script>", '"quoted" `ticks`', "=cmd()"]
PRE = Preprocess(image_size=61, resize=72, interpolation="bicubic", mean=(0.5, 0.4, 0.3))
CARD = {
    "backbone": "test_resnet",
    "strategy": "freeze",
    "head": "linear",
    "params": {"train.lr": 0.001},
    "classes": CLASSES,
    "preprocess": {"image_size": 61, "resize": 72},
    "metric": "accuracy",
    "score": 0.9,
    "test": {"value": 0.875, "low": 0.8, "high": 0.925, "n": 160},
    "source": "in1k",
    "license": "apache-2.0",
    "versions": {"autoft": "0.1.0"},
    "parity": [
        {
            "format": "onnx", "n": 9, "label_agreement": 1.0,
            "max_probability_difference": 1e-6, "passed": True, "error": "",
        }
    ],
}  # fmt: skip


def prepared(paths: list[Path]) -> torch.Tensor:
    pixels = [to_square(decode(path), PRE.resize, PRE.interpolation) for path in paths]
    return torch.from_numpy(normalise(np.stack(pixels), PRE))


@pytest.fixture(scope="module")
def model(photos) -> nn.Module:
    """A random network, centred so that its labels of the photos differ."""
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", pretrained=False, num_classes=len(CLASSES)).eval()
    nn.init.normal_(network.get_classifier().weight, std=10)
    with torch.no_grad():
        network.get_classifier().bias -= network(prepared(photos)).mean(0)
    return network


@pytest.fixture(scope="module")
def run(model, tmp_path_factory) -> Path:
    """A run folder with its artifact."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "best").mkdir()
    to_onnx(model, folder / "best" / "model.onnx", PRE, metadata_of(CLASSES, PRE, {}))
    write_card(folder / "best", CARD)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[Path]:
    """Images of every kind that a naive reader gets wrong."""
    folder = tmp_path_factory.mktemp("photos")
    pixels = np.random.default_rng(0).integers(0, 256, (9, 13, 4), np.uint8)
    image = Image.fromarray(pixels).resize((130, 91), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.convert("RGB").save(folder / "turned.jpg", exif=exif)
    image.save(folder / "alpha.png")
    image.convert("P").save(folder / "palette.gif")
    image.convert("CMYK").save(folder / "cmyk.jpg")
    image.convert("L").resize((40, 301)).save(folder / "grey.png")
    return sorted(folder.iterdir())


def test_predictions_are_the_network_on_the_shared_preprocessing(run, model, photos):
    with torch.inference_mode():
        expected = model(prepared(photos)).softmax(1)

    found = list(load(run).predict(photos))

    assert [prediction.path for prediction in found] == photos
    assert [p.label for p in found] == [CLASSES[i] for i in expected.argmax(1)]
    np.testing.assert_allclose([p.probabilities for p in found], expected, atol=1e-4)
    assert [p.probability for p in found] == [max(p.probabilities) for p in found]
    assert len({p.label for p in found}) > 1, "labels that are all one would prove nothing"


def test_batch_size_does_not_change_the_answers(run, photos):
    opened = load(run)
    one, all_ = list(opened.predict(photos, batch_size=1)), list(opened.predict(iter(photos)))
    assert [p.label for p in one] == [p.label for p in all_]
    np.testing.assert_allclose(
        [p.probabilities for p in one], [p.probabilities for p in all_], atol=1e-5
    )
    with pytest.raises(UsageError, match="batch size is 0"):
        opened.predict(photos, batch_size=0)


def test_run_folder_artifact_folder_and_file_open_the_same_model(run):
    for path in (run, run / "best", run / "best" / "model.onnx"):
        opened = load(path)
        assert opened.classes == tuple(CLASSES)
        assert opened.preprocess == PRE


def test_unreadable_file_is_a_row_with_its_error_and_the_others_go_on(run, photos, tmp_path):
    text = tmp_path / "text.jpg"
    text.write_text("no image")
    half = tmp_path / "half.jpg"
    half.write_bytes(photos[-1].read_bytes()[:700])
    paths = [text, photos[0], tmp_path / "missing.jpg", half, photos[1]]

    found = list(load(run).predict(paths, batch_size=2))

    assert [bool(prediction.error) for prediction in found] == [True, False, True, True, False]
    assert found[0].probabilities == ()
    direct = list(load(run).predict(photos[:2]))
    assert [found[1].label, found[4].label] == [prediction.label for prediction in direct]


def test_readme_snippet_gives_the_same_answers_without_autoft(run, photos, tmp_path):
    readme = (run / "best" / "README.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    assert "autoft import" not in snippet
    script = tmp_path / "snippet.py"
    script.write_text(snippet, encoding="utf-8")
    opened = load(run)
    for prediction in opened.predict(photos):
        done = subprocess.run(
            [sys.executable, script, prediction.path],
            cwd=run / "best", capture_output=True, text=True, check=True, encoding="utf-8",
            env=os.environ | {"PYTHONIOENCODING": "utf-8"},
        )  # fmt: skip
        rows = [line.split(" ", 1) for line in done.stdout.splitlines()]
        expected = top(prediction, opened.classes, 3)
        assert [label for _, label in rows] == [label for label, _ in expected]
        np.testing.assert_allclose(
            [float(number) for number, _ in rows], [number for _, number in expected], atol=2e-5
        )


def test_readme_says_what_was_measured_and_keeps_class_names_inert(run):
    readme = (run / "best" / "README.md").read_text(encoding="utf-8")
    for fact in ("test_resnet", "0.8750", "0.8000 to 0.9250", "160 test images", "apache-2.0"):
        assert fact in readme
    assert "autoft predict" in readme
    lines = [line for line in readme.splitlines() if "<script>" in line]
    assert lines
    assert all(line.startswith("    ") for line in lines)
    assert json.loads((run / "best" / "model.json").read_text()) == CARD


def test_card_accepts_unmeasured_models_and_names_that_are_not_utf8(tmp_path):
    write_card(tmp_path, CARD | {"classes": ["a\udce9", "b"], "test": None, "parity": []})
    readme = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "not measured on test images" in readme
    assert json.loads((tmp_path / "model.json").read_text())["classes"][0] == "a\udce9"


def test_prediction_needs_no_torch(run, photos):
    script = """
import sys, pathlib
from autoft.export.runtime import load
(prediction,) = load(pathlib.Path(sys.argv[1])).predict([pathlib.Path(sys.argv[2])])
assert prediction.label, prediction
heavy = {"torch", "torchvision", "timm", "optuna", "sklearn"} & set(sys.modules)
sys.exit(f"imported: {heavy}" if heavy else 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, run, photos[0]], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def small_model(*, meta: dict[str, str] | None, classes: int = 2, nested: bool = False):
    """Return an ONNX model of mean colours times a (3, classes) matrix."""
    matrix = numpy_helper.from_array(np.ones((3, classes), np.float32), "matrix")
    nodes = [
        helper.make_node("ReduceMean", ["images", "axes"], ["means"], keepdims=0),
        helper.make_node("MatMul", ["means", "matrix"], ["logits"]),
    ]
    axes = numpy_helper.from_array(np.array([2, 3], np.int64), "axes")
    if nested:
        nodes.insert(0, helper.make_node("Constant", [], ["matrix"], value=matrix))
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", classes])],
        [axes] if nested else [axes, matrix],
    )
    opset = helper.make_opsetid("", 18)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=10)
    if meta:
        helper.set_model_props(model, meta)
    return model


SMALL = metadata_of(["a", "b"], Preprocess(8, 8), {})


def save(model: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def test_handmade_model_is_accepted_so_that_the_refusals_below_mean_something(tmp_path, photos):
    opened = load(save(small_model(meta=SMALL), tmp_path / "model.onnx"))
    assert next(opened.predict(photos)).probabilities == (0.5, 0.5)


@pytest.mark.parametrize("nested", [False, True], ids=["initializer", "constant"])
def test_external_data_is_refused_before_onnxruntime_sees_it(tmp_path, monkeypatch, nested):
    model = small_model(meta=SMALL, nested=nested)
    tensor = model.graph.node[0].attribute[0].t if nested else model.graph.initializer[1]
    secret = tmp_path / "secret"
    secret.write_bytes(tensor.raw_data)
    # A hard link: onnxruntime itself accepts it.
    (tmp_path / "weights.bin").hardlink_to(secret)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights.bin")
    seen = []
    monkeypatch.setattr(runtime.onnxruntime, "InferenceSession", lambda *a, **k: seen.append(a))
    with pytest.raises(DataError, match="'matrix' in another file"):
        load(save(model, tmp_path / "model.onnx"))
    assert seen == []


@pytest.mark.parametrize(
    ("meta", "sentence"),
    [
        (None, r"does not say its autoft\.classes"),
        ({"autoft.classes": '["a", "b"]'}, r"autoft\.preprocess"),
        (SMALL | {"autoft.classes": "a,b"}, "does not say its"),
        (SMALL | {"autoft.classes": "[1, 2]"}, "no list of names"),
        (SMALL | {"autoft.classes": '["a", "b", "c"]'}, r"\('logits', \[3\]\)"),
        (metadata_of(["a", "b"], Preprocess(9, 9), {}), r"\('images', \[3, 9, 9\]\)"),
        (metadata_of(["a", "b"], Preprocess(8, 7), {}), "impossible sizes"),
        (metadata_of(["a", "b"], Preprocess(8, 8, interpolation="x"), {}), "interpolation 'x'"),
    ],
    ids=["none", "one", "no-json", "numbers", "count", "size", "resize", "interpolation"],
)
def test_file_that_does_not_say_what_it_is_is_refused(tmp_path, meta, sentence):
    with pytest.raises(DataError, match=sentence):
        load(save(small_model(meta=meta), tmp_path / "model.onnx"))


def test_damaged_file_is_a_data_error(run, tmp_path):
    content = (run / "best" / "model.onnx").read_bytes()
    for number, damaged in enumerate((b"", b"no protobuf", content[: len(content) // 2])):
        path = tmp_path / f"{number}.onnx"
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=path.name):
            load(path)


def test_path_that_is_no_artifact_is_told_apart_from_a_missing_one(run, tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        load(tmp_path / "runs")
    with pytest.raises(UsageError, match=r"neither best/model\.onnx nor model\.onnx"):
        load(tmp_path)
    with pytest.raises(UsageError, match=r"is no \.onnx file"):
        load(run / "best" / "README.md")


def test_top_ranks_and_stops_at_the_number_of_classes():
    prediction = Prediction(Path("x"), "b", 0.6, (0.1, 0.6, 0.3))
    assert top(prediction, ["a", "b", "c"], 2) == [("b", 0.6), ("c", 0.3)]
    assert len(top(prediction, ["a", "b", "c"], 9)) == 3
    assert top(Prediction(Path("x"), "", 0.0, (), "damaged"), ["a"], 1) == []


def test_csv_has_a_pair_of_columns_per_rank_and_the_error_last(tmp_path):
    predictions = [
        Prediction(Path("a.jpg"), "y", 0.75, (0.25, 0.75)),
        Prediction(Path("b,c.jpg"), "", 0.0, (), "damaged"),
    ]
    write_csv(tmp_path / "out.csv", predictions, ["x", "y"], 5)
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["path", "label", "probability", "label_2", "probability_2", "error"],
        ["a.jpg", "y", "0.750000", "x", "0.250000", ""],
        ["b,c.jpg", "", "", "", "", "damaged"],
    ]


def test_csv_cells_cannot_be_formulas_and_any_file_name_is_written(tmp_path):
    classes = ["=1+1", "@x", "-y", "+z", "猫"]
    predictions = [
        Prediction(Path("-rf.jpg"), label, 1.0, tuple(float(name == label) for name in classes))
        for label in classes
    ] + [Prediction(Path("caf\udce9.jpg"), "猫", 1.0, (0.0, 0.0, 0.0, 0.0, 1.0))]
    write_csv(tmp_path / "out.csv", predictions, classes, 1)
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))[1:]
    assert [row[1] for row in rows] == ["'=1+1", "'@x", "'-y", "'+z", "猫", "猫"]
    assert [row[0] for row in rows] == ["'-rf.jpg"] * 5 + ["caf\\udce9.jpg"]
