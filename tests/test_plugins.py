"""Entry points: found without imports, clashes named, whatever a plugin does contained."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from autoft import plugins
from autoft.errors import PluginError


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Return a function that lays a package with entry points on the path."""
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins.installed.cache_clear()

    def make(name: str, code: str, *entries: str) -> Path:
        (tmp_path / f"{name}.py").write_text(code)
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[autoft.heads]\n" + "\n".join(entries) + "\n")
        return tmp_path

    yield make
    plugins.installed.cache_clear()


def test_built_ins_are_declared_as_plugins_and_load() -> None:
    names = {plugin.name for plugin in plugins.installed("strategy")}
    expected = {"head_only", "freeze", "full", "scratch", "gradual", "probe_then_tune"}
    assert names >= expected | {"norm_bias"}
    assert plugins.load("strategy", "full")(3, 0.0, bottom=0.01) == [0.01, 0.1, 1.0]


def test_listing_imports_neither_torch_nor_a_plugin(package) -> None:
    folder = package("loud", "raise SystemExit('imported!')", "loud = loud:head")
    code = (
        "import sys; from autoft import plugins\n"
        "found = [p.name for p in plugins.installed('head')]\n"
        "assert 'loud' in found and 'linear' in found, found\n"
        "assert not {'torch', 'timm', 'loud', 'autoft.heads'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(folder), "PATH": "/usr/bin"},
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import nothing_of_this_name", "No module named 'nothing_of_this_name'"),
        ("raise SystemExit(3)", "SystemExit(3)"),
        ("head = 5", "is a int and not a function"),
        ("", "has no attribute 'head'"),
        ("def head(:", "SyntaxError"),
    ],
    ids=["P01-import", "P01-exit", "P01-value", "P01-absent", "P01-syntax"],
)
def test_a_broken_plugin_fails_alone_and_says_who_it_is(package, code, words) -> None:
    package("bad_one", code, "bad = bad_one:head")
    sys.modules.pop("bad_one", None)
    with pytest.raises(PluginError, match="bad_one") as caught:
        plugins.load("head", "bad")
    assert words in str(caught.value)
    assert callable(plugins.load("strategy", "freeze"))


def test_an_unknown_name_suggests_the_closest() -> None:
    with pytest.raises(PluginError, match="Did you mean 'linear'"):
        plugins.find("head", "liner")


def test_a_built_in_name_is_reserved_and_the_other_stays_reachable(package) -> None:
    package("thief", "def head(n, c): return 'stolen'", "linear = thief:head")
    assert plugins.find("head", "linear").package == "autoft"
    assert plugins.load("head", "thief:linear")(1, 2) == "stolen"
    stolen = plugins.find("head", "thief:linear")
    assert "reserved by autoft; use 'thief:linear'" in plugins.shadowed(stolen)


def test_two_packages_with_one_name_are_both_named(package) -> None:
    package("one", "def head(n, c): return 1", "same = one:head")
    package("two", "def head(n, c): return 2", "same = two:head")
    with pytest.raises(PluginError, match=r"one 1\.0 and two 1\.0"):
        plugins.load("head", "same")
    assert plugins.load("head", "two:same")(0, 0) == 2
    assert "also declared by two" in plugins.shadowed(plugins.find("head", "one:same"))


def test_the_environment_can_leave_third_parties_out(package, monkeypatch) -> None:
    package("extra", "def head(n, c): return 1", "extra = extra:head")
    assert any(p.name == "extra" for p in plugins.installed("head"))
    monkeypatch.setenv("AUTOFT_DISABLE_PLUGINS", "1")
    plugins.installed.cache_clear()
    assert all(p.builtin for p in plugins.installed("head"))
