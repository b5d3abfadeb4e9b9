"""Any architecture of timm as a backbone: by name and tag, or from a local folder."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoft.errors import MachineError, UsageError, did_you_mean
from autoft.values import Backbone

if TYPE_CHECKING:
    from torch import nn


def timm(*, model: str = "", image_size: int = 0, pretrained: bool = True) -> Backbone:
    """Build the timm architecture `model`, such as `resnet18.a1_in1k` or `local-dir:PATH`.

    `image_size` (pixels) matters only to networks whose position embedding has a fixed size.

    Raises:
        UsageError: timm has no such architecture or tag.
        MachineError: its weights are neither cached nor to be had.
    """
    import timm as library

    _check_name(model)
    options: dict[str, Any] = {"num_classes": 0, "pretrained": pretrained}
    if image_size and _fixed_size(model):
        options["img_size"] = image_size
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # timm's and the hub's own progress bars
            module = library.create_model(model, **options)
    except (OSError, RuntimeError) as error:
        raise _explain(model, error) from error
    return _describe(module)


def _check_name(model: str) -> None:
    import timm as library

    if not model:
        raise UsageError("The backbone 'timm' needs the name of an architecture.")
    if model.startswith("local-dir:"):
        return
    architecture, _, tag = model.partition(".")
    if not library.is_model(architecture):
        hint = did_you_mean(architecture, library.list_models())
        raise UsageError(
            f"timm has no architecture '{architecture}'.{hint} "
            f"`python -c 'import timm; print(timm.list_models())'` lists them."
        )
    tags = [name.partition(".")[2] for name in library.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise UsageError(
            f"timm's '{architecture}' has no weights tagged '{tag}'.{did_you_mean(tag, tags)} "
            f"It has: {', '.join(tags) or 'none'}."
        )


def _fixed_size(model: str) -> bool:
    if model.startswith("local-dir:"):
        text = (Path(model.removeprefix("local-dir:")) / "config.json").read_text("utf-8")
        return bool(json.loads(text).get("pretrained_cfg", {}).get("fixed_input_size", False))
    from timm.models import get_pretrained_cfg

    config = get_pretrained_cfg(model)
    return bool(config and config.fixed_input_size)


def _explain(model: str, error: Exception) -> MachineError:
    offline = " (offline)" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
    return MachineError(
        f"The weights of '{model}' could not be loaded{offline}: {first_line[:200]} Fetch them on "
        f"a machine with network by `python -c \"import timm; timm.create_model('{model}', "
        f'pretrained=True)"`, or give a local folder with --weights.'
    )


def _describe(module: nn.Module) -> Backbone:
    from timm.models import group_parameters

    config: dict[str, Any] = module.pretrained_cfg  # type: ignore[assignment]  # set by timm
    matcher = module.group_matcher(coarse=True)  # type: ignore[operator]  # timm's own contract
    groups = group_parameters(module, matcher, reverse=False)
    return Backbone(
        module=module,
        stages=tuple(tuple(groups[index]) for index in sorted(groups)),
        num_features=int(module.num_features),  # type: ignore[arg-type]  # timm's own contract
        image_size=int(config["input_size"][-1]),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=str(config.get("interpolation", "bilinear")),
        crop=float(config.get("crop_pct", 0.875)),
        source=str(config.get("tag") or ""),
        license=str(config.get("license") or ""),
    )
