"""The flags of `autoft search`, stated without importing the settings they fill.

The settings (`autoft.search.settings`) check the values, so that a flag, a variable and a line of
a file are refused with the same words. A flag that is not given stays None: the others count then.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Final

import typer


@dataclass(frozen=True)
class Flag:
    """One flag: its name as a setting, what its value is called, and its line of help."""

    name: str
    metavar: str
    help: str
    default: str = ""

    def parameter(self) -> inspect.Parameter:
        """Return the parameter that makes typer offer this flag."""
        text = f"{self.help} [dim]\\[default: {self.default}][/]" if self.default else self.help
        option = typer.Option(f"--{self.name.replace('_', '-')}", metavar=self.metavar, help=text)
        annotation: Any = Annotated[str | None, option]
        if not self.metavar:
            annotation = Annotated[bool | None, option]
        where = inspect.Parameter.KEYWORD_ONLY
        return inspect.Parameter(self.name, where, default=None, annotation=annotation)


SPLITTING: Final = (
    Flag("split", "FILE", "CSV of path,part to use as the split.", "made from the seed"),
    Flag("folds", "N", "Folds for selection; 1 is a hold-out.", "by the number of images"),
)
READING: Final = (
    Flag("image_size", "N", "Pixels per side.", "by the images, at most 224"),
    Flag("max_bad", "SHARE", "Share of the files that may be unusable.", "0.05"),
    Flag("min_side", "N", "Leave out images whose shorter side has fewer pixels.", "8"),
    Flag("min_per_class", "error|drop", "What becomes of classes too small to split.", "error"),
    Flag("near_dup", "BITS", "Look for near-duplicates too, within BITS of 64; 6 is usual."),
    Flag("allow_leak", "", "Go on although the same image is in two given parts."),
    Flag("merge_classes", "", "Join classes that differ only in case, form or spaces."),
    Flag("keep_empty", "", "Keep classes that have no image."),
    Flag("follow_outside", "", "Follow links and paths that leave the dataset."),
)
SEARCH: Final = (
    Flag(
        "dataset",
        "PATH",
        "Labelled images: a folder with one sub-folder a class, a manifest, an archive, "
        "hf://owner/name, torchvision:NAME or sample:digits.",
    ),
    Flag("out", "DIR", "Run folder; one that holds this run is resumed.", "runs/<dataset>"),
    Flag(
        "time", "TIME", "Wall time of the whole command, export included: 90s, 15m, 1h30m.", "30m"
    ),
    Flag("trials", "N", "Stop after so many trials.", "as many as fit"),
    Flag("backbones", "A,B", "Backbones to choose among; see `autoft plugins list`.", "what fits"),
    Flag("strategies", "A,B", "Strategies to choose among.", "all"),
    Flag("heads", "A,B", "Heads to choose among.", "all"),
    Flag("weights", "DIR", "Folder whose sub-folders hold weights, used by their names."),
    Flag(
        "allow_license",
        "A,B",
        "Licences of weights that may be used, such as apache-2.0,mit, or commercial.",
        "any",
    ),
    Flag("fix", "A=X,B=Y", "Give answers of the search: train.sam=0.05,head.mlp.hidden=256."),
    Flag("metric", "NAME", "accuracy, balanced_accuracy, macro_f1, or by the imbalance.", "auto"),
    Flag("device", "NAME", "auto, cpu, cuda, cuda:0 or cuda:0,1.", "auto"),
    Flag("workers", "N", "Trials trained at the same time.", "one a device"),
    Flag("engine", "NAME", "local, or ray for a cluster.", "local"),
    Flag("seed", "N", "Seed of the split, the search and the trials.", "0"),
    *SPLITTING,
    *READING,
    Flag("offline", "", "Never use the network."),
    Flag("config", "FILE", "TOML file of settings; flags win over it."),
    Flag("export", "A,B", "Formats to export: onnx, torchscript, pt2.", "onnx,torchscript"),
    Flag("dry_run", "", "Say what there is and stop; `autoft plan` measures, too."),
)
SEED: Final = next(flag for flag in SEARCH if flag.name == "seed")
RESUME: Final = tuple(flag for flag in SEARCH if flag.name in ("time", "trials"))


def takes(flags: tuple[Flag, ...]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that gives a command with `**flags` these flags as parameters."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        own = [
            parameter
            for parameter in inspect.signature(command, eval_str=True).parameters.values()
            if parameter.kind is not parameter.VAR_KEYWORD
        ]
        parameters = [*own, *(flag.parameter() for flag in flags)]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # PEP 362
        return command

    return decorate
