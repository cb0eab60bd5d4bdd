"""Mixture of block attention: its choice written down in numpy; full attention where its blocks cover the
sequence; cost."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_close, random

from seqlab.models import Attention, Full
from seqlab.models.attention import with_cache
from seqlab.models.cache import MoBA, Scores
from seqlab.module import params_of

LENGTH = 43
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


def dense(q, k, v, policy):
    """The definition, query by query in float64: [t, h, k], [t, g, k], [t, g, v] -> [t, h, v]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    (t, h, width), g, block = q.shape, k.shape[1], policy.block
    out = np.zeros((t, h, v.shape[2]))
    for i, head in np.ndindex(t, h):
        group, own = head * g // h, i // block
        past = range(max(0, own - policy.stored + 1) if policy.stored else 0, own)
        scores = {m: q[i, head] @ k[m * block : (m + 1) * block, group].mean(0) for m in past}
        chosen = [own, *sorted(scores, key=scores.get)[::-1][: policy.top_k - 1]]
        seen = [j for j in range(i + 1) if j // block in chosen]
        weights = np.exp(k[seen, group] @ q[i, head] / np.sqrt(width))
        out[i, head] = weights / weights.sum() @ v[seen, group]
    return out


@pytest.mark.parametrize(
    "policy",
    [MoBA(4, 3, 44), MoBA(4, 3, None, stored=5), slow(MoBA(4, 1, 44)), slow(MoBA(5, 4, None, stored=2))],
    ids=str,
)
def test_a_query_sees_its_block_and_those_it_likes_best(policy):
    """Whole, in chunks of one length, longer than what is stored, and step by step, in a ring that is wrapped
    often."""
    q, k, v = random(0, 2, LENGTH, 4, 8), random(1, 2, LENGTH, 2, 8), random(2, 2, LENGTH, 2, 6)
    expected = np.stack([dense(*rows, policy) for rows in zip(q, k, v, strict=True)])

    @jax.jit
    def call(q, k, v, state=None):
        return policy(q, k, v, state, None, None, Scores(lambda x, _: x))

    assert_close(call(q, k, v)[0], expected, 2e-5, "whole")
    for chunk in (1, 26):
        state, outputs = policy.init_state(2, 2, 8, jnp.float32, v_width=6), []
        for begin in range(0, LENGTH, chunk):
            here = slice(begin, begin + chunk)
            out, _, state = call(q[:, here], k[:, here], v[:, here], state)
            outputs.append(out)
        assert_close(jnp.concatenate(outputs, axis=1), expected, 2e-5, f"chunks of {chunk}")


def test_it_is_full_attention_where_its_blocks_cover_the_sequence():
    full = Attention(16, heads=4, kv_heads=2, cache=Full(64), rngs=nnx.Rngs(0))
    x, cotangent = random(3, 2, LENGTH, 16), random(4, 2, LENGTH, 16)

    def both_forms(mixer):
        streamed, state = mixer(x[:, :30], mixer.init_state(2))
        whole, pull = jax.vjp(lambda x: mixer(x)[0], x)
        return whole, streamed, state, pull(cotangent)

    whole, streamed, state, gradient = jax.jit(lambda: both_forms(full))()
    covering = jax.jit(lambda: both_forms(with_cache(full, MoBA(4, 11, 64))))()
    assert_close((covering[0], covering[1], covering[2].cache), (whole, streamed, state), 2e-5)
    assert_close(covering[3], gradient, 5e-5)


def test_keys_gather_their_neighbours_before_anything_else():
    mixer = Attention(16, heads=4, kv_heads=2, key_conv=3, rngs=nnx.Rngs(0))
    x = random(6, 1, 9, 16)
    p = {name: np.asarray(value, np.float64) for name, value in params_of(mixer).items()}
    keys = (np.asarray(x[0], np.float64) @ p["qkv.weight"])[:, 16:24]
    near = sum(tap * np.pad(keys, ((2 - j, 0), (0, 0)))[:9] for j, tap in enumerate(p["key_conv.weight"]))
    assert_close(
        jax.jit(lambda x: mixer.project(x)[1])(x)[0],
        (keys + near / (1 + np.exp(-near))).reshape(9, 2, 4),
        2e-5,
    )


def test_a_decode_step_reads_the_chosen_blocks_alone():
    mixer = Attention(32, heads=2, cache=MoBA(64, 3, 8192), rngs=nnx.Rngs(0))
    state = jax.eval_shape(lambda: mixer.init_state(2))
    step = jax.jit(lambda x, state, valid: mixer(x, state, None, valid), donate_argnums=1)
    compiled_step = step.lower(
        jax.ShapeDtypeStruct((2, 1, 32), jnp.float32), state, jax.ShapeDtypeStruct((2, 1), bool)
    ).compile()
    assert (
        compiled_step.memory_analysis().temp_size_in_bytes
        < state.cache.k.size * state.cache.k.dtype.itemsize / 4
    )


def test_beyond_its_capacity_it_gives_nan_and_never_a_wrong_number():
    mixer = Attention(16, heads=2, cache=MoBA(4, 2, 8), rngs=nnx.Rngs(0))
    x = random(5, 1, 13, 16)
    y, _ = jax.jit(lambda x, state: mixer(x, state))(x, mixer.init_state(1))
    assert_close(y[:, :8], jax.jit(lambda x: mixer(x)[0])(x[:, :8]), 2e-5)
    assert np.isnan(np.asarray(y[:, 8:])).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"block": 0}, "block must be a positive integer, got 0"),
        ({"top_k": 0}, "top_k must be a positive integer, got 0"),
        ({"stored": 8}, "give capacity or stored"),
        ({"capacity": None}, "give capacity or stored"),
        ({"capacity": 1000}, "capacity must be a multiple of block=512, got 1000"),
    ],
)
def test_impossible_policies_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        MoBA(**options)


@pytest.mark.slow
@pytest.mark.parametrize("block", [256, 512])
def test_a_training_step_over_4096_is_not_slower_than_full_attention(block):
    """Forward and backward of the attention alone, the two in turn."""
    arrays = [random(seed, 1, 4096, 4, 64) for seed in range(4)]

    def step(policy):
        def loss(q, k, v, weights):
            return (policy(q, k, v, None, None, None, Scores(lambda x, _: x))[0] * weights).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arrays).compile()

    steps = {name: step(policy) for name, policy in (("moba", MoBA(block, 3)), ("full", Full()))}
    rounds = [
        {name: timed(functools.partial(call, *arrays)) for name, call in steps.items()} for _ in range(7)
    ]
    assert np.median([r["moba"] / r["full"] for r in rounds]) < 1


def timed(call):
    begin = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - begin
