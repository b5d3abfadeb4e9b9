"""The backbone that autoft ships with: small, and pre-trained without a single photograph.

Its weights lie beside this file. They were trained on generated images alone, by
`benchmarks/pretrain/`; docs/results/embedded.md tells how, and what they are worth.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Final

from autoft.errors import DataError, MachineError
from autoft.values import PROCEDURAL, Backbone
from autoft.weights import Weights, published

if TYPE_CHECKING:
    from torch import nn

FILE: Final = Path(__file__).with_name("autoft_mini.safetensors")
STEM: Final = 16
STAGES: Final = ((24, 2), (48, 2), (96, 2), (160, 2), (224, 1))  # width and stride of each
IMAGE_SIZE: Final = 96
LICENSE: Final = "apache-2.0"


def locate() -> Weights:
    """Return the file of weights, which the package holds."""
    return Weights(
        origin=f"package autoft {metadata.version('autoft')}",
        place=str(FILE.parent),
        path=str(FILE) if FILE.is_file() else "",
        source=PROCEDURAL,
        license=LICENSE,
    )


@published(locate)
def autoft_mini(*, pretrained: bool = True) -> Backbone:
    """Build the embedded backbone: 1.4M parameters, trained on generated images only.

    Raises:
        MachineError: the installation lacks the file of weights.
        DataError: the file is damaged.
    """
    module = network()
    if pretrained:
        _load(module)
    return Backbone(
        module=module,
        stages=[["stem"], *([f"stages.{index}"] for index in range(len(STAGES)))],
        num_features=STAGES[-1][0],
        image_size=IMAGE_SIZE,
        source=PROCEDURAL,
        license=LICENSE,
    )


def network() -> nn.Module:
    """Build the network with random weights: a stem and five plain residual blocks of timm's.

    Images (N, 3, H, W) to features (N, 224); the last map has 1/32 of the sides of the image.
    """
    from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg

    # What these widths avoid (depthwise convolutions, squeeze-and-excitation) is slow to train.
    blocks = tuple(
        ByoBlockCfg(type="basic", d=1, c=width, s=stride, gs=0, br=1.0) for width, stride in STAGES
    )
    config = ByoModelCfg(blocks=blocks, stem_chs=STEM, stem_type="3x3", stem_pool="")
    return ByobNet(config, num_classes=0)


def _load(module: nn.Module) -> None:
    """Load the half-precision weights beside this file into `module`, in single precision."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not FILE.is_file():
        raise MachineError(
            f"The weights of 'autoft_mini' are not at {FILE}, where the package has them. "
            f"Install autoft again."
        )
    try:
        module.load_state_dict({name: value.float() for name, value in load_file(FILE).items()})
    except (SafetensorError, RuntimeError) as error:
        told = " ".join(str(error).split())[:200]
        raise DataError(
            f"The weights of 'autoft_mini' at {FILE} are damaged: {told}. Install autoft again."
        ) from error
