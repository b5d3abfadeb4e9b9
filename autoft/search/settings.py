"""The settings of a search: one model for flags, environment, file and Python.

A flag wins over the environment (`AUTOFT_*`), that over the file (`--config`), that over defaults.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from autoft.data.reading import SCHEMES, Reading
from autoft.errors import UsageError, did_you_mean

FORMATS = ("onnx", "torchscript", "pt2")
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
MAY_CHANGE = ("out", "time", "trials", "workers", "engine", "device", "export", "offline")
"""Settings that do not change what a trial means, so a resumed run may have others."""


def parse_time(text: object) -> float:
    """Return seconds for `90`, `90s`, `15m`, `1.5h` or `1h30m`.

    Raises:
        ValueError: the text is none of these, or not above zero.
    """
    if isinstance(text, int | float):
        seconds = float(text)
    else:
        parts = re.findall(r"(\d+(?:\.\d+)?)([smhd]?)", str(text).strip().lower())
        if not parts or "".join(n + u for n, u in parts) != str(text).strip().lower():
            raise ValueError(f"'{text}' is no time; write 90s, 15m, 1.5h or 1h30m")
        seconds = sum(float(number) * UNITS[unit or "s"] for number, unit in parts)
    if seconds <= 0:
        raise ValueError(f"a time of {seconds} s is not above zero")
    return seconds


def _split_names(names: object) -> object:
    if isinstance(names, str):
        return tuple(name.strip() for name in names.split(",") if name.strip())
    return names


def _check_device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+(,\d+)*)?", text):
        raise ValueError("write auto, cpu, cuda, cuda:0 or cuda:0,1")
    return text


def _expand(path: object) -> object:
    return str(Path(path).expanduser()) if isinstance(path, str) and path[:1] == "~" else path


def check_formats(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return `names` if each is a format that can be exported.

    Raises:
        ValueError: one is not (with the closest), or there is none.
    """
    if not names:
        raise ValueError(f"at least one format is needed: {', '.join(FORMATS)}")
    for name in names:
        if name not in FORMATS:
            hint = did_you_mean(name, FORMATS)
            raise ValueError(f"there is no format '{name}'.{hint} Known: {', '.join(FORMATS)}")
    return names


Names = Annotated[tuple[str, ...], BeforeValidator(_split_names)]


class Settings(BaseModel):
    """What `autoft search` is told; an empty tuple means "what is installed and fits"."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: Annotated[str, BeforeValidator(_expand)] = Field(
        description="Images: a folder, a manifest, an archive, hf://..., or sample:digits."
    )
    out: Annotated[str | None, BeforeValidator(_expand)] = Field(
        None, description="Run folder [default: runs/<dataset>]."
    )
    time: Annotated[float, BeforeValidator(parse_time)] = Field(
        1800.0, description="Wall time of the whole command, export included: 90s, 15m, 1.5h."
    )
    trials: int | None = Field(None, ge=1, description="Stop after so many trials.")
    backbones: Names = Field((), description="Backbones to choose among, comma-separated.")
    strategies: Names = Field((), description="Strategies to choose among.")
    heads: Names = Field((), description="Heads to choose among.")
    weights: Annotated[str | None, BeforeValidator(_expand)] = Field(
        None, description="Folder whose sub-folders hold weights."
    )
    allow_license: Names = Field(
        (), description="Licences of weights that may be used; commercial or any."
    )
    fix: Names = Field(
        (), description="Answers that are given: train.sam=0.05,head.mlp.hidden=256."
    )
    metric: Literal["auto", "accuracy", "balanced_accuracy", "macro_f1"] = Field(
        "auto", description="What the search maximises on the validation part."
    )
    device: Annotated[str, AfterValidator(_check_device)] = Field(
        "auto", description="auto, cpu, cuda, cuda:0 or cuda:0,1."
    )
    workers: int | None = Field(None, ge=1, le=64, description="Trials at the same time.")
    engine: Literal["local", "ray"] = Field("local", description="Where trials run.")
    seed: int = Field(
        0, ge=0, lt=2**31, description="Seed of the split, the search and the trials."
    )
    image_size: int | None = Field(None, ge=16, le=1024, description="Pixels per side.")
    split: Annotated[str | None, BeforeValidator(_expand)] = Field(
        None, description="CSV that says which image is in which part."
    )
    folds: int | None = Field(None, ge=1, le=20, description="Folds for selection; 1: hold-out.")
    max_bad: float = Field(0.05, ge=0, le=1, description="Share of files that may be unusable.")
    min_side: int = Field(8, ge=1, description="Smallest shorter side in pixels.")
    min_per_class: Literal["error", "drop"] = Field(
        "error", description="What becomes of classes that are too small to be split."
    )
    near_dup: int | None = Field(
        None, ge=0, le=32, description="Look for near-duplicates within so many of 64 bits."
    )
    allow_leak: bool = Field(False, description="Accept the same image in two given parts.")
    merge_classes: bool = Field(False, description="Join classes that differ in case or form.")
    keep_empty: bool = Field(False, description="Keep classes without an image.")
    follow_outside: bool = Field(False, description="Follow links that leave the dataset.")
    offline: bool = Field(False, description="Never use the network.")
    export: Annotated[Names, AfterValidator(check_formats)] = Field(
        ("onnx", "torchscript"), description="Formats: onnx, torchscript, pt2."
    )

    def reading(self) -> Reading:
        """Return what is accepted, left out or refused of the dataset."""
        return Reading(**{field.name: getattr(self, field.name) for field in fields(Reading)})

    def meaning(self) -> dict[str, Any]:
        """Return the settings that decide what a trial means; a resumed run must agree on them."""
        return self.resolved().model_dump(mode="json", exclude=set(MAY_CHANGE))

    def resolved(self) -> Settings:
        """Return the same settings with absolute paths, which mean the same from everywhere."""
        paths = {
            name: str(Path(value).resolve())
            for name in ("dataset", "weights", "split")
            if (value := getattr(self, name)) and not value.startswith(SCHEMES)
        }
        return self.model_copy(update=paths)


def read_settings(flags: Mapping[str, Any], config: Path | None = None) -> Settings:
    """Join flags, environment and `config` (TOML) into settings; a flag of None is not given.

    Raises:
        UsageError: names the setting, its value, where it came from, and what was expected.
    """
    layers = {"": {k: v for k, v in flags.items() if v is not None}}
    environment = {
        name: os.environ[f"AUTOFT_{name.upper()}"]
        for name in Settings.model_fields
        if f"AUTOFT_{name.upper()}" in os.environ
    }
    file = _read_toml(config) if config else {}
    origin = dict.fromkeys(file, f" in {config}")
    origin |= dict.fromkeys(environment, " in the environment") | dict.fromkeys(layers[""], "")
    try:
        return Settings(**{**file, **environment, **layers[""]})
    except ValidationError as error:
        raise UsageError(_explain(error, origin)) from error


def read_saved(folder: Path, **changes: Any) -> Settings:
    """Return the settings that a run was made with; the environment of today has no say.

    Raises:
        UsageError: `config.toml` is missing or damaged, or a change cannot be.
    """
    given = {name: value for name, value in changes.items() if value is not None}
    saved = _read_toml(folder / "config.toml") | given
    try:
        return Settings(**saved)
    except ValidationError as error:
        raise UsageError(_explain(error, {})) from error


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path} is not valid TOML: {error}.") from error


def _explain(error: ValidationError, origin: Mapping[str, str]) -> str:
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else "settings"
    flag = f"--{name.replace('_', '-')}"
    if first["type"] == "extra_forbidden":
        hint = did_you_mean(name, Settings.model_fields)
        known = ", ".join(Settings.model_fields)
        return f"There is no setting '{name}'{origin.get(name, '')}.{hint} Known: {known}."
    if first["type"] == "missing":
        return f"{flag} is not given. Name a folder of labelled images, or sample:digits."
    message = first["msg"].removeprefix("Value error, ")
    return f"{flag} {first['input']!r}{origin.get(name, '')} cannot be used: {message}."
