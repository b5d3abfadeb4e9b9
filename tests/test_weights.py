"""Weights: where they come from, that they fit, and what is refused."""

from __future__ import annotations

import json
import os

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from autoft import plugins
from autoft.errors import DataError, MachineError, UsageError
from autoft.network import licenses, provide
from autoft.network.build import build
from autoft.network.sources import (
    ANY_ARCHITECTURE,
    MANIFEST,
    Source,
    in_folder,
    read_metadata,
    resolve,
)
from autoft.network.weights import load_weights
from autoft.search.settings import Settings
from autoft.values import PROCEDURAL
from autoft.weights import Weights, find_weights, published, quiet

GIANT = 2**62


def silent(text, done, total):
    """Tell nobody."""


def header(text: bytes, body: bytes = b"", length: int | None = None) -> bytes:
    """Return a file of safetensors with this header and any length for it."""
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def tensors(**offsets) -> bytes:
    shapes = {n: {"dtype": "F32", "shape": [2], "data_offsets": o} for n, o in offsets.items()}
    return json.dumps(shapes).encode()


BAD = {
    "empty": b"",
    "huge": header(b"{}", length=GIANT),
    "short header": header(b"{}", length=16),
    "no JSON": header(b"{[}"),
    "overlap": header(tensors(a=[0, 8], b=[4, 12]), bytes(12)),
    "overflow": header(tensors(a=[GIANT * 4 - 8, GIANT * 4]), bytes(8)),
    "negative": header(tensors(a=[8, 0]), bytes(8)),
    "short": header(tensors(a=[0, 8]), bytes(4)),
    "shape": header(tensors(a=[0, 4]), bytes(4)),
}


@pytest.fixture
def donor():
    torch.manual_seed(3)
    return timm.create_model("test_resnet", num_classes=7)


def backbone_of(spec, **local):
    return build(resolve(str(spec), local)).module


def saved(model, folder):
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    return folder


def test_weights_of_a_file_reach_the_backbone(tmp_path, donor) -> None:
    save_file(donor.state_dict(), tmp_path / "model.safetensors")
    backbone = timm.create_model("test_resnet", num_classes=0)
    assert load_weights(backbone, tmp_path / "model.safetensors") == ["fc.bias", "fc.weight"]
    assert torch.equal(backbone.conv1[0].weight, donor.conv1[0].weight)


class Gadget:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("name", ["bad.pth", "model.safetensors"])
def test_s01_code_in_a_checkpoint_is_never_run(tmp_path, name) -> None:
    canary = tmp_path / "canary"
    torch.save({"state_dict": Gadget(f"touch {canary}")}, tmp_path / name)
    with pytest.raises(DataError, match=r"never run|as safetensors"):
        load_weights(nn.Linear(1, 1), tmp_path / name)
    assert not canary.exists()


def test_s01_code_in_a_local_directory_is_never_run(tmp_path, donor) -> None:
    folder, canary = saved(donor, tmp_path / "mine"), tmp_path / "canary"
    (folder / "model.safetensors").unlink()
    torch.save(Gadget(f"touch {canary}"), folder / "pytorch_model.bin")
    with pytest.raises(DataError, match="never run"):
        build(resolve(str(folder), {}))
    assert not canary.exists()


@pytest.mark.parametrize("kind", BAD)
def test_s02_a_damaged_file_is_one_sentence(tmp_path, donor, kind) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(BAD[kind])
    with pytest.raises(DataError, match="cannot be read as safetensors") as told:
        load_weights(nn.Linear(1, 1), file)
    assert "\n" not in str(told.value)
    folder = saved(donor, tmp_path / "mine")
    (folder / "model.safetensors").write_bytes(BAD[kind])
    with pytest.raises(DataError, match=r"mine/model.safetensors cannot be read \(.+damaged"):
        build(resolve(str(folder), {}))


@pytest.mark.parametrize("wrap", [None, "state_dict", "model", "state_dict_ema"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_s03_wrappers_and_prefixes_are_taken_off(tmp_path, donor, wrap, prefix) -> None:
    state = {f"{prefix}{name}": tensor for name, tensor in donor.state_dict().items()}
    if wrap is None:
        save_file(state, tmp_path / "w.safetensors")
    torch.save({wrap: state, "epoch": 3} if wrap else state, tmp_path / "w.pth")
    for file in sorted(tmp_path.iterdir()):
        backbone = timm.create_model("test_resnet", num_classes=0)
        assert load_weights(backbone, file) == ["fc.bias", "fc.weight"] or file.suffix == ".pth"
        assert torch.equal(backbone.conv1[0].weight, donor.conv1[0].weight)


@pytest.mark.parametrize("model", ["convnext_atto", "efficientvit_b0", "mobilenetv3_small_050"])
def test_s03_a_classifier_beside_other_parts_is_left_out(tmp_path, model) -> None:
    donor = timm.create_model(model, num_classes=5)
    save_file(donor.state_dict(), tmp_path / "w.safetensors")
    backbone = timm.create_model(model, num_classes=0)
    left_out = load_weights(backbone, tmp_path / "w.safetensors")
    assert {name.rpartition(".")[2] for name in left_out} == {"weight", "bias"}
    kept = backbone.state_dict()
    assert all(torch.equal(kept[n], t) for n, t in donor.state_dict().items() if n in kept)
    assert set(donor.state_dict()) == set(kept) | set(left_out)


def test_s03_a_deeper_network_is_not_taken_for_its_shallower_sister(tmp_path) -> None:
    save_file(timm.create_model("resnet34").state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(DataError, match="is unknown"):
        load_weights(timm.create_model("resnet18", num_classes=0), tmp_path / "w.safetensors")


def test_s03_half_precision_is_loaded_as_single(tmp_path, donor) -> None:
    for kind in (torch.float16, torch.bfloat16):
        halved = {
            name: tensor.to(kind) if tensor.is_floating_point() else tensor
            for name, tensor in donor.state_dict().items()
        }
        save_file(halved, tmp_path / "w.safetensors")
        backbone = timm.create_model("test_resnet", num_classes=0)
        load_weights(backbone, tmp_path / "w.safetensors")
        assert backbone.conv1[0].weight.dtype == torch.float32
        assert torch.equal(backbone.conv1[0].weight, halved["conv1.0.weight"].float())
    folder = saved(donor, tmp_path / "mine")
    save_file(halved, folder / "model.safetensors")
    assert backbone_of(folder).conv1[0].weight.dtype == torch.float32


def test_s03_another_architecture_names_the_tensors(tmp_path, donor) -> None:
    file = tmp_path / "model.safetensors"
    save_file(donor.state_dict(), file)
    with pytest.raises(DataError, match=r"'.+' (has shape|is missing|is unknown)"):
        load_weights(timm.create_model("test_vit", num_classes=0), file)


@pytest.mark.parametrize("change", ["width", "missing", "other"])
def test_s03_a_local_directory_that_does_not_fit_names_the_tensors(tmp_path, donor, change):
    folder = saved(donor, tmp_path / "mine")
    state = load_file(folder / "model.safetensors")
    if change == "width":
        state["conv1.0.weight"] = state["conv1.0.weight"][:2].clone()
    elif change == "missing":
        del state["conv1.0.weight"]
    else:
        state = timm.create_model("test_vit").state_dict()
    save_file(state, folder / "model.safetensors")
    with pytest.raises(DataError, match=r"do not fit.*conv1\.0\.weight"):
        build(resolve(str(folder), {}))


def test_s03_a_head_of_other_classes_is_told_once(tmp_path, donor) -> None:
    save_file(donor.state_dict(), tmp_path / "w.safetensors")
    source = resolve(f"test_resnet@{tmp_path / 'w.safetensors'}", {})
    (note,) = provide.check(source)
    assert "'fc.bias', 'fc.weight'" in note
    assert "new head is trained" in note


def test_a_damaged_configuration_is_one_sentence(tmp_path, donor) -> None:
    folder = saved(donor, tmp_path / "mine")
    for text in ("", "[]", "{}", '{"architecture": 3}'):
        (folder / "config.json").write_text(text)
        with pytest.raises(DataError, match=r"config\.json cannot be read"):
            build(resolve(str(folder), {}))


def test_a_weights_folder_offers_its_sub_folders(tmp_path) -> None:
    model = timm.create_model("test_resnet")
    saved(model, tmp_path / "mine.v1")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").write_bytes(b"")
    local, notes = in_folder(tmp_path)
    assert list(local) == ["mine.v1"]
    assert "other" in notes[0]
    built = build(resolve("mine.v1", local))
    assert torch.equal(built.module.conv1[0].weight, model.conv1[0].weight)
    assert resolve("resnet18", local).options == {"model": "resnet18"}
    assert resolve("mine.v1@w.pth", local).weights.endswith("w.pth")


@pytest.mark.parametrize("text", ["", "[]", '{"backbones": {"a": 1}}', '{"backbones": 3}'])
def test_a_damaged_manifest_is_one_sentence(tmp_path, donor, text) -> None:
    saved(donor, tmp_path / "mine")
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(DataError, match=r"MANIFEST\.json cannot be read"):
        in_folder(tmp_path)


def test_the_licence_of_a_file_of_ones_own_is_not_that_of_the_published_one(tmp_path, donor):
    save_file(donor.state_dict(), tmp_path / "w.safetensors")
    assert build(resolve("test_resnet", {}), pretrained=False).license == "apache-2.0"
    own = build(resolve(f"test_resnet@{tmp_path / 'w.safetensors'}", {}))
    assert (own.license, own.source) == ("", "")


def test_a_file_tells_what_it_was_trained_on_and_its_licence(tmp_path, donor) -> None:
    told = {"source": PROCEDURAL, "license": "mit", "format": "pt"}
    save_file(donor.state_dict(), tmp_path / "w.safetensors", metadata=told)
    source = resolve(f"test_resnet@{tmp_path / 'w.safetensors'}", {})
    own = build(source)
    assert (own.license, own.source) == ("mit", PROCEDURAL)
    assert provide.provide(source, ("mit",), silent).source.trained_on == PROCEDURAL
    (tmp_path / "autoft_mini").mkdir()
    save_file(donor.state_dict(), tmp_path / "autoft_mini" / "model.safetensors", metadata=told)
    (carried,) = in_folder(tmp_path)[0].values()
    assert (carried.license, carried.trained_on) == ("mit", PROCEDURAL)
    known = {"backbones": {"autoft_mini": {"license": "bsd", "source": "in1k"}}}
    (tmp_path / MANIFEST).write_text(json.dumps(known))
    (carried,) = in_folder(tmp_path)[0].values()
    assert (carried.license, carried.trained_on) == ("bsd", "in1k")


@pytest.mark.parametrize("damage", BAD)
def test_a_damaged_file_tells_nothing_and_loading_it_says_why(tmp_path, damage) -> None:
    file = tmp_path / "w.safetensors"
    file.write_bytes(BAD[damage])
    source = resolve(f"test_resnet@{file}", {})
    assert (source.license, source.trained_on) == ("", "")
    with pytest.raises(DataError, match=str(file)):
        build(source)


def test_a_folder_and_no_file_tell_nothing(tmp_path) -> None:
    assert read_metadata(tmp_path) == read_metadata(tmp_path / "gone") == {}


def test_a_package_without_its_file_is_another_mistake_than_a_wrong_path(tmp_path) -> None:
    weights = Weights(origin="package theirs 1.0", place=str(tmp_path))
    with pytest.raises(MachineError, match=r"package theirs 1\.0 has them.*Install its package"):
        provide.fetch(Source("theirs", "their_plugin"), weights, silent)
    with pytest.raises(UsageError, match=r"holds no file of weights\. Check the path"):
        provide.fetch(Source("theirs", ANY_ARCHITECTURE), weights, silent)


@pytest.mark.parametrize(
    ("license", "commercial"),
    [
        ("apache-2.0", True),
        ("MIT", True),
        ("bsd-3-clause", True),
        ("cc-by-4.0", True),
        ("cc-by-nc-4.0", False),
        ("cc-by-nc-sa-4.0", False),
        ("fair-noncommercial-research-license", False),
        ("apple-amlr", False),
        ("dinov3-license", None),
        ("unknown", None),
        ("", None),
    ],
)
def test_which_licences_permit_commercial_use(license, commercial) -> None:
    assert licenses.is_commercial(license) is commercial
    assert licenses.allows((), license)
    assert licenses.allows(("any",), license)
    assert licenses.allows(("commercial",), license) is (commercial is True)
    assert licenses.allows(("isc", license or "unknown"), license)
    assert not licenses.allows(("isc",), license)
    assert bool(licenses.warning("x", license)) is (commercial is False)


def test_every_licence_of_timm_is_in_one_class_and_the_tiers_are_free() -> None:
    from timm.models import get_pretrained_cfg

    found = {get_pretrained_cfg(name).license or "" for name in timm.list_pretrained()}
    forbidding = {name for name in found if licenses.is_commercial(name) is False}
    assert all("nc" in name or "research" in name or name in {"apple-amlr", "seer-license"}
               or "noncommercial" in name for name in forbidding)  # fmt: skip
    assert {name for name in found if "-nc" in name or "noncommercial" in name} <= forbidding
    for plugin in plugins.installed("backbone"):
        if plugin.builtin and plugin.name != "timm":
            weights = provide.locate(resolve(plugin.name, {}))
            assert licenses.is_commercial(weights.license), plugin.name


def test_a_licence_that_is_not_allowed_is_refused_before_anything_is_fetched() -> None:
    source = Source("mine", "timm", {"model": "convnextv2_atto.fcmae"})
    with pytest.raises(UsageError, match=r"'mine' .*'cc-by-nc-4.0'.*--allow-license mit,cc-by-nc"):
        provide.provide(source, ("mit",), silent)
    with pytest.raises(MachineError):
        provide.provide(source, (), silent)


def test_a_name_that_timm_does_not_know_suggests_the_closest() -> None:
    with pytest.raises(UsageError, match="Did you mean 'test_resnet"):
        provide.locate(resolve("test_resnt", {}))
    with pytest.raises(UsageError, match="no weights tagged 'x'"):
        provide.locate(resolve("test_resnet.x", {}))


def test_n01_missing_weights_name_model_place_and_command(tmp_path, monkeypatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    place = tmp_path / "hub" / "models--timm--test_resnet.r160_in1k"
    with pytest.raises(MachineError) as told:
        build(resolve("test_resnet", {}))
    for part in ("'test_resnet'", str(place), "HF_HUB_OFFLINE=1", "weights pull test_resnet`"):
        assert part in str(told.value)


def test_a_plugin_tells_its_file_with_the_options_that_it_is_called_with() -> None:
    asked = []

    def locate(*, size):
        asked.append(size)
        return f"file of {size}"

    @published(locate)
    def plugin(*, size=3, pretrained=True):
        """Build nothing."""

    assert find_weights(plugin, {}) == "file of 3"
    assert find_weights(plugin, {"size": 4}) == "file of 4"
    assert find_weights(quiet, {}) is None
    assert asked == [3, 4]


def test_allowed_licences_are_a_setting(monkeypatch) -> None:
    assert Settings(dataset=".", allow_license="mit, apache-2.0").allow_license == (
        "mit",
        "apache-2.0",
    )


@pytest.mark.shared
def test_the_real_weights_load_and_keep_their_stages(shared_root) -> None:
    from autoft.network.stages import stage_of_parameters

    local, _ = in_folder(shared_root / "weights")
    backbone = build(local["mobilenetv2_100.in1k"])
    assert backbone.source == "in1k"
    assert backbone.license == "apache-2.0"
    assert 4 <= len(backbone.stages) <= 12
    assert set(stage_of_parameters(backbone).values()) == set(range(len(backbone.stages)))
