"""Training on images: what changes pictures, where they come from, what they are judged by, the average of
the parameters."""

import functools
import io
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_close, assert_identical, random

from seqlab import split
from seqlab.models import Linear
from seqlab.studies.show import Views, _answers, _colours, captions, show
from seqlab.train.augment import GEOMETRIC, OPERATIONS, Augment, warp
from seqlab.train.data import Batches, validation_batches
from seqlab.train.images import DigitImages, DigitScenes, FolderImages, TfdsImages, in_memory, scaled
from seqlab.train.optim import adamw, average_of, parameter_average
from seqlab.train.step import init_state, train_step
from seqlab.train.vision import class_loss, mean_iou, picture_loss, psnr, top1

partial = functools.partial


def picture(seed=0, shape=(6, 5, 3)):
    return np.random.default_rng(seed).random(shape).astype(np.float32)


def test_warping_moves_whole_places_exactly_and_parts_of_them_linearly():
    x = picture()
    down = warp(x, np.eye(2), (2.0, -1.0))
    expected = np.zeros_like(x)
    expected[:4, 1:] = x[2:, :-1]
    assert_close(down, expected, 1e-6)
    assert_close(warp(x, np.eye(2), (0.0, 0.25))[:, :-1], 0.75 * x[:, :-1] + 0.25 * x[:, 1:], 1e-6)
    square = picture(1, (5, 5, 2))
    assert_close(warp(square, np.array([[0.0, -1.0], [1.0, 0.0]])), np.rot90(square, -1, axes=(0, 1)), 1e-6)


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_changes_nothing_at_magnitude_zero_and_stays_in_range(name):
    x = picture()
    if name not in ("autocontrast", "equalize"):  # have none
        assert_close(OPERATIONS[name](x, 0.0), x, 4e-3 if name == "posterize" else 1e-6)
    for m in (-1.0, 0.6, 1.0):
        y = OPERATIONS[name](x, m)
        assert y.shape == x.shape
        assert y.min() >= -1e-6
        assert y.max() <= 1 + 1e-6
        assert (name == "identity") == np.array_equal(y, x)


def test_values_of_some_operations():
    x = np.array([[[0.2], [0.6]], [[0.4], [0.9]]], np.float32)
    assert_close(OPERATIONS["solarize"](x, -0.5)[..., 0], np.array([[0.2, 0.4], [0.4, 0.1]]), 1e-6)
    assert_close(OPERATIONS["brightness"](x, -0.5), x * 0.55, 1e-6)
    assert_close(OPERATIONS["autocontrast"](x, 1.0)[..., 0], np.array([[0, 4 / 7], [2 / 7, 1]]), 1e-6)
    assert_close(OPERATIONS["equalize"](x, 1.0)[..., 0], np.array([[0, 2 / 3], [1 / 3, 1]]), 1e-6)
    assert_close(OPERATIONS["contrast"](x, 0.5), np.clip(0.525 + (x - 0.525) * 1.45, 0, 1), 1e-6)


def test_mixup_and_cutmix_share_targets_as_pictures():
    one, other = (
        (np.zeros((8, 8, 1), np.float32), np.eye(3)[0]),
        (np.ones((8, 8, 1), np.float32), np.eye(3)[2]),
    )
    for change in (Augment(mixup=0.8), Augment(cutmix=1.0)):
        for seed in range(20):
            mixed, targets = change.pair(one, other, np.random.default_rng(seed))
            assert_close(targets, np.array([1 - mixed.mean(), 0, mixed.mean()]), 1e-6)
            assert set(np.unique(mixed)) <= {0.0, 1.0} or change.mixup
    both = [
        Augment(mixup=0.8, cutmix=1.0).pair(one, other, np.random.default_rng(seed))[0] for seed in range(40)
    ]
    pasted = sum(set(np.unique(x)) <= {0.0, 1.0} for x in both)
    assert 10 < pasted < 30


def test_a_row_of_a_run_is_changed_as_the_seed_and_its_number_say():
    images = np.random.default_rng(0).integers(0, 256, (10, 6, 6, 3), np.uint8)
    change = Augment(shift=2, flip=True, operations=2, erase=0.3, mixup=0.4, cutmix=1.0)
    items = in_memory(images, np.arange(10) % 4, classes=4, change=change)
    batches = Batches(items, 4, seed=3)
    first, later = batches[0], batches[7]
    assert first["inputs"].shape == (4, 6, 6, 3)
    assert first["targets"].shape == (4, 4)
    assert_close(first["targets"].sum(axis=1), np.ones(4), 1e-6)
    assert_identical(Batches(items, 4, seed=3)[7], later, "again")
    assert not np.array_equal(Batches(items, 4, seed=4)[0]["inputs"], first["inputs"])
    halves = [Batches(items, 4, 3, index, 2)[7] for index in range(2)]
    joined = {
        name: np.stack([half[name] for half in halves], axis=1).reshape(later[name].shape) for name in later
    }
    assert_identical(joined, later, "two processes")
    stream = batches.iterate(6)
    next(stream)
    assert_identical(next(stream), later, "resumed")
    plain = in_memory(images, np.arange(10), classes=10)
    assert_identical(plain[3]["inputs"], images[3].astype(np.float32) / 255)
    epochs = [Batches(items, 5, seed=0)[step]["inputs"] for step in (0, 2)]
    assert not np.array_equal(*epochs), "another epoch draws anew"


def test_augmentation_is_refused_where_targets_would_no_longer_agree():
    with pytest.raises(ValueError, match="targets are maps"):
        in_memory(np.zeros((2, 4, 4, 1)), np.zeros((2, 4, 4), int), classes=2, change=Augment(flip=True))
    with pytest.raises(ValueError, match="erase must be"):
        Augment(erase=1.5)
    with pytest.raises(ValueError, match="did you mean 'rotate'"):
        Augment(names=("rotat",))
    assert set(GEOMETRIC) <= set(OPERATIONS)


def test_digits_are_held_out_alike_by_both_tasks():
    from seqlab.train.tasks import Digits

    train, held_out = DigitImages().train(0), DigitImages().validation()
    assert (len(train), len(held_out)) == (1437, 360)
    sequence = Digits().validation()[5]
    assert_identical(held_out[5]["inputs"].reshape(64, 1), sequence["inputs"])
    assert held_out[5]["targets"] == sequence["targets"][-1]
    assert train.fingerprint != held_out.fingerprint
    [batch] = validation_batches(held_out, 400)
    assert batch["valid"].sum() == 360
    assert batch["inputs"].shape == (400, 8, 8, 1)


def test_scenes_show_what_their_targets_say():
    data = DigitScenes(examples=30, held_out=5)
    scenes = data.train(1)
    for i in range(5):
        item = scenes[i]
        assert item["valid"].all()
        assert ((item["inputs"][..., 0] > 0.25) == (item["targets"] > 0)).all()
        assert item["targets"].max() <= 10
    assert_identical(data.train(1)[3], scenes[3])
    assert data.train(2).fingerprint != scenes.fingerprint
    assert_identical(
        data.validation()[0], DigitScenes(examples=10, held_out=2).validation()[0], "the same for every size"
    )
    small = DigitScenes(task="upscale", examples=3).train(1)[0]
    assert small["inputs"].shape == (12, 12, 1)
    assert_close(small["inputs"], small["targets"].reshape(12, 2, 12, 2, 1).mean(axis=(1, 3)), 1e-6)
    with pytest.raises(ValueError, match="size must be even"):
        DigitScenes(size=23)


def test_folders_of_pictures(tmp_path):
    from PIL import Image

    rng = np.random.default_rng(0)
    for name, level in (("cat", 40), ("dog", 200)):
        (tmp_path / name / "deep").mkdir(parents=True)
        for i in range(12):
            pixels = (level + rng.integers(-9, 9, (6 + i, 10, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / "deep" / f"{i}.png")
    (tmp_path / "cat" / "notes.txt").write_text("no picture")
    data = FolderImages(str(tmp_path), size=(4, 5), held_out=0.25)
    train, held_out = data.train(0), data.validation()
    assert data.classes == ("cat", "dog")
    assert len(train) + len(held_out) == 24
    assert len(held_out)
    for part in (train, held_out):
        for i in range(len(part)):
            item = part[i]
            assert item["inputs"].shape == (4, 5, 3)
            assert item["targets"] == (item["inputs"].mean() > 0.5)
    assert train.fingerprint == data.train(1).fingerprint
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "stray.png")
    with pytest.raises(ValueError, match=r"stray.png lies in no folder"):
        data.train(0)
    with pytest.raises(ValueError, match="channels 1 or 3"):
        FolderImages(str(tmp_path), channels=2)


def test_scaling_takes_the_middle():
    wide = np.zeros((4, 8, 3), np.uint8)
    wide[:, 2:6] = 255
    assert (scaled(wide, (2, 2), 3) == 255).all()
    assert scaled(wide[:, 1:7], (4, 6), 1)[0, :, 0].tolist() == [0, 255, 255, 255, 255, 0]


def test_pictures_of_tfds(tmp_path):
    import tensorflow_datasets as tfds
    from PIL import Image

    with tfds.core.registered.skip_registration():

        class ToyImages(tfds.core.GeneratorBasedBuilder):
            __module__ = "toy_images"
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                features = {
                    "image": tfds.features.Image(shape=(None, None, 1)),
                    "label": tfds.features.ClassLabel(num_classes=3),
                }
                return tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
                )

            def _split_generators(self, manager):
                return {"train": self._generate_examples(6), "test": self._generate_examples(2)}

            def _generate_examples(self, count):
                for i in range(count):
                    yield i, {"image": encoded(np.full((4 + i, 6), 50 * (i % 3), np.uint8)), "label": i % 3}

    def encoded(pixels):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        file.seek(0)
        return file

    tfds.disable_progress_bar()
    ToyImages(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    data = TfdsImages("toy_images", size=(4, 4), channels=1, data_dir=str(tmp_path))
    train = data.train(0)
    assert len(train) == 6
    assert len(data.validation()) == 2
    assert train.classes == 3
    for i in (0, 4):
        assert_close(train[i]["inputs"], np.full((4, 4, 1), 50 * (i % 3) / 255), 1e-6)
        assert train[i]["targets"] == i % 3
    with pytest.raises(ValueError, match="no feature 'picture'"):
        TfdsImages("toy_images", image="picture", data_dir=str(tmp_path)).train(0)
    with pytest.raises(ValueError, match="expected a picture and a class"):
        TfdsImages("toy_images", label="image", data_dir=str(tmp_path)).train(0)


def fixed(values):
    return lambda inputs: jnp.asarray(values)


def test_losses_and_metrics_by_hand():
    logits = np.array([[2.0, 0.0, 1.0], [0.0, 3.0, 0.0], [0.0, 0.0, 9.0]])
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    batch = {
        "inputs": np.zeros((3, 1, 1, 1)),
        "targets": np.array([0, 2, 0]),
        "valid": np.array([True, True, False]),
    }
    expected = -0.9 * (log_p[0, 0] + log_p[1, 2]) - 0.1 * log_p[:2].mean(axis=1).sum()
    assert_close(class_loss(fixed(logits), batch, smoothing=0.1), (expected, 2.0), 1e-6)
    shares = np.array([[0.25, 0.75, 0], [0, 0, 1.0], [0, 0, 0]])
    soft = -0.25 * log_p[0, 0] - 0.75 * log_p[0, 1] - log_p[1, 2]
    assert_close(class_loss(fixed(logits), batch | {"targets": shares}), (soft, 2.0), 1e-6)
    assert tuple(map(float, top1(fixed(logits), batch))) == (1.0, 2.0)

    said = np.eye(3)[np.array([[[0, 1], [1, 1]], [[2, 2], [2, 2]]])]
    places = {
        "inputs": np.zeros((2, 2, 2, 1)),
        "targets": np.array([[[0, 1], [0, 1]], [[2, 2], [2, 0]]]),
        "valid": np.ones((2, 2, 2), bool),
    }
    # the first image: class 0 one of two, class 1 two of three; the second: class 2 three of four, class 0
    # none of one
    assert_close(mean_iou(fixed(said), places), ((1 / 2 + 2 / 3) / 2 + (3 / 4 + 0) / 2, 2.0), 1e-6)
    assert tuple(map(float, top1(fixed(said), places))) == (6.0, 8.0)

    answer = np.full((2, 2, 2, 1), 0.5)
    pictures = {"inputs": answer, "targets": np.full((2, 2, 2, 1), 0.6), "valid": np.array([True, False])}
    assert_close(picture_loss(fixed(answer), pictures), (0.1, 1.0), 1e-5)
    assert_close(psnr(fixed(answer), pictures), (20.0, 1.0), 1e-5)


def test_the_average_of_the_parameters_is_what_its_rule_says_and_changes_no_step():
    static, params = split(Linear(3, 2, rngs=nnx.Rngs(0)))

    def loss(model, batch):
        return jnp.sum(jnp.square(model(batch["x"]) - 1.0)), jnp.float32(4)

    batch = {"x": random(1, 4, 3)}
    plain, averaged = adamw(10, peak=0.1, warmup=0), adamw(10, peak=0.1, warmup=0, average=0.3)
    states = {}
    for name, optimizer in (("plain", plain), ("averaged", averaged)):
        states[name] = [init_state(static, params, optimizer)]
        step = jax.jit(partial(train_step, static, optimizer, loss, 1))
        for _ in range(4):
            states[name].append(step(states[name][-1], batch)[0])
    assert average_of(states["plain"][-1].optimizer) == {}
    expected = np.asarray(params["weight"], np.float64)
    for n, (one, other) in enumerate(zip(states["plain"][1:], states["averaged"][1:], strict=True)):
        assert_identical(other.params, one.params)
        rate = 1 - min(0.3, (1 + n) / (10 + n))
        expected = expected + rate * (np.asarray(one.params["weight"]) - expected)
        assert_close(average_of(other.optimizer)["weight"], expected, 1e-6)
    with pytest.raises(ValueError, match="average"):
        parameter_average(1.0)
    bad = jax.jit(partial(train_step, static, averaged, loss, 1))(
        states["averaged"][-1], {"x": batch["x"] * jnp.nan}
    )[0]
    assert_identical(bad, states["averaged"][-1])


@pytest.mark.slow
def test_runs_are_judged_and_loaded_by_the_average(tmp_path, monkeypatch):
    """A run of the tiny WaveMix config, interrupted and resumed: the average, the statistics and the keys are
    those of one go."""
    from PIL import Image

    from seqlab.studies import runs
    from seqlab.train import config, loop

    cfg = config.fiddle(config.load("digits_wavemix"), "tiny")
    whole = loop.run(config.build(cfg), tmp_path / "whole")
    config.prepare(cfg, tmp_path / "parts")
    advance = loop.Progress.advance

    def stopped(self, step):
        advance(self, step)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop.Progress, "advance", stopped)
    assert loop.run(config.build(cfg), tmp_path / "parts").step == 1
    monkeypatch.undo()
    parts = loop.run(config.build(cfg), tmp_path / "parts")
    assert_identical(parts.state, whole.state)
    average = average_of(parts.state.optimizer)
    loaded = runs.load(tmp_path / "parts")
    params = split(loaded.model)[1]
    assert_identical({name: params[name] for name in average}, average)
    assert any(not np.array_equal(average[name], whole.state.params[name]) for name in average)
    assert runs.evaluate(loaded.model, config.build(cfg)).value == pytest.approx(parts.validation)
    drawn = show(tmp_path / "parts", count=3)
    assert drawn == tmp_path / "parts" / "show.png"
    assert Image.open(drawn).format == "PNG"


def test_what_is_drawn_of_a_model():
    maps = [random(0, 2, 4, 4, 6), random(1, 2, 2, 2, 2)]
    inputs = np.zeros((2, 4, 4, 1), np.float32)
    seen = Views(inputs, np.array([1, 0]), np.array([[0.0, np.log(3.0)], [0.0, 2.0]], np.float32), maps)
    assert captions(seen) == [("1 at 75%", True), ("1 at 88%, is 0", False)]
    for y in maps:
        colours = _colours(np.asarray(y))
        assert colours.shape == (*y.shape[:3], 3)
        assert colours.min() == 0.0
        assert colours.max() == 1.0
    # One direction: one colour has it all, in order.
    steps = np.arange(16.0).reshape(1, 4, 4, 1) * np.array([1.0, -2.0, 0.5])
    shades = _colours(steps)[0, :, :, 0].ravel()
    assert (np.diff(shades) >= 0).all() or (np.diff(shades) <= 0).all()
    places = Views(inputs, np.ones((2, 4, 4), int), np.zeros((2, 4, 4, 3), np.float32), maps)
    (_, said), (_, true) = _answers(places)
    assert not np.array_equal(said[0], true[0])
    assert said[0].shape == (4, 4, 3)
