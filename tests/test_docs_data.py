"""The commands of docs/data.md run as they stand, on a small data set of the names used there."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from autoft.cli.main import main

PAGE = Path(__file__).resolve().parents[1] / "docs" / "data.md"
COMMANDS = re.findall(r"^\$ autoft (.+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)


@pytest.fixture(scope="module")
def folder(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `flowers`, `flowers.zip` and `labels.csv`."""
    root = tmp_path_factory.mktemp("docs")
    shutil.copytree(photos, root / "flowers")
    shutil.make_archive(str(root / "flowers"), "zip", root, "flowers")
    images = sorted((root / "flowers").rglob("*.png"))
    lines = [f"{image.relative_to(root)},{image.parent.name}\n" for image in images]
    (root / "labels.csv").write_text("path,label\n" + "".join(lines))
    return root


def test_there_are_commands_to_run() -> None:
    assert len(COMMANDS) > 8


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_page_run(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    code = main(shlex.split(command))
    assert code == 0, capsys.readouterr().err
    assert capsys.readouterr().out
