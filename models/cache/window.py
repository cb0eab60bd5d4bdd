"""The first keys and the last ones, in constant memory: sliding windows, attention sinks, StreamingLLM."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seqlab.checks import UserError, check_at_least, check_choice, check_positive
from seqlab.kernels.attention import merge
from seqlab.models.cache.common import (
    NEVER,
    CacheState,
    Scores,
    Span,
    attend,
    beyond_is_nan,
    check_layout,
    earlier,
    empty,
    forget_from,
    joined,
    new_span,
    only_valid,
    store,
    stored_span,
    with_slots,
)
from seqlab.models.cache.full import parallel
from seqlab.models.cache.policy import Policy, slots_for
from seqlab.shapes import Keys, LogSumExp, Queries, Steps, Values
from seqlab.state import Segments, segments


@dataclasses.dataclass(frozen=True)
class Window(Policy):
    """The first `sinks` keys of the sequence and the last `window`, the query's own included, in a ring
    buffer.

    Args:
      window: W, how many keys a query sees besides the sinks, its own included.
      sinks: how many first keys stay (StreamingLLM, arXiv 2309.17453).
      softcap: deprecated, give it to `Attention`.
      positions: "cache" counts places in the cache, as StreamingLLM does, so that the sinks are never further
        away than sinks + window, however long the stream. "absolute" counts steps of the stream: past about
        1.5 times the length that a rotary model was trained on its sinks do more harm than good. Distances
        within the window are the same in both. Keys are stored rotated once: the sinks are read with a second
        rotation of the query, at its place in the cache.
      edge: "step" hides from every query what is older than its window. "call" reproduces the published code
        of StreamingLLM and DuoAttention: all queries of a call see all that was cached before it, and the
        call; results then depend on how a stream is cut.
      turn: the most steps of a turn, with which the cache is that of the published chat: nothing is dropped while
        a turn lasts. `make_room`, which `stream_generate` calls for a state that goes on, drops all but the sinks
        and the last keys before it, so that these and the turn are sinks + window at most, or the sinks and
        the turn where it alone is longer than the window. None: keys are dropped step by step.

    The published window of r keys before the query is W = r + 1: see `published`.
    """

    window: int
    sinks: int = 0
    softcap: float | None = None
    positions: str = "cache"
    edge: str = "step"
    turn: int | None = None
    state_type: ClassVar[type] = CacheState

    def __post_init__(self):
        check_positive("window", self.window)
        check_at_least("sinks", self.sinks, 0)
        check_choice(self.positions, ("absolute", "cache"), "positions")
        check_choice(self.edge, ("step", "call"), "edge")
        if self.turn is not None:
            check_positive("turn", self.turn)
            object.__setattr__(self, "edge", "call")  # what is stored is what is seen
        if not self.sinks:  # nothing is read from another place: both are one policy
            object.__setattr__(self, "positions", "cache")

    @classmethod
    def published(cls, sinks: int, recent: int) -> "Window":
        """StreamingLLM's own numbers: `recent` keys are kept between steps, so a query sees one more,
        itself."""
        return cls(recent + 1, sinks)

    @property
    def exact(self) -> bool:
        return self.edge == "step"

    def __str__(self) -> str:
        sinks = f"sinks({self.sinks})+" if self.sinks else ""
        edge = ", edge=call" if self.edge == "call" else ""
        option = edge if self.turn is None else f", turn={self.turn}"
        return f"{sinks}window({self.window}{option})" + ("+absolute" if self.positions == "absolute" else "")

    @property
    def span(self) -> int:
        return self.sinks + self.ring

    @property
    def ring(self) -> int:
        """Slots behind the sinks: of the window, or of a turn that is longer."""
        return max(self.window, self.turn or 0)

    @property
    def reach(self) -> int | None:
        return None if self.positions == "absolute" else self.span

    def init_state(
        self,
        batch: int,
        kv_heads: int,
        width: int,
        dtype: jax.typing.DTypeLike,
        v_width: int | None = None,
    ) -> CacheState:
        return empty(batch, self.span, kv_heads, width, dtype, v_width)

    def __call__(
        self,
        q: Queries,
        k: Keys,
        v: Values,
        state: CacheState | None,
        reset: Steps | None,
        valid: Steps | None,
        scores: Scores,
    ) -> tuple[Float[Array, "b t h v"], LogSumExp, CacheState | None]:
        if state is None:
            return (*self._whole(q, k, v, reset, valid, scores), None)
        where = segments(q.shape[:2], state.length, reset, valid)
        k = scores.rotary(k, where.positions)
        new = self._stored(state, k, v, where, reset)
        # The ring after the store holds exactly what the one query sees: no copy of the cache is needed.
        if q.shape[1] == 1:
            span = stored_span(new)._replace(segments=None)
        else:
            old = state if self.edge == "step" else _without_oldest(state, self.ring - 1, self.sinks)
            span = joined(stored_span(old), new_span(k, v, where))
        if self._in_place:
            # Without a reset all the sinks that a query may see lie, once the chunk is stored, in their slots.
            first = stored_span(new, slice(0, self.sinks))._replace(segments=None) if reset is None else None
            start = _ring_start(state, self.sinks)
            out, lse = self._with_sinks_in_place(q, scores, where, start, span, first)
        else:
            q = scores.rotary(q, where.positions)
            out, lse = attend(q, where.positions, where, span, scores, **self._limits())
        out = only_valid(out, where)
        if self.held(state) < self.span:  # a state that was made for fewer steps ends with these
            out, lse = beyond_is_nan(out, lse, where.positions >= self.held(state))
        return out, lse, new

    def _whole(
        self, q: Queries, k: Keys, v: Values, reset: Steps | None, valid: Steps | None, scores: Scores
    ) -> tuple[Float[Array, "b t h v"], LogSumExp]:
        """The parallel form."""
        if not self._in_place:
            return parallel(q, k, v, reset, valid, scores, **self._limits())
        where = segments(q.shape[:2], 0, reset, valid)
        span = new_span(scores.rotary(k, where.positions), v, where)
        start = jnp.full(q.shape[:1], self.sinks)
        simple = reset is None and valid is None
        first = Span(*(x[:, : self.sinks] for x in span[:3]), None) if simple else None
        return self._with_sinks_in_place(q, scores, where, start, span, first)

    @property
    def _in_place(self) -> bool:
        """Whether sinks are read from another place than the window."""
        return self.positions == "cache" and self.sinks > 0

    def _limits(self) -> dict:
        """The bounds that `kernels.attention` is told; under "call" what is stored is what is seen."""
        return {"window": self.window, "sinks": self.sinks} if self.edge == "step" else {}

    def _with_sinks_in_place(
        self,
        q: Queries,
        scores: Scores,
        where: Segments,
        start: Int[Array, " b"],
        span: Span,
        first: Span | None,
    ) -> tuple[Float[Array, "b t h v"], LogSumExp]:
        """Attention over the ring at absolute distances, merged with attention over the sinks from the
        query's place in the cache.

        `start` [b]: the first position behind the sinks that the state still holds; a fresh sequence starts
        behind its sinks. `first`: the sinks, where they lie by themselves; else they are among `span`.
        """
        p = where.positions
        place = place_in_cache(p, where.ids, start, self.sinks, self.window if self.edge == "step" else None)
        ring = span._replace(positions=jnp.where(span.positions >= self.sinks, span.positions, NEVER))
        if first is None:
            first = span._replace(positions=jnp.where(span.positions < self.sinks, span.positions, NEVER))
        window = {"window": self.window} if self.edge == "step" else {}
        near = attend(scores.rotary(q, p), p, where, ring, scores, **window)
        return merge(*near, *attend(scores.rotary(q, place), p, where, first, scores))

    def _stored(self, state: CacheState, k, v, where: Segments, reset: Steps | None) -> CacheState:
        ring = self.sinks + (where.positions - self.sinks) % self.ring
        slots = jnp.where(where.positions < self.sinks, where.positions, ring)
        # Of a chunk longer than the ring only the steps that survive it are stored: two writes to one slot
        # would race.
        survives = (where.positions < self.sinks) | (where.positions >= where.length[:, None] - self.ring)
        return store(state, k, v, where, slots, survives, reset)

    def held(self, state: CacheState) -> int:
        return state.positions.shape[1]

    def slots_for(self, steps: int) -> int:
        return slots_for(steps, self.span)

    def resize(self, state: CacheState, slots: int) -> CacheState:
        return with_slots(state, slots)

    def adopt(self, state: CacheState) -> CacheState:
        self.check(state)
        slot = jnp.arange(self.held(state))[None]
        last = state.length[:, None] - 1  # the newest step of each slot of the ring
        ring = last - (last - slot) % self.ring  # slot - sinks = (position - sinks) % ring
        check_layout(self, state, jnp.where(slot < self.sinks, slot, ring), newest=self.turn is None)
        return state

    def evict(self, state: CacheState, recent: int) -> CacheState:
        """`state` with the sinks and the last `recent` keys alone: room for what is to come, as StreamingLLM
        makes it before a turn."""
        return _without_oldest(state, recent, self.sinks)

    def make_room(self, state: CacheState, steps: Int[Array, " b"] | int) -> CacheState:
        """`state` with room for a turn of `steps` steps per row, where there is a `turn`: keys behind the sinks
        are dropped, the oldest first, until those that stay and the turn are sinks + window.

        Raises:
          ValueError: the turn is longer than `turn`.
        """
        if self.turn is None:
            return state
        if not isinstance(steps, jax.core.Tracer) and bool(jnp.any(jnp.asarray(steps) > self.turn)):
            raise UserError(
                f"steps={jnp.asarray(steps).tolist()} are more than the {self.turn} of a turn of {self}: give "
                "window(..., turn=) as many as a prompt and its answer may have"
            )
        held = jnp.sum(state.positions != NEVER, axis=1)
        dropped = _without_oldest(state, jnp.maximum(self.window - steps, 0), self.sinks)
        full = held + steps > self.sinks + self.window
        return state._replace(positions=jnp.where(full[:, None], dropped.positions, state.positions))

    def rewind(self, state: CacheState, steps: Int[Array, " b"]) -> CacheState:
        """The state `steps` steps ago; ValueError where the ring has overwritten what a query would see
        there. What `make_room` has dropped stays dropped."""
        length = earlier(state, steps)
        if self.turn is None:
            needed = jnp.maximum(length - self.window + 1, self.sinks)
            gone = (state.length - self.window > needed) & (length > self.sinks)
        else:  # as many as the ring holds: it may have had more
            gone = (state.length - _ring_start(state, self.sinks) >= self.ring) & (length < state.length)
        if bool(jnp.any(gone)):
            raise UserError(
                f"steps={jnp.asarray(steps).tolist()} cannot be taken back: {self} has overwritten the keys "
                "before them"
            )
        return forget_from(state, length)


def place_in_cache(
    positions: Int[Array, "b t"],
    ids: Int[Array, "b t"],
    start: Int[Array, " b"],
    sinks: int,
    window: int | None,
) -> Int[Array, "b t"]:
    """The place of each query among the sinks and the ring that it sees, counted from 0.

    `start` [b]: the first position behind the sinks that the state holds, of the sequence with id 1; the ring
    of a fresh one begins behind its sinks. `window`: how many keys of the ring a query sees, None for all.
    """
    first = jnp.where(ids == 1, start[:, None], sinks)
    first = first if window is None else jnp.maximum(first, positions - window + 1)
    return jnp.where(positions < sinks, positions, sinks + positions - first)


def _without_oldest(state: CacheState, recent: Int[Array, " b"] | int, sinks: int) -> CacheState:
    """`state` without what is neither a sink nor one of the last `recent` steps."""
    gone = (state.positions >= sinks) & (state.positions < (state.length - recent)[:, None])
    return state._replace(positions=jnp.where(gone, NEVER, state.positions))


def _ring_start(state: CacheState, sinks: int) -> Int[Array, " b"]:
    """The first position behind the sinks that is stored; the next to come where none is."""
    behind = jnp.where(state.positions >= sinks, state.positions, NEVER).min(axis=1)
    return jnp.maximum(sinks, jnp.minimum(behind, state.length))
