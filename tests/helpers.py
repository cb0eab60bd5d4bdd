"""Shared helpers of tests: comparison relative to scale, random splits, chunked runs."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from seqlab.module import Module


def assert_close(actual, expected, tolerance, name="value"):
    """Every leaf of `actual` equals that of `expected` within `tolerance` times the largest magnitude of the
    expected leaf."""
    flat_actual, tree = jax.tree_util.tree_flatten_with_path(actual)
    flat_expected, expected_tree = jax.tree_util.tree_flatten_with_path(expected)
    assert tree == expected_tree, f"{name}: {tree} is not {expected_tree}"
    for (path, a), (_, e) in zip(flat_actual, flat_expected, strict=True):
        where = name + jax.tree_util.keystr(path)
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        assert a.shape == e.shape, f"{where}: shape {a.shape} is not {e.shape}"
        assert np.isfinite(a).all() == np.isfinite(e).all(), f"{where}: not finite"
        scale = max(np.abs(e).max(initial=0.0), 1e-6)
        error = np.abs(a - e).max(initial=0.0) / scale
        assert error <= tolerance, (
            f"{where}: relative error {error:.2e} > {tolerance:.0e} (scale {scale:.3g})"
        )


def assert_identical(actual, expected, name="value"):
    """Every leaf bit-identical."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected), name
    for path, e in jax.tree_util.tree_leaves_with_path(expected):
        a = dict(jax.tree_util.tree_leaves_with_path(actual))[path]
        assert a.dtype == e.dtype, f"{name}{jax.tree_util.keystr(path)}: {a.dtype} is not {e.dtype}"
        np.testing.assert_array_equal(
            np.asarray(a), np.asarray(e), err_msg=f"{name}{jax.tree_util.keystr(path)}"
        )


def random(seed, *shape, scale=1.0, dtype=jnp.float32):
    """A normal array that does not depend on the precision of the session."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * scale, dtype)


class _NoKeys(nnx.Rngs):
    def __init__(self):
        super().__init__(0)

    def params(self):
        return jnp.zeros((2,), jnp.uint32)


def abstract(build):
    """The module that build(rngs=...) makes, without its numbers. Nothing is drawn: tracing the draws of a
    large model takes longer than all the rest."""
    blank = {name: lambda key, shape, **bounds: jnp.zeros(shape) for name in ("normal", "uniform")}
    with mock.patch.multiple(jax.random, **blank, key_data=lambda key: key):
        return nnx.eval_shape(lambda: build(rngs=_NoKeys()))


class Parrot(Module):
    """A model that says the tokens of a text in turn, whatever it reads: its logits are right by
    construction."""

    causal, lookahead, exact, vocab_size = True, 0, True, 256

    def __init__(self, text):
        self.text = tuple(text)

    def init_state(self, batch, dtype=jnp.float32):
        return jnp.zeros((batch,), jnp.int32)

    def features(self, inputs, state=None, reset=None, valid=None):
        valid = jnp.ones(inputs.shape, bool) if valid is None else valid
        start = jnp.zeros(inputs.shape[:1], jnp.int32) if state is None else state
        places = start[:, None] + jnp.cumsum(valid, axis=1, dtype=jnp.int32)
        said = jnp.asarray(self.text)[(places - 1) % len(self.text)]
        return 20 * jax.nn.one_hot(said, self.vocab_size), places[:, -1]

    def read_out(self, x):
        return x

    def __call__(self, inputs, state=None, reset=None, valid=None):
        return self.features(inputs, state, reset, valid)
