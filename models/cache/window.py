"""The first keys and the last ones, in constant memory: sliding windows, attention sinks, StreamingLLM."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from seqlab.checks import UserError, check_at_least, check_choice, check_positive
from seqlab.models.cache.common import NEVER, CacheState
from seqlab.models.cache.exact import without_oldest
from seqlab.models.cache.parts import Term, Word
from seqlab.models.cache.product import Retention
from seqlab.shapes import Counts


@dataclasses.dataclass(frozen=True)
class Window(Retention):
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
      turn: the most steps of a turn, with which the cache is that of the published chat: nothing is dropped
        while a turn lasts. `make_room`, which `stream_generate` calls for a state that goes on, drops all but
        the sinks and the last keys before it, so that these and the turn are sinks + window at most, or the
        sinks and the turn where it alone is longer than the window. None: keys are dropped step by step.

    The published window of r keys before the query is W = r + 1: see `published`.
    """

    window: int
    sinks: int = 0
    softcap: float | None = None
    positions: str = "cache"
    edge: str = "step"
    turn: int | None = None
    words: ClassVar = {"window": Word("window(n)", ("edge", "turn"))}

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
    def ring(self) -> int:
        """Slots behind the sinks: of the window, or of a turn that is longer."""
        return max(self.window, self.turn or 0)

    @property
    def visible(self) -> int:
        return self.window

    @classmethod
    def of_words(cls, name: str, term: Term, modifiers: dict[str, Term]) -> "Window":
        if "grows" in modifiers:
            raise UserError("cache: grows and window do not go together: a window has no end")
        if "absolute" in modifiers and "in_place" in modifiers:
            raise UserError(
                "cache: words ask for absolute positions and for those in the cache at once: absolute or "
                "in_place"
            )
        if "absolute" in modifiers and "sinks" not in modifiers:
            raise UserError(
                f"cache: absolute changes nothing in 'window({term.numbers[0]})+absolute', which has no sinks"
            )
        sinks = modifiers["sinks"].numbers[0] if "sinks" in modifiers else 0
        positions = "absolute" if "absolute" in modifiers else "cache"
        return cls(term.numbers[0], sinks, positions=positions, **term.options)

    def text(self) -> str:
        sinks = f"sinks({self.sinks})+" if self.sinks else ""
        edge = ", edge=call" if self.edge == "call" else ""
        return f"{sinks}window({self.window}{edge if self.turn is None else f', turn={self.turn}'})"

    def endings(self) -> tuple[str, ...]:
        return ("absolute",) if self.positions == "absolute" else ()

    def evict(self, state: CacheState, recent: int) -> CacheState:
        """`state` with the sinks and the last `recent` keys alone: room for what is to come, as StreamingLLM
        makes it before a turn."""
        return without_oldest(state, recent, self.sinks)

    def make_room(self, state: CacheState, steps: Counts) -> CacheState:
        """`state` with room for a turn of `steps` steps per row, where there is a `turn`: keys behind the
        sinks are dropped, the oldest first, until those that stay and the turn are sinks + window.

        Raises:
          ValueError: the turn is longer than `turn`.
        """
        if self.turn is None:
            return state
        if not isinstance(steps, jax.core.Tracer) and bool(jnp.any(jnp.asarray(steps) > self.turn)):
            raise UserError(
                f"steps={jnp.asarray(steps).tolist()} are more than the {self.turn} of a turn of {self}: "
                "give "
                "window(..., turn=) as many as a prompt and its answer may have"
            )
        held = jnp.sum(state.positions != NEVER, axis=1)
        dropped = without_oldest(state, jnp.maximum(self.window - steps, 0), self.sinks)
        full = held + steps > self.sinks + self.window
        return state._replace(positions=jnp.where(full[:, None], dropped.positions, state.positions))
