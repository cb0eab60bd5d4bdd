"""Training on a mesh is training: the loss curve of one device, on another mesh after every interruption too."""

import json
import os
import signal

import jax
import numpy as np
import pytest
from test_train import experiment

from seqlab.sharding import MeshSizes
from seqlab.train import config, loop
from seqlab.train.loop import run

pytestmark = pytest.mark.filterwarnings("default")  # grain and orbax warn as they please

STEPS = {"steps": 9, "log_every": 1, "checkpoint_every": 9, "validate_every": 9}


def losses(folder):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def interrupted(monkeypatch, at):
    """SIGTERM between the steps `at` and `at` + 1."""
    original = loop.Progress.advance

    def advance(self, step):
        original(self, step)
        if step == at:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop.Progress, "advance", advance)


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(tmp_path, monkeypatch):
    whole = run(experiment(**STEPS), tmp_path / "one")
    first, second, third = MeshSizes(data=2, fsdp=2, sequence=2), MeshSizes(sequence=8, layout="zigzag"), MeshSizes(tensor=2, sequence=3)
    for at, mesh in ((3, first), (6, second), (None, third)):
        if at is not None:
            interrupted(monkeypatch, at)
        result = run(experiment(**STEPS, mesh=mesh), tmp_path / "many")
        monkeypatch.undo()
        assert result.step == (at or 9)
        weight = result.state.params["backbone.blocks.0.mixer.qkv.weight"]
        assert dict(weight.sharding.mesh.shape) == {name: getattr(mesh, name) for name in ("data", "fsdp", "tensor", "sequence")}
        assert weight.addressable_shards[0].data.size * mesh.fsdp * mesh.tensor == weight.size
    one, many = losses(tmp_path / "one"), losses(tmp_path / "many")
    assert one.keys() == many.keys() == set(range(1, 10))
    np.testing.assert_allclose([many[step] for step in one], list(one.values()), rtol=1e-5)
    assert abs(result.validation - whole.validation) < 1e-5 * whole.validation


def test_a_mesh_is_one_line_of_config(tmp_path):
    cfg = config.fiddle(config.load("demo"), "tiny")
    config.prepare(cfg, tmp_path)
    cfg = config.override(cfg, "mesh.sequence=8")
    config.prepare(cfg, tmp_path)  # the same run on other devices
    with pytest.raises(config.ConfigError, match="steps"):
        config.prepare(config.override(cfg, "steps=7"), tmp_path)
    assert dict(config.build(cfg).mesh.make().shape) == {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 8}
    with pytest.raises(config.ConfigError, match=r"mesh.*sequence must be positive"):
        config.build(config.override(cfg, "mesh.sequence=0"))
    with pytest.raises(ValueError, match=r"needs 16 devices, and there are 8 .*device_count=16"):
        MeshSizes(data=2, sequence=8).make()
    assert MeshSizes().make() is None and MeshSizes(data=-1).make().size == jax.device_count()
