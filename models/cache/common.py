"""What cache policies share: where steps stand, how slots are written, and attention over what was stored and
what is new."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seqlab import kernels
from seqlab.checks import UserError
from seqlab.shapes import Keys, Values
from seqlab.state import Segments, Steps

Rotary = Callable[[Array, Array], Array]

NEVER = jnp.iinfo(jnp.int32).max  # the position of an empty slot: later than every query


class CacheState(NamedTuple):
    """`k`, `v` [b, g, s, k]: rotated keys and values by slot; `positions` [b, s]: whose they are; `length`
    [b]: steps seen.

    Heads stand before slots, other than everywhere else: a decode step then reads the cache as it lies, two
    to three times as fast.
    """

    k: Float[Array, "b g s k"]
    v: Float[Array, "b g s v"]
    positions: Int[Array, "b s"]
    length: Int[Array, " b"]


class Span(NamedTuple):
    """Keys and values [b, s, g, k] with the position and the segment [b, s] of each; segment 0 is an empty
    slot or padding.

    `segments` None: all belong to the sequence of the queries, and what is empty stands at NEVER.
    """

    k: Keys
    v: Values
    positions: Int[Array, "b s"]
    segments: Int[Array, "b s"] | None


def empty(batch: int, slots: int, kv_heads: int, width: int, dtype: jax.typing.DTypeLike) -> CacheState:
    """No keys in `slots` slots."""
    zeros = jnp.zeros((batch, kv_heads, slots, width), dtype)
    return CacheState(
        zeros, zeros, jnp.full((batch, slots), NEVER, jnp.int32), jnp.zeros((batch,), jnp.int32)
    )


def new_span(k: Keys, v: Values, where: Segments) -> Span:
    """The keys of a chunk, already rotated."""
    return Span(k, v, where.positions, where.ids)


def stored_span(state: CacheState, slots: slice = slice(None)) -> Span:
    """What is stored in `slots`, a view of it once compiled; before a chunk is stored it is of segment 1, the
    sequence that is carried."""
    k, v = (x[:, :, slots].swapaxes(1, 2) for x in (state.k, state.v))
    positions = state.positions[:, slots]
    return Span(k, v, positions, (positions != NEVER).astype(jnp.int32))


def joined(a: Span, b: Span) -> Span:
    """Both, one behind the other, in the dtype of `b`."""
    return Span(*(jnp.concatenate([x.astype(y.dtype), y], axis=1) for x, y in zip(a, b, strict=True)))


def attend(
    q: Array, positions: Int[Array, "b t"], where: Segments, span: Span, **limits
) -> tuple[Array, Array]:
    """`kernels.attention` of queries at `positions` over a span."""
    sides = {"q_positions": positions, "kv_positions": span.positions}
    if span.segments is not None:  # telling segments apart costs a copy of the keys and values
        sides |= {"q_segments": where.ids, "kv_segments": span.segments}
    return kernels.attention(q, span.k, span.v, **sides, **limits)


def store(
    state: CacheState,
    k: Keys,
    v: Values,
    where: Segments,
    slots: Int[Array, "b t"],
    keep: Array,
    reset: Steps | None,
) -> CacheState:
    """`state` with the steps of a chunk in their slots where `keep` [b, t], those of the sequence that is
    carried on alone."""
    if (
        reset is not None
    ):  # a sequence that has ended leaves nothing behind: the state is that of the last sequence alone
        carried = (where.last == 1)[:, None]
        state = state._replace(
            k=jnp.where(carried[..., None, None], state.k, 0),
            v=jnp.where(carried[..., None, None], state.v, 0),
            positions=jnp.where(carried, state.positions, NEVER),
        )
    keep = keep & (where.ids == where.last[:, None])
    slots = jnp.where(
        keep, slots, state.positions.shape[1]
    )  # a slot out of range: the scatter drops the write
    rows = jnp.arange(k.shape[0])[:, None]
    index = (rows[:, None], jnp.arange(k.shape[2])[:, None], slots[:, None])  # [b, g, t]
    return CacheState(
        state.k.at[index].set(k.swapaxes(1, 2).astype(state.k.dtype), mode="drop"),
        state.v.at[index].set(v.swapaxes(1, 2).astype(state.v.dtype), mode="drop"),
        state.positions.at[rows, slots].set(where.positions, mode="drop"),
        where.length,
    )


def only_valid(out: Array, where: Segments) -> Array:
    """Zeros for padded queries."""
    return jnp.where((where.ids > 0)[:, :, None, None], out, 0)


def forget_from(state: CacheState, length: Int[Array, " b"]) -> CacheState:
    """`state` without the steps from `length` on."""
    later = state.positions >= length[:, None]
    kept = jnp.where(later[:, None, :, None], 0, state.k), jnp.where(later[:, None, :, None], 0, state.v)
    return CacheState(*kept, jnp.where(later, NEVER, state.positions), length)


def with_slots(state: CacheState, slots: int) -> CacheState:
    """`state` with empty slots behind its own, `slots` in all."""
    more = (0, slots - state.positions.shape[1])
    k, v = (jnp.pad(x, ((0, 0), (0, 0), more, (0, 0))) for x in (state.k, state.v))
    return CacheState(k, v, jnp.pad(state.positions, ((0, 0), more), constant_values=NEVER), state.length)


def doubled(slots: int, steps: int) -> int:
    """`slots` times the least power of two that makes them `steps` or more."""
    return slots * 2 ** max(0, math.ceil(math.log2(steps / slots)))


def end(policy: Any) -> int | None:
    """Where sequences must end under a policy; None for one that goes on, in constant memory or because it
    grows."""
    return None if getattr(policy, "grows", False) else getattr(policy, "capacity", None)


def earlier(state: CacheState, steps: Int[Array, " b"]) -> Int[Array, " b"]:
    """The lengths `steps` steps ago; ValueError where a row has not seen as many. Looks at the numbers: not
    for jitted code."""
    length = state.length - jnp.asarray(steps, jnp.int32)
    if bool(jnp.any(length > state.length)):
        raise UserError(f"steps must be 0 or more, got {jnp.asarray(steps).tolist()}")
    if bool(jnp.any(length < 0)):
        raise UserError(
            f"steps must not exceed the steps seen, {state.length.tolist()} by row, got "
            f"{jnp.asarray(steps).tolist()}"
        )
    return length
