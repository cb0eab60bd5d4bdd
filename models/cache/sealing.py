"""Resets that forget everything: one function around every cache policy."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from seqlab.models.cache.common import Scores
from seqlab.models.cache.policy import Policy
from seqlab.parallel.sequence_parallel import running_max, running_sum
from seqlab.shapes import Steps
from seqlab.state import State, segments, select_rows


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

    A hidden value has weight 0, and 0 * NaN is NaN. So what is not finite is replaced before anything reads
    it and put back where it belongs: as NaN into the outputs of its own sequence from there on, and into the
    state if that sequence is the one that is carried on.
    """
    where = segments(reset.shape, 0, reset, valid)
    bad = (where.ids > 0) & ~_finite(qkv)
    count = running_sum(bad)
    before = running_max(jnp.where(reset & (where.ids > 0), count - bad, 0))
    poisoned = count > before
    clean = tuple(jnp.where(jnp.isfinite(x), x, jnp.zeros((), x.dtype)) for x in qkv)
    if state is None:
        out, lse, _ = policy(*clean, None, reset, valid, scores)
        return jnp.where(poisoned[..., None, None], jnp.nan, out), _nan_where(poisoned, lse), None
    ill = jnp.any(jnp.stack([_ill_rows(x) for x in jax.tree.leaves(state)]), axis=0)
    poisoned = poisoned | (ill[:, None] & (where.ids == 1))
    out, lse, new = policy(*clean, jax.tree.map(_finite_or_zero, state), reset, valid, scores)
    if reset.shape[1] == 0:
        return out, lse, state
    # Padding is never poisoned and may stand last: of the last sequence the last valid step tells.
    carried = jnp.any(poisoned & (where.ids == where.last[:, None]), axis=1) | (ill & (where.last == 1))
    new = jax.tree.map(lambda x: _nan_rows(x, carried), new)
    out = jnp.where((poisoned & (where.ids > 0))[..., None, None], jnp.nan, out)
    return out, _nan_where(poisoned, lse), select_rows(jnp.any(where.ids > 0, axis=1), new, state)


def _finite(arrays: tuple[Array, ...]) -> Array:
    """[b, t]: whether all numbers of a step are finite."""
    return functools.reduce(jnp.logical_and, [jnp.isfinite(x).all((2, 3)) for x in arrays])


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


def _nan_where(steps: Array, lse: Array) -> Array:
    return jnp.where(steps[..., None], jnp.nan, lse)
