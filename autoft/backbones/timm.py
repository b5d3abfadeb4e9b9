"""Any architecture of timm as a backbone: by name and tag, or from a local folder."""

from __future__ import annotations

import contextlib
import io
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoft.backbones.files import LOCAL, check_name, locate, read_config
from autoft.errors import AutoftError, DataError, MachineError
from autoft.values import Backbone
from autoft.weights import published, quiet

if TYPE_CHECKING:
    from torch import nn


@published(locate)
def timm(*, model: str = "", image_size: int = 0, pretrained: bool = True) -> Backbone:
    """Build the timm architecture `model`, such as `resnet18.a1_in1k` or `local-dir:PATH`.

    `image_size` (pixels) matters only to networks whose position embedding has a fixed size.

    Raises:
        UsageError: timm has no such architecture or tag.
        MachineError: its weights are neither cached nor to be had.
        DataError: the weights in the folder are damaged, or of another architecture.
    """
    import timm as library

    check_name(model)
    options: dict[str, Any] = {"num_classes": 0}
    if image_size and _fixed_size(model):
        options["img_size"] = image_size
    if pretrained:
        return _describe(_load(model, options))
    return _describe(library.create_model(model, **options))


def _load(model: str, options: dict[str, Any]) -> nn.Module:
    """Build `model` with its weights, which are fetched if they are not here."""
    import timm as library

    weights = locate(model=model)
    path = weights.path
    if not path and weights.get is not None:
        path = str(weights.get(quiet, False))
    if not model.startswith(LOCAL):  # the very file that was found, without asking the Hub again
        options["pretrained_cfg_overlay"] = {"file": path, "custom_load": _is_foreign(model)}
    try:
        with contextlib.redirect_stderr(io.StringIO()), _missing_tensors() as missing:
            module = library.create_model(model, pretrained=True, **options)
    except AutoftError:
        raise
    except Exception as error:  # damage shows as any of a dozen exceptions
        raise _explain(model, path or weights.place, error) from error
    if missing and model.startswith(LOCAL):
        raise DataError(
            f"The weights in {path} do not fit '{weights.config['architecture']}': "
            f"{missing[0]} missing. Choose the architecture that they were trained with."
        )
    built: nn.Module = module
    return built


def _is_foreign(model: str) -> bool:
    """Tell whether the published file of `model` has a format of its own, which timm converts."""
    from timm.models import get_pretrained_cfg

    config = get_pretrained_cfg(model)
    if config is None:
        return False
    # What the Hub has was converted already, with few exceptions; what is at an address was not.
    special: object = config.custom_load
    return special == "hf" if config.hf_hub_id else bool(special)


@contextlib.contextmanager
def _missing_tensors() -> Iterator[list[str]]:
    """Hear which parameters timm found no tensor for; it says so in its log and nowhere else."""
    heard: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if found := re.match(r"Missing keys \((.+)\) discovered", record.getMessage()):
                names = found[1].split(", ")
                shown = ", ".join(f"'{name}'" for name in names[:3])
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                heard.append(f"{shown}{more} {'is' if len(names) == 1 else 'are'}")

    log, handler = logging.getLogger("timm.models._builder"), Listener()
    level, passed_on = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False  # what timm has to say of a replaced head is of no use to anybody
    try:
        yield heard
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = passed_on


def _fixed_size(model: str) -> bool:
    if model.startswith(LOCAL):
        told = read_config(Path(model.removeprefix(LOCAL))).get("pretrained_cfg", {})
        return bool(told.get("fixed_input_size", False))
    from timm.models import get_pretrained_cfg

    config = get_pretrained_cfg(model)
    return bool(config and config.fixed_input_size)


def _explain(model: str, path: str, error: Exception) -> AutoftError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].startswith("Error(s) in loading state_dict"):
        return DataError(
            f"The weights in {path} do not fit the architecture: {'; '.join(lines[1:4])[:400]} "
            f"Choose the architecture that they were trained with."
        )
    reason = f"{type(error).__name__}: {lines[0][:200]}" if lines else repr(error)
    if model.startswith(LOCAL):
        return DataError(
            f"The weights in {path} cannot be read ({reason}): the file is damaged or holds more "
            f"than tensors, and code in it is never run. Copy it again, or leave it out."
        )
    return MachineError(
        f"The weights of '{model}' cannot be read from {path} ({reason}); expected a file "
        f"as it was published. `autoft weights verify {model}` looks at it, and `autoft weights "
        f"pull {model}` fetches a damaged one again."
    )


def _describe(module: nn.Module) -> Backbone:
    from autoft.backbones.partition import stages_of  # torch is for workers

    config: dict[str, Any] = module.pretrained_cfg  # type: ignore[assignment]  # set by timm
    width: Any = getattr(module, "head_hidden_size", None) or module.num_features
    return Backbone(
        module=module,
        stages=stages_of(module),
        num_features=int(width),
        image_size=int(config["input_size"][-1]),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=str(config.get("interpolation", "bilinear")),
        crop=float(config.get("crop_pct", 0.875)),
        source=str(config.get("tag") or ""),
        license=str(config.get("license") or ""),
    )
