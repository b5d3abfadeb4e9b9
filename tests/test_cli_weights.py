"""Weights by the commands: fetched from a Hub over HTTP, verified, packed, searched with."""

from __future__ import annotations

import hashlib
import json
import re
import socket
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar
from urllib.parse import unquote, urlsplit

import pytest
import timm
import torch
from safetensors.torch import load_file, save, save_file

from autoft.search.folder import RunFolder

COMMIT = "c" * 40
RESNET, VIT = "timm/test_resnet.r160_in1k", "timm/test_vit.r160_in1k"
FREE = "apache-2.0"


class ModelHub(BaseHTTPRequestHandler):
    """As much of the Hub's protocol as its client needs to fetch files of models."""

    files: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[str]] = []

    def do_GET(self):
        path = unquote(urlsplit(self.path).path).lstrip("/")
        repo, _, rest = path.partition("/resolve/")
        name = rest.partition("/")[2]
        self.asked.append(f"{self.command} {repo} {name}")
        if f"{repo}/{name}" in self.files:
            self.answer(200, self.files[f"{repo}/{name}"])
        elif any(known.startswith(f"{repo}/") for known in self.files):
            self.answer(404, error="EntryNotFound")
        else:
            self.answer(404, error="RepoNotFound")

    do_HEAD = do_GET  # noqa: N815 - the server's name for it

    def answer(self, status, data=b"", error=""):
        self.send_response(status)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(data)))
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *arguments):
        """Say nothing."""


@pytest.fixture(scope="module")
def published():
    """Return the files of a Hub: one model as safetensors, one as a plain checkpoint."""
    torch.manual_seed(5)
    resnet, vit = timm.create_model("test_resnet"), timm.create_model("test_vit")
    return {f"{RESNET}/model.safetensors": save(resnet.state_dict()), VIT: vit.state_dict()}


@pytest.fixture
def hub(tmp_path, monkeypatch, published):
    """Serve the files, and point the Hub's client there with an empty cache of its own."""
    torch.save(published[VIT], tmp_path / "vit.bin")
    files = {name: data for name, data in published.items() if name != VIT}
    files[f"{VIT}/pytorch_model.bin"] = (tmp_path / "vit.bin").read_bytes()
    handler = type("Handler", (ModelHub,), {"files": files, "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("AUTOFT_DISABLE_PLUGINS", "1")
        for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
            monkeypatch.delenv(name, raising=False)
        yield handler
        server.shutdown()


def test_pull_verify_and_pack_with_a_hub(hub, run, tmp_path) -> None:
    data = hub.files[f"{RESNET}/model.safetensors"]
    digest = hashlib.sha256(data).hexdigest()
    code, out, err = run("weights", "pull", "test_resnet", "test_vit.r160_in1k")
    assert code == 0, err
    first, second = (line.split("  ") for line in out.splitlines())
    assert first[:2] == ["test_resnet", digest]
    file = Path(first[2])
    assert file.read_bytes() == data
    assert file.is_relative_to(tmp_path / "home")
    assert second[2].endswith("pytorch_model.bin")
    assert "fetching test_resnet: MB" in err

    code, out, _ = run("weights", "list", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    row = rows["test_resnet.r160_in1k"]
    assert (row["state"], row["license"], row["commercial"]) == ("here", FREE, True)
    assert (row["bytes"], row["path"], row["origin"]) == (len(data), str(file), f"hf://{RESNET}")
    assert rows["resnet18.a1_in1k"]["state"] == "missing"
    assert rows["resnet18.a1_in1k"]["tier"] == "nano"

    before = len(hub.asked)
    code, out, err = run("weights", "verify")
    assert code == 0, err
    assert sorted(re.findall(r"^(\S+) .* ok$", out, flags=re.MULTILINE)) == [
        "autoft_mini",
        "test_resnet.r160_in1k",
        "test_vit.r160_in1k",
    ]
    assert len(hub.asked) == before  # what is here is looked at without the network

    damaged = bytearray(data)
    damaged[-1] ^= 1  # still a readable file
    file.resolve().write_bytes(damaged)
    code, out, err = run("weights", "verify", "test_resnet")
    assert code == 3
    assert f"expected {digest}" in out
    assert "1 of 1 weights cannot be used: test_resnet" in err
    assert run("weights", "pull", "test_resnet")[0] == 0
    assert file.read_bytes() == data

    carried = tmp_path / "carried"
    names = ("test_resnet", "test_vit.r160_in1k")
    code, out, err = run("weights", "pack", *names, "--out", carried, "--offline")
    assert code == 0, err
    assert (carried / "test_resnet" / "model.safetensors").read_bytes() == data
    told = json.loads((carried / "MANIFEST.json").read_text())["backbones"]
    assert told["test_resnet"]["sha256"] == digest
    assert told["test_resnet"]["license"] == FREE
    assert told["test_vit.r160_in1k"]["origin_sha256"] == second[1]
    # What was a plain checkpoint is safetensors now, without the classifier.
    state = load_file(carried / "test_vit.r160_in1k" / "model.safetensors")
    assert "head.weight" not in state
    (carried / "test_vit.r160_in1k" / "model.safetensors").unlink()
    path = carried / "test_resnet" / "model.safetensors"
    path.write_bytes(damaged)
    code, out, err = run("weights", "verify", carried, "--json")
    assert code == 3
    wrong = {row["name"]: row["wrong"] for row in json.loads(out)}
    assert "the file was changed" in wrong["test_resnet"]
    assert "has no model.safetensors" in wrong["test_vit.r160_in1k"]


def test_pack_from_a_folder_and_from_a_file_of_ones_own(run, tmp_path, tiny_weights) -> None:
    model = timm.create_model("test_resnet", num_classes=3)
    save_file(model.state_dict(), tmp_path / "own.safetensors")
    code, out, err = run(
        *("weights", "pack", "test_byobnet.fixed", f"test_resnet@{tmp_path / 'own.safetensors'}"),
        *("--weights", tiny_weights, "--out", "carried"),
    )
    assert code == 0, err
    assert out.splitlines() == ["carried/test_byobnet.fixed", "carried/test_resnet.own"]
    name = Path("test_byobnet.fixed", "model.safetensors")
    assert Path("carried", name).read_bytes() == (tiny_weights / name).read_bytes()
    assert "conv1.0.weight" in load_file(Path("carried", "test_resnet.own", "model.safetensors"))
    code, out, err = run("weights", "verify", "carried", "--json")
    assert code == 0, out + err


def test_n01_pull_without_network_is_exit_4_with_the_reason(hub, run, monkeypatch) -> None:
    code, out, err = run("weights", "pull", "test_resnet", "--offline")
    assert (code, out) == (4, "")
    assert "AUTOFT_OFFLINE=1 forbids the network" in err
    code, _, err = run("weights", "pull", "test_byobnet")
    assert code == 4
    assert "RepositoryNotFoundError" in err


def search(run, photos, *words, out="run"):
    fixed = ("--time", "100s", "--trials", 1, "--image-size", 64, "--folds", 1, "--device", "cpu")
    return run("search", "--dataset", photos, "--out", out, *fixed, "--export", "onnx", *words)


def test_n01_missing_weights_end_a_search_before_trial_0(run, photos, tmp_path) -> None:
    code, _, err = search(run, photos, "--backbones", "test_resnet", "--offline")
    assert code == 4
    assert "weights of 'test_resnet' are not on this machine" in err
    assert "models--timm--test_resnet.r160_in1k" in err
    assert "`autoft weights pull test_resnet`" in err
    assert not RunFolder(tmp_path / "run").trials()
    assert not (tmp_path / "run" / "run.json").exists()


def test_s01_a_search_never_runs_code_in_weights(run, photos, tmp_path) -> None:
    from tests.test_weights import Gadget

    torch.save(Gadget(f"touch {tmp_path / 'canary'}"), tmp_path / "bad.pth")
    code, _, err = search(run, photos, "--backbones", f"test_resnet@{tmp_path / 'bad.pth'}")
    assert code == 3
    assert "never run" in err
    assert not (tmp_path / "canary").exists()


def test_a_licence_that_is_not_allowed_ends_a_search_or_leaves_out(
    run, photos, tiny_weights
) -> None:
    names = ("--backbones", "test_resnet.fixed", "--weights", tiny_weights)
    code, _, err = search(run, photos, *names, "--allow-license", "mit,isc")
    assert code == 2
    assert "'test_resnet.fixed' have the licence 'apache-2.0'" in err
    assert "--allow-license mit,isc,apache-2.0" in err
    code, _, err = search(run, photos, "--weights", tiny_weights, "--allow-license", "mit")
    assert code == 2
    assert err.count("Left out: The weights of") == 3  # the embedded ones too
    assert "No backbone here has weights that --allow-license mit allows" in err


def test_s03_a_search_fetches_notes_and_records_its_weights(hub, run, photos, tmp_path) -> None:
    model = timm.create_model("test_resnet", num_classes=4)
    own = tmp_path / "own.safetensors"
    save_file({f"module.{k}": v for k, v in model.state_dict().items()}, own)
    names = ("--backbones", f"test_resnet,test_resnet@{own}")
    code, _, err = search(run, photos, *names, "--allow-license", "commercial,unknown")
    assert code == 0, err
    assert "fetching test_resnet" in err
    assert err.count("belong to a classifier of other classes") == 1
    sources = json.loads((tmp_path / "run" / "sources.json").read_text())
    digest = hashlib.sha256(hub.files[f"{RESNET}/model.safetensors"]).hexdigest()
    fetched, mine = sources["test_resnet"], sources[f"test_resnet@{own}"]
    assert (fetched["sha256"], fetched["origin"]) == (digest, f"hf://{RESNET}")
    assert (fetched["license"], mine["license"]) == (FREE, "")
    assert mine["sha256"] == hashlib.sha256(own.read_bytes()).hexdigest()
    card = json.loads((tmp_path / "run" / "best" / "model.json").read_text())
    assert card["plugin"] == sources[card["backbone"]]
    assert card["license"] == card["plugin"]["license"]


def test_the_hub_is_named_when_it_cannot_be_reached(hub, run, monkeypatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    code, _, err = run("weights", "pull", "test_resnet")
    assert code == 4
    assert "127.0.0.1 cannot be reached" in err
    assert "`autoft weights pull test_resnet`" in err


PAGE = (Path(__file__).resolve().parents[1] / "docs" / "weights.md").read_text(encoding="utf-8")
TINY = {"resnet18.a1_in1k": "test_resnet", "convnext_nano.in12k_ft_in1k": "test_vit.r160_in1k"}


def test_commands_of_the_page_run(hub, run) -> None:
    commands = re.findall(r"^    autoft (weights .+)$", PAGE, flags=re.MULTILINE)
    assert [line.split()[1] for line in commands] == ["pull", "pack", "verify"]
    for line in commands:
        code, out, err = run(*(TINY.get(word, word) for word in line.split()))
        assert code == 0, err
        assert len(out.splitlines()) == 2


def test_plugin_of_the_page_tells_its_file() -> None:
    from autoft.weights import find_weights

    (text,) = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    scope: dict[str, object] = {"__name__": "example"}
    exec(text, scope)
    found = find_weights(scope["my_backbone"], {"size": "large"})
    assert (found.origin, found.license) == ("https://example.org/large.safetensors", "mit")
