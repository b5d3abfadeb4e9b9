"""The backbone that comes with autoft: its contract, its file, and a search with nothing else.

Nothing here depends on how much its weights know.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from autoft.backbones import mini
from autoft.errors import DataError, MachineError
from autoft.export.artifact import FORMATS
from autoft.export.parity import check_parity
from autoft.network.assemble import Network
from autoft.network.build import build
from autoft.network.cut import cut, why_uncut
from autoft.network.sources import in_folder, resolve
from autoft.network.stages import stage_of_parameters
from autoft.search.prepare import BEGINS_WEAK, EMBEDDED, MISSING
from autoft.testing import conformance
from autoft.values import PROCEDURAL, Backbone, Preprocess

ROOT = Path(__file__).resolve().parents[1]
SIZES = (64, 128, 224)
STAGES = 6
ENOUGH = 400  # seconds that a command may take on a busy machine

test_conforms = conformance("autoft", names=[EMBEDDED], pretrained=True)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return build(resolve(EMBEDDED, {}))


def images(size: int, count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(size))


# --- the file and the network -------------------------------------------------------------------


def test_the_file_is_small_and_holds_half_precision_alone(backbone) -> None:
    assert mini.FILE.stat().st_size <= 5_000_000
    state = load_file(mini.FILE)
    assert {tensor.dtype for tensor in state.values() if tensor.is_floating_point()} == {
        torch.float16
    }
    loaded = backbone.module.state_dict()
    assert all(torch.equal(loaded[name].float(), state[name].float()) for name in state)
    assert 1_000_000 <= sum(each.numel() for each in backbone.module.parameters()) <= 2_500_000
    assert all(each.isfinite().all() for each in state.values())


def test_it_says_where_it_is_from(backbone) -> None:
    assert (backbone.source, backbone.license) == (PROCEDURAL, "apache-2.0")
    assert set(stage_of_parameters(backbone).values()) == set(range(STAGES))


def test_random_weights_are_others_and_need_no_file(backbone, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(mini, "FILE", tmp_path / "gone.safetensors")
    blank = build(resolve(EMBEDDED, {}), pretrained=False).module.state_dict()
    assert blank.keys() == backbone.module.state_dict().keys()
    assert not torch.equal(blank["stem.conv.weight"], backbone.module.stem.conv.weight)


@pytest.mark.parametrize("size", SIZES)
def test_it_is_cut_after_every_stage(backbone, size) -> None:
    assert why_uncut(backbone, size) == ""
    module = backbone.module.eval()
    with torch.no_grad():
        expected = module(images(size))
        for k in range(1, STAGES + 1):
            prefix, tail = cut(backbone, k, size)
            torch.testing.assert_close(tail(*prefix(images(size))), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [64, 224])
def test_it_learns_images_by_heart(backbone, size) -> None:
    network = Network(copy.deepcopy(backbone), nn.Linear(backbone.num_features, 3))
    network.set_rates([1.0] * STAGES, norm_mode="train")
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-3)
    batch, labels, losses = images(size, 6), torch.tensor([0, 1, 2, 0, 1, 2]), []
    network.train()
    for _ in range(12):
        loss = functional.cross_entropy(network(batch), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2, losses


@pytest.mark.parametrize("size", SIZES)
def test_exported_files_agree_at_every_size(backbone, size, tmp_path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(backbone.module, nn.Linear(backbone.num_features, 5))
    files = {name: tmp_path / FORMATS[name][0] for name in ("onnx", "torchscript")}
    for name, path in files.items():
        FORMATS[name][1](model, path, Preprocess(size, size), {})
    proofs = check_parity(model, files, lambda: iter([images(size, 1), images(size, 4)]))
    assert [proof.passed for proof in proofs] == [True, True], proofs


# --- its weights, for users ---------------------------------------------------------------------


@pytest.fixture
def run(run, monkeypatch):
    monkeypatch.setenv("AUTOFT_DISABLE_PLUGINS", "1")
    return run


def test_the_commands_about_weights_know_it(run, tmp_path) -> None:
    digest = hashlib.sha256(mini.FILE.read_bytes()).hexdigest()
    code, out, err = run("weights", "list", EMBEDDED, "--json")
    assert code == 0, err
    (row,) = json.loads(out)
    assert (row["state"], row["source"], row["license"]) == ("here", PROCEDURAL, "apache-2.0")
    assert (row["commercial"], row["path"], row["tier"]) == (True, str(mini.FILE), "")
    code, out, err = run("weights", "verify", EMBEDDED)
    assert (code, out.split()) == (0, [EMBEDDED, digest, "ok"]), err
    code, out, err = run("weights", "pack", EMBEDDED, "--out", "carried", "--offline")
    assert code == 0, err
    told = json.loads(Path("carried", "MANIFEST.json").read_text())["backbones"][EMBEDDED]
    assert (told["sha256"], told["source"], told["license"]) == (digest, PROCEDURAL, "apache-2.0")
    local, left_out = in_folder(tmp_path / "carried")
    assert not left_out
    carried = build(local[EMBEDDED])
    assert (carried.source, carried.license) == (PROCEDURAL, "apache-2.0")
    code, out, err = run("weights", "verify", "carried")
    assert (code, out.split()) == (0, [EMBEDDED, digest, "ok"]), err


@pytest.mark.parametrize("damage", ["cut", "other", "text"])
def test_a_damaged_file_is_one_sentence(monkeypatch, tmp_path, damage) -> None:
    file = tmp_path / mini.FILE.name
    data = mini.FILE.read_bytes()
    if damage == "other":
        from safetensors.torch import save_file

        save_file({"stem.conv.weight": torch.zeros(2)}, file)
    else:
        file.write_bytes(data[: len(data) // 2] if damage == "cut" else b"no tensors")
    monkeypatch.setattr(mini, "FILE", file)
    with pytest.raises(DataError, match=rf"{file} are damaged: .+ Install autoft again\.") as told:
        build(resolve(EMBEDDED, {}))
    assert told.value.exit_code == 3


def test_a_missing_file_is_one_sentence(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(mini, "FILE", tmp_path / "gone.safetensors")
    with pytest.raises(MachineError, match=r"gone\.safetensors, .+Install autoft again\.") as told:
        build(resolve(EMBEDDED, {}))
    assert told.value.exit_code == 4


REPLACED = """
import autoft.backbones.mini as mini
from pathlib import Path
mini.FILE = Path(r"{file}")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "code", "words"),
    [("gone", 4, "cannot be fetched"), ("cut", 3, "damaged")],
)
def test_a_search_with_no_weights_at_all_ends_with_the_reason(
    photos, tmp_path, damage, code, words
) -> None:
    file = tmp_path / "weights.safetensors"
    if damage == "cut":
        file.write_bytes(mini.FILE.read_bytes()[:1000])
    place = tmp_path / "place"
    place.mkdir()
    (place / "sitecustomize.py").write_text(REPLACED.format(file=file))
    done = offline_search(photos, tmp_path, place)
    assert done.returncode == code, done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("Error")]
    assert words in error
    assert EMBEDDED in error


@pytest.mark.slow
def test_the_wheel_holds_the_weights(tmp_path) -> None:
    uv = shutil.which("uv") or shutil.which("uv", path=Path(sys.executable).parent)
    assert uv, "uv is not installed"
    command = [uv, "build", "--wheel", "--out-dir", tmp_path, ROOT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        data = packed.read(f"autoft/backbones/{mini.FILE.name}")
    assert data == mini.FILE.read_bytes()


# --- a search with nothing else, and no network -------------------------------------------------

WATCHED = """
import os, socket
LOOPBACK = ("127.", "::1", "localhost")
def watch(name):
    plain = getattr(socket.socket, name)
    def connect(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6):
            if not str(address[0]).startswith(LOOPBACK):
                note(address)
        return plain(self, address)
    setattr(socket.socket, name, connect)
def note(address):
    with open(r"{file}", "a") as file:
        file.write(f"{{os.getpid()}} {{address}}\\n")
    raise OSError(f"the network is not to be touched: {{address}}")
def look_up(host, *more, **options):
    if host and not str(host).startswith(LOOPBACK):
        note(host)
    return plain_look_up(host, *more, **options)
plain_look_up, socket.getaddrinfo = socket.getaddrinfo, look_up
watch("connect")
watch("connect_ex")
with open(r"{file}", "a") as file:
    file.write("")
with open(r"{file}.seen", "a") as file:
    file.write(f"{{os.getpid()}}\\n")
"""


def offline_search(
    photos: Path, folder: Path, place: Path, *more: object, before: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """Search with an empty cache of weights, and with what `place` holds as sitecustomize."""
    fixed = ("--time", "100s", "--trials", 3, "--image-size", 64, "--device", "cpu")
    command = [
        *(*before, sys.executable, "-m", "autoft", "search", "--dataset", photos, "--offline"),
        *("--out", folder / "run", "--export", "onnx", *fixed, *more),
    ]
    hidden = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    own = {"PYTHONPATH": str(place), "HF_HOME": str(folder / "empty"), "COLUMNS": "1000"}
    return subprocess.run(
        [str(word) for word in command],
        env={**kept, **own, "AUTOFT_DISABLE_PLUGINS": "1"},
        capture_output=True,
        text=True,
        timeout=ENOUGH,
        check=False,
    )


def namespace() -> tuple[str, ...]:
    """Return what begins a command without any network, where this system has that."""
    command = ("unshare", "--map-root-user", "--net")
    if not shutil.which(command[0]):
        return ()
    done = subprocess.run([*command, "true"], capture_output=True, check=False)
    return command if done.returncode == 0 else ()


@pytest.mark.slow
def test_beside_the_users_own_weights_it_is_ranked_and_that_is_shown(
    photos, tiny_weights, tmp_path
) -> None:
    own = "test_byobnet.fixed"
    shutil.copytree(tiny_weights / own, tmp_path / "own" / own)
    given = ("--weights", tmp_path / "own", "--trials", 1, "--time", "300s")
    done = offline_search(photos, tmp_path, tmp_path, *given)
    assert done.returncode == 0, done.stderr
    assert BEGINS_WEAK not in done.stderr
    assert MISSING not in done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    probes = {row["backbone"]: row for row in result["ranking"]}
    assert set(probes) == {EMBEDDED, own}
    assert probes[EMBEDDED]["source"] == PROCEDURAL
    assert result["backbones"] == {name: row["probe"] for name, row in probes.items()}
    (line,) = [each for each in done.stdout.splitlines() if each.startswith("Backbones by probe")]
    told = [f"{row['backbone']} {row['probe']:.3f}" for row in result["ranking"]]
    assert [each for each in told if each not in line] == []
    best = max(row["probe"] for row in result["ranking"])
    for name, row in probes.items():
        assert row["searched"] is (row["probe"] >= best - 0.10), name
    tried = "head_only" in result["regime"]["first"]  # of one trial, the linear probe
    assert result["regime"]["tried"] is tried
    assert ("was not tried" in done.stdout) is not tried


@pytest.mark.slow
def test_a_search_without_network_starts_from_it_and_touches_none(photos, tmp_path) -> None:
    place, attempts = tmp_path / "place", tmp_path / "attempts"
    place.mkdir()
    (place / "sitecustomize.py").write_text(WATCHED.format(file=attempts))
    done = offline_search(photos, tmp_path, place, before=namespace())
    assert done.returncode == 0, done.stderr
    assert attempts.read_text() == ""
    seen = set((tmp_path / "attempts.seen").read_text().split())
    assert len(seen) >= 2  # the command, and its worker at least

    assert done.stderr.count(BEGINS_WEAK) == done.stderr.count(MISSING) == 1
    assert f"Backbones by probe: {EMBEDDED} " in done.stdout
    assert f"({PROCEDURAL})" in done.stdout
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    (ranked,) = result["ranking"]
    assert (ranked["backbone"], ranked["source"], ranked["searched"]) == (
        EMBEDDED,
        PROCEDURAL,
        True,
    )
    assert result["regime"]["name"] == "weak-weights"
    assert result["regime"]["first"] == ["full", "scratch"]

    best = tmp_path / "run" / "best"
    assert [proof["passed"] for proof in result["parity"]] == [True]
    card = json.loads((best / "model.json").read_text())
    assert (card["backbone"], card["license"]) == (EMBEDDED, "apache-2.0")
    assert card["source"] == PROCEDURAL
    assert card["plugin"]["sha256"] == hashlib.sha256(mini.FILE.read_bytes()).hexdigest()
    assert "License of those weights: apache-2.0" in (best / "README.md").read_text()
