"""What cache policies share: where steps stand, how slots are written, and attention over what was stored and
what is new."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seqlab import kernels
from seqlab.checks import UserError
from seqlab.shapes import Counts, Keys, Queries, Steps, Values
from seqlab.state import Segments

Rotary = Callable[[Array, Array], Array]


class Scores(NamedTuple):
    """How an attention forms its logits, c tanh(scale q·k / c): the model's, whatever its cache is.

    `rotary(x, positions)` turns queries or keys [b, t, h, k] to positions [b, t]; the policy decides which,
    because that is where policies differ. `softcap`: c, None for none. `scale`: None for 1 / sqrt(k).
    """

    rotary: Rotary
    softcap: float | None = None
    scale: float | None = None

    @property
    def limits(self) -> dict[str, float | None]:
        """The arguments of the attention kernels."""
        return {"softcap": self.softcap, "scale": self.scale}


NEVER = jnp.iinfo(jnp.int32).max  # the position of an empty slot: later than every query


class CacheState(NamedTuple):
    """`k`, `v` [b, g, s, k]: rotated keys and values by slot, or what a storage keeps of them, arrays [b, g,
    s, .]; `positions` [b, s]: whose they are; `length` [b]: steps seen.

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


def empty(
    batch: int,
    slots: int,
    kv_heads: int,
    width: int,
    dtype: jax.typing.DTypeLike,
    v_width: int | None = None,
) -> CacheState:
    """No keys of `width` and values of `v_width` (default: the same) in `slots` slots."""
    return CacheState(
        jnp.zeros((batch, kv_heads, slots, width), dtype),
        jnp.zeros((batch, kv_heads, slots, width if v_width is None else v_width), dtype),
        jnp.full((batch, slots), NEVER, jnp.int32),
        jnp.zeros((batch,), jnp.int32),
    )


def _as_is(x: Any) -> Any:
    return x


def new_span(k: Keys, v: Values, where: Segments) -> Span:
    """The keys of a chunk, already rotated."""
    return Span(k, v, where.positions, where.ids)


def stored_span(
    state: CacheState, slots: slice = slice(None), decode: Callable[[Any], Array] = _as_is
) -> Span:
    """What is stored in `slots`, a view of it once compiled; before a chunk is stored it is of segment 1, the
    sequence that is carried. `decode`: of a storage that keeps no plain numbers."""
    k, v = (
        decode(jax.tree.map(lambda leaf: leaf[:, :, slots], x)).swapaxes(1, 2) for x in (state.k, state.v)
    )
    positions = state.positions[:, slots]
    return Span(k, v, positions, (positions != NEVER).astype(jnp.int32))


def joined(a: Span, b: Span) -> Span:
    """Both, one behind the other, in the dtype of `b`."""
    return Span(*(jnp.concatenate([x.astype(y.dtype), y], axis=1) for x, y in zip(a, b, strict=True)))


def attend(
    q: Array, positions: Int[Array, "b t"], where: Segments, span: Span, scores: Scores, **limits
) -> tuple[Array, Array]:
    """`kernels.attention` of queries at `positions`, already turned, over a span."""
    sides = {"q_positions": positions, "kv_positions": span.positions}
    if span.segments is not None:  # telling segments apart costs a copy of the keys and values
        sides |= {"q_segments": where.ids, "kv_segments": span.segments}
    return kernels.attention(q, span.k, span.v, **sides, **scores.limits, **limits)


def store(
    state: CacheState,
    k: Any,
    v: Any,
    where: Segments,
    slots: Int[Array, "b t"],
    keep: Array,
    reset: Steps | None,
) -> CacheState:
    """`state` with the steps of a chunk in their slots where `keep` [b, t], those of the sequence that is
    carried on alone. `k`, `v`: arrays [b, t, g, .], as many as the state has."""
    # A sequence that has ended leaves nothing behind: the state is that of the last sequence alone.
    if reset is not None:
        carried = (where.last == 1)[:, None]
        state = state._replace(
            k=_where(carried[..., None, None], state.k),
            v=_where(carried[..., None, None], state.v),
            positions=jnp.where(carried, state.positions, NEVER),
        )
    keep = keep & (where.ids == where.last[:, None])
    # A slot out of range: the scatter drops the write.
    slots = jnp.where(keep, slots, state.positions.shape[1])
    rows = jnp.arange(slots.shape[0])[:, None]

    def put(x: Array, new: Array) -> Array:
        index = (rows[:, None], jnp.arange(x.shape[1])[:, None], slots[:, None])  # [b, g, t]
        return x.at[index].set(new.swapaxes(1, 2).astype(x.dtype), mode="drop")

    return CacheState(
        jax.tree.map(put, state.k, k),
        jax.tree.map(put, state.v, v),
        state.positions.at[rows, slots].set(where.positions, mode="drop"),
        where.length,
    )


def _where(keep: Array, x: Any) -> Any:
    """The leaves of x, 0 where not `keep`."""
    return jax.tree.map(lambda leaf: jnp.where(keep, leaf, jnp.zeros((), leaf.dtype)), x)


def only_valid(out: Array, where: Segments) -> Array:
    """Zeros for padded queries."""
    return jnp.where((where.ids > 0)[:, :, None, None], out, 0)


def forget_from(state: CacheState, length: Int[Array, " b"]) -> CacheState:
    """`state` without the steps from `length` on."""
    later = state.positions >= length[:, None]
    kept = (_where(~later[:, None, :, None], x) for x in (state.k, state.v))
    return CacheState(*kept, jnp.where(later, NEVER, state.positions), length)


def resized(x: Array, size: int, axis: int, fill: float | int = 0) -> Array:
    """`x` with `size` entries along `axis`: the first ones, or its own and then `fill`."""
    held = x.shape[axis]
    if size <= held:
        return jax.lax.slice_in_dim(x, 0, size, axis=axis)
    more = [(0, 0)] * x.ndim
    more[axis] = (0, size - held)
    return jnp.pad(x, more, constant_values=fill)


def with_slots(state: CacheState, slots: int) -> CacheState:
    """`state` with `slots` slots: its first ones, or its own with empty ones behind them."""
    k, v = (jax.tree.map(lambda leaf: resized(leaf, slots, 2), x) for x in (state.k, state.v))
    return CacheState(k, v, resized(state.positions, slots, 1, NEVER), state.length)


def place_in_cache(
    positions: Int[Array, "b t"], ids: Int[Array, "b t"], start: Int[Array, " b"], sinks: int, first: Array
) -> Int[Array, "b t"]:
    """The place of each query among the sinks and the steps behind them that it sees, counted from 0.

    `start` [b]: the first position behind the sinks that the state holds, of the sequence with id 1; a fresh
    one begins behind its sinks. `first` [b, t]: the first position behind the sinks that each query may see.
    """
    first = jnp.maximum(jnp.where(ids == 1, start[:, None], sinks), first)
    return jnp.where(positions < sinks, positions, sinks + positions - first)


def attend_sinks(
    q: Queries,
    where: Segments,
    scores: Scores,
    sinks: int,
    stored: Span | None,
    chunk: Span | None,
) -> tuple[Array, Array]:
    """Attention over the sinks alone of queries that are turned as they see them: those that are `stored`,
    and those of the `chunk` that is not yet."""
    if chunk is None:
        return attend(q, where.positions, where, stored._replace(segments=None), scores)
    span = chunk if stored is None else joined(stored, chunk)
    span = span._replace(positions=jnp.where(span.positions < sinks, span.positions, NEVER))
    return attend(q, where.positions, where, span, scores)


def beyond_is_nan(out: Array, lse: Array, beyond: Array) -> tuple[Array, Array]:
    """Outputs and log-sum-exps that are NaN at the queries [b, t] that the cache has no room for."""
    return jnp.where(beyond[:, :, None, None], jnp.nan, out), jnp.where(beyond[:, :, None], jnp.nan, lse)


def check_layout(policy: str, state: CacheState, places: Int[Array, "b s"], newest: bool = True) -> None:
    """Refuse a state whose steps do not lie where `policy` puts them: step `places` in each slot, or none;
    the `newest` is always kept, unless the policy may drop it. Looks at the numbers: not for jitted code."""
    here = state.positions != NEVER
    if bool(jnp.any(here & (state.positions != places))):
        raise UserError(f"state holds other steps than {policy} keeps: it was made by another cache")
    some = jnp.any(here, axis=1, keepdims=True)  # a row may have forgotten all that it had seen
    gone = (places >= 0) & (places < state.length[:, None]) & ~here
    if newest and bool(jnp.any(some & gone & (places == state.length[:, None] - 1))):
        raise UserError(f"state lacks the newest step, which {policy} keeps: it was made by another cache")


@runtime_checkable
class Counted(Protocol):
    """A state with the number of steps that its sequences have seen."""

    @property
    def length(self) -> Int[Array, " b"]: ...


def earlier(state: Counted, steps: Counts) -> Int[Array, " b"]:
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
