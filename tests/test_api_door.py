"""`import autoft` is light, and `autoft.search` is a function whatever was imported before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import autoft
from autoft.api import find_images


def in_fresh_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_brings_nothing_else() -> None:
    code = "import sys, autoft; print([m for m in sys.modules if m.startswith('autoft')])"
    assert in_fresh_python(code) == "['autoft']"


def test_every_public_name_is_there_and_torch_is_not() -> None:
    code = (
        "import sys, autoft; [getattr(autoft, name) for name in autoft.__all__];"
        "print(autoft.__all__ == sorted(autoft.__all__), dir(autoft) == autoft.__all__,"
        "'torch' in sys.modules, autoft.__version__)"
    )
    assert in_fresh_python(code) == "True True False 0.1.0"


@pytest.mark.parametrize("first", ["autoft", "autoft.search.settings", "autoft.api"])
def test_search_is_callable_whatever_was_imported_first(first: str) -> None:
    code = (
        f"import {first}\nimport autoft, autoft.search.folder\n"
        "try: autoft.search('x', tme='1m')\n"
        "except autoft.UsageError as error: print(error)"
    )
    assert "Did you mean 'time'?" in in_fresh_python(code)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'serach'"):
        autoft.serach  # noqa: B018  reading it is the test


def test_load_refuses_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(autoft.UsageError, match=r"no run\.json"):
        autoft.load(tmp_path)


def test_unfinished_run_says_how_to_finish_it(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    run = autoft.load(tmp_path)
    assert run.leaderboard() == []
    with pytest.raises(autoft.UsageError, match="autoft resume"):
        _ = run.best


def test_script_without_main_guard_is_told_so(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing, sys\nimport autoft\n"
        "if __name__ == '__main__':\n"
        "    worker = multiprocessing.get_context('spawn').Process(target=print)\n"
        "    worker.start()\n    worker.join()\n    sys.exit(worker.exitcode)\n"
        "autoft.search('sample:digits')\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 1
    assert 'Put the call under `if __name__ == "__main__":`' in done.stderr


def test_folders_are_searched_for_images(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.png", "deep/a.PNG"):
        Image.new("RGB", (2, 2)).save(tmp_path / name)
    (tmp_path / "list.txt").touch()
    found = find_images([tmp_path, "other.xyz"])
    assert found == [tmp_path / "b.png", tmp_path / "deep" / "a.PNG", Path("other.xyz")]
