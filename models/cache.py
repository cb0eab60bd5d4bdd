"""Key/value caches as values with a policy.

A policy is a small frozen object: which past keys a query may see, and what is stored so that it can. Called with the unrotated queries,
keys and values of a chunk it gives the attention output and the new state,

    out, lse, state = policy(q, k, v, state, reset, valid, rotary)

and the same call with `state=None` is the parallel form for training. `rotary(x, positions)` turns queries or keys; the policy decides
with which positions, because that is where policies differ. Partial results carry their log-sum-exp, so policies can be built from parts.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seqlab import kernels
from seqlab.models.layers import positive
from seqlab.shapes import Keys, LogSumExp, Queries, Steps, Values
from seqlab.state import Segments, segments

Rotary = Callable[[Array, Array], Array]

_NEVER = jnp.iinfo(jnp.int32).max  # the position of an empty slot: later than every query


class CacheState(NamedTuple):
    """`k`, `v` [b, g, s, k]: rotated keys and values by slot; `positions` [b, s]: whose they are; `length` [b]: steps seen.

    Heads stand before slots, other than everywhere else: a decode step then reads the cache as it lies, two to three times as fast.
    """

    k: Float[Array, "b g s k"]
    v: Float[Array, "b g s v"]
    positions: Int[Array, "b s"]
    length: Int[Array, " b"]


@dataclasses.dataclass(frozen=True)
class Full:
    """Every key is kept, up to `capacity` steps of one sequence; attention beyond it gives NaN, never a wrong number."""

    capacity: int = 4096
    softcap: float | None = None

    exact = True

    def __post_init__(self):
        positive("capacity", self.capacity)

    def init_state(self, batch: int, kv_heads: int, width: int, dtype: jax.typing.DTypeLike) -> CacheState:
        return _empty(batch, self.capacity, kv_heads, width, dtype)

    def __call__(
        self, q: Queries, k: Keys, v: Values, state: CacheState | None, reset: Steps | None, valid: Steps | None, rotary: Rotary
    ) -> tuple[Float[Array, "b t h v"], LogSumExp, CacheState | None]:
        if state is None:
            return (*_parallel(q, k, v, reset, valid, rotary, softcap=self.softcap), None)
        where = segments(q.shape[:2], state.length, reset, valid)
        q, k = rotary(q, where.positions), rotary(k, where.positions)
        capacity = state.positions.shape[1]
        new = _store(state, k, v, where, _drop_unless(_kept(where), where.positions, capacity), reset)
        if reset is None:  # one sequence a row: store first, then the cache holds all that the queries may see
            out, lse = kernels.attention(q, *_read(new), q_positions=where.positions, kv_positions=new.positions, softcap=self.softcap)
        else:
            out, lse = _attend_old_and_new(q, k, v, state, where, softcap=self.softcap)
        full = (where.positions >= capacity)[:, :, None]
        return jnp.where(full[..., None], jnp.nan, _only_valid(out, where)), jnp.where(full, jnp.nan, lse), new


@dataclasses.dataclass(frozen=True)
class Window:
    """The first `sinks` keys of the sequence and the last `window` (the query's own included), at absolute positions, in a ring buffer."""

    window: int
    sinks: int = 0
    softcap: float | None = None

    exact = True

    def __post_init__(self):
        positive("window", self.window)
        if self.sinks:
            positive("sinks", self.sinks)

    def init_state(self, batch: int, kv_heads: int, width: int, dtype: jax.typing.DTypeLike) -> CacheState:
        return _empty(batch, self.sinks + self.window, kv_heads, width, dtype)

    def __call__(
        self, q: Queries, k: Keys, v: Values, state: CacheState | None, reset: Steps | None, valid: Steps | None, rotary: Rotary
    ) -> tuple[Float[Array, "b t h v"], LogSumExp, CacheState | None]:
        limits = {"window": self.window, "sinks": self.sinks, "softcap": self.softcap}
        if state is None:
            return (*_parallel(q, k, v, reset, valid, rotary, **limits), None)
        where = segments(q.shape[:2], state.length, reset, valid)
        q, k = rotary(q, where.positions), rotary(k, where.positions)
        ring = self.sinks + (where.positions - self.sinks) % self.window
        slots = jnp.where(where.positions < self.sinks, where.positions, ring)
        # Of a chunk longer than the ring only the steps that survive it are stored: two writes to one slot would race.
        survives = (where.positions < self.sinks) | (where.positions >= where.length[:, None] - self.window)
        new = _store(state, k, v, where, _drop_unless(_kept(where) & survives, slots, state.positions.shape[1]), reset)
        if q.shape[1] == 1:  # the ring after the store holds exactly what the one query sees: no copy of the cache is needed
            out, lse = kernels.attention(q, *_read(new), q_positions=where.positions, kv_positions=new.positions, **limits)
        else:
            out, lse = _attend_old_and_new(q, k, v, state, where, **limits)
        return _only_valid(out, where), lse, new


def _parallel(q, k, v, reset, valid, rotary, **limits):
    """Training: whole sequences, nothing stored."""
    if reset is None and valid is None:
        positions = jnp.broadcast_to(jnp.arange(q.shape[1], dtype=jnp.int32), q.shape[:2])
        return kernels.attention(rotary(q, positions), rotary(k, positions), v, **limits)
    where = segments(q.shape[:2], 0, reset, valid)
    places = {"q_positions": where.positions, "kv_positions": where.positions, "q_segments": where.ids, "kv_segments": where.ids}
    return kernels.attention(rotary(q, where.positions), rotary(k, where.positions), v, **places, **limits)


def _attend_old_and_new(q, k, v, state: CacheState, where: Segments, **limits):
    """The chunk's queries over what was stored before it, and over the chunk itself."""
    stored = jnp.where(state.positions == _NEVER, 0, 1)  # what is stored belongs to the sequence that the state carries: segment 1
    return kernels.attention(
        q,
        *(jnp.concatenate([old.astype(now.dtype), now], axis=1) for old, now in zip(_read(state), (k, v), strict=True)),
        q_positions=where.positions,
        kv_positions=jnp.concatenate([state.positions, where.positions], axis=1),
        q_segments=where.ids,
        kv_segments=jnp.concatenate([stored, where.ids], axis=1),
        **limits,
    )


def _empty(batch: int, slots: int, kv_heads: int, width: int, dtype: jax.typing.DTypeLike) -> CacheState:
    zeros = jnp.zeros((batch, kv_heads, slots, width), dtype)
    return CacheState(zeros, zeros, jnp.full((batch, slots), _NEVER, jnp.int32), jnp.zeros((batch,), jnp.int32))


def _read(state: CacheState) -> tuple[Keys, Values]:
    """Keys and values as [b, s, g, k]: a view, not a copy, once compiled."""
    return state.k.swapaxes(1, 2), state.v.swapaxes(1, 2)


def _kept(where: Segments) -> Array:
    return where.ids == where.last[:, None]


def _drop_unless(keep: Array, slots: Array, count: int) -> Array:
    return jnp.where(keep, slots, count)  # a slot out of range: the scatter drops the write


def _store(state: CacheState, k, v, where: Segments, slots: Array, reset: Steps | None) -> CacheState:
    if reset is not None:  # a sequence that has ended leaves nothing behind: the state is that of the last sequence alone
        carried = (where.last == 1)[:, None]
        state = state._replace(
            k=jnp.where(carried[..., None, None], state.k, 0),
            v=jnp.where(carried[..., None, None], state.v, 0),
            positions=jnp.where(carried, state.positions, _NEVER),
        )
    rows = jnp.arange(k.shape[0])[:, None]
    places = (rows[:, None], jnp.arange(k.shape[2])[:, None], slots[:, None])  # [b, g, t]
    return CacheState(
        state.k.at[places].set(k.swapaxes(1, 2).astype(state.k.dtype), mode="drop"),
        state.v.at[places].set(v.swapaxes(1, 2).astype(state.v.dtype), mode="drop"),
        state.positions.at[rows, slots].set(where.positions, mode="drop"),
        where.length,
    )


def _only_valid(out: Array, where: Segments) -> Array:
    return jnp.where((where.ids > 0)[:, :, None, None], out, 0)
