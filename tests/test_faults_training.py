"""T08: numbers that are none end a trial with the reason, and never a search with a bad model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from autoft import plugins
from autoft.search.engines import tasks
from autoft.training.job import Outcome, Precision, Setup, TrialJob
from autoft.values import Part, TrialConfig

BACKBONE = "test_resnet.fixed"
POISON = """
import torch
from torch import nn

class Poison(nn.Linear):
    "Logits times `factor`, in evaluation alone where `late`."
    def __init__(self, features, classes, factor, late):
        super().__init__(features, classes)
        self.factor, self.late = factor, late

    def forward(self, features):
        logits = super().forward(features)
        return logits if self.late and self.training else logits * self.factor

def nan(num_features, num_classes):
    "Give NaN."
    return Poison(num_features, num_classes, float("nan"), False)

def inf(num_features, num_classes):
    "Give infinite numbers."
    return Poison(num_features, num_classes, float("inf"), False)

def late(num_features, num_classes):
    "Give NaN where it is scored."
    return Poison(num_features, num_classes, float("nan"), True)
"""
POINTS = "[autoft.heads]\nnan = poisons:nan\ninf = poisons:inf\nlate = poisons:late\n"


@pytest.fixture
def poisons(tmp_path) -> Path:
    """Return a folder that holds an installed package of heads that give no numbers."""
    root = tmp_path / "site"
    info = root / "poisons-1.0.dist-info"
    info.mkdir(parents=True)
    (root / "poisons.py").write_text(POISON)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: poisons\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(POINTS)
    return root


@pytest.fixture
def installed(poisons, monkeypatch):
    """Have that package installed in this process."""
    monkeypatch.syspath_prepend(str(poisons))
    plugins.installed.cache_clear()
    yield
    plugins.installed.cache_clear()
    sys.modules.pop("poisons", None)


@pytest.fixture
def setup(photos, tiny_sources, setup_in, tmp_path) -> Setup:
    return setup_in(photos, tiny_sources, tmp_path)


def train(setup: Setup, strategy: str, head: str, **choices: object) -> Outcome:
    config = TrialConfig(Part(BACKBONE), Part(strategy), Part(head), choices, seed=1)
    job = TrialJob(0, config, 2, time.time() + 200, Precision())
    (outcome,) = tasks.train(tasks.Link(lambda *_: None, lambda _: True), setup, (job,))
    return outcome


@pytest.mark.parametrize("strategy", ["head_only", "full"])
@pytest.mark.parametrize(
    ("head", "reason"),
    [("nan", "non_finite_loss"), ("inf", "non_finite_loss"), ("late", "non_finite_score")],
)
def test_t08_a_loss_or_a_metric_that_is_no_number_fails_the_trial(
    setup, installed, strategy, head, reason
) -> None:
    outcome = train(setup, strategy, head)
    assert outcome.status == "failed"
    assert reason in outcome.error
    assert (outcome.score, outcome.loss, outcome.scores) == (None, None, ())
    assert not list(setup.folder.glob("trials/0000/scored.safetensors"))


def test_t08_a_learning_rate_that_explodes_fails_the_trial(setup, monkeypatch) -> None:
    monkeypatch.setattr("autoft.training.trial.check_choices", lambda *_: None)
    outcome = train(setup, "full", "linear", lr=1e30, head_lr=1e30)
    assert outcome.status == "failed"
    assert "non_finite" in outcome.error
    assert outcome.score is None


def search(
    photos: Path, weights: Path, out: Path, poisons: Path, heads: str, *more: str
) -> tuple[int, str]:
    command = [
        *(sys.executable, "-m", "autoft", "search", "--dataset", photos, "--weights", weights),
        *("--out", out, "--time", "200s", "--trials", 6, "--export", "onnx", "--heads", heads),
        *("--backbones", BACKBONE, *more),
    ]
    env = {**os.environ, "PYTHONPATH": str(poisons)}
    done = subprocess.run(
        [str(word) for word in command],
        env=env,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def told(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_t08_a_search_whose_trials_all_give_nan_ends_with_exit_5(
    photos, tiny_weights, tmp_path, poisons
) -> None:
    out = tmp_path / "run"
    code, printed = search(photos, tiny_weights, out, poisons, "nan")
    assert code == 5, printed
    assert "non_finite_loss" in printed
    assert "Traceback" not in printed
    assert {trial["status"] for trial in told(out)} == {"failed"}
    assert not (out / "best").exists()


@pytest.mark.slow
def test_t08_a_trial_that_gives_nan_is_never_the_best(
    photos, tiny_weights, tmp_path, poisons
) -> None:
    out = tmp_path / "run"
    quick = "--strategies", "head_only"  # the heads have their turn however busy the machine is
    code, printed = search(photos, tiny_weights, out, poisons, "linear,late", *quick)
    assert code == 0, printed
    bad = [trial for trial in told(out) if trial["config"]["head"]["name"] == "late"]
    assert bad
    assert {trial["status"] for trial in bad} == {"failed"}
    assert json.loads((out / "result.json").read_text())["winner"]["head"] == "linear"
