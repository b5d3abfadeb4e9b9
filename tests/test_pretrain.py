"""What the embedded backbone was trained by: images that are what they are said to be."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from autoft.backbones import mini

FOLDER = Path(__file__).parents[1] / "benchmarks" / "pretrain"


@pytest.fixture(autouse=True)
def beside(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER.parent))
    monkeypatch.syspath_prepend(str(FOLDER))


def drawn(count=48, size=48, seed=0, **families):
    from drawing import Draw
    from rendering import Families, render

    return render(Draw.seeded(seed), count, size, Families(**families))


def answers_of(rendered, task):
    from rendering import TASKS

    return rendered.answers[:, list(TASKS).index(task)]


def test_the_same_seed_draws_the_same_images_and_another_seed_others():
    first, again, other = drawn(), drawn(), drawn(seed=1)
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.answers, again.answers)
    assert not torch.equal(first.images, other.images)


def test_images_are_colours_and_differ():
    images = drawn(count=64).images
    assert images.shape == (64, 3, 48, 48)
    assert images.isfinite().all()
    assert images.amin() >= 0
    assert images.amax() <= 1
    assert (images.std((2, 3)).amax(1) > 0.01).float().mean() > 0.95  # hardly any is blank
    assert len({image.sum().item() for image in images}) == 64


def test_every_answer_is_one_of_its_task_or_unknown():
    from rendering import TASKS, UNKNOWN

    rendered = drawn(count=200)
    for task, number in TASKS.items():
        told = answers_of(rendered, task)
        assert int(told.min()) >= UNKNOWN, task
        assert int(told.max()) < number, task
        assert len(told.unique()) > number / 2, task


def test_answers_agree_with_each_other():
    rendered = drawn(count=300)
    number, present = answers_of(rendered, "count"), rendered.present.sum(1)
    family, surface = answers_of(rendered, "object"), answers_of(rendered, "surface")
    assert (present <= number).all()  # two of one class count as two
    assert ((present == 0) == (number == 0)).all()
    assert ((family == 0) == (number == 0)).all()
    assert ((surface == -1) == (number == 0)).all()


@pytest.mark.parametrize("family", ["contours", "limbs", "glyphs", "fractals"])
def test_only_objects_of_the_families_asked_for_are_drawn(family):
    import shapes

    rendered = drawn(count=64, objects=(family,))
    first = shapes.first_class(family)
    inside = rendered.present[:, first : first + shapes.SIZES[family]]
    assert inside.sum() == rendered.present.sum() > 20
    own = shapes.FAMILIES.index(family) + 1
    assert set(answers_of(rendered, "object").tolist()) == {0, own}


def test_only_grounds_of_the_families_asked_for_are_drawn():
    import textures

    told = answers_of(drawn(count=64, grounds=("stripes", "cells")), "ground")
    wanted = {textures.FAMILIES.index("stripes"), textures.FAMILIES.index("cells"), -1}
    assert set(told.tolist()) <= wanted
    assert len(set(told.tolist()) - {-1}) == 2


def test_every_texture_fills_the_range():
    import textures
    from drawing import Draw

    for name in textures.FAMILIES:
        values = textures.textures(Draw.seeded(0), 16, 48, (name,)).values
        assert values.isfinite().all(), name
        assert values.amin() == 0, name
        assert values.amax() == pytest.approx(1, abs=1e-5), name


@pytest.mark.parametrize("form", ["polygon", "star", "rose", "gear"])
@pytest.mark.parametrize("corners", [4, 6, 8])
def test_a_contour_has_as_many_corners_as_its_class_says(form, corners):
    import shapes
    from drawing import Draw

    if (form, corners) not in shapes.CONTOURS:
        pytest.skip(f"there is no {form} of {corners}")
    theta = torch.arange(shapes.ANGLES) * (2 * torch.pi / shapes.ANGLES)
    radius = shapes._radius(Draw.seeded(0), form, corners, theta, 1)[0]
    spectrum = torch.fft.rfft(radius).abs()[1:20]
    assert int(spectrum.argmax()) + 1 == corners


def test_fractals_of_one_class_are_more_alike_than_those_of_two():
    import shapes
    from drawing import Draw, grid

    x, y = (each.expand(32, 48, 48).clone() for each in grid(48, torch.device("cpu")))
    kinds = torch.arange(8).repeat_interleave(4)
    flat = shapes.heights(Draw.seeded(0), "fractals", kinds, x, y).flatten(1)
    alike = torch.corrcoef(flat)
    same = (kinds[:, None] == kinds) & ~torch.eye(32, dtype=torch.bool)
    other = kinds[:, None] != kinds
    assert alike[same].mean() > alike[other].mean() + 0.15


@pytest.mark.parametrize(
    ("colour", "named"),
    [((1.0, 0.0, 0.0), 0), ((0.0, 1.0, 0.0), 2), ((0.0, 0.0, 1.0), 5), ((0.1, 0.1, 0.1), 8)],
)
def test_colours_are_named_by_their_hue_and_greys_by_their_light(colour, named):
    from rendering import _colour_of

    image = torch.tensor(colour).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    assert _colour_of(image, torch.ones(1, 8, 8)).tolist() == [named]


def test_an_object_is_told_only_where_enough_of_it_is_seen():
    from rendering import _Scene, _told
    from textures import Textures

    owner = torch.full((1, 10, 10), -1)
    owner[0, :4], owner[0, 9, 9] = 0, 1  # forty pixels of the first, one of the second
    scene = _Scene(torch.rand(1, 3, 10, 10), owner)
    scene.kinds = [torch.tensor([3]), torch.tensor([50]), torch.tensor([-1])]
    scene.areas = [torch.tensor([60.0]), torch.tensor([60.0]), torch.tensor([0.0])]
    scene.surfaces = [torch.tensor([2]), torch.tensor([4]), torch.tensor([-1])]
    ground = Textures(torch.rand(1, 10, 10), torch.tensor([7]), torch.tensor([1]))
    answers, present = _told(scene, ground)
    assert present.nonzero()[:, 1].tolist() == [3]
    assert answers[0, :5].tolist() == [7, 1, 2, 1, 1]


def test_an_image_is_used_as_often_as_was_asked():
    from drawing import Draw
    from pool import CHUNK, Pool

    pool = Pool(Draw.seeded(0), CHUNK, 32, uses=4.0)
    before = pool.images.clone()
    for _ in range(4 * CHUNK // 32):
        pool.batch(32)
    assert pool.rendered == 2 * CHUNK
    assert not torch.equal(before, pool.images)


def test_images_that_stay_are_never_replaced():
    from drawing import Draw
    from pool import Pool

    pool = Pool(Draw.seeded(0), 64, 32, uses=0.0)
    before = pool.images.clone()
    for _ in range(20):
        pool.batch(32)
    assert pool.rendered == 64
    assert torch.equal(before, pool.images)


def test_views_of_an_image_lie_half_a_batch_apart_and_differ():
    from drawing import Draw
    from pool import Pool

    batch = Pool(Draw.seeded(0), 64, 32, uses=0.0).batch(8, views=2)
    assert torch.equal(batch.present[:8], batch.present[8:])
    assert not torch.equal(batch.images[:8], batch.images[8:])


def options(out, **changed):
    given = {
        "out": out,
        "minutes": 60.0,
        "views": 640,
        "sizes": [(32, 1.0)],
        "batch": 32,
        "lr": 3e-3,
        "decay": 0.01,
        "contrast": 0.0,
        "pool": 64,
        "uses": 6.0,
        "distinct": 64,
        "objects": (),
        "grounds": (),
        "seed": 0,
        "device": "cpu",
        "bf16": False,
    }
    return Namespace(**(given | changed))


@pytest.mark.parametrize("contrast", [0.0, 0.5])
def test_it_learns_what_it_is_shown(tmp_path, monkeypatch, contrast):
    import train

    monkeypatch.setattr(train, "EVERY", 0.0)
    train.Run(options(tmp_path, views=32 * 60, contrast=contrast)).train()
    lines = [json.loads(line) for line in (tmp_path / train.LOG).read_text().splitlines()]
    assert len(lines) == 60
    assert ("contrast" in lines[0]["losses"]) == bool(contrast)
    totals = [sum(line["losses"].values()) for line in lines]
    assert sum(totals[-10:]) < 0.9 * sum(totals[:10])
    assert lines[-1]["views"] == 32 * 60
    page = train.report(tmp_path)
    assert page.count("\n") == 3 + train.ROWS
    assert "1,920 views of 64 images" in page
    assert lines[-1]["rate"] < 0.1 < max(line["rate"] for line in lines)


def test_its_weights_are_those_of_the_embedded_backbone(tmp_path, monkeypatch):
    import train

    run = train.Run(options(tmp_path))
    run.train()
    file = tmp_path / train.WEIGHTS
    assert file.stat().st_size < 5_000_000
    assert {value.dtype for value in load_file(file).values()} <= {torch.float16, torch.int64}
    monkeypatch.setattr(mini, "FILE", file)
    loaded = mini.autoft_mini().module.state_dict()
    for name, value in run.average.backbone.state_dict().items():
        assert torch.allclose(loaded[name].float(), value.float(), atol=1e-3, rtol=1e-3), name
    told = json.loads((tmp_path / train.RUN).read_text())
    assert told["seen"]["views"] == 640
    assert told["versions"]["torch"] == torch.__version__


def test_it_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    import train

    monkeypatch.setattr(train, "EVERY", 0.0)
    steps = []
    step = train.Run._step

    def killed(run, loss):
        if len(steps) == 7:
            raise KeyboardInterrupt
        steps.append(loss)
        step(run, loss)

    monkeypatch.setattr(train.Run, "_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train.Run(options(tmp_path)).train()
    monkeypatch.setattr(train.Run, "_step", step)
    run, fresh = train.Run(options(tmp_path)), train.Run(options(tmp_path))
    run.load()
    state = torch.load(tmp_path / train.STATE, weights_only=True)
    for part in ("model", "average"):
        held = getattr(run, part).state_dict()
        assert all(torch.equal(held[name], value) for name, value in state[part].items()), part
        begun = getattr(fresh, part).state_dict()
        assert not torch.equal(begun["objects.weight"], held["objects.weight"]), part
    moments = run.optimiser.state_dict()["state"]
    assert moments[0]["step"] == 7
    assert run.seen["views"] == 7 * 32
    assert run.seen["resumed"] == 1
    again = train.Run(options(tmp_path))
    again.train()
    assert again.seen["views"] == 640
    assert again.seen["resumed"] == 1
    assert (tmp_path / train.WEIGHTS).is_file()


def test_a_finished_training_is_not_counted_as_interrupted(tmp_path):
    import train

    train.Run(options(tmp_path)).train()
    train.Run(options(tmp_path)).train()
    assert json.loads((tmp_path / train.RUN).read_text())["seen"]["resumed"] == 0


def test_another_training_is_not_gone_on_with(tmp_path):
    import train

    train.Run(options(tmp_path)).train()
    with pytest.raises(SystemExit, match="other values of seed"):
        train.Run(options(tmp_path, seed=1)).train()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--objects", "contuors"), "there is no contuors; expected contours"),
        (("--grounds", "plain"), "there is no plain; expected noise"),
        (("--sizes", "48:0.5,64:0.2"), "do not add up to 1"),
        ((), "--out DIR is needed"),
    ],
)
def test_what_means_nothing_is_refused(words, told, monkeypatch, capsys):
    import train

    monkeypatch.setattr("sys.argv", ["train.py", *words])
    with pytest.raises(SystemExit):
        train.main()
    assert told in capsys.readouterr().err


def test_the_rate_rises_then_falls():
    import train

    rates = [train.rate_at(step / 100) for step in range(101)]
    top = rates.index(max(rates))
    assert 0 < top <= 4
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] == pytest.approx(train.LAST_RATE)


def test_pairs_that_are_alike_have_less_contrast_than_others():
    from questions import info_nce

    torch.manual_seed(0)
    one, noise = torch.randn(16, 8), 0.05 * torch.randn(16, 8)
    paired = info_nce(torch.cat([one, one + noise]))
    assert paired < 0.3 * info_nce(torch.cat([one, torch.randn(16, 8)]))


def test_weights_that_diverged_are_not_written(tmp_path):
    import train

    run = train.Run(options(tmp_path))
    nn.init.constant_(run.average.backbone.stem.conv.weight, float("nan"))
    with pytest.raises(SystemExit, match="half precision"):
        run.finish()
    assert not (tmp_path / train.WEIGHTS).exists()


def test_its_command_draws_a_picture(tmp_path):
    import train

    path = tmp_path / "samples.png"
    train.picture(path, seed=0)
    assert path.stat().st_size > 10_000
