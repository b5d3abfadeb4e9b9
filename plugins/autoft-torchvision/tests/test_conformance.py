"""The public contracts of a backbone; AUTOFT_TEST_ALL=1 checks all names, which takes minutes."""

from __future__ import annotations

import os

import autoft_torchvision
import pytest

from autoft.testing import CHECKS, conformance
from autoft.testing.probes import one_thread

REPRESENTATIVE = ["tv_squeezenet1_0", "tv_resnet18", "tv_mobilenet_v3_small", "tv_vgg16"]
EVERYTHING = os.environ.get("AUTOFT_TEST_ALL") == "1"

test_conforms = conformance("autoft-torchvision", names=None if EVERYTHING else REPRESENTATIVE)


@pytest.mark.parametrize("name", ["tv_convnext_tiny", "tv_swin_t", "tv_vit_b_16"])
def test_large_backbone_runs_its_stages_in_order(name):
    (check,) = (c for c in CHECKS["backbone"] if c.__name__ == "check_stages_run_in_order")
    with one_thread():
        check(getattr(autoft_torchvision, name))
