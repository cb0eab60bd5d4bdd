"""BatchNorm: the numbers of the definition, an affine map in evaluation, and statistics that a training step
measures but never learns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import assert_close, assert_identical, random

from seqlab import merge, split
from seqlab.models import Backbone, BatchNorm, Linear
from seqlab.module import Module, statistics_of
from seqlab.train.optim import adamw
from seqlab.train.step import init_state, train_step


def test_training_takes_the_moments_of_the_valid_steps_and_moves_the_running_ones():
    x = np.random.default_rng(0).normal(2.0, 3.0, size=(3, 7, 4)).astype(np.float32)
    valid = np.random.default_rng(1).random((3, 7)) < 0.6
    norm = BatchNorm(4)
    norm.weight[...], norm.bias[...] = random(2, 4), random(3, 4)
    norm.running_mean[...], norm.running_var[...] = random(4, 4), jnp.exp(random(5, 4))
    before = {name: np.asarray(leaf, np.float64) for name, leaf in split(norm)[1].items()}
    norm.train()
    y = norm(jnp.where(valid[..., None], x, jnp.nan), jnp.asarray(valid))
    seen = x[valid].astype(np.float64)
    mean, var = seen.mean(0), seen.var(0)
    assert_close(
        np.asarray(y)[valid], (seen - mean) / np.sqrt(var + 1e-5) * before["weight"] + before["bias"], 2e-6
    )
    assert_close(norm.running_mean[...], 0.9 * before["running_mean"] + 0.1 * mean, 2e-6)
    assert_close(norm.running_var[...], 0.9 * before["running_var"] + 0.1 * seen.var(0, ddof=1), 2e-6)
    after = split(norm)[1]
    norm(jnp.full((3, 7, 4), jnp.nan), jnp.zeros((3, 7), bool))
    assert_identical(split(norm)[1], after, "a batch without a valid step")
    norm.eval()
    expected = (x - after["running_mean"]) / np.sqrt(after["running_var"] + 1e-5) * before["weight"] + before[
        "bias"
    ]
    assert_close(norm(x), expected, 2e-6)
    assert_identical(split(norm)[1], after, "evaluation moves nothing")


class Mixing(Module):
    """A linear map, with a norm behind it or without."""

    causal, lookahead, exact = True, 0, True

    def __init__(self, dim, *, normed=True, rngs):
        self.linear, self.norm = Linear(dim, dim, rngs=rngs), BatchNorm(dim) if normed else None

    def init_state(self, batch, dtype=jnp.float32):
        return ()

    def __call__(self, x, state=None, reset=None, valid=None):
        y = self.linear(x)
        return (y if self.norm is None else self.norm(y, valid)), state


def model(**options):
    return Backbone(6, 2, Mixing, channel_mixer=Mixing, rngs=nnx.Rngs(0), **options)


def loss(model, batch):
    y, _ = model(batch["x"], None, None, batch["valid"])
    errors = jnp.square(y - batch["y"]) * batch["valid"][..., None]
    return errors.sum(), batch["valid"].sum().astype(jnp.float32)


def batch(seed=0, rows=4):
    rng = np.random.default_rng(seed)
    x, y = (rng.normal(1.0, size=(rows, 9, 6)).astype(np.float32) for _ in range(2))
    return {"x": x, "y": y, "valid": np.arange(9)[None] < rng.integers(3, 9, (rows, 1))}


def stepped(model, batches, accumulate=1, loss=loss, optimizer=None):
    static, params = split(model)
    optimizer = optimizer or adamw(10, peak=1e-2, warmup=0)
    step = jax.jit(functools.partial(train_step, static, optimizer, loss, accumulate))
    states = [init_state(static, params, optimizer)]
    for data in batches:
        states.append(step(states[-1], data)[0])
    return states


def test_statistics_get_no_gradient_no_update_and_no_decay():
    """With a learning rate of zero and any decay they still move, by exactly their own rule; the optimizer
    does not know them."""
    static, params = split(model())
    names = statistics_of(static)
    assert {name.rsplit(".", 1)[1] for name in names} == {"running_mean", "running_var"} and len(names) == 8
    first, second = stepped(
        model(), [batch()], optimizer=optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.0))
    )
    assert_identical(
        {k: v for k, v in second.params.items() if k not in names},
        {k: v for k, v in params.items() if k not in names},
    )
    trained = model()
    trained.train()
    loss(trained, batch())
    assert_close({k: second.params[k] for k in names}, {k: split(trained)[1][k] for k in names}, 1e-6)
    for name in names:
        assert not np.array_equal(second.params[name], first.params[name]), name
    adam = jax.tree_util.tree_leaves_with_path(stepped(model(), [])[0].optimizer)
    assert not any("running" in jax.tree_util.keystr(path) for path, _ in adam)


@pytest.mark.parametrize(
    "options", [{"remat": "block"}, {"scan_layers": True}, {"scan_layers": True, "remat": "block"}], ids=str
)
def test_recomputed_and_scanned_layers_measure_the_same(options):
    plain, other = (
        stepped(model(), [batch(0), batch(1)])[-1].params,
        stepped(model(**options), [batch(0), batch(1)])[-1].params,
    )
    if "scan_layers" in options:
        joined = {
            name: jnp.stack([plain[name], plain[name.replace("blocks.0", "blocks.1")]])
            for name in plain
            if "blocks.0" in name
        }
        plain = joined | {"norm.weight": plain["norm.weight"]}
    assert_close(other, plain, 1e-5)


def test_as_the_norm_of_a_backbone_it_measures_valid_steps_alone():
    def measured(rows, valid):
        stack = Backbone(
            6,
            1,
            functools.partial(Mixing, normed=False),
            channel_mixer=None,
            norm=BatchNorm,
            rngs=nnx.Rngs(0),
        )
        stack.train()
        stack(rows, None, None, valid)
        return split(stack)[1]

    data = batch()
    alone = data["x"][data["valid"]][None]  # rows are independent here: all valid steps may stand in one
    padded = np.where(data["valid"][..., None], data["x"], np.nan)
    assert_close(measured(padded, jnp.asarray(data["valid"])), measured(alone, None), 1e-5)


def test_parts_of_a_batch_are_measured_one_after_another():
    whole, parts = (stepped(model(), [batch()], accumulate)[-1].params for accumulate in (1, 2))
    halves = [{name: leaf[half] for name, leaf in batch().items()} for half in (slice(0, 2), slice(2, 4))]
    measured = model()
    measured.train()
    for half in halves:
        loss(measured, half)
    names = statistics_of(split(measured)[0])
    assert_close({k: parts[k] for k in names}, {k: split(measured)[1][k] for k in names}, 1e-6)
    assert any(not np.allclose(parts[k], whole[k], rtol=1e-3) for k in names)


def test_a_batch_that_is_not_finite_leaves_the_statistics():
    bad = batch()
    bad["y"][0, 0] = np.nan
    before, after = stepped(model(), [bad])
    assert_identical(after, before)


def test_an_evaluated_model_has_the_statistics_of_training():
    """Trained at a learning rate of zero on one batch again and again, evaluation becomes the function that
    was trained."""
    static, _ = split(model())
    data = batch() | {"valid": np.ones((4, 9), bool)}
    final = stepped(model(), [data] * 80, optimizer=optax.sgd(0.0))[-1].params
    trained = merge(static, final)
    trained.train()
    expected, _ = trained(data["x"])
    count = 4 * 9  # evaluation divides by the unbiased variance
    assert_close(merge(static, final)(data["x"])[0], expected, 3 / count)


def test_a_model_without_statistics_is_stepped_as_it_always_was():
    """The very same program: nothing is added for models that measure nothing."""
    static, params = split(
        Backbone(6, 2, functools.partial(Mixing, normed=False), channel_mixer=None, rngs=nnx.Rngs(0))
    )
    assert not statistics_of(static)
    optimizer = adamw(10, peak=1e-2, warmup=0)
    state = init_state(static, params, optimizer)
    assert_identical(state.optimizer, optimizer.init(params))

    def plain(state, data):
        (_, count), grads = jax.value_and_grad(lambda p: loss(merge(static, p), data), has_aux=True)(
            state.params
        )
        grads = jax.tree.map(lambda leaf: leaf / jnp.maximum(count, 1.0), grads)
        updates, _ = optimizer.update(grads, state.optimizer, state.params)
        return optax.apply_updates(state.params, updates)

    new, _ = jax.jit(functools.partial(train_step, static, optimizer, loss, 1))(state, batch())
    assert_close(new.params, jax.jit(plain)(state, batch()), 1e-7)
