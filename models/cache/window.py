"""The first keys and the last ones, in constant memory: sliding windows, attention sinks, StreamingLLM."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seqlab.checks import UserError, check_choice, check_positive
from seqlab.kernels.attention import merge
from seqlab.models.cache.common import (
    NEVER,
    CacheState,
    Rotary,
    Span,
    attend,
    earlier,
    empty,
    forget_from,
    joined,
    new_span,
    only_valid,
    store,
    stored_span,
)
from seqlab.models.cache.full import parallel
from seqlab.shapes import Keys, LogSumExp, Queries, Steps, Values
from seqlab.state import Segments, segments


@dataclasses.dataclass(frozen=True)
class Window:
    """The first `sinks` keys of the sequence and the last `window`, the query's own included, in a ring
    buffer.

    Args:
      window: W, how many keys a query sees besides the sinks, its own included.
      sinks: how many first keys stay (StreamingLLM, arXiv 2309.17453).
      softcap: bound of the logits.
      positions: "absolute" counts steps of the stream; "cache" counts places in the cache, so that the sinks
        are never further away than sinks + window, however long the stream. Distances within the window are
        the same in both. Keys are stored rotated once: the sinks are read with a second rotation of the
        query, at its place in the cache.
      edge: "step" hides from every query what is older than its window. "call" reproduces the published code
        of StreamingLLM and DuoAttention: all queries of a call see all that was cached before it, and the
        call; results then depend on how a stream is cut.

    The published window of r keys before the query is W = r + 1: see `published`.
    """

    window: int
    sinks: int = 0
    softcap: float | None = None
    positions: str = "absolute"
    edge: str = "step"

    def __post_init__(self):
        check_positive("window", self.window)
        if self.sinks:
            check_positive("sinks", self.sinks)
        check_choice(self.positions, ("absolute", "cache"), "positions")
        check_choice(self.edge, ("step", "call"), "edge")

    @classmethod
    def published(cls, sinks: int, recent: int) -> "Window":
        """StreamingLLM's own numbers: `recent` keys are kept between steps, so a query sees one more,
        itself."""
        return cls(recent + 1, sinks, positions="cache")

    @property
    def exact(self) -> bool:
        return self.edge == "step"

    def __str__(self) -> str:
        return (f"sinks({self.sinks})+" if self.sinks else "") + f"window({self.window})"

    @property
    def span(self) -> int:
        """How many steps it remembers at most."""
        return self.sinks + self.window

    def init_state(self, batch: int, kv_heads: int, width: int, dtype: jax.typing.DTypeLike) -> CacheState:
        return empty(batch, self.sinks + self.window, kv_heads, width, dtype)

    def __call__(
        self,
        q: Queries,
        k: Keys,
        v: Values,
        state: CacheState | None,
        reset: Steps | None,
        valid: Steps | None,
        rotary: Rotary,
    ) -> tuple[Float[Array, "b t h v"], LogSumExp, CacheState | None]:
        if state is None:
            if not self._in_place:
                return (*parallel(q, k, v, reset, valid, rotary, **self._limits()), None)
            where = segments(q.shape[:2], 0, reset, valid)
            start = jnp.full(q.shape[:1], self.sinks)
            return (
                *self._with_sinks_in_place(
                    q, rotary, where, start, new_span(rotary(k, where.positions), v, where)
                ),
                None,
            )
        where = segments(q.shape[:2], state.length, reset, valid)
        k = rotary(k, where.positions)
        new = self._stored(state, k, v, where, reset)
        if (
            q.shape[1] == 1
        ):  # the ring after the store holds exactly what the one query sees: no copy of the cache is needed
            span = stored_span(new)._replace(segments=None)
        else:
            old = state if self.edge == "step" else _without_oldest(state, self.window - 1, self.sinks)
            span = joined(stored_span(old), new_span(k, v, where))
        if self._in_place:
            out, lse = self._with_sinks_in_place(q, rotary, where, _ring_start(state, self.sinks), span)
        else:
            out, lse = attend(rotary(q, where.positions), where.positions, where, span, **self._limits())
        return only_valid(out, where), lse, new

    @property
    def _in_place(self) -> bool:
        """Whether sinks are read from another place than the window."""
        return self.positions == "cache" and self.sinks > 0

    def _limits(self) -> dict:
        """What `kernels.attention` is told; under "call" what is stored is what is seen."""
        return {"softcap": self.softcap} | (
            {"window": self.window, "sinks": self.sinks} if self.edge == "step" else {}
        )

    def _with_sinks_in_place(
        self, q: Queries, rotary: Rotary, where: Segments, start: Int[Array, " b"], span: Span
    ):
        """Attention over the ring at absolute distances, merged with attention over the sinks from the
        query's place in the cache.

        `start` [b]: the first position behind the sinks that the state still holds; a fresh sequence starts
        behind its sinks.
        """
        p = where.positions
        first = jnp.where(where.ids == 1, start[:, None], self.sinks)  # of the ring, as the query sees it
        first = jnp.maximum(first, p - self.window + 1) if self.edge == "step" else first
        place = jnp.where(p < self.sinks, p, self.sinks + p - first)
        ring = span._replace(positions=jnp.where(span.positions >= self.sinks, span.positions, NEVER))
        if span.segments is None:  # the slots of a state, of which the sinks have the first ones
            sinks = Span(*(x[:, : self.sinks] for x in span[:3]), None)
        else:
            sinks = span._replace(positions=jnp.where(span.positions < self.sinks, span.positions, NEVER))
        window = {"window": self.window} if self.edge == "step" else {}
        near = attend(rotary(q, p), p, where, ring, softcap=self.softcap, **window)
        return merge(*near, *attend(rotary(q, place), p, where, sinks, softcap=self.softcap))

    def _stored(self, state: CacheState, k, v, where: Segments, reset: Steps | None) -> CacheState:
        ring = self.sinks + (where.positions - self.sinks) % self.window
        slots = jnp.where(where.positions < self.sinks, where.positions, ring)
        # Of a chunk longer than the ring only the steps that survive it are stored: two writes to one slot
        # would race.
        survives = (where.positions < self.sinks) | (where.positions >= where.length[:, None] - self.window)
        return store(state, k, v, where, slots, survives, reset)

    def evict(self, state: CacheState, recent: int) -> CacheState:
        """`state` with the sinks and the last `recent` keys alone: room for what is to come, as StreamingLLM
        makes it before a turn."""
        return _without_oldest(state, recent, self.sinks)

    def rewind(self, state: CacheState, steps: Int[Array, " b"]) -> CacheState:
        """The state `steps` steps ago; ValueError where the ring has overwritten what a query would see
        there."""
        length = earlier(state, steps)
        needed = jnp.maximum(length - self.window + 1, self.sinks)
        if bool(jnp.any((state.length - self.window > needed) & (length > self.sinks))):
            raise UserError(
                f"steps={jnp.asarray(steps).tolist()} cannot be taken back: {self} has overwritten the keys "
                "before them"
            )
        return forget_from(state, length)


def _without_oldest(state: CacheState, recent: int, sinks: int) -> CacheState:
    gone = (state.positions >= sinks) & (state.positions < (state.length - recent)[:, None])
    return state._replace(positions=jnp.where(gone, NEVER, state.positions))


def _ring_start(state: CacheState, sinks: int) -> Int[Array, " b"]:
    """The first position behind the sinks that is stored; the next to come where none is."""
    behind = jnp.where(state.positions >= sinks, state.positions, NEVER).min(axis=1)
    return jnp.maximum(sinks, jnp.minimum(behind, state.length))
