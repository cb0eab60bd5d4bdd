"""Training on a mesh is training: the loss curve of one device, on another mesh after every interruption
too."""

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_train import experiment

from seqlab import merge, split
from seqlab.models import GatedLinearAttention, LanguageModel
from seqlab.parallel.sharding import MeshSizes, make_mesh
from seqlab.train import config, loop
from seqlab.train.loop import run
from seqlab.train.step import cross_entropy

pytestmark = pytest.mark.filterwarnings("default")  # grain and orbax warn as they please

ROOT = pathlib.Path(__file__).resolve().parent.parent
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
    first, second, third = (
        MeshSizes(data=2, fsdp=2, sequence=2),
        MeshSizes(sequence=8, layout="zigzag"),
        MeshSizes(tensor=2, sequence=3),
    )
    for at, mesh in ((3, first), (6, second), (None, third)):
        if at is not None:
            interrupted(monkeypatch, at)
        result = run(experiment(**STEPS, mesh=mesh), tmp_path / "many")
        monkeypatch.undo()
        assert result.step == (at or 9)
        weight = result.state.params["backbone.blocks.0.mixer.qkv.weight"]
        assert dict(weight.sharding.mesh.shape) == {
            name: getattr(mesh, name) for name in ("data", "fsdp", "tensor", "sequence")
        }
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
    step = tmp_path / "checkpoints" / "1"  # a folder without a checkpoint belongs to nobody
    step.mkdir(parents=True)
    (step / "commit_success.txt").touch()
    with pytest.raises(config.ConfigError, match="steps"):
        config.prepare(config.override(cfg, "steps=7"), tmp_path)
    assert dict(config.build(cfg).mesh.make().shape) == {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 8}
    with pytest.raises(config.ConfigError, match=r"mesh.*sequence must be positive"):
        config.build(config.override(cfg, "mesh.sequence=0"))
    with pytest.raises(ValueError, match=r"needs 16 devices, and there are 8 .*device_count=16"):
        MeshSizes(data=2, sequence=8).make()
    assert MeshSizes().make() is None and MeshSizes(data=-1).make().size == jax.device_count()


@pytest.mark.parametrize("time, devices", [(24, 1), (22, 4)])
def test_logits_in_parts_are_the_logits(time, devices):
    """Loss and gradients do not depend on how many logits there are at a time; only those of a part are ever
    there."""
    rng = np.random.default_rng(0)
    x, weight = helpers.random(1, 3, time, 8), helpers.random(2, 8, 50)
    targets, valid = jnp.asarray(rng.integers(0, 50, (3, time))), jnp.asarray(rng.random((3, time)) < 0.8)

    def loss(x, weight, most):
        return cross_entropy(lambda x: x @ weight, x, targets, valid, most)[0]

    run = jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=2)
    expected = run(x, weight, 10**6)
    with (
        jax.set_mesh(make_mesh(data=1, sequence=devices, devices=jax.devices()[:devices]))
        if devices > 1
        else contextlib.nullcontext()
    ):
        helpers.assert_close(run(x, weight, 3 * 50 * 4), expected, 1e-5)
        text = run.lower(x, weight, 3 * 50 * 4).as_text()
    assert not re.search(rf"tensor<3x{time}x50xf32>", text) and re.search(
        rf"tensor<3x{devices}x[34]x50xf32>", text
    )


def test_what_is_computed_again_is_what_remat_says():
    """The gradient is the same; products are done again under "block" alone, and activations are kept under
    "none" alone."""
    tokens = jnp.arange(512).reshape(2, 256) % 16
    grads, products, kept = {}, {}, {}
    for remat in ("none", "dots", "block"):
        static, params = split(
            LanguageModel(16, 8, 1, GatedLinearAttention, channel_mixer=None, remat=remat, rngs=nnx.Rngs(0))
        )

        def loss(params, static=static):
            return jnp.square(merge(static, params)(tokens)[0]).sum()

        def streamed(params, static=static):
            net = merge(static, params)
            return jnp.square(net(tokens, net.init_state(2))[0]).sum()

        gradient = jax.jit(jax.grad(loss))
        grads[remat], products[remat] = (
            gradient(params),
            str(gradient.trace(params).jaxpr).count("dot_general"),
        )
        kept[remat] = sum(
            leaf.size
            for leaf in jax.tree.leaves(
                jax.eval_shape(lambda params, loss=loss: jax.vjp(loss, params)[1], params)
            )
        )
        kept[remat, "streamed"] = sum(
            leaf.size
            for leaf in jax.tree.leaves(
                jax.eval_shape(lambda params, loss=streamed: jax.vjp(loss, params)[1], params)
            )
        )
    helpers.assert_close(grads["dots"], grads["none"], 1e-5)
    helpers.assert_close(grads["block"], grads["none"], 1e-5)
    assert products["none"] <= products["dots"] < products["block"], products
    assert kept["none"] > kept["dots"] > kept["block"], kept
    assert kept["none", "streamed"] > kept["dots", "streamed"] > kept["block", "streamed"], kept


def command(folder, *settings, process=None):
    """`seqlab train` on two virtual devices; as one of several processes: the port where they meet, their
    number, its own."""
    together = [] if process is None else ["--distributed", "127.0.0.1:{},{},{}".format(*process)]
    sizes = ["steps=60", "log_every=5", "checkpoint_every=10", "validate_every=60", *settings]
    line = [
        sys.executable,
        "-m",
        "seqlab",
        "train",
        "demo",
        "--fiddler",
        "tiny",
        "--workdir",
        str(folder),
        *together,
        "--set",
        *sizes,
    ]
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True)


def together(folder, count, *settings):
    """The processes of one run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        command(folder, f"mesh.data={count}", "mesh.sequence=2", *settings, process=(port, count, i))
        for i in range(count)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_processes_are_one_run_and_the_loss_of_one_is_made_good_by_the_others(count, tmp_path):
    alone = command(tmp_path / "one")
    assert alone.wait() == 0, alone.stderr.read()

    first, *others = together(tmp_path / "many", count)
    metrics = tmp_path / "many" / "metrics.jsonl"
    while first.poll() is None and (not metrics.exists() or len(metrics.read_text().splitlines()) < 6):
        time.sleep(0.1)
    others[-1].kill()
    said = [process.communicate(timeout=200)[1] for process in (first, *others)]
    assert first.returncode == 4 and f"process 0 of {count} has lost another one" in said[0], said[0]
    assert all(process.returncode == 4 for process in others[:-1]), said
    assert re.search(r"the last checkpoint is step [1234]0; the same command goes on", said[0])

    rest = (
        together(tmp_path / "many", count // 2)
        if count > 2
        else [command(tmp_path / "many", "mesh.sequence=2")]
    )
    said = [process.communicate()[1] for process in rest]
    assert not any(process.returncode for process in rest) and re.search(
        r"resuming at step [1234]0", said[0]
    ), said
    one, many = losses(tmp_path / "one"), losses(tmp_path / "many")
    assert one.keys() == many.keys()
    np.testing.assert_allclose(list(many.values()), list(one.values()), rtol=1e-4)
