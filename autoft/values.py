"""The frozen values that flow through autoft; no module above may need torch to read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import nn

Triple = tuple[float, float, float]
Value = bool | int | float | str
Status = Literal["done", "stopped", "failed"]

NormMode = Literal["frozen", "affine", "train"]
"""What batch norms of thawed stages do: stay as they are, train scale and shift with the
pre-trained statistics, or train everything and take the statistics of the batch."""

IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)

PROCEDURAL = "procedural"
"""The `source` of weights that were trained on generated images alone: weak ones."""


@dataclass(frozen=True)
class Backbone:
    """A network without its classifier, and its ordered stages.

    `module` maps normalised images (N, 3, H, W) to features (N, num_features). `stages` names
    submodules or parameters of it, input first; together they hold every parameter exactly once.
    """

    module: nn.Module
    stages: Sequence[Sequence[str]]
    num_features: int
    image_size: int = 224
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD
    interpolation: str = "bilinear"
    crop: float = 0.875
    source: str = ""
    license: str = ""


@dataclass(frozen=True)
class Rates:
    """Learning-rate multipliers of one stage, by kind of parameter; 0 = frozen.

    `adapters` are parameters that a strategy's adapter added, which few strategies have: they
    rest unless their rate is given. A plain number stands for all four kinds.
    """

    weights: float = 1.0
    norms: float = 1.0
    biases: float = 1.0
    adapters: float = 0.0


Rate = float | Rates
"""What a strategy returns for a stage: one multiplier for all its parameters, or one a kind."""


@dataclass(frozen=True)
class Part:
    """A plugin by name and the choices made for it."""

    name: str
    params: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True)
class TrialConfig:
    """One configuration: which backbone, strategy and head, and how it is trained."""

    backbone: Part
    strategy: Part
    head: Part
    train: Mapping[str, Value]
    seed: int = 0

    def answers(self) -> dict[str, Value]:
        """Flatten to named answers, such as `head=mlp` and `head.mlp.hidden=256`."""
        flat: dict[str, Value] = {}
        for kind in ("backbone", "strategy", "head"):
            part: Part = getattr(self, kind)
            flat[kind] = part.name
            flat |= {f"{kind}.{part.name}.{name}": value for name, value in part.params.items()}
        return flat | {f"train.{name}": value for name, value in self.train.items()}

    def to_json(self) -> dict[str, Any]:
        """Return plain data; `from_json` is the inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TrialConfig:
        """Rebuild a configuration from what `to_json` returned."""
        parts = {kind: Part(**data[kind]) for kind in ("backbone", "strategy", "head")}
        return cls(**parts, train=dict(data["train"]), seed=int(data["seed"]))


@dataclass(frozen=True)
class TrialResult:
    """What became of a trial of `epochs` epochs; `scores` holds one validation score per epoch.

    `fold` was held out. Where it is not the first, it scores the trial `of` that number again.
    """

    number: int
    config: TrialConfig
    status: Status
    scores: tuple[float, ...] = ()
    score: float | None = None
    loss: float | None = None
    seconds: float = 0.0
    error: str = ""
    epochs: int = 0
    fold: int = 0
    of: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain data; `from_json` is the inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TrialResult:
        """Rebuild a result from what `to_json` returned."""
        fields = dict(data)
        fields["config"] = TrialConfig.from_json(fields["config"])
        fields["scores"] = tuple(fields["scores"])
        return cls(**fields)


@dataclass(frozen=True)
class Preprocess:
    """How a file becomes the network's input; one rule for training, scoring, prediction, export.

    Decode, apply EXIF orientation, convert to RGB (alpha composited on white), resize the
    shorter side to `resize` with `interpolation` (antialiased), crop the centre `image_size`
    square, divide by 255, subtract `mean` and divide by `std`.
    """

    image_size: int
    resize: int
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD
    interpolation: str = "bilinear"


@dataclass(frozen=True)
class Estimate:
    """A measured score with its 95 % interval over `n` images."""

    value: float
    low: float
    high: float
    n: int


def is_of_images(mix: str) -> bool:
    """Tell whether a recipe's `mix` is of images, and not of what frozen stages make of them."""
    return mix not in ("none", "manifold")
