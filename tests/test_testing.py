"""Every check of the conformance kit is seen to fail, with its words, on a plugin so broken."""

from __future__ import annotations

import random
import socket
import subprocess
import sys
import urllib.request
from dataclasses import replace
from itertools import count
from typing import Annotated

import pytest
import torch
from torch import Tensor, nn

from autoft import plugins
from autoft.errors import PluginError
from autoft.space import Float
from autoft.testing import CHECKS, CheckResult, conformance, run_checks
from autoft.testing.probes import one_thread
from autoft.values import Backbone, Rates


class Tiny(nn.Module):
    """Two stages and a parameter on the root, as a vision transformer has it."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(4, 1, 1))
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 4, stride=4), nn.BatchNorm2d(4), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(4, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        return self.body(self.stem(images) + self.position).mean((2, 3))


SOUND = Backbone(module=Tiny(), stages=(("stem", "position"), ("body",)), num_features=8)


def sound(*, pretrained: bool = True) -> Backbone:
    """Build a backbone that keeps every promise."""
    return replace(SOUND, module=Tiny())


def described(**changes):
    """Return a plugin whose Backbone is sound but for `changes`."""

    def plugin(*, pretrained: bool = True) -> Backbone:
        """Build it."""
        return replace(sound(), **changes)

    return plugin


def computed(forward):
    """Return a plugin whose module computes `forward(module, images)`."""

    class Changed(Tiny):
        def forward(self, images: Tensor) -> Tensor:
            return forward(self, images)

    def plugin(*, pretrained: bool = True) -> Backbone:
        """Build it."""
        return replace(SOUND, module=Changed())

    return plugin


def built(change):
    """Return a plugin that does `change(module, pretrained)` while it builds."""

    def plugin(*, pretrained: bool = True) -> Backbone:
        """Build it."""
        backbone = sound()
        change(backbone.module, pretrained)
        return backbone

    return plugin


def usual(module, images):
    return Tiny.forward(module, images)


def batch_statistics(module, images):
    features = usual(module, images)
    return features - features.mean(0)


def nan_in_training(module, images):
    return usual(module, images) / (0.0 if module.training else 1.0)


def without_gradient(module, images):
    with torch.no_grad():
        stem = module.stem(images) + module.position
    return module.body(stem).mean((2, 3))


def counting(module, images):
    module.stem[1].running_mean += 1
    return usual(module, images)


def stem_always_trains(module, images):
    module.stem.train()
    return usual(module, images)


def own_randomness(module, pretrained):
    generator = torch.Generator()
    generator.seed()
    nn.init.normal_(module.position, generator=generator)


def hidden_tensor(module, pretrained):
    hidden = torch.randn(8)
    module.register_forward_hook(lambda module, inputs, features: features + hidden)


def tied(module, pretrained):
    module.body[1].running_mean = module.body[1].running_var


def fetching(module, pretrained):
    urllib.request.urlopen("http://weights.example.org/tiny.pth", timeout=5)


def fetching_quietly(module, pretrained):
    try:
        socket.create_connection(("192.0.2.1", 80), timeout=5)
    except (OSError, AssertionError):
        module.eval()


def a_module(*, pretrained: bool = True) -> nn.Module:
    """Build a module."""
    return Tiny()


BROKEN_BACKBONES = [
    ("returns_backbone", a_module, "returned a Tiny; an autoft.Backbone was expected"),
    ("returns_backbone", described(module=len), "Backbone.module is a builtin_function"),
    ("preprocessing_is_possible", described(std=(1.0, 0.0, 1.0)), r"std=\(1.0, 0.0, 1.0\) is not"),
    ("preprocessing_is_possible", described(mean=(0.5,)), r"mean=\(0.5,\) is not three"),
    ("preprocessing_is_possible", described(crop=87.5), "crop=87.5 is no share"),
    ("preprocessing_is_possible", described(interpolation="area"), "'area' is none of"),
    ("preprocessing_is_possible", described(image_size=0), "image_size=0 is no number of pixels"),
    (
        "stages_partition_parameters",
        described(stages=(("stem",), ("body",))),
        r"No stage names \['position'\]",
    ),
    (
        "stages_partition_parameters",
        described(stages=(("stem", "position"), ("body", "stem.0"))),
        r"\['stem.0.weight', 'stem.0.bias'\] are in two stages",
    ),
    (
        "stages_partition_parameters",
        described(stages=(("stem", "position"), ("bodi",))),
        "Stage 1 names 'bodi'",
    ),
    (
        "stages_partition_parameters",
        described(stages=(("stem", "position"), ("stem.2",), ("body",))),
        r"Stages \[1\] hold no parameter",
    ),
    (
        "stages_run_in_order",
        described(stages=(("body",), ("stem", "position"))),
        "'body.0.weight' of stage 0 runs after 'stem.0.weight' of stage 1",
    ),
    (
        "stages_run_in_order",
        described(stages=(("stem", "position", "body.1"), ("body.0",))),
        "'body.1.weight' of stage 0 runs after 'body.0.weight' of stage 1",
    ),
    (
        "stages_run_in_order",
        described(stages=(("position",), ("stem",), ("body",))),
        "'position' of stage 0 runs after 'stem.0.weight' of stage 1",
    ),
    (
        "features_have_promised_shape",
        described(num_features=5),
        r"shape \(2, 8\); num_features=5 promises \(2, 5\). Is the classifier still attached",
    ),
    (
        "features_have_promised_shape",
        computed(lambda module, images: [usual(module, images)]),
        "returned a list; a tensor of features was expected",
    ),
    ("features_are_finite", computed(nan_in_training), "In training mode 16 of 16 features"),
    (
        "rows_do_not_depend_on_the_batch",
        computed(batch_statistics),
        "differ by .* between a batch of 1 and of 2",
    ),
    (
        "input_is_not_modified",
        computed(lambda module, images: usual(module, images.relu_())),
        "changed the images that it was given",
    ),
    (
        "same_seed_builds_the_same",
        built(own_randomness),
        r"differ in \['position'\] \(1 of 15 tensors\)",
    ),
    (
        "gradients_reach_every_stage",
        computed(without_gradient),
        r"No gradient reaches the stages \[0\]",
    ),
    (
        "frozen_prefix_stays_equal",
        computed(counting),
        r"first 2 of 2 stages frozen, a training step changed \['stem.1.running_mean'\]",
    ),
    (
        "frozen_prefix_stays_equal",
        computed(stem_always_trains),
        "leave `train\\(\\)` and `eval\\(\\)` to the caller",
    ),
    ("state_dict_round_trip", built(hidden_tensor), "After saving and loading, features differ"),
    ("state_dict_round_trip", built(tied), "cannot be saved as safetensors .* share memory"),
    ("random_weights_need_no_network", built(fetching), "weights.example.org was to be reached"),
    (
        "random_weights_need_no_network",
        built(fetching_quietly),
        "With pretrained=False the plugin tried to reach .*192.0.2.1",
    ),
]


def silent(num_stages, progress):
    return [1.0] * num_stages


def unresolved(num_stages: int, progress: float, *, depth: Flaot = 0.5) -> list[float]:  # noqa: F821
    """Name a type that is nowhere."""
    return [depth] * num_stages


def out_of_range(
    num_stages: int, progress: float, *, depth: Annotated[float, Float(0, 1)] = 2.0
) -> list[float]:
    """State a default that the range does not hold."""
    return [depth] * num_stages


def without_default(
    num_stages: int, progress: float, *, depth: Annotated[float, Float(0, 1)]
) -> list[float]:
    """State no default."""
    return [depth] * num_stages


BROKEN_SIGNATURES = [
    ("has_docstring", silent, "'silent' has no docstring"),
    ("annotations_resolve", unresolved, "annotations of 'unresolved' .*name 'Flaot' is not defin"),
    ("defaults_lie_in_range", out_of_range, "the default 2.0 of 'depth' lies outside"),
    ("defaults_lie_in_range", without_default, "'depth' is searched and needs a default"),
]


def negative_at_one_end(
    num_stages, progress, *, slope: Annotated[float, Float(0.0, 2.0)] = 0.5
) -> list[float]:
    return [1.0 - slope] * num_stages


def one_stage_is_too_few(num_stages, progress):
    return [i / (num_stages - 1) if num_stages > 1 else float("nan") for i in range(num_stages)]


def remembering():
    calls = count()
    return lambda num_stages, progress: [float(next(calls))] * num_stages


def short_of_norms(num_stages, progress, *, gradient_norms=()):
    return [float(norm) for norm in gradient_norms] or [1.0]


def with_no_adapter(num_stages, progress, *, adapter: str = "no_such_package:adapter"):
    return [1.0] * num_stages


BROKEN_STRATEGIES = [
    ("gradient_norms_may_be_anything", short_of_norms, "A rate is finite"),
    ("adapter_keeps_features_and_merges", with_no_adapter, "cannot be imported"),
    (
        "returns_one_rate_per_stage",
        lambda num_stages, progress: [1.0] * 12,
        "returned 12 rates for 1 stages at progress 0.0",
    ),
    ("returns_one_rate_per_stage", lambda num_stages, progress: None, "returned a NoneType for"),
    (
        "returns_one_rate_per_stage",
        lambda num_stages, progress: ["all"] * num_stages,
        "returned 'all', a str, for stage 0",
    ),
    (
        "rates_are_finite_and_not_negative",
        negative_at_one_end,
        r"weights=-1.0.*for stage 0.*slope=2.0",
    ),
    ("rates_are_finite_and_not_negative", one_stage_is_too_few, "nan.*for 1 stages"),
    (
        "rates_are_finite_and_not_negative",
        lambda num_stages, progress: [Rates(biases=float("inf"))] * num_stages,
        "biases=inf",
    ),
    ("strategy_is_pure", remembering(), "It must depend on its arguments alone"),
    (
        "strategy_is_pure",
        lambda num_stages, progress: [random.random() for _ in range(num_stages)],
        "It must depend on its arguments alone",
    ),
]


class Head(nn.Linear):
    """A linear head with a second parameter, and a change to what it computes."""

    def __init__(self, num_features: int, num_classes: int, change) -> None:
        super().__init__(num_features, num_classes)
        self.scale = nn.Parameter(torch.ones(()))
        self.change = change

    def forward(self, features: Tensor) -> Tensor:
        return self.change(self, features)


def scored(change):
    """Return a head plugin that computes `change(head, features)`."""
    return lambda num_features, num_classes: Head(num_features, num_classes, change)


def plain(head, features):
    return head.scale * nn.functional.linear(features, head.weight, head.bias)


def angle(head, features):
    return plain(head, features / features.norm(dim=1, keepdim=True))


def centred(head, features):
    logits = plain(head, features)
    return logits - logits.mean(0)


def without_scale(head, features):
    return nn.functional.linear(features, head.weight, head.bias)


def several_rows_only(head, features):
    if len(features) < 2:
        raise ValueError("Expected more than 1 value per channel.")
    return plain(head, features)


def wants_the_middle(num_features, num_classes, *, features: str = "middle"):
    return nn.Linear(num_features, num_classes)


BROKEN_HEADS = [
    ("features_are_known", wants_the_middle, "may be 'middle'"),
    ("head_returns_module", lambda num_features, num_classes: len, "returned a builtin_function"),
    (
        "logits_have_promised_shape",
        lambda num_features, num_classes: nn.Linear(num_features, 10),
        r"logits of shape \(4, 10\) for 4 rows, 2 classes; logits of shape \(4, 2\) were expected",
    ),
    ("logits_have_promised_shape", scored(lambda head, features: None), "returned a NoneType for"),
    ("logits_are_finite", scored(angle), "not finite for 2 classes"),
    ("every_parameter_gets_a_gradient", scored(without_scale), r"No gradient reaches \['scale'\]"),
    (
        "every_parameter_gets_a_gradient",
        scored(lambda head, features: plain(head, features).detach()),
        r"No gradient reaches \['weight', 'bias', 'scale'\]",
    ),
    ("rows_are_scored_alone", scored(centred), "between a batch of 1 and of 4"),
    ("rows_are_scored_alone", scored(several_rows_only), "cannot score a batch of 1: Expected"),
    (
        "features_are_not_modified",
        scored(lambda head, features: plain(head, features.relu_())),
        "changed the features that it was given",
    ),
]


def named(kind: str, name: str):
    """Return the check of `kind` called `name`."""
    (check,) = (c for c in CHECKS[kind] if c.__name__ == f"check_{name}")
    return check


BROKEN = [
    *(("backbone", *row) for row in BROKEN_BACKBONES),
    *(("strategy", *row) for row in BROKEN_SIGNATURES),
    *(("strategy", *row) for row in BROKEN_STRATEGIES),
    *(("head", *row) for row in BROKEN_HEADS),
]


@pytest.mark.parametrize(
    ("kind", "name", "plugin", "words"),
    BROKEN,
    ids=[f"{row[1]}-{number}" for number, row in enumerate(BROKEN)],
)
def test_check_fails_with_its_words(kind, name, plugin, words):
    with one_thread(), pytest.raises(AssertionError, match=words):
        named(kind, name)(plugin)


def test_every_check_is_seen_to_fail():
    seen = {f"check_{row[1]}" for row in BROKEN}
    assert seen == {check.__name__ for checks in CHECKS.values() for check in checks}


def resnet(*, pretrained: bool = True) -> Backbone:
    """Build timm's smallest ResNet."""
    return plugins.load("backbone", "timm")(model="test_resnet", pretrained=pretrained)


def convnext(*, pretrained: bool = True) -> Backbone:
    """Build timm's smallest ConvNeXt."""
    return plugins.load("backbone", "timm")(model="test_convnext", pretrained=pretrained)


def vit(*, image_size: int = 160, pretrained: bool = True) -> Backbone:
    """Build timm's smallest vision transformer."""
    timm = plugins.load("backbone", "timm")
    return timm(model="test_vit", image_size=image_size, pretrained=pretrained)


def vit_of_one_size(*, pretrained: bool = True) -> Backbone:
    """Build a vision transformer that takes no images but its own size."""
    return plugins.load("backbone", "timm")(model="test_vit", pretrained=pretrained)


@pytest.mark.parametrize("check", CHECKS["backbone"], ids=lambda check: check.__name__)
@pytest.mark.parametrize("plugin", [sound, resnet, convnext, vit, vit_of_one_size])
def test_sound_backbone_passes(plugin, check):
    with one_thread():
        check(plugin)


def builtin_names(*kinds: str) -> list[str]:
    return [plugin.name for kind in kinds for plugin in plugins.installed(kind) if plugin.builtin]


test_builtin_strategies_and_heads_conform = conformance(
    "autoft", names=builtin_names("strategy", "head")
)


def test_conformance_names_each_case_by_plugin_and_check():
    test = conformance("autoft", names=["mlp", "freeze"])
    (mark,) = test.pytestmark
    names = [mark.kwargs["ids"](case) for case in mark.args[1]]
    assert len(names) == len(CHECKS["strategy"]) + len(CHECKS["head"])
    assert "mlp-rows_are_scored_alone" in names
    assert "freeze-strategy_is_pure" in names


def test_conformance_refuses_what_is_not_declared():
    with pytest.raises(PluginError, match=r"'autovt' declares a plugin\. Did you mean 'autoft'"):
        conformance("autovt")
    with pytest.raises(PluginError, match=r"declares no plugin 'mpl'\. Did you mean 'mlp'"):
        conformance("autoft", names=["mpl"])


@pytest.fixture
def declared(tmp_path, monkeypatch):
    """Return a function that puts a package with entry points on the path."""

    def declare(code: str, entry_points: str) -> None:
        (tmp_path / "odd_plugin.py").write_text(code)
        info = tmp_path / "odd_plugin-0.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: odd-plugin\nVersion: 0.1\n")
        (info / "entry_points.txt").write_text(entry_points)
        monkeypatch.syspath_prepend(tmp_path)
        plugins.installed.cache_clear()

    yield declare
    sys.modules.pop("odd_plugin", None)
    plugins.installed.cache_clear()


def test_run_checks_reports_every_contract_without_pytest(declared):
    declared(
        "def lazy(num_stages, progress):\n    return [-1.0] * num_stages\n",
        "[autoft.strategies]\nlazy = odd_plugin:lazy\n",
    )
    results = run_checks("strategy", "lazy")
    assert [result.check for result in results if not result.passed] == [
        "has_docstring",
        "rates_are_finite_and_not_negative",
    ]
    assert results[0] == CheckResult(
        check="has_docstring",
        contract="A plugin says in the first line of its docstring what it is.",
        passed=False,
        message=results[0].message,
    )
    assert "'lazy' has no docstring" in results[0].message


def test_run_checks_reports_whatever_a_plugin_raises(declared):
    declared(
        'def hot(num_stages, progress):\n    """Fail."""\n    raise ZeroDivisionError("oops")\n',
        "[autoft.strategies]\nhot = odd_plugin:hot\ngone = odd_plugin:gone\n",
    )
    hot = {result.check: result for result in run_checks("strategy", "hot")}
    assert hot["has_docstring"].passed
    assert hot["strategy_is_pure"].message == "It raised ZeroDivisionError('oops')."
    gone = run_checks("strategy", "gone")
    assert not any(result.passed for result in gone)
    assert "from odd-plugin 0.1 cannot be imported" in gone[0].message


def test_conformance_finds_a_package_by_any_spelling_of_its_name(declared):
    declared(
        'def one(num_stages, progress):\n    """Train all."""\n    return [1.0] * num_stages\n',
        "[autoft.strategies]\none = odd_plugin:one\n",
    )
    (mark,) = conformance("Odd_Plugin").pytestmark
    assert {case.plugin.name for case in mark.args[1]} == {"one"}


def test_network_works_again_after_it_was_blocked():
    check = named("backbone", "random_weights_need_no_network")
    with pytest.raises(AssertionError):
        check(built(fetching))
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        socket.create_connection(server.getsockname(), timeout=5).close()


def test_run_checks_needs_no_pytest():
    code = (
        "import sys; sys.modules['pytest'] = None\n"
        "from autoft.testing import run_checks\n"
        "print(all(result.passed for result in run_checks('head', 'mlp')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
