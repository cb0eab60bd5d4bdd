"""Pictures in folders: all are found and read as they are, what cannot be read is named, labels fit the
model."""

import types

import numpy as np
import pytest
from PIL import Image

from seqlab.studies.compare import _fiddler
from seqlab.studies.show import views
from seqlab.train import config
from seqlab.train.images import FolderImages
from seqlab.train.loop import _fingerprint, check_labels


def folder(path, classes, suffixes=(".png",), count=10):
    for name in classes:
        (path / name).mkdir()
        for n in range(count):
            picture = Image.fromarray(np.full((8, 8, 3), 20 * n, np.uint8))
            picture.save(path / name / f"{n}{suffixes[n % len(suffixes)]}")
    return FolderImages(path=str(path), size=(8, 8))


def test_pictures_are_found_in_letters_of_either_case(tmp_path):
    data = folder(tmp_path, "ab", (".JPG", ".jpeg", ".Png"))
    assert len(data.train(0)) + len(data.validation()) == 20


def test_a_broken_picture_is_named(tmp_path):
    data = folder(tmp_path, "ab")
    broken = data.train(0)._read.files[3]
    with open(broken, "r+b") as file:
        file.truncate(40)
    with pytest.raises(OSError, match=f"{broken} cannot be read as a picture"):
        data.train(0)[3]


def test_sixteen_bits_keep_their_scale(tmp_path):
    (tmp_path / "a").mkdir()
    for n in range(4):
        grey = np.full((8, 8), n * 257 * 50, np.uint16)
        Image.fromarray(grey).save(tmp_path / "a" / f"{n}.png")
    data = FolderImages(path=str(tmp_path), size=(8, 8), channels=1)
    items = [split[i]["inputs"] for split in (data.train(0), data.validation()) for i in range(len(split))]
    np.testing.assert_allclose(sorted(float(x.mean()) for x in items), np.arange(4) * 50 / 255, atol=1e-3)


def test_labels_beyond_the_outputs_are_refused(tmp_path):
    data = folder(tmp_path, [f"{n:02}" for n in range(12)], count=2)
    data = FolderImages(path=data.path, size=(8, 8), channels=1)
    experiment = config.build(config.load("digits_poolformer"))
    with pytest.raises(
        ValueError, match=r"model.outputs: got 10, but the data has the label 11 \(12 classes\)"
    ):
        check_labels(experiment, data.train(0))


def test_a_run_knows_its_held_out_data():
    train, held_out = types.SimpleNamespace(fingerprint="a"), types.SimpleNamespace(fingerprint="b")
    assert _fingerprint(train, held_out) == "a.b"
    assert _fingerprint(train, object()) == "a" and _fingerprint(object(), held_out) is None


def test_few_pictures_are_each_drawn_once():
    pictures = [{"inputs": np.full((2, 2, 1), n, np.float32), "targets": np.int32(0)} for n in range(4)]
    experiment = types.SimpleNamespace(data=types.SimpleNamespace(validation=lambda: pictures))

    class Model:
        def __call__(self, x):
            return x.mean((1, 2))

        def features(self, x):
            return [x]

    seen = views(Model(), experiment, count=6).inputs
    assert seen[:, 0, 0, 0].tolist() == [0, 1, 2, 3]


def test_a_mixer_of_ones_own_is_compared_by_its_name():
    assert _fiddler("mine:Mine(heads=2)") == "mixer('mine:Mine', heads=2)"
    assert _fiddler("mine:Mine") == "mixer('mine:Mine')" and _fiddler("mamba") == "mixer(mamba)"
