"""Steps that are kept one by one: exactly, or each coded by itself. And the selection of them all."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seqlab import kernels
from seqlab.checks import UserError
from seqlab.kernels.attention import merge
from seqlab.models.cache.common import (
    NEVER,
    CacheState,
    Scores,
    Span,
    attend,
    attend_sinks,
    beyond_is_nan,
    check_layout,
    earlier,
    empty,
    forget_from,
    joined,
    new_span,
    only_valid,
    place_in_cache,
    store,
    stored_span,
    with_slots,
)
from seqlab.models.cache.parts import Selection, Storage
from seqlab.models.cache.policy import slots_for
from seqlab.shapes import Counts, Keys, LogSumExp, Queries, Values
from seqlab.shapes import Steps as Booleans
from seqlab.state import Segments, segments

_APART = 2**20  # more than the groups of a sequence: a segment and a group are one number


class StepStorage(Storage):
    """A storage that codes every key and every value by itself: `encode` and `decode` are all there is to it.
    A query sees `decode(encode(x))` of every step, its own included, so a stream may be cut anywhere."""

    def encode(self, x: Float[Array, "*n d"], dtype: jax.typing.DTypeLike) -> Any:
        """What is kept of x in a state of `dtype`: an array [*n, .], or a pytree of such."""
        raise NotImplementedError

    def decode(self, kept: Any, dtype: jax.typing.DTypeLike) -> Float[Array, "*n d"]:
        """The numbers in `dtype` that are kept."""
        raise NotImplementedError

    def seen(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        """x as queries see it."""
        return self.decode(self.encode(x, x.dtype), x.dtype)

    def over(self, retention: Any) -> "Steps":
        return Steps(retention, self)


@dataclasses.dataclass(frozen=True)
class Exact(StepStorage):
    """Keys and values as they are, in the dtype of the state."""

    def encode(self, x: Float[Array, "*n d"], dtype: jax.typing.DTypeLike) -> Array:
        return x

    def decode(self, kept: Array, dtype: jax.typing.DTypeLike) -> Array:
        return kept

    def text(self) -> str:
        return ""


@dataclasses.dataclass(frozen=True)
class All(Selection):
    """A query reads every step that it may see."""

    def over(self, kept: Any) -> Any:
        return kept

    def text(self) -> str:
        return ""


@dataclasses.dataclass(frozen=True)
class Steps:
    """The steps that a `retention` keeps, each by itself as a `storage` does: the first ones in the first
    slots, the others in a ring behind them."""

    retention: Any
    storage: StepStorage
    state_type: ClassVar[type] = CacheState

    @property
    def all_slots(self) -> int:
        return self.retention.sinks + self.retention.ring

    def init_state(
        self, batch: int, kv_heads: int, width: int, dtype: jax.typing.DTypeLike, v_width: int
    ) -> CacheState:
        plain = empty(batch, self.all_slots, kv_heads, width, dtype, v_width)

        def fresh(x: Array) -> Any:
            kept = jax.eval_shape(lambda: self.storage.encode(x, dtype))
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), kept)

        return plain._replace(k=fresh(plain.k), v=fresh(plain.v))

    def held(self, state: CacheState) -> int:
        return state.positions.shape[1]

    def slots_for(self, steps: int) -> int:
        return slots_for(steps, self.all_slots, self.retention.grows)

    def resize(self, state: CacheState, slots: int) -> CacheState:
        return with_slots(state, slots)

    def attend(
        self,
        q: Queries,
        k: Keys,
        v: Values,
        state: CacheState | None,
        reset: Booleans | None,
        valid: Booleans | None,
        scores: Scores,
    ) -> tuple[Float[Array, "b t h v"], LogSumExp, CacheState | None]:
        """Out [b, t, h, v], its log-sum-exp and the new state, see `Policy`."""
        kept = self.retention
        if state is None:
            return (*self._whole(q, k, v, reset, valid, scores), None)
        where = segments(q.shape[:2], state.length, reset, valid)
        k = scores.rotary(k, where.positions)
        new = self.store(state, k, v, where, reset)
        k, v = self.storage.seen(k), self.storage.seen(v)
        # The slots hold, once the chunk is stored, just what its queries may see if nothing has been
        # overwritten that one of them may: no copy of the cache is needed.
        if q.shape[1] == 1 or (kept.ends and reset is None):
            span = self.read(new, k)._replace(segments=None)
        else:
            old = state if kept.edge == "step" else without_oldest(state, kept.ring - 1, kept.sinks)
            span = joined(self.read(old, k), new_span(k, v, where))
        if kept.in_cache:
            # Without a reset all the sinks that a query may see lie, once the chunk is stored, in their
            # slots.
            first = self.read(new, k, slice(0, kept.sinks)) if reset is None else None
            out, lse = self._with_sinks(q, scores, where, self._ring_start(state), span, first)
        else:
            out, lse = self._near(scores.rotary(q, where.positions), where, span, scores, sinks=kept.sinks)
        out = only_valid(out, where)
        if kept.ends or self.held(state) < self.all_slots:  # a state made for fewer steps ends with these
            out, lse = beyond_is_nan(out, lse, where.positions >= self.held(state))
        return out, lse, new

    def read(self, state: CacheState, like: Array, slots: slice = slice(None)) -> Span:
        """What is stored in `slots`, in the dtype of `like` where the storage keeps codes."""
        return stored_span(state, slots, lambda kept: self.storage.decode(kept, like.dtype))

    def store(
        self, state: CacheState, k: Keys, v: Values, where: Segments, reset: Booleans | None
    ) -> CacheState:
        """`state` after a chunk of rotated keys and values."""
        kept, place = self.retention, where.positions - self.retention.sinks
        ring = self.held(state) - kept.sinks if kept.ends else kept.ring
        slots = jnp.where(place < 0, where.positions, kept.sinks + place % ring)
        # Of a chunk longer than the ring only the steps that survive it are stored: two writes to one slot
        # would race. What ends keeps the first ones.
        survives = (place < ring) if kept.ends else where.positions >= where.length[:, None] - ring
        leaf = jax.tree.leaves(state.k)[0]
        k, v = (self.storage.encode(x, leaf.dtype) for x in (k, v))
        return store(state, k, v, where, slots, survives | (place < 0), reset)

    def _whole(
        self,
        q: Queries,
        k: Keys,
        v: Values,
        reset: Booleans | None,
        valid: Booleans | None,
        scores: Scores,
    ) -> tuple[Array, Array]:
        """The parallel form: whole sequences, nothing stored."""
        kept, simple = self.retention, reset is None and valid is None
        where = segments(q.shape[:2], 0, reset, valid)
        k, v = self.storage.seen(scores.rotary(k, where.positions)), self.storage.seen(v)
        span = new_span(k, v, where)
        if kept.in_cache:
            start = jnp.full(q.shape[:1], kept.sinks)
            first = Span(*(x[:, : kept.sinks] for x in span[:3]), None) if simple else None
            return self._with_sinks(q, scores, where, start, span, first)
        q = scores.rotary(q, where.positions)
        if simple and kept.apart(where.positions) is None:
            return kernels.attention(q, k, v, **scores.limits, **self._limits(kept.sinks))
        return self._near(q, where, span, scores, sinks=kept.sinks)

    def _limits(self, sinks: int = 0) -> dict[str, Any]:
        """The bounds that `kernels.attention` is told; under "call" what is stored is what is seen."""
        if self.retention.visible is None or self.retention.edge == "call":
            return {}
        return {"window": self.retention.visible, "sinks": sinks}

    def _near(
        self, q: Queries, where: Segments, span: Span, scores: Scores, sinks: int = 0
    ) -> tuple[Array, Array]:
        """Attention of turned queries over a span, within the bounds of the retention."""
        kept = self.retention
        if kept.apart(where.positions) is not None:
            # Steps see each other if they are of one sequence and of one group: one number says both.
            there = (span.positions != NEVER).astype(jnp.int32)
            ids = there if span.segments is None else span.segments
            own = where.last[:, None] if span.segments is None else 1
            ids = ids * own
            span = span._replace(segments=_grouped(kept, ids, span.positions))
            where = where._replace(ids=_grouped(kept, where.ids, where.positions))
        return attend(q, where.positions, where, span, scores, **self._limits(sinks))

    def _with_sinks(
        self,
        q: Queries,
        scores: Scores,
        where: Segments,
        start: Int[Array, " b"],
        span: Span,
        first: Span | None,
    ) -> tuple[Array, Array]:
        """Attention over the ring at absolute distances, merged with attention over the sinks from the
        query's place in the cache.

        `start` [b]: the first position behind the sinks that the state still holds; a fresh sequence starts
        behind its sinks. `first`: the sinks, where they lie by themselves; else they are among `span`.
        """
        kept, p = self.retention, where.positions
        first_seen = kept.first_seen(p - kept.sinks) + kept.sinks if kept.edge == "step" else p * 0
        place = place_in_cache(p, where.ids, start, kept.sinks, first_seen)
        ring = span._replace(positions=jnp.where(span.positions >= kept.sinks, span.positions, NEVER))
        near = self._near(scores.rotary(q, p), where, ring, scores)
        turned = scores.rotary(q, place)
        stored, chunk = (None, span) if first is None else (first, None)
        return merge(*near, *attend_sinks(turned, where, scores, kept.sinks, stored, chunk))

    def _ring_start(self, state: CacheState) -> Int[Array, " b"]:
        """The first position behind the sinks that is stored; the next to come where none is."""
        sinks = self.retention.sinks
        behind = jnp.where(state.positions >= sinks, state.positions, NEVER).min(axis=1)
        return jnp.maximum(sinks, jnp.minimum(behind, state.length))

    def rewind(self, state: CacheState, steps: Counts, words: str) -> CacheState:
        """The state `steps` steps ago; ValueError where the ring has overwritten what a query would see
        there. What was dropped for a turn stays dropped."""
        kept, length = self.retention, earlier(state, steps)
        if not kept.ends:
            if kept.turn is None:
                needed = jnp.maximum(kept.first_seen(length - kept.sinks) + kept.sinks, kept.sinks)
                gone = (state.length - kept.ring > needed) & (length > kept.sinks)
            else:  # as many as the ring holds: it may have had more
                gone = (state.length - self._ring_start(state) >= kept.ring) & (length < state.length)
            if bool(jnp.any(gone)):
                raise UserError(
                    f"steps={jnp.asarray(steps).tolist()} cannot be taken back: {words} has overwritten "
                    "the keys "
                    "before them"
                )
        return forget_from(state, length)

    def adopt(self, state: CacheState, words: str) -> CacheState:
        """A state that enters from outside; that of a smaller cache without end is taken over: what it holds
        lies where it would lie here. ValueError where it lies elsewhere."""
        kept, slot = self.retention, jnp.arange(self.held(state))[None]
        ring = slot
        if not kept.ends:
            last = state.length[:, None] - 1  # the newest step of each slot of the ring
            ring = last - (last - slot) % kept.ring  # slot - sinks = (position - sinks) % ring
        places = jnp.where(slot < kept.sinks, slot, ring)
        check_layout(words, state, places, newest=kept.turn is None)
        if kept.ends:
            state = self.resize(state, max(self.slots_for(self.held(state)), self.held(state)))
        return state


def _grouped(kept: Any, ids: Int[Array, "b n"], positions: Int[Array, "b n"]) -> Int[Array, "b n"]:
    place = jnp.where(positions == NEVER, 0, positions) - kept.sinks
    return jnp.where(ids > 0, ids * _APART + kept.apart(place), 0)


def without_oldest(state: CacheState, recent: Int[Array, " b"] | int, sinks: int) -> CacheState:
    """`state` without what is neither a sink nor one of the last `recent` steps."""
    gone = (state.positions >= sinks) & (state.positions < (state.length - recent)[:, None])
    return state._replace(positions=jnp.where(gone, NEVER, state.positions))
