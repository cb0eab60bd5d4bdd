"""The cache that keeps everything, up to a capacity."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seqlab import kernels
from seqlab.checks import check_positive
from seqlab.models.cache.common import (
    CacheState,
    Scores,
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
from seqlab.models.cache.policy import Policy, slots_for
from seqlab.shapes import Keys, LogSumExp, Queries, Steps, Values
from seqlab.state import segments


@dataclasses.dataclass(frozen=True)
class Full(Policy):
    """Every key is kept, up to `capacity` steps of one sequence; attention beyond it gives NaN, never a wrong
    number.

    Args:
      capacity: steps of a sequence that are kept.
      softcap: deprecated, give it to `Attention`.
      grows: whether a stream goes on beyond the capacity: a host that sees the end coming gives the state more
        slots (`with_room`; `stream_generate` does), so that only memory ends it.
    """

    capacity: int = 4096
    softcap: float | None = None
    grows: bool = False
    state_type: ClassVar[type] = CacheState

    def __post_init__(self):
        check_positive("capacity", self.capacity)

    def __str__(self) -> str:
        return f"full({self.capacity})" + ("+grows" if self.grows else "")

    @property
    def span(self) -> int:
        return self.capacity

    @property
    def reach(self) -> int | None:
        return None if self.grows else self.capacity

    def init_state(
        self,
        batch: int,
        kv_heads: int,
        width: int,
        dtype: jax.typing.DTypeLike,
        v_width: int | None = None,
    ) -> CacheState:
        return empty(batch, self.capacity, kv_heads, width, dtype, v_width)

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
            return (*parallel(q, k, v, reset, valid, scores), None)
        where = segments(q.shape[:2], state.length, reset, valid)
        q, k = scores.rotary(q, where.positions), scores.rotary(k, where.positions)
        slots = self.held(state)
        new = store(state, k, v, where, where.positions, where.positions < slots, reset)
        # With one sequence a row the cache holds, once the chunk is stored, all that the queries may see.
        span = (
            stored_span(new)._replace(segments=None)
            if reset is None
            else joined(stored_span(state), new_span(k, v, where))
        )
        out, lse = attend(q, where.positions, where, span, scores)
        return (*beyond_is_nan(only_valid(out, where), lse, where.positions >= slots), new)

    def held(self, state: CacheState) -> int:
        return state.positions.shape[1]

    def slots_for(self, steps: int) -> int:
        return slots_for(steps, self.capacity, self.grows)

    def resize(self, state: CacheState, slots: int) -> CacheState:
        return with_slots(state, slots)

    def adopt(self, state: CacheState) -> CacheState:
        """A smaller full cache's state is taken over: what it holds lies where it would lie here."""
        if isinstance(state, CacheState):
            check_layout(self, state, jnp.arange(self.held(state))[None])
            state = self.resize(state, max(self.slots_for(self.held(state)), self.held(state)))
        return super().adopt(state)

    def rewind(self, state: CacheState, steps: Int[Array, " b"]) -> CacheState:
        return forget_from(state, earlier(state, steps))


def parallel(q, k, v, reset, valid, scores, **limits) -> tuple[Float[Array, "b t h v"], LogSumExp]:
    """Training: whole sequences, nothing stored."""
    if reset is None and valid is None:
        positions = jnp.broadcast_to(jnp.arange(q.shape[1], dtype=jnp.int32), q.shape[:2])
        q, k = scores.rotary(q, positions), scores.rotary(k, positions)
        return kernels.attention(q, k, v, **scores.limits, **limits)
    where = segments(q.shape[:2], 0, reset, valid)
    q, k = scores.rotary(q, where.positions), scores.rotary(k, where.positions)
    return attend(q, where.positions, where, new_span(k, v, where), scores, **limits)
