from __future__ import annotations

import hashlib
import io
import json
import os
import socket
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar
from urllib.parse import unquote, urlsplit

import pytest
from PIL import Image

from autoft.data.inputs import vision
from autoft.data.inputs.dispatch import list_dataset
from autoft.data.reading import PARTS, Reading
from autoft.errors import DataError, MachineError, UsageError

READING = Reading()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOFT_CACHE", str(tmp_path / "cache"))


def encoded(colour, kind="png"):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, kind)
    return file.getvalue()


RED, BLUE, GREY = encoded("red"), encoded("blue", "jpeg"), encoded("grey")


class Hub:
    """Datasets that the real library has kept on this machine, as after a run with network."""

    def __init__(self, folder, datasets):
        self.folder = folder
        self.datasets = datasets

    def keep(self, name, config="default", **splits):
        files = {}
        for split, table in splits.items():
            files[split] = str(self.folder / f"{config}-{split}.parquet")
            table.to_parquet(files[split])
        from datasets.packaged_modules.parquet.parquet import Parquet

        owner, _, short = name.partition("/")
        place = self.folder / "made"
        builder = Parquet(
            cache_dir=str(place),
            dataset_name=short,
            config_name=config,
            hash="0",
            data_files=files,
        )
        builder.download_and_prepare()
        made = Path(builder.cache_dir)
        kept = Path(self.datasets.config.HF_DATASETS_CACHE) / f"{owner}___{short}" / config
        kept.parent.mkdir(parents=True, exist_ok=True)
        made.parents[1].rename(kept)

    def table(self, columns, **features):
        kinds = {"image": self.datasets.Image(), **features}
        return self.datasets.Dataset.from_dict(columns, features=self.datasets.Features(kinds))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "kept")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    return Hub(tmp_path, datasets)


def pets(hub, data=(RED, BLUE), labels=(1, 0)):
    images = [item and {"bytes": item, "path": "a.JPG" if item == BLUE else None} for item in data]
    names = hub.datasets.ClassLabel(names=["cat", "dog"])
    return hub.table({"image": images, "label": list(labels)}, label=names)


def read(listing):
    return {
        (PARTS[part], listing.label_names[code]): Path(listing.root, path).read_bytes()
        for part, code, path in zip(listing.parts, listing.labels, listing.paths, strict=True)
    }


def test_a_dataset_of_the_hub_becomes_files_with_the_same_bytes(hub, monkeypatch):
    hub.keep("owner/pets", train=pets(hub), validation=pets(hub, [GREY], [0]))
    calls = []
    listing = list_dataset("hf://owner/pets", READING, lambda *call: calls.append(call))
    assert listing.name == "owner/pets"
    assert listing.label_names == ("cat", "dog")
    assert read(listing) == {
        ("train", "dog"): RED,
        ("train", "cat"): BLUE,
        ("val", "cat"): GREY,
    }
    assert sorted(Path(path).suffix for path in listing.paths) == ["", "", ".jpg"]
    assert calls[0] == (3, 3)
    # A second time neither the library nor the network is asked.
    monkeypatch.setattr(hub.datasets.config, "HF_DATASETS_CACHE", "/nowhere")
    assert list_dataset("hf://owner/pets", READING).paths == listing.paths
    assert hub.datasets.config.HF_HUB_OFFLINE is True


def test_the_name_may_be_a_folder_here_and_the_hub_is_still_meant(hub, tmp_path, monkeypatch):
    (tmp_path / "owner" / "pets").mkdir(parents=True)
    (tmp_path / "owner" / "pets" / "a.csv").write_text("a,b\n1,2\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MachineError, match=r"hf://owner/pets' cannot be fetched \(HF_HUB_OFFLINE"):
        list_dataset("hf://owner/pets", READING)


def test_rows_without_image_or_label_and_other_splits_are_counted(hub):
    table = pets(hub, [RED, BLUE, None, GREY], [0, -1, 1, 1])
    hub.keep("owner/holes", train=table, extra=pets(hub))
    listing = list_dataset("hf://owner/holes", READING)
    assert len(listing) == 2
    assert listing.counts == {
        "rows without an image": 1,
        "rows without a label": 1,
        "in the split 'extra'": 2,
    }


def test_configurations_are_chosen_by_name(hub):
    hub.keep("owner/two", config="small", train=pets(hub, [RED], [0]))
    hub.keep("owner/two", config="large", train=pets(hub))
    assert len(list_dataset("hf://owner/two:small", READING)) == 1
    assert len(list_dataset("hf://owner/two:large", READING)) == 2
    with pytest.raises(UsageError, match=r"small.*hf://owner/name:config"):
        list_dataset("hf://owner/two", READING)
    with pytest.raises(UsageError, match=r"'huge' Available.*hf://owner/name:config"):
        list_dataset("hf://owner/two:huge", READING)


@pytest.mark.parametrize(
    ("name", "kind", "values", "expected"),
    [
        ("label", "string", ["001", "NA"], ["001", "NA"]),
        ("target", "int64", [7, 10], ["7", "10"]),
    ],
)
def test_labels_that_are_text_or_numbers(hub, name, kind, values, expected):
    images = [{"bytes": RED, "path": None}, {"bytes": BLUE, "path": None}]
    value = hub.datasets.Value
    columns = {"image": images, name: values, "note": ["x", "y"]}
    table = hub.table(columns, **{name: value(kind), "note": value("string")})
    hub.keep("owner/plain", full=table)
    listing = list_dataset("hf://owner/plain", READING)
    assert [listing.label_names[code] for code in listing.labels] == expected
    assert listing.parts.tolist() == [0, 0]


def test_columns_that_leave_a_choice_are_listed(hub):
    names = hub.datasets.ClassLabel(names=["a", "b"])
    columns = {"image": [{"bytes": RED, "path": None}], "coarse": [0], "fine": [1]}
    hub.keep("owner/double", train=hub.table(columns, coarse=names, fine=names))
    with pytest.raises(DataError, match=r"several columns could hold the label: 'coarse', 'fine'"):
        list_dataset("hf://owner/double", READING)
    table = hub.datasets.Dataset.from_dict({"text": ["x"], "label": ["a"]})
    hub.keep("owner/texts", train=table)
    with pytest.raises(DataError, match=r"no column holds the image.*'text' \(Value"):
        list_dataset("hf://owner/texts", READING)
    hub.keep("owner/odd", red=pets(hub), blue=pets(hub))
    with pytest.raises(DataError, match=r"splits .* are called 'red', 'blue'"):
        list_dataset("hf://owner/odd", READING)


COMMIT = "a" * 40
CARD = b"""---
configs:
- config_name: small
  data_files: data/train.parquet
- config_name: large
  data_files:
  - split: train
    path: data/train.parquet
  - split: test
    path: data/train.parquet
---
"""


class HubServer(BaseHTTPRequestHandler):
    """As much of the Hub's protocol as its client needs to load one dataset."""

    files: ClassVar[dict[str, bytes]] = {}

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        resolve, api = "/datasets/owner/pets/resolve/", "/api/datasets/owner/pets/"
        if path.startswith(resolve):
            revision, _, name = path.removeprefix(resolve).partition("/")
            if revision not in ("main", "v1", COMMIT):
                self.answer(404, error="RevisionNotFound")
            elif name in self.files:
                self.answer(200, self.files[name])
            else:
                self.answer(404, error="EntryNotFound")
        elif path.startswith(f"{api}tree/"):
            files = [{"type": "file", "path": name, "size": 1, "oid": "0"} for name in self.files]
            self.answer(200, json.dumps(files).encode())
        elif path.startswith(f"{api}revision/"):
            siblings = [{"rfilename": name} for name in self.files]
            about = {"id": "owner/pets", "sha": COMMIT, "siblings": siblings}
            self.answer(200, json.dumps(about).encode())
        else:
            self.answer(404, error="RepoNotFound")

    do_HEAD = do_GET  # noqa: N815 - the server's name for it

    def answer(self, status, data=b"", error=""):
        self.send_response(status)
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(data)))
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *arguments):
        """Say nothing."""


ASK = """
import sys
from autoft.data.inputs.dispatch import list_dataset
from autoft.data.reading import Reading
from autoft.errors import AutoftError
for dataset in sys.argv[1:]:
    try:
        listing = list_dataset(dataset, Reading())
        print(len(listing), listing.parts.tolist(), flush=True)
    except AutoftError as error:
        print(type(error).__name__, error, flush=True)
"""


def test_the_real_library_asks_a_hub_over_http(hub, tmp_path):
    pets(hub).to_parquet(str(tmp_path / "train.parquet"))
    data = (tmp_path / "train.parquet").read_bytes()
    handler = type(
        "Handler", (HubServer,), {"files": {"README.md": CARD, "data/train.parquet": data}}
    )
    names = [":small", "@v1:large", "@v9:large", "", ":huge"]
    names = [f"hf://owner/pets{name}" for name in names] + ["hf://owner/none"]
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        # A process of its own, because the client reads the address of the Hub once.
        here = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}
        here |= {"HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
        done = subprocess.run(
            [sys.executable, "-c", ASK, *names],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | here,
        )
        server.shutdown()
    small, large, revision, several, unknown, nothing = done.stdout.splitlines()
    assert small == "2 [1, 1]"
    assert large == "4 [1, 1, 3, 3]"
    assert "DataError" in revision
    assert "Revision 'v9' doesn't exist" in revision
    assert "UsageError" in several
    assert "['small', 'large']" in several
    assert "UsageError" in unknown
    assert "'huge' not found" in unknown
    assert "DataError" in nothing
    assert "'owner/none' doesn't exist" in nothing


def test_another_revision_than_the_one_asked_for_is_never_taken(hub):
    hub.keep("owner/pets", train=pets(hub))
    with pytest.raises(MachineError, match="hf://owner/pets@v2' cannot be fetched"):
        list_dataset("hf://owner/pets@v2", READING)


@pytest.mark.parametrize("switch", ["HF_HUB_OFFLINE", "AUTOFT_OFFLINE"])
def test_offline_is_said_and_nothing_is_asked(hub, monkeypatch, switch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(hub.datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv(switch, "1")
    with pytest.raises(MachineError, match=rf"\({switch}=1 forbids the network\)"):
        list_dataset("hf://owner/none", READING)
    assert hub.datasets.config.HF_HUB_OFFLINE is False


def test_a_hub_that_cannot_be_reached_is_named(hub, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    with pytest.raises(MachineError, match=r"127\.0\.0\.1 cannot be reached"):
        list_dataset("hf://owner/none", READING)


@pytest.mark.parametrize("name", ["hf://", "hf://a/b/c", "hf://a b", "hf://a/b@", "hf://../x/y"])
def test_names_that_are_none_are_usage_errors(name):
    with pytest.raises(UsageError, match="names no dataset"):
        list_dataset(name, READING)


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MachineError, match=r"pip install 'autoft\[hf\]'"):
        list_dataset("hf://owner/name", READING)


def test_torchvision_becomes_files(monkeypatch):
    from torchvision.datasets import FakeData

    monkeypatch.setattr(FakeData.__init__, "__defaults__", (20, (3, 9, 9), 3, None, None, 0))
    listing = list_dataset("torchvision:FakeData", READING)
    assert listing.name == "FakeData"
    assert len(listing) == 20
    assert listing.parts.tolist() == [0] * 20
    expected = FakeData()
    for index, (path, code) in enumerate(zip(listing.paths, listing.labels, strict=True)):
        image, target = expected[index]
        assert listing.label_names[code] == str(target)
        with Image.open(Path(listing.root, path)) as written:
            assert written.tobytes() == image.tobytes()


def test_torchvision_keeps_parts_classes_and_files(tmp_path, monkeypatch):
    from torchvision import datasets

    class Own(datasets.ImageFolder):
        def __init__(self, root, split, loader):
            super().__init__(tmp_path / "source" / split, loader=loader)

    for part in ("train", "test"):
        for label, data in (("a", RED), ("b", BLUE)):
            (tmp_path / "source" / part / label).mkdir(parents=True)
            (tmp_path / "source" / part / label / "1.jpg").write_bytes(data)
    monkeypatch.setattr(datasets, "STL10", Own)
    listing = list_dataset("torchvision:STL10", READING)
    assert read(listing) == {
        (part, label): data
        for part in ("train", "test")
        for label, data in (("a", RED), ("b", BLUE))
    }
    assert {Path(path).suffix for path in listing.paths} == {".jpg"}


def test_torchvision_knows_every_name_and_argument():
    import inspect

    from torchvision import datasets

    for name, parts in vision.DATASETS.items():
        accepted = inspect.signature(getattr(datasets, name)).parameters
        for choice in parts.values():
            assert set(choice) <= set(accepted), name


def test_a_download_that_cannot_happen_is_a_machine_error(monkeypatch):
    with pytest.raises(MachineError, match=r"CIFAR10 \(HF_HUB_OFFLINE=1 forbids"):
        list_dataset("torchvision:CIFAR10", READING)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    # No one listens on the discard port: the same as no network. The opener that this makes
    # would outlive the test, proxies and all.
    monkeypatch.setattr("urllib.request._opener", None)
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(MachineError, match=r"could not fetch CIFAR10 \(.*refused"):
        list_dataset("torchvision:CIFAR10", READING)


@pytest.mark.parametrize(("name", "near"), [("cifar10", "CIFAR10"), ("Flower102", "Flowers102")])
def test_unknown_names_suggest_a_known_one(name, near):
    with pytest.raises(UsageError, match=f"Did you mean '{near}'"):
        list_dataset(f"torchvision:{name}", READING)


def test_importing_the_readers_imports_no_heavy_library():
    code = (
        "import sys; import autoft.data.inputs.dispatch; "
        "print([n for n in ('torch', 'torchvision', 'sklearn', 'scipy', 'datasets', 'pyarrow', "
        "'pandas') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
