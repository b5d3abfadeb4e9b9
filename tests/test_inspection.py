"""Broken plugins are seen and named without running them, and contained when they are run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from autoft.cli.probing import probe
from autoft.plugins import Plugin

GOOD = "def head(num_features, num_classes):\n    '''Make a head.'''\n"
# Source of a module, and what `plugins list` says about it without importing it.
BROKEN = {
    "no_package": ("import missing_package\n" + GOOD, "'missing_package' is not installed"),
    "no_sibling": ("from .nowhere import x\n" + GOOD, "there is no module 'fakes.nowhere'"),
    "bad_sibling": ("from . import no_syntax\n" + GOOD, "cannot be read as Python"),
    "no_name": ("from .good import hed\n" + GOOD, "fakes.good defines no 'hed'. Did you mean"),
    "no_core": ("from autoft.valeus import Rates\n" + GOOD, "no module 'autoft.valeus'"),
    "no_core_name": ("from autoft.values import Ratez\n" + GOOD, "autoft.values defines no"),
    "no_syntax": ("def head(:\n", "cannot be read as Python"),
    "no_function": ("def haed(): ...\n", "defines no 'head'. Did you mean 'haed'?"),
    "raises": ("raise ImportError('go away')\n" + GOOD, "raise ImportError('go away')"),
    "exits": ("import sys\nsys.exit(3)\n" + GOOD, "sys.exit(3)"),
}
SOUND = {
    "good": GOOD,
    "optional": "try:\n    import missing_package\nexcept ImportError:\n    pass\n" + GOOD,
    "typing_only": (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import missing_package\n" + GOOD
    ),
    "assigned": "from .good import head as _head\nhead = _head\n",
    "starred": "from .good import *\n",
    "lazy": "def __getattr__(name):\n    return print\n",
    "conditional": "if True:\n    def head(f, c): ...\n",
}
# What only running shows, and what `--check` says about it.
HIDDEN = {
    "segfaults": ("import os\nx = os.kill(os.getpid(), 11)\n" + GOOD, "SIGSEGV"),
    "leaves": ("import os\nx = [os._exit(7)]\n" + GOOD, "exit code 7"),
    "system_exit": ("x = [exit(0)]\n" + GOOD, "SystemExit"),
    "no_default": (
        "from typing import Annotated\nfrom autoft.space import Int\n"
        "def head(f, c, *, hidden: Annotated[int, Int(1, 2)]): ...\n",
        "needs a default",
    ),
}
NOISY = "print('hello from a plugin')\n" + GOOD


def lay_out(folder: Path, modules: dict[str, str]) -> None:
    """Write a package `fakes` and the metadata that pip would have installed with it."""
    package, info = folder / "fakes", folder / "fakes-1.0.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").touch()
    trace = f"open({str(folder / 'imported')!r}, 'a').close()\n"
    for name, source in modules.items():
        readable = name != "no_syntax"
        (package / f"{name}.py").write_text(source + trace if readable else source)
    entries = [f"{name} = fakes.{name}:head" for name in modules]
    entries += ["gone = fakes.gone:head", "no_target = fakes", "linear = fakes.good:head"]
    (info / "entry_points.txt").write_text("[autoft.heads]\n" + "\n".join(entries) + "\n")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fakes\nVersion: 1.0\n")


def list_states(folder: Path, *flags: str) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "autoft", "plugins", "list", "--json", "--kind", "head", *flags],
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    rows = json.loads(done.stdout)
    return {row["name"]: row["state"] for row in rows if row["package"] == "fakes"}


@pytest.fixture(scope="module")
def fakes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fakes")
    lay_out(folder, {**SOUND, **{name: source for name, (source, _) in BROKEN.items()}})
    return folder


@pytest.fixture(scope="module")
def states(fakes: Path) -> dict[str, str]:
    return list_states(fakes)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_plugin_is_listed_with_its_reason(states: dict[str, str], name: str) -> None:
    assert states[name].startswith("broken: ")
    assert BROKEN[name][1] in states[name]


@pytest.mark.parametrize("name", SOUND)
def test_sound_plugin_is_not_called_broken(states: dict[str, str], name: str) -> None:
    assert states[name] == "ok"


def test_missing_module_and_target_without_function_are_named(states: dict[str, str]) -> None:
    assert states["gone"] == "broken: there is no module 'fakes.gone'"
    assert "expected 'module:function'" in states["no_target"]


def test_builtin_name_is_reserved(states: dict[str, str]) -> None:
    assert "reserved" in states["linear"]
    assert "'fakes:linear'" in states["linear"]


def test_listing_runs_no_plugin(fakes: Path, states: dict[str, str]) -> None:
    assert states
    assert not (fakes / "imported").exists()


def test_check_contains_and_explains_what_only_running_shows(tmp_path: Path) -> None:
    hidden = {name: source for name, (source, _) in HIDDEN.items()}
    lay_out(tmp_path, {**hidden, "good": GOOD, "noisy": NOISY})
    plain, checked = list_states(tmp_path), list_states(tmp_path, "--check")
    assert {name: plain[name] for name in hidden} == dict.fromkeys(hidden, "ok")
    for name, (_, words) in HIDDEN.items():
        assert words in checked[name], checked[name]
    assert checked["good"] == checked["noisy"] == "ok"


def test_hanging_plugin_is_stopped_and_the_next_is_still_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay_out(tmp_path, {"hangs": "import time\nx = [time.sleep(600)]\n" + GOOD, "good": GOOD})
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    plugins = [Plugin("head", n, "fakes", "1.0", f"fakes.{n}:head") for n in ("hangs", "good")]
    assert list(probe(plugins, patience=3.0).values()) == ["its import did not end within 3 s", ""]
