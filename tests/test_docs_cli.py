"""The documents name the commands, flags and exit codes that there are, all and no others."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer.main

from autoft import errors
from autoft.cli.main import app

ROOT = Path(__file__).resolve().parents[1]


def commands(group: Any = None, path: str = "autoft") -> dict[str, set[str]]:
    """Return the flags of every command by its full name, `--help` left out."""
    group = group or typer.main.get_command(app)
    inner = getattr(group, "commands", {})
    found = {} if inner and path != "autoft" else {path: flags(group)}
    for name, command in inner.items():
        found |= commands(command, f"{path} {name}")
    return found


def flags(command: Any) -> set[str]:
    names = {name for parameter in command.params for name in parameter.opts}
    return {name for name in names if name.startswith("--")} - {"--help"}


def documented() -> dict[str, set[str]]:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    sections = re.split(r"^## (autoft .*|Exit codes)$", f"## autoft\n{text}", flags=re.MULTILINE)
    names, bodies = ["autoft", *sections[1::2]], sections[0::2]
    found = {
        name: set(re.findall(r"^\| `(--[a-z-]+)`", body, flags=re.MULTILINE))
        for name, body in zip(names, bodies, strict=True)
    }
    return {name: flags for name, flags in found.items() if name != "Exit codes"}


def test_documented_flags_are_those_of_the_application() -> None:
    assert documented() == commands()


@pytest.mark.parametrize("page", ["README.md", "docs/cli.md"])
def test_documented_exit_codes_are_those_of_the_errors(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8").partition("## Exit codes")[2].split("## ")[0]
    written = {int(code) for code in re.findall(r"^\| (\d+) \|", text, flags=re.MULTILINE)}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    assert written == {0} | {k.exit_code for k in kinds if issubclass(k, errors.AutoftError)}


def test_readme_names_the_two_commands_of_the_makefile() -> None:
    readme, makefile = (
        (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "Makefile")
    )
    for target in ("demo", "test"):
        assert f"\n    make {target}\n" in readme
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
