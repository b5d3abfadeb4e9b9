"""docs/training.md names every strategy, head and choice of the recipe, with its values."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from autoft import plugins
from autoft.space import Choice, read_signature, searched
from autoft.training import recipe

PAGE = (Path(__file__).parents[1] / "docs/training.md").read_text("utf-8")


def rows(heading: str) -> dict[str, list[str]]:
    part = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    cells = [re.split(r"\s*\|\s*", line.strip("| ")) for line in part.splitlines() if "|" in line]
    return {row[0].strip("`"): row for row in cells[2:]}


def test_the_page_names_every_strategy_with_its_choices() -> None:
    told = rows("Strategies")
    for plugin in plugins.installed("strategy"):
        if plugin.builtin:
            own = searched(read_signature(plugins.load("strategy", plugin.name)))
            assert set(re.findall(r"`(\w+)`", "".join(told[plugin.name][2:]))) == set(own)


def test_the_page_names_every_choice_of_the_recipe_with_its_options() -> None:
    told = rows("The recipe")
    ranges = searched(read_signature(recipe.tuning))
    assert set(told) == set(ranges)
    for name, range_ in ranges.items():
        if isinstance(range_, Choice):
            words = [word.strip("` ") for word in told[name][1].split(",")]
            assert {spelt(word) for word in words} == set(range_.options), name
        else:
            low, high = re.findall(r"[\d.e-]+", told[name][1])[:2]
            assert (float(low), float(high)) == (range_.low, range_.high)


def spelt(word: str) -> object:
    if word in ("true", "false"):
        return word == "true"
    try:
        return float(word)
    except ValueError:
        return word


@pytest.mark.parametrize("plugin", [p for p in plugins.installed("head") if p.builtin])
def test_the_page_names_every_head(plugin) -> None:
    assert f"`{plugin.name}`" in PAGE


def test_the_command_of_the_page_fixes_what_there_is() -> None:
    from autoft.search.configs import read_fixed
    from autoft.search.engines.tasks import Names, describe

    (texts,) = re.findall(r"--fix (\S+)", PAGE)
    space = describe(Names(("full",), ("linear", "mlp"), False, False)).space
    assert read_fixed(space, texts.split(",")) == {
        "train.optimizer": "sgd",
        "head.mlp.hidden": 512,
    }
