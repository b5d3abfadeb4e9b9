"""What a run keeps of its images: the split, whatever becomes of the file that it came from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from autoft.cli.main import main
from autoft.errors import DataError, UsageError
from autoft.search.folder import RunFolder
from autoft.search.images import chosen_metric, decode, list_images, read_data
from autoft.search.resuming import choose_folder
from autoft.search.settings import Settings


class Heard(list):
    def __call__(self, kind, **data):
        self.append((kind, data))

    def notes(self):
        return [data["text"] for kind, data in self if kind == "note"]


@pytest.fixture
def images(photos, tmp_path) -> Path:
    return Path(shutil.copytree(photos, tmp_path / "images"))


def begin(folder, **settings):
    heard = Heard()
    asked = Settings(image_size=64, **settings)
    data = decode(asked, RunFolder(folder), list_images(asked, heard), heard)
    return data, heard


def test_a_run_keeps_its_split_when_the_file_is_gone(images, tmp_path):
    mine = tmp_path / "mine.csv"
    assert main(["data", "split", str(images), "--seed", "7", "--out", str(mine)]) == 0
    run = tmp_path / "run"
    run.mkdir()
    first, _ = begin(run, dataset=str(images), split=str(mine))
    mine.unlink()
    again, _ = begin(run, dataset=str(images), split=str(mine))
    assert again.split == first.split
    with pytest.raises(DataError, match="cannot be read"):
        read_data(Settings(dataset=str(images), split=str(mine), image_size=64), Heard())


def test_a_split_may_name_what_was_left_out_and_says_what_folds_it_has(images, tmp_path):
    mine = tmp_path / "mine.csv"
    assert main(["data", "split", str(images), "--out", str(mine)]) == 0
    (images / "red" / "00.png").write_bytes(b"damaged")
    asked = Settings(dataset=str(images), split=str(mine), folds=3, image_size=64)
    heard = Heard()
    data = read_data(asked, heard)
    assert len(data.catalog) == 119
    assert len(data.split.fold) == 119
    assert data.split.folds == 5
    assert any("has 5 folds" in note for note in heard.notes())


def test_changed_images_are_another_run(images, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    begin(run, dataset=str(images))
    known = json.loads((run / "catalog.json").read_text())
    assert known["usable"] == 120
    (images / "red" / "00.png").rename(images / "blue" / "x.png")
    with pytest.raises(DataError, match="changed since"):
        begin(run, dataset=str(images))


def test_the_metric_follows_the_imbalance_outside_the_test_part(images):
    settings = Settings(dataset=str(images), image_size=64)
    data = read_data(settings, Heard())
    assert chosen_metric(settings, data) == "accuracy"
    asked = settings.model_copy(update={"metric": "macro_f1"})
    assert chosen_metric(asked, data) == "macro_f1"
    for file in sorted((images / "red").iterdir())[4:]:
        file.unlink()
    assert chosen_metric(settings, read_data(settings, Heard())) == "balanced_accuracy"


@pytest.mark.parametrize(
    ("dataset", "name"),
    [
        ("sample:digits", "digits"),
        ("hf://owner/name@main:default", "name"),
        ("torchvision:CIFAR10", "CIFAR10"),
        ("flowers", "flowers"),
        ("flowers.v2", "flowers.v2"),
        ("flowers.tar.gz", "flowers"),
        ("labels.csv", "labels"),
    ],
)
def test_a_run_is_called_like_its_dataset(dataset, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "." in dataset and not dataset.endswith("v2"):
        Path(dataset).touch()
    assert choose_folder(Settings(dataset=dataset)) == Path("runs") / name


@pytest.mark.parametrize("words", [["split", "--out"], ["profile", "--suspects"]])
def test_nothing_is_written_into_the_dataset(images, words, capsys):
    command, flag = words
    target = images / "made.csv"
    assert main(["data", command, str(images), flag, str(target)]) == UsageError.exit_code
    assert "never written to" in capsys.readouterr().err
    assert not target.exists()
