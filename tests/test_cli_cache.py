from __future__ import annotations

import json
import os
import time
from datetime import datetime

import pytest

from autoft.cli import cache as command
from autoft.cli.cache import size
from autoft.cli.main import main
from autoft.data.cache.entries import entries
from autoft.data.cache.files import cache_root
from autoft.data.cache.holding import hold, release


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("AUTOFT_CACHE_LIMIT", "5MB")
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache" / "autoft"


def put(kind, name, count, age=0.0):
    path = cache_root() / kind / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(count))
    os.utime(path, (time.time() - age,) * 2)
    return path


def names():
    return [entry.name for entry in entries()]


def test_list_shows_the_last_used_first_and_the_total(capsys, cache):
    put("scans", "old.npz", 1_500, age=86_400)
    held = put("pixels", "new", 2_500_000)
    hold(held)
    assert main(["cache", "list"]) == 0
    out, err = capsys.readouterr()
    heading, new, old = out.splitlines()
    assert heading.split() == ["kind", "what", "size", "last", "used", "in", "use"]
    assert new.split()[:4] == ["pixels", "new", "2.5", "MB"]
    assert new.split()[-1] == "yes"
    assert old.split()[:4] == ["scans", "old.npz", "1.5", "kB"]
    assert old.split()[-1] == "no"
    assert err == f"2 entries, 2.5 MB of at most 5.0 MB, in {cache}.\n"
    release(held)


def test_list_as_json(capsys, cache):
    path = put("features", "a.npy", 30)
    assert main(["cache", "list", "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    when = datetime.fromtimestamp(path.stat().st_mtime).isoformat(timespec="seconds")
    assert about == {
        "root": str(cache),
        "bytes": 30,
        "limit": 5_000_000,
        "entries": [
            {"kind": "features", "name": "a.npy", "bytes": 30, "last_used": when, "held": False}
        ],
    }


def test_an_empty_cache(capsys):
    assert main(["cache", "list"]) == 0
    assert capsys.readouterr().err.startswith("0 entries, 0 B of at most")
    assert main(["cache", "clear"]) == 0
    assert capsys.readouterr().out == "0 entries removed, 0 B freed.\n"


def test_names_cannot_act_on_the_terminal(capsys):
    put("features", "a\x1b[31m.npy", 30)
    main(["cache", "list"])
    assert "\x1b" not in capsys.readouterr().out


def test_clear_says_what_was_freed_and_names_what_is_in_use(capsys):
    held = put("pixels", "used", 7)
    put("pixels", "idle", 1_500)
    hold(held)
    assert main(["cache", "clear", "--yes"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out == [
        "1 entry removed, 1.5 kB freed.",
        "Kept, for a running command uses it (7 B): pixels/used.",
    ]
    assert names() == ["used"]
    release(held)


def test_clear_by_kind_and_age():
    put("pixels", "a", 1, age=8 * 86_400)
    put("pixels", "b", 1)
    put("scans", "c", 1, age=8 * 86_400)
    assert main(["cache", "clear", "--kind", "pixels", "--older-than", "7d"]) == 0
    assert names() == ["b", "c"]


@pytest.mark.parametrize("answer", [True, False])
def test_on_a_terminal_it_asks(capsys, monkeypatch, answer):
    put("pixels", "a", 1)
    asked = []
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr(command.typer, "confirm", lambda text: asked.append(text) or answer)
    assert main(["cache", "clear", "--kind", "pixels", "--older-than", "0s"]) == 0
    assert asked == [f"Remove pixels in {cache_root()} that was not used for 0s?"]
    assert names() == ([] if answer else ["a"])
    assert main(["cache", "clear", "--yes"]) == 0
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--older-than", "week"], "such as 7d"),
        (["--older-than", "7"], "such as 7d"),
        (["--older-than", "-7d"], "such as 7d"),
        (["--kind", "pixel"], "Did you mean 'pixels'?"),
    ],
)
def test_what_cannot_be_is_a_usage_error(capsys, arguments, message):
    put("pixels", "a", 1)
    assert main(["cache", "clear", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert names() == ["a"]


def test_a_cache_that_is_a_file(capsys, cache):
    cache.write_text("")
    for arguments in (["list"], ["clear", "--yes"]):
        assert main(["cache", *arguments]) == 4
        assert str(cache) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_960, "1.0 MB"),
        (12 * 10**9, "12.0 GB"),
        (10**16, "10000.0 TB"),
    ],
)
def test_sizes(count, text):
    assert size(count) == text
