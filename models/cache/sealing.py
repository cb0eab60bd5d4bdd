"""Resets that forget everything: one function around every cache policy."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from seqlab.models.cache.common import Scores
from seqlab.models.cache.policy import Policy
from seqlab.shapes import Steps
from seqlab.state import State, broken, mask_steps, select_rows


def seal_resets(
    policy: Policy,
    qkv: tuple[Array, Array, Array],
    state: State | None,
    reset: Steps,
    valid: Steps | None,
    scores: Scores,
) -> tuple[Array, Array, State | None]:
    """`policy(...)` of a chunk with resets, in which a sequence leaves nothing to the next one, NaN and
    infinity included.

    What is not finite is NaN in the outputs of its own sequence from there on, and in the state if that
    sequence is the one that is carried on (see `seqlab.state.broken`).
    """
    bad = ~functools.reduce(jnp.logical_and, [jnp.isfinite(x).all((2, 3)) for x in qkv])
    clean = tuple(mask_steps(x, ~bad) for x in qkv)
    if state is None:
        out, lse, _ = policy(*clean, None, reset, valid, scores)
        steps = broken(bad, None, reset, valid).steps
        return _nan_where(steps, out), _nan_where(steps, lse), None
    ill = jnp.any(jnp.stack([_ill_rows(x) for x in jax.tree.leaves(state)]), axis=0)
    out, lse, new = policy(*clean, jax.tree.map(_finite_or_zero, state), reset, valid, scores)
    found = broken(bad, ill, reset, valid)
    new = jax.tree.map(lambda x: _nan_rows(x, found.last), new)
    untouched = ~jnp.any(jnp.ones(reset.shape, bool) if valid is None else valid, axis=1)
    return _nan_where(found.steps, out), _nan_where(found.steps, lse), select_rows(~untouched, new, state)


def _ill_rows(x: Array) -> Array:
    """[b]: whether a row of a leaf holds anything that is not finite."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.zeros(x.shape[:1], bool)
    return ~jnp.isfinite(x).reshape(x.shape[0], -1).all(1)


def _finite_or_zero(x: Array) -> Array:
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return jnp.where(jnp.isfinite(x), x, jnp.zeros((), x.dtype)) if floating else x


def _nan_rows(x: Array, rows: Array) -> Array:
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return jnp.where(rows.reshape(-1, *(1,) * (x.ndim - 1)), jnp.nan, x) if floating else x


def _nan_where(steps: Array, x: Array) -> Array:
    return jnp.where(steps.reshape(steps.shape + (1,) * (x.ndim - 2)), jnp.nan, x)
