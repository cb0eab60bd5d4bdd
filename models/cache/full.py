"""The cache that keeps everything, up to a capacity."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seqlab import kernels
from seqlab.checks import check_positive
from seqlab.models.cache.common import (
    CacheState,
    Rotary,
    attend,
    doubled,
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
from seqlab.shapes import Keys, LogSumExp, Queries, Steps, Values
from seqlab.state import segments


@dataclasses.dataclass(frozen=True)
class Full:
    """Every key is kept, up to `capacity` steps of one sequence; attention beyond it gives NaN, never a wrong
    number.

    Where the cache `grows`, a host that sees it coming doubles the slots of a state (`with_room`;
    `stream_generate` does): sequences then have no end but that of memory, and programs are compiled anew at
    doublings only.
    """

    capacity: int = 4096
    softcap: float | None = None
    grows: bool = False

    exact = True

    def __post_init__(self):
        check_positive("capacity", self.capacity)

    def __str__(self) -> str:
        return f"full({self.capacity})" + "+grows" * self.grows

    @property
    def span(self) -> int:
        """How many steps it remembers at most."""
        return self.capacity

    def init_state(self, batch: int, kv_heads: int, width: int, dtype: jax.typing.DTypeLike) -> CacheState:
        return empty(batch, self.capacity, kv_heads, width, dtype)

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
            return (*parallel(q, k, v, reset, valid, rotary, softcap=self.softcap), None)
        where = segments(q.shape[:2], state.length, reset, valid)
        q, k = rotary(q, where.positions), rotary(k, where.positions)
        capacity = state.positions.shape[1]
        new = store(state, k, v, where, where.positions, where.positions < capacity, reset)
        # With one sequence a row the cache holds, once the chunk is stored, all that the queries may see.
        span = (
            stored_span(new)._replace(segments=None)
            if reset is None
            else joined(stored_span(state), new_span(k, v, where))
        )
        out, lse = attend(q, where.positions, where, span, softcap=self.softcap)
        beyond = (where.positions >= capacity)[:, :, None]
        return (
            jnp.where(beyond[..., None], jnp.nan, only_valid(out, where)),
            jnp.where(beyond, jnp.nan, lse),
            new,
        )

    def with_room(self, state: CacheState, steps: int) -> CacheState:
        """`state` with slots for sequences of `steps` steps: its own, doubled as often as it takes. Only of a
        cache that grows."""
        slots = state.positions.shape[1]
        return state if not self.grows or steps <= slots else with_slots(state, doubled(slots, steps))

    def rewind(self, state: CacheState, steps: Int[Array, " b"]) -> CacheState:
        """The state `steps` steps ago, row by row."""
        return forget_from(state, earlier(state, steps))


def parallel(q, k, v, reset, valid, rotary, **limits):
    """Training: whole sequences, nothing stored."""
    if reset is None and valid is None:
        positions = jnp.broadcast_to(jnp.arange(q.shape[1], dtype=jnp.int32), q.shape[:2])
        return kernels.attention(rotary(q, positions), rotary(k, positions), v, **limits)
    where = segments(q.shape[:2], 0, reset, valid)
    return attend(
        rotary(q, where.positions),
        where.positions,
        where,
        new_span(rotary(k, where.positions), v, where),
        **limits,
    )
