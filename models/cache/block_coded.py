"""Blocks of steps that share scales, so that a block is no piece of memory by itself."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from seqlab.models.cache.block_choice import Candidates, Choice, MoBAState, behind_sinks, resized_sums
from seqlab.models.cache.common import Scores, earlier
from seqlab.shapes import Counts, Keys, LogSumExp, Queries, Values, accumulator
from seqlab.shapes import Steps as Booleans
from seqlab.state import Segments, mask_steps, segments


class Picked(NamedTuple):
    """The blocks that each query reads, its own among them: their numbers `blocks` [b, t, h, c], -1 for
    none."""

    blocks: Int[Array, "b t h c"]
    choice: Choice

    def sees(self, places: Int[Array, "b e"]) -> Bool[Array, "b t h e"]:
        """Whether the steps at `places` behind the sinks are in these blocks."""
        block = (places // self.choice.block)[:, None, None, None]
        return (self.blocks[..., None] == block).any(3)


@dataclasses.dataclass(frozen=True)
class CodedBlocks:
    """A choice of blocks over steps that `kept` keeps in groups: `kept.attend` is told the blocks that each
    query reads. Blocks are chosen by the means of their exact keys."""

    kept: Any
    choice: Choice
    state_type: ClassVar[type] = MoBAState

    @property
    def all_slots(self) -> int:
        return self.kept.all_slots

    def _blocks(self, slots: int) -> int:
        """How many blocks a state with so many slots knows the sums of."""
        if self.choice.stored is not None and slots == self.all_slots:
            return self.choice.stored
        return -(-slots // self.choice.block)

    def init_state(
        self, batch: int, kv_heads: int, width: int, dtype: jax.typing.DTypeLike, v_width: int
    ) -> MoBAState:
        cache = self.kept.init_state(batch, kv_heads, width, dtype, v_width)
        sums = jnp.zeros((batch, self._blocks(self.all_slots), kv_heads, width), accumulator(dtype))
        return MoBAState(cache, sums)

    def held(self, state: MoBAState) -> int:
        return self.kept.held(state.cache)

    def slots_for(self, steps: int) -> int:
        return self.kept.slots_for(steps)

    def resize(self, state: MoBAState, slots: int) -> MoBAState:
        return MoBAState(self.kept.resize(state.cache, slots), resized_sums(state.sums, self._blocks(slots)))

    def adopt(self, state: MoBAState, words: str) -> MoBAState:
        return MoBAState(self.kept.adopt(state.cache, words), state.sums)

    def rewind(self, state: MoBAState, steps: Counts, words: str) -> MoBAState:
        sinks = self.kept.retention.sinks
        length = jnp.maximum(earlier(state.cache, steps) - sinks, 0)
        cache = self.kept.rewind(state.cache, steps, words)
        k, places = self.kept.newest(cache)
        mine = (places >= length[:, None] // self.choice.block * self.choice.block) & (places >= 0)
        sums = self.choice.rewound(state.sums, length, k, mine)
        same = (cache.length == state.cache.length)[:, None, None, None]
        return MoBAState(cache, jnp.where(same, state.sums, sums))

    def attend(
        self,
        q: Queries,
        k: Keys,
        v: Values,
        state: MoBAState | None,
        reset: Booleans | None,
        valid: Booleans | None,
        scores: Scores,
    ) -> tuple[Float[Array, "b t h v"], LogSumExp, MoBAState | None]:
        """Out [b, t, h, v], its log-sum-exp and the new state, see `Policy`."""
        q, k, v = (mask_steps(x, valid) for x in (q, k, v))
        sinks, length = self.kept.retention.sinks, 0 if state is None else state.cache.length
        where = segments(q.shape[:2], length, reset, valid)
        behind, before = behind_sinks(where, sinks), jnp.maximum(jnp.asarray(length) - sinks, 0)
        turned_q, turned_k = scores.rotary(q, where.positions), scores.rotary(k, where.positions)
        closed = self._closed(turned_k, behind, before, None if state is None else state.sums)
        if state is not None:
            both = zip(self.choice.held(state.sums, before)[2:], closed[2:], strict=True)
            closed = Candidates(None, None, *(jnp.concatenate(pair, axis=1) for pair in both))
        chosen = self.choice.choose(turned_q, closed, behind)
        index = jnp.take_along_axis(closed.index[:, None, None], jnp.maximum(chosen, 0), axis=3)
        own = jnp.broadcast_to((behind.positions // self.choice.block)[:, :, None, None], (*q.shape[:3], 1))
        picked = Picked(jnp.concatenate([own, jnp.where(chosen < 0, -1, index)], axis=3), self.choice)
        cache = None if state is None else state.cache
        out, lse, cache = self.kept.attend(q, k, v, cache, reset, valid, scores, picked)
        if state is None:
            return out, lse, None
        return out, lse, MoBAState(cache, self.choice.summed(state.sums, before, turned_k, behind))

    def _closed(self, k: Keys, where: Segments, before: Int[Array, " b"], held: Array | None) -> Candidates:
        """The sums of the blocks that end in a chunk before its last step, side by side."""
        (b, t), block = k.shape[:2], self.choice.block
        rows, there = jnp.arange(b)[:, None], where.ids > 0
        n = (t - 2) // block + 1 if t > 1 and held is not None else max(t - 1, 0) // block
        # 0: the block that was open.
        rank = jnp.cumsum(there & (where.positions % block == 0), axis=1, dtype=jnp.int32)
        ends = there & (where.positions % block == block - 1)
        number = jnp.cumsum(ends, axis=1) - ends

        def at_ends(values: Array) -> Array:
            return jnp.zeros((b, n), jnp.int32).at[rows, jnp.where(ends, number, n)].set(values, mode="drop")

        ranks, ids = at_ends(rank), at_ends(where.ids)
        own = jnp.take_along_axis(jnp.pad(ranks, ((0, 0), (0, 1))), jnp.minimum(number, n), axis=1)
        mine = there & (rank == own)
        shape = (b, n, *k.shape[2:])
        sums = jnp.zeros(shape, accumulator(k.dtype))
        if held is not None and n:
            at = jnp.arange(b), jnp.maximum(before, 0) // block % held.shape[1]
            goes_on = (ids[:, 0] == 1) & (ranks[:, 0] == 0)
            sums = sums.at[:, 0].set(jnp.where(goes_on[:, None, None], held[at], 0))
        sums = sums.at[rows, jnp.where(mine, number, n)].add(k.astype(sums.dtype), mode="drop")
        return Candidates(None, None, sums, ids, at_ends(where.positions // block))
