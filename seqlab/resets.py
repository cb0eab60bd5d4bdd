"""Resets that forget everything, NaN and infinity included."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from seqlab.parallel.sequence_parallel import running_max, running_sum
from seqlab.shapes import Steps
from seqlab.state import State, by_row, mask_steps, segments, select_rows


class Broken(NamedTuple):
    """Which results are NaN because their sequence has had a step that is not finite, at them or before.

    `steps` [b, t]: outputs. `last` [b]: the state, where that is of such a sequence.
    """

    steps: Bool[Array, "b t"]
    last: Bool[Array, " b"]


def broken(bad: Steps, start: Bool[Array, " b"] | None, reset: Steps, valid: Steps | None) -> Broken:
    """Where sequences are broken by `bad` steps, or by a state that was broken at the `start`.

    A reset is to forget NaN and infinity, too, but steps before and after it share sums and products, where
    0 * NaN is NaN. So what is not finite is masked before anything reads it, and put back by this.
    """
    where = segments(reset.shape, 0, reset, valid)
    there = where.ids > 0
    bad = bad & there
    count = running_sum(bad)
    before = running_max(jnp.where(reset & there, count - bad, 0))
    steps = count > before
    if start is not None:
        steps = steps | (start[:, None] & (where.ids == 1))
    # Padding may stand last: of the last sequence the last valid step tells.
    last = jnp.any(steps & there & (where.ids == where.last[:, None]), axis=1)
    last = last if start is None else last | (start & (where.last == 1))
    return Broken(steps & there, last)


def sealed(
    call: Callable[[tuple[Array, ...], State | None], tuple[Any, State | None]],
    arrays: Sequence[Array],
    state: State | None,
    reset: Steps,
    valid: Steps | None,
) -> tuple[Any, State | None]:
    """`outputs, state = call(arrays, state)` of a chunk with resets, in which a sequence leaves nothing to
    the next one.

    `call` gets `arrays` [b, t, ...] and `state` without what is not finite. That is NaN in the outputs
    [b, t, ...] of its own sequence from there on, and in the new state if that sequence is the one that is
    carried on.
    """
    bad = ~functools.reduce(jnp.logical_and, [jnp.isfinite(x).all(tuple(range(2, x.ndim))) for x in arrays])
    clean = tuple(mask_steps(x, ~bad) for x in arrays)
    if state is None:
        outputs, _ = call(clean, None)
        return _nan_steps(outputs, broken(bad, None, reset, valid).steps), None
    outputs, new = call(clean, jax.tree.map(_finite_or_zero, state))
    found = broken(bad, _ill_rows(state, len(reset)), reset, valid)
    new = by_row(functools.partial(_nan_rows, found.last), new)
    touched = jnp.any(jnp.ones(reset.shape, bool) if valid is None else valid, axis=1)
    return _nan_steps(outputs, found.steps), select_rows(touched, new, state)


def _nan_steps(outputs: Any, steps: Array) -> Any:
    return jax.tree.map(
        lambda x: jnp.where(steps.reshape(steps.shape + (1,) * (x.ndim - 2)), jnp.nan, x), outputs
    )


def _ill_rows(state: State, batch: int) -> Bool[Array, " b"]:
    """Which rows of a state hold anything that is not finite."""

    def ill(x: Array, axis: int) -> Array:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.zeros((batch,), bool)
        return ~jnp.isfinite(x).all(tuple(i for i in range(x.ndim) if i != axis))

    leaves = jax.tree.leaves(by_row(ill, state))
    return functools.reduce(jnp.logical_or, leaves, jnp.zeros((batch,), bool))


def _finite_or_zero(x: Array) -> Array:
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return jnp.where(jnp.isfinite(x), x, jnp.zeros((), x.dtype)) if floating else x


def _nan_rows(which: Array, x: Array, axis: int) -> Array:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return jnp.where(which.reshape((1,) * axis + (-1,) + (1,) * (x.ndim - axis - 1)), jnp.nan, x)
