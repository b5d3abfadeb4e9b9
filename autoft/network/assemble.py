"""Join a backbone and a head into one network."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from autoft.network.family import is_transformer
from autoft.network.heads import build_head, features_of
from autoft.network.parametrized import plain_name
from autoft.network.pooling import Pooling
from autoft.network.rates import check_rates, is_frozen
from autoft.network.stages import kind_of_parameters, stage_of_modules, stage_of_parameters
from autoft.values import Backbone, NormMode, Part, Rate, Rates


class Network(nn.Module):
    """A backbone with its head; owns what is frozen and keeps it frozen.

    Maps normalised images (N, 3, H, W) to logits (N, num_classes). `pool` makes of the backbone
    what the head takes; the features that the backbone returns, unless another is given.
    """

    def __init__(self, backbone: Backbone, head: nn.Module, pool: Pooling | None = None) -> None:
        super().__init__()
        self.backbone = backbone.module
        self.pool = pool or Pooling(backbone, "native", backbone.image_size)
        self.head = head
        self.num_stages = len(backbone.stages)
        self.transformer = is_transformer(backbone.module)
        self._stage_of_parameter = stage_of_parameters(backbone)
        self._stage_of_module = stage_of_modules(backbone, self._stage_of_parameter)
        self._kind = kind_of_parameters(backbone.module)
        self._rates: tuple[Rates, ...] = (Rates(1.0, 1.0, 1.0, 1.0),) * self.num_stages
        self._norm_mode: NormMode = "train"
        self._batch_norms = frozenset(
            name for name, module in backbone.module.named_modules() if has_statistics(module)
        )

    def features(self, images: Tensor) -> Tensor:
        """Map normalised images (N, 3, H, W) to what the head takes, (N, num_features)."""
        features: Tensor = self.pool(images)
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images (N, 3, H, W) to logits (N, num_classes)."""
        logits: Tensor = self.head(self.features(images))
        return logits

    @property
    def rates(self) -> tuple[Rates, ...]:
        """Return the rates now in force, one per stage."""
        return self._rates

    @property
    def norm_mode(self) -> NormMode:
        """Return what batch norms of thawed stages do."""
        return self._norm_mode

    def set_rates(self, rates: Sequence[Rate], *, norm_mode: NormMode = "train") -> None:
        """Freeze and thaw: one rate per stage, 0 = frozen.

        A frozen parameter has no gradient, so that neither momentum nor weight decay moves it; a
        stage whose rates are all 0 is in eval mode, so that its buffers stay bit-equal.
        `norm_mode` says what the batch norms of thawed stages do: "affine" keeps their statistics,
        "frozen" their scales and shifts as well.

        Raises:
            PluginError: not one rate per stage, or a rate is negative or not finite.
        """
        self._rates = check_rates(rates, self.num_stages)
        self._norm_mode = norm_mode
        for name, parameter in self.backbone.named_parameters():
            live = self.rate_of(name) > 0
            parameter.requires_grad_(live)
            if not live:
                parameter.grad = None
        self.train(self.training)

    def rate_of(self, parameter: str) -> float:
        """Return the learning-rate multiplier of a backbone parameter by name."""
        owner = plain_name(parameter).rpartition(".")[0]
        if self._norm_mode == "frozen" and owner in self._batch_norms:
            return 0.0
        rates = self._rates[self._stage_of_parameter[parameter]]
        return float(getattr(rates, self._kind[parameter]))

    def train(self, mode: bool = True) -> Network:
        """Set training mode everywhere but in frozen stages, whatever the caller asks for."""
        super().train(mode)
        if mode:
            for name, module in self.backbone.named_modules():
                stage = self._stage_of_module.get(name)
                frozen = stage is not None and is_frozen(self._rates[stage])
                if frozen or (self._norm_mode != "train" and name in self._batch_norms):
                    module.training = False
            if all(is_frozen(rates) for rates in self._rates):
                self.backbone.eval()
        return self

    def groups(self) -> dict[tuple[int, str], list[nn.Parameter]]:
        """Return the backbone's parameters by (stage, kind), input first."""
        grouped: dict[tuple[int, str], list[nn.Parameter]] = {}
        for name, parameter in self.backbone.named_parameters():
            key = (self._stage_of_parameter[name], self._kind[name])
            grouped.setdefault(key, []).append(parameter)
        return dict(sorted(grouped.items()))


def assemble(
    backbone: Backbone, head: Part, num_classes: int, pool: str, image_size: int
) -> Network:
    """Return `backbone` with a new head, fed as the head asks for or else by `pool`.

    Raises:
        AutoftError: the head is missing, broken or misused, or the backbone cannot be pooled so.
    """
    kind = "stages" if features_of(head) == "stages" else pool
    pooling = Pooling(backbone, kind, image_size)
    return Network(backbone, build_head(head, pooling.num_features, num_classes), pooling)


def has_statistics(module: nn.Module) -> bool:
    """Tell whether a module keeps running statistics of batches, as batch norms do."""
    return getattr(module, "running_mean", None) is not None
