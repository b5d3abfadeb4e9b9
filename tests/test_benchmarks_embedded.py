"""The benchmark of the embedded backbone: what it takes, what it chooses, and what it writes."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "benchmarks" / "quality"

pytestmark = pytest.mark.usefixtures("scripts")


def images(labels):
    from autoft.training.job import Images

    return Images(np.arange(100, 100 + len(labels)), np.array(labels))


def row(arm, rate, seed=0, dataset="flowers", role="", images=100, **more):
    prefix = f"{dataset}/{arm}/{images}"
    name = "probe" if rate is None else f"lr{rate:g}"
    known = {
        "label": f"{prefix}/{name}/{seed}",
        "prefix": prefix,
        "dataset": dataset,
        "arm": arm,
        "role": role or arm,
        "images": images,
        "rate": rate,
        "seed": seed,
        "classes": 5,
        "seconds": 10.0,
    }
    if rate is None:
        return known | {"n": [500, 736]} | more
    tuned = {"n": [500, 400, 736], "epochs": 20, "image_size": 96, "precision": "fp32"}
    return known | tuned | {"loss": 1.0} | more


def results():
    return [
        row("autoft_mini", None, last=0.40, stages=0.50),
        row("scratch", None, last=0.30, stages=0.45),
        row("squeezenet1_0.in1k", None, last=0.60, stages=0.70),
        row("autoft_mini", 1e-3, validation=0.55, test=0.90),
        row("autoft_mini", 2e-3, validation=0.65, test=0.60),
        row("autoft_mini", 3e-3, validation=0.60, test=0.50),
        row("autoft_mini", 2e-3, seed=1, validation=0.40, test=0.70),
        row("scratch", 2e-3, validation=0.5, test=0.5),
        row("scratch", 2e-3, seed=1, validation=0.5, test=0.52),
        row("squeezenet1_0.in1k", 1e-4, validation=0.8, test=0.80),
        row("squeezenet1_0.in1k", 3e-4, validation=0.7, test=0.99),
    ]


def test_every_class_gives_its_share_and_the_rest_is_left_over():
    from one_trial import per_class

    part = images([0] * 20 + [1] * 3 + [2] * 8)
    taken, rest = per_class(part, 5)
    assert np.bincount(taken.labels).tolist() == [5, 3, 5]
    assert sorted([*taken.rows, *rest.rows]) == part.rows.tolist()
    assert all(
        part.labels[r - 100] == label for r, label in zip(taken.rows, taken.labels, strict=True)
    )


def test_a_smaller_share_is_part_of_a_larger_one_every_time():
    from one_trial import per_class

    part = images([0, 1, 2, 1, 0] * 20)
    small, large = per_class(part, 4)[0], per_class(part, 9)[0]
    assert set(small.rows) < set(large.rows)
    assert np.array_equal(small.rows, per_class(part, 4)[0].rows)


def test_joined_parts_keep_every_column():
    from one_trial import joined, per_class

    part = images([0, 1] * 6)
    both = joined(*per_class(part, 2))
    order = np.argsort(both.rows)
    assert np.array_equal(both.rows[order], part.rows)
    assert np.array_equal(both.labels[order], part.labels)
    assert len(both.weights) == len(both.folds) == len(part)


def test_validation_chooses_the_rate_and_neither_test_nor_another_seed():
    from embedded_table import best_rate

    rows = results()[3:7]
    assert best_rate(rows) == 2e-3
    assert best_rate([*rows, row("autoft_mini", 1e-4, seed=1, validation=0.99)]) == 2e-3
    assert best_rate([*rows, row("autoft_mini", 1e-4, error="out of memory")]) == 2e-3
    assert best_rate([*rows, row("autoft_mini", 1e-4, validation=0.65, loss=0.1)]) == 1e-4
    assert best_rate(results()[:1]) is None


def options(**more):
    known = {"images": None, "label": "", "mini": "", "fix": "", "rates": ""}
    return argparse.Namespace(**known | more)


def test_what_is_done_is_not_wanted_again_and_what_failed_is():
    from embedded import specs_of

    rows = [*results(), row("scratch", 1e-3, error="killed")]
    left = [spec["label"] for spec in specs_of("grid", rows, options())]
    mine = [label for label in left if label.startswith("flowers/scratch/")]
    assert mine == [f"flowers/scratch/100/lr{rate}/0" for rate in ("0.001", "0.003")]
    assert not [
        spec for spec in specs_of("probe", rows, options()) if spec["dataset"] == "flowers"
    ]


def test_the_second_seed_goes_to_the_chosen_rate():
    from embedded import specs_of

    left = [spec["label"] for spec in specs_of("chosen", results(), options())]
    assert left == ["flowers/squeezenet1_0.in1k/100/lr0.0001/1"]


def test_other_weights_and_other_numbers_of_images_are_arms_of_their_own():
    from embedded import specs_of

    others = options(mini="there/better.safetensors", fix="norm_mode=train", images=10)
    arms = {spec["arm"]: spec["role"] for spec in specs_of("probe", results(), others)}
    assert arms["better+norm_mode=train"] == "autoft_mini"
    assert all("/10/" in spec["label"] for spec in specs_of("grid", results(), others))


def test_given_rates_are_for_the_network_itself_and_not_for_the_published_weights():
    from embedded import specs_of

    specs = list(specs_of("grid", [], options(rates="4e-3,1e-2")))
    rates = {arm: [s["rate"] for s in specs if s["arm"] == arm] for arm in ("scratch",)}
    assert set(rates["scratch"]) == {4e-3, 1e-2}
    assert {s["rate"] for s in specs if s["arm"] == "squeezenet1_0.in1k"} == {3e-4, 1e-3}


def cells(text, start):
    line = next(line for line in text.splitlines() if line.startswith(start))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_holds_the_chosen_rate_with_both_seeds():
    from embedded_table import tables

    text = tables(results())
    mini = cells(text, "| flowers | autoft_mini |")
    assert mini[2:] == ["0.400", "0.500", "0.650", "**0.650** (0.600, 0.700)", "0.002", "10"]
    assert cells(text, "| flowers | squeezenet")[6] == "0.0001 (edge)"
    assert cells(text, "| flowers | 5 |")[:5] == ["flowers", "5", "500", "400", "736"]


def test_lines_stand_in_the_same_order_however_they_were_measured():
    from embedded_table import tables

    assert tables(results()[::-1]) == tables(results())


def test_the_differences_are_in_points_of_test_accuracy():
    from embedded_table import tables

    text = tables(results())
    expected = ["+10.0", "+5.0", "+14.0", "+20.0", "+20.0", "+15.0"]
    assert cells(text, "| flowers | +")[1:] == expected
    assert cells(text, "| **mean**")[1:] == expected
    assert "on 1 of 1 data sets; the mean difference is +14.0 points" in text
    assert "That of `squeezenet1_0.in1k` to it is +15.0 points" in text


def test_weights_that_lose_are_said_to_lose():
    from embedded_table import tables

    worse = [
        row("autoft_mini", 2e-3, dataset="sign-digits", validation=0.9, test=0.5),
        row("scratch", 2e-3, dataset="sign-digits", validation=0.9, test=0.8),
    ]
    text = tables([*results(), *worse])
    assert (
        "on 1 of 2 data sets; the mean difference is -8.0 points (least -30.0, most +14.0)" in text
    )


def test_every_number_of_images_has_its_table_and_failures_are_listed():
    from embedded_table import tables

    few = [row("autoft_mini", None, images=10, last=0.2, stages=0.3)]
    failed = [row("scratch", 3e-3, error="RuntimeError: no")]
    text = tables([*results(), *few, *failed])
    assert text.index("### 100 images") < text.index("### 10 images")
    assert "- flowers/scratch/100/lr0.003/0: RuntimeError: no" in text


def test_a_trial_that_succeeded_later_is_no_failure():
    from embedded_table import tables

    again = row("scratch", 2e-3, error="killed")
    assert "killed" not in tables([again, *results()])


def test_no_results_are_an_error():
    from embedded_table import tables

    with pytest.raises(ValueError, match="run the benchmark"):
        tables([row("scratch", 2e-3, error="killed")])


def test_what_stands_around_the_marks_stays(tmp_path):
    from page import write_between

    page = tmp_path / "page.md"
    page.write_text("# Mine\n\n<!-- a: begin -->\nold\n<!-- a: end -->\n\nMore.\n", "utf-8")
    write_between(page, "a", "new\n")
    first = page.read_text("utf-8")
    assert first == "# Mine\n\n<!-- a: begin -->\n\nnew\n\n<!-- a: end -->\n\nMore.\n"
    write_between(page, "a", "new")
    assert page.read_text("utf-8") == first
    write_between(page, "b", "other")
    assert page.read_text("utf-8").startswith(first)
    assert page.read_text("utf-8").endswith("<!-- b: begin -->\n\nother\n\n<!-- b: end -->\n")


def test_a_missing_page_is_made(tmp_path):
    from page import write_between

    write_between(tmp_path / "page.md", "a", "new")
    assert "\nnew\n" in (tmp_path / "page.md").read_text("utf-8")


@pytest.mark.parametrize(
    "text",
    [
        "<!-- a: begin -->",
        "<!-- a: end --> <!-- a: begin -->",
        "<!-- a: begin --> <!-- a: begin --> <!-- a: end -->",
    ],
)
def test_broken_marks_are_refused_and_the_page_stays(tmp_path, text):
    from page import write_between

    page = tmp_path / "page.md"
    page.write_text(text, "utf-8")
    with pytest.raises(ValueError, match="Mend the marks"):
        write_between(page, "a", "new")
    assert page.read_text("utf-8") == text
