"""Resets that forget everything, including NaN and infinity."""

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
    """Masks of results that are NaN because their sequence had a non-finite step, at them or before.

    `steps` [b, t]: outputs. `last` [b]: the state, if it belongs to such a sequence.
    """

    steps: Bool[Array, "b t"]
    last: Bool[Array, " b"]


def broken(bad: Steps, start: Bool[Array, " b"] | None, reset: Steps, valid: Steps | None) -> Broken:
    """Masks of sequences with `bad` steps, or with a non-finite state at the `start`.

    A reset must also forget NaN and infinity, but steps before and after it share sums and products, where 0
    * NaN is NaN. Non-finite values are therefore masked before they are read, and restored by these masks.
    """
    where = segments(reset.shape, 0, reset, valid)
    there = where.ids > 0
    bad = bad & there
    count = running_sum(bad)
    before = running_max(jnp.where(reset & there, count - bad, 0))
    steps = count > before
    if start is not None:
        steps = steps | (start[:, None] & (where.ids == 1))
    # Padding may be last, so use the last valid step of the last sequence.
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
    """`outputs, state = call(arrays, state)` of a chunk with resets, in which a sequence has no effect on the
    next one.

    `call` gets `arrays` [b, t, ...] and `state` without non-finite values. These become NaN in the outputs
    [b, t, ...] of their own sequence from there on, and in the new state if that sequence is carried on.
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
    """The rows of a state with non-finite values."""

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
