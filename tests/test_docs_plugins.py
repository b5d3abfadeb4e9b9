"""The plugin page: its tutorial works as written, and its lists are those of the kit."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from autoft.space import Choice, Float, Int
from autoft.testing import CHECKS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "plugins.md"
FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def blocks() -> list[tuple[str, str, str]]:
    """Return language, title and text of every fenced block."""
    return FENCE.findall(PAGE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Lay out the tutorial's package as pip does, and return its sources and the environment."""
    source = tmp_path_factory.mktemp("tutorial") / "autoft-shufflenet"
    files = {title: text for _, title, text in blocks() if title}
    for name, text in files.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text, encoding="utf-8")
    project = tomllib.loads(files["pyproject.toml"])["project"]
    info = source / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    sections = (
        f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in entries.items())
        for group, entries in project["entry-points"].items()
    )
    (info / "entry_points.txt").write_text("\n".join(sections))
    return source, {**os.environ, "PYTHONPATH": str(source)}


def test_tutorial_plugin_is_listed(installed):
    source, environment = installed
    command = [sys.executable, "-m", "autoft", "plugins", "list", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    (listed,) = (row for row in json.loads(done.stdout) if row["package"] == source.name)
    assert (listed["name"], listed["state"]) == ("my_shufflenet", "ok")


def test_tutorial_plugin_passes_its_own_test(installed):
    source, environment = installed
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    assert f"{len(CHECKS['backbone'])} passed" in done.stdout, done.stdout + done.stderr


def test_function_of_the_tutorial_has_ten_lines():
    (text,) = (text for _, title, text in blocks() if title == "autoft_shufflenet.py")
    assert len([line for line in text.splitlines() if line and '"""' not in line]) <= 10


@pytest.mark.parametrize(("kind", "name"), [("strategy", "from_the_top"), ("head", "dropped")])
def test_example_of_the_page_conforms(kind, name):
    (text,) = (text for _, title, text in blocks() if f"def {name}(" in text)
    scope: dict[str, object] = {"__name__": "example"}
    exec(compile(text, str(PAGE), "exec"), scope)
    for check in CHECKS[kind]:
        check(scope[name])


def test_ranges_of_the_page_hold_their_defaults():
    page = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `Annotated\[\w+, (.+)\] = (.+?)` \|", page, flags=re.MULTILINE)
    assert len(rows) == 4
    for text, default in rows:
        range_ = eval(text, {"Float": Float, "Int": Int, "Choice": Choice})
        assert range_.holds(eval(default))


def test_page_lists_every_check_with_its_sentence():
    listed = re.findall(r"^- `(\w+)`: (.+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    checks = {check for group in CHECKS.values() for check in group}
    assert dict(listed) == {
        check.__name__.removeprefix("check_"): check.__doc__.partition("\n")[0] for check in checks
    }
