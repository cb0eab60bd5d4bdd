"""Attention over chosen blocks: every implementation against the keys of these blocks picked out in
float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, random

from seqlab.kernels.block_attention import block_attention
from seqlab.kernels.block_attention.specs import SPECS, make

VARIANTS = ("few_queries", "one_block", "every_block", "no_choice")  # others take the same ways


def oracle(q, k, v, chosen, block, softcap):
    """Query by query in float64: the keys of its blocks are picked out, nothing is masked."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    (b, t, h, width), g = q.shape, k.shape[2]
    out, lse = np.zeros((b, t, h, v.shape[3])), np.full((b, t, h), -np.inf)
    for row, i, head in np.ndindex(b, t, h):
        seen = [j * block + s for j in np.asarray(chosen[row, i, head]) if j >= 0 for s in range(block)]
        if seen:
            x = k[row, seen, head * g // h] @ q[row, i, head] / np.sqrt(width)
            x = x if softcap is None else softcap * np.tanh(x / softcap)
            lse[row, i, head] = np.logaddexp.reduce(x)
            out[row, i, head] = np.exp(x - lse[row, i, head]) @ v[row, seen, head * g // h]
    return out, lse


def with_gradients(*, implementation, block, softcap, **arrays):
    # The reference is only run once a shape: it compiles in half the time unoptimised.
    options = {"xla_backend_optimization_level": 0} if implementation == "reference" else None
    call = functools.partial(both_ways, block=block, softcap=softcap, implementation=implementation)
    return jax.jit(lambda arrays: call(**arrays), compiler_options=options)(arrays)


def both_ways(q, k, v, chosen, cotangents, **options):
    call = functools.partial(block_attention, chosen=chosen, **options)
    results, pull = jax.vjp(call, q, k, v)
    return results, pull(cotangents)


@functools.cache
def truth(name):
    """The oracle's values and the reference's gradients, in float64."""
    with jax.enable_x64(True):
        call = {key: x.astype(jnp.float64) if key in "qkv" else x for key, x in make(SPECS[name]).items()}
        cotangents = tuple(x.astype(jnp.float64) for x in cotangents_of(call))
        results, gradients = jax.tree.map(
            np.asarray, with_gradients(**call, cotangents=cotangents, implementation="reference")
        )
        expected = oracle(**call)
        check(results, expected, 1e-12)
    return expected, gradients


def cotangents_of(call):
    return random(7, *call["q"].shape[:3], call["v"].shape[3]), random(8, *call["q"].shape[:3])


def check(actual, expected, tolerance):
    dead = np.isneginf(expected[1])
    np.testing.assert_array_equal(np.isneginf(actual[1]), dead)
    assert_close(
        (actual[0], np.where(dead, 0, actual[1])), (expected[0], np.where(dead, 0, expected[1])), tolerance
    )


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in VARIANTS)) for name in SPECS]
)
def test_xla_values_and_gradients(name):
    call = make(SPECS[name])
    results, gradients = with_gradients(**call, cotangents=cotangents_of(call), implementation="xla")
    expected, expected_gradients = truth(name)
    assert results[0].dtype == results[1].dtype == jnp.float32
    check(results, expected, 5e-6)
    assert_close(gradients, expected_gradients, 2e-5)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_bfloat16(implementation):
    call = make(SPECS["many_queries"], dtype=jnp.bfloat16)
    out, lse = cotangents_of(call)
    results, gradients = with_gradients(
        **call, cotangents=(out.astype(jnp.bfloat16), lse), implementation=implementation
    )
    assert results[0].dtype == jnp.bfloat16 and results[1].dtype == jnp.float32
    assert all(x.dtype == jnp.bfloat16 for x in gradients)
    check(results, oracle(**call), 2e-2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"softcap": 0.0}, "softcap must be a number above 0 or None, got 0.0"),
        ({"block": 7}, "block must be a positive integer that divides the 40 keys, got 7"),
        ({"k": jnp.zeros((2, 40, 4, 5))}, "with g dividing h"),
        ({"chosen": jnp.zeros((2, 37, 2, 2), jnp.int32)}, r"chosen must be an integer array \[b, t, h, c\]"),
        ({"q": jnp.zeros((2, 37, 6, 5), jnp.int32)}, "q must be a floating-point array"),
        ({"implementation": "xal"}, "did you mean 'xla'"),
    ],
)
def test_bad_arguments_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        block_attention(**make(SPECS["many_queries"]) | change)
