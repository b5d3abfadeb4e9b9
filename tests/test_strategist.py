"""What strategies of others leave alone is asked of them: their trials are planned as all are."""

from __future__ import annotations

import json
import sys
import threading
import time
from dataclasses import replace

import pytest

from autoft.network.strategy import Treatment
from autoft.search import run
from autoft.search.budget import Budget
from autoft.search.engines import strategist as module
from autoft.search.engines.strategist import Strategist
from autoft.search.settings import Settings
from autoft.search.stop import Stop
from autoft.training.job import Costs, Ranked
from autoft.training.plan import Room
from autoft.values import Part, TrialConfig

UPPER = """
import os
import time
from typing import Annotated

import torch  # a strategy of others may need it
from autoft.space import Float
from autoft.values import Rates

def upper(num_stages, progress, *, share: Annotated[float, Float(0.1, 1.0)] = 0.5):
    "Train the last `share` of the stages."
    trained = max(1, round(share * num_stages))
    return [0.0] * (num_stages - trained) + [1.0] * trained

def shifts(num_stages, progress):
    "Train the norms alone."
    return [Rates(weights=0.0, biases=0.0, norms=1.0)] * num_stages

def leaves(num_stages, progress):
    "End the process."
    os._exit(3)

def waits(num_stages, progress):
    "Never return."
    time.sleep(600)

def fails(num_stages, progress):
    "Cannot say."
    raise ValueError("I cannot say")
"""
NAMES = ("upper", "shifts", "leaves", "waits", "fails")
# Whatever is frozen, nothing can be kept in so little room.
COSTS = Costs(
    prefix=(0, 0.01, 0.02, 0.03, 0.04),
    tail=(0.1, 0.07, 0.05, 0.02, 0),
    score=(0.04, 0.03, 0.02, 0.01, 0),
    bytes=(0, 10, 10, 10, 0),
)
FOR_EVER = 1e4  # seconds: longer than a test may take
NOWHERE = Room(0, 0, 0, 1e9)


@pytest.fixture
def theirs(install, monkeypatch) -> None:
    """Install strategies, and wait for them for long."""
    monkeypatch.setattr(module, "PATIENCE", FOR_EVER)
    install("their_strategies", UPPER, "strategies", NAMES)


def config(strategy: str, **params) -> TrialConfig:
    return TrialConfig(Part("a"), Part(strategy, params), Part("linear"), {})


def budget_of(ask) -> Budget:
    ranked = Ranked("a", images_per_second=10, trained_per_second=10, num_stages=4, costs=COSTS)
    return Budget(time.time() + 1e5, None, {"a": ranked}, 1000, 200, NOWHERE, ask=ask, first=False)


def test_what_is_left_alone_is_asked_in_another_process(theirs) -> None:
    told = list[str]()
    before = "their_strategies" in sys.modules
    with Strategist(Stop(), told.append) as strategist:
        assert strategist.ask(Part("upper", {"share": 0.25}), 4) == Treatment(3, False)
        assert strategist.ask(Part("upper", {"share": 0.5}), 12) == Treatment(6, False)
        assert strategist.ask(Part("shifts"), 4) == Treatment(0, True)
        assert strategist.ask(Part("fails"), 4) == Treatment()
    assert ("their_strategies" in sys.modules) is before
    assert not told


def test_one_that_ends_its_process_or_never_answers_holds_nothing_up(theirs, monkeypatch) -> None:
    told = list[str]()
    with Strategist(Stop(), told.append) as strategist:
        assert strategist.ask(Part("leaves"), 4) == Treatment()
        assert strategist.ask(Part("upper"), 4) == Treatment(2, False)
        monkeypatch.setattr(module, "PATIENCE", 1.0)
        assert strategist.ask(Part("waits"), 4) == Treatment()
        monkeypatch.setattr(module, "PATIENCE", FOR_EVER)  # it is not asked again
        assert strategist.ask(Part("waits"), 6) == Treatment()
        assert strategist.ask(Part("upper"), 4) == Treatment(2, False)
    assert [each.split("'")[1] for each in told] == ["leaves", "waits"]


def test_who_asked_to_stop_does_not_wait_for_an_answer(theirs) -> None:
    stop = Stop()
    with Strategist(stop, lambda _: None) as strategist:
        threading.Timer(1.0, lambda: setattr(stop, "asked", True)).start()
        assert strategist.ask(Part("waits"), 4) == Treatment()
        assert strategist.ask(Part("upper"), 4) == Treatment()


def test_trials_of_others_are_planned_by_what_they_leave_alone(theirs) -> None:
    asked = list[tuple[Part, int]]()

    def ask(strategy: Part, num_stages: int) -> Treatment:
        asked.append((strategy, num_stages))
        return Treatment(3 if strategy.params.get("share") == 0.25 else 0)

    budget = budget_of(ask)
    tail, own, whole = config("upper", share=0.25), config("freeze", depth=0.75), config("upper")
    assert (budget.frozen(tail), budget.frozen(own), budget.frozen(whole)) == (3, 3, 0)
    assert budget.expected(tail, 10, True) == budget.expected(own, 10, True)
    assert budget.expected(tail, 10, True) < 0.6 * budget.expected(whole, 10, True)
    mixed = [replace(each, train={"mix": "mixup"}) for each in (tail, own, whole)]
    in_step = [budget.together(each, 10) for each in mixed]
    assert in_step[0] == in_step[1] > 1
    assert in_step[2] == 1
    assert len(asked) == 2  # answers are remembered; built-in strategies are not asked


@pytest.mark.slow
def test_a_search_plans_and_shares_what_a_strategy_of_others_freezes(
    theirs, photos, tiny_weights, tmp_path, monkeypatch
) -> None:
    plain, answers = Strategist.ask, list[Treatment]()

    def asked(self: Strategist, strategy: Part, num_stages: int) -> Treatment:
        answers.append(plain(self, strategy, num_stages))
        return answers[-1]

    monkeypatch.setattr(Strategist, "ask", asked)
    settings = Settings(
        dataset=str(photos),
        weights=str(tiny_weights),
        out=str(tmp_path / "run"),
        strategies=("upper",),
        heads=("linear",),
        fix=("strategy.upper.share=0.25", "train.mix=none"),
        offline=True,
        trials=2,
        time=120,
        export=("onnx",),
    )
    told = list[dict]()
    path = run.run_search(settings, lambda event: told.append({"kind": event.kind, **event.data}))
    shared = [json.loads(each.read_text()) for each in sorted(path.glob("trials/*/sharing.json"))]
    assert shared
    assert answers
    assert {each["cut"] for each in shared} <= {each.frozen for each in answers}
    assert all(each["cut"] > 0 for each in shared)
    ends = [each for each in told if each["kind"] == "trial_end"]
    assert all(each["status"] != "failed" for each in ends)
