"""Mixture of block attention: a query reads its own block and the past blocks whose mean key it likes best
(MoBA, arXiv 2502.13189)."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seqlab import kernels
from seqlab.checks import UserError, check_positive
from seqlab.kernels.attention import merge
from seqlab.models.cache.block_choice import Candidates, Choice, MoBAState, behind_sinks, resized_sums
from seqlab.models.cache.block_coded import CodedBlocks
from seqlab.models.cache.common import (
    NEVER,
    CacheState,
    Scores,
    Span,
    attend,
    attend_sinks,
    beyond_is_nan,
    earlier,
    forget_from,
    joined,
    new_span,
    only_valid,
    place_in_cache,
)
from seqlab.models.cache.exact import Steps
from seqlab.models.cache.full import Full
from seqlab.models.cache.parts import Selection, Word
from seqlab.models.cache.product import Product, Retention
from seqlab.models.cache.window import Window
from seqlab.shapes import Counts, Keys, LogSumExp, Queries, Values, accumulator
from seqlab.shapes import Steps as Booleans
from seqlab.state import Segments, mask_steps, segments


@dataclasses.dataclass(frozen=True)
class Blocks(Selection):
    """A query at step i behind the sinks, in block β = i // block, reads the sinks, its own block up to
    itself, and all of the top_k - 1 blocks m < β that are kept with the largest q·mean(k of block m), each
    query head by itself; all of them where there are fewer. Nothing is differentiated through the choice.

    Args:
      block: keys a block.
      top_k: how many blocks a query reads, its own counted.
    """

    block: int = 512
    top_k: int = 3
    words: ClassVar = {"moba": Word("moba(block, top_k)")}

    def __post_init__(self):
        check_positive("block", self.block)
        check_positive("top_k", self.top_k)

    def text(self) -> str:
        return f"moba({self.block}, {self.top_k})"

    def over(self, kept: Any) -> Any:
        retention = kept.retention
        if retention.edge == "call":
            raise UserError(
                f"cache: {retention.text()} and {self.text()} do not go together: with edge=call or turn "
                "all that is "
                "stored is seen, where a query reads the blocks of its choice"
            )
        if retention.apart(jnp.zeros(1, jnp.int32)) is not None:
            raise UserError(
                f"cache: {retention.text()} and {self.text()} do not go together: both say which earlier "
                "blocks a "
                "query sees"
            )
        if retention.ring % self.block:
            name = "capacity" if retention.ends else "window"
            less = f" - {retention.sinks} sinks" if retention.ends and retention.sinks else ""
            raise UserError(
                f"cache: {name}{less} must hold whole blocks of {self.text()}, got {retention.text()}"
            )
        choice = Choice(self.block, self.top_k, None if retention.ends else retention.ring // self.block)
        return StepBlocks(kept, choice) if isinstance(kept, Steps) else CodedBlocks(kept, choice)


@dataclasses.dataclass(frozen=True, eq=False)
class MoBA(Product):
    """Blocks of a full cache or of a window: `Cache(Full(capacity), selection=Blocks(block, top_k))`, see
    `Blocks`.

    Args:
      block: keys a block. Blocks count from the start of the sequence.
      top_k: how many blocks a query sees, its own counted.
      capacity: steps of a sequence that are kept, a multiple of `block`; attention beyond gives NaN. None
        with `stored`.
      stored: blocks that are kept, the open one counted: constant memory without end. A query then chooses
        among the last `stored` blocks, in training too, and forgets what lies before them: the first tokens
        as well.
      grows: with a capacity, whether streams go on beyond it in more memory, see `Full`.
    """

    block: int = 512
    top_k: int = 3
    capacity: int | None = 4096
    stored: int | None = None
    grows: bool = False

    def __post_init__(self):
        check_positive("block", self.block)
        check_positive("top_k", self.top_k)
        if (self.capacity is None) == (self.stored is None):
            raise UserError(
                f"give capacity or stored, the other one None, got capacity={self.capacity}, "
                f"stored={self.stored}"
            )
        if self.stored is not None:
            check_positive("stored", self.stored)
            if self.grows:
                raise UserError(f"grows changes nothing where the last stored={self.stored} blocks are kept")
        elif check_positive("capacity", self.capacity) % self.block:
            raise UserError(f"capacity must be a multiple of block={self.block}, got {self.capacity}")

    @property
    def retention(self) -> Retention:
        if self.stored is None:
            return Full(self.capacity, grows=self.grows)
        return Window(self.stored * self.block)

    @property
    def selection(self) -> Blocks:
        return Blocks(self.block, self.top_k)

    def whole(self, k: Keys, v: Values) -> Candidates:
        """The blocks of a whole sequence behind which another query stands."""
        return self.kept.whole(k, v)

    def choose(self, q: Queries, blocks: Candidates, where: Segments) -> Int[Array, "b t h c"]:
        """The indices of the past blocks that each query reads, -1 for none."""
        return self.kept.choice.choose(q, blocks, where)


@dataclasses.dataclass(frozen=True)
class StepBlocks:
    """Blocks of steps that are kept one by one: block m of the ring lies in its slots as it is."""

    kept: Steps
    choice: Choice
    state_type: ClassVar[type] = MoBAState

    @property
    def all_slots(self) -> int:
        return self.kept.all_slots

    @property
    def sinks(self) -> int:
        return self.kept.retention.sinks

    @property
    def reach(self) -> int | None:
        return None if self.grows else self.span

    def init_state(
        self, batch: int, kv_heads: int, width: int, dtype: jax.typing.DTypeLike, v_width: int
    ) -> MoBAState:
        blocks = self.kept.retention.ring // self.choice.block
        sums = jnp.zeros((batch, blocks, kv_heads, width), accumulator(dtype))
        return MoBAState(self.kept.init_state(batch, kv_heads, width, dtype, v_width), sums)

    def held(self, state: MoBAState) -> int:
        return self.kept.held(state.cache)

    def slots_for(self, steps: int) -> int:
        behind = max(1, self.kept.slots_for(steps) - self.sinks)
        return self.sinks + -(-behind // self.choice.block) * self.choice.block

    def resize(self, state: MoBAState, slots: int) -> MoBAState:
        sums = resized_sums(state.sums, (slots - self.sinks) // self.choice.block)
        return MoBAState(self.kept.resize(state.cache, slots), sums)

    def adopt(self, state: MoBAState, words: str) -> MoBAState:
        return state

    def rewind(self, state: MoBAState, steps: Counts, words: str) -> MoBAState:
        length, block = earlier(state.cache, steps), self.choice.block
        seen = jnp.maximum(length - self.sinks, 0)
        if self.choice.stored is not None:
            needed = jnp.maximum(seen // block - self.choice.stored + 1, 0) * block + self.sinks
            if bool(jnp.any((state.cache.length - self.kept.retention.ring > needed) & (seen > 0))):
                raise UserError(
                    f"steps={jnp.asarray(steps).tolist()} cannot be taken back: {words} has overwritten the "
                    "blocks before them"
                )
        cache = forget_from(state.cache, length)
        part = self._open_part(cache, seen, state.sums)
        return MoBAState(cache, self.choice.rewound(state.sums, seen, part.k, part.segments > 0))

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
        retention = self.kept.retention
        length = 0 if state is None else state.cache.length
        where = segments(q.shape[:2], length, reset, valid)
        behind, before = behind_sinks(where, self.sinks), jnp.maximum(jnp.asarray(length) - self.sinks, 0)
        unturned = q
        q, k = scores.rotary(q, where.positions), scores.rotary(k, where.positions)
        new = None
        if state is not None:
            cache = self.kept.store(state.cache, k, v, where, reset)
            k, v = self.kept.storage.seen(k), self.kept.storage.seen(v)
            new = MoBAState(cache, self.choice.summed(state.sums, before, k, behind))
        else:
            k, v = self.kept.storage.seen(k), self.kept.storage.seen(v)
        if state is None and reset is None and valid is None:
            near, blocks = self._own_aligned(q, k, v, scores), self.whole(k, v)
        else:
            near, blocks = self._own(q, k, v, behind, before, state, new, reset, scores)
        chosen = self.choice.choose(q, blocks, behind)
        out, lse = near
        if chosen.shape[3]:
            block = self.choice.block
            far = kernels.block_attention(q, blocks.k, blocks.v, chosen, block=block, **scores.limits)
            out, lse = merge(out, lse, *far)
        if self.sinks:
            out, lse = merge(out, lse, *self._sinks(q, unturned, k, v, where, state, new, reset, scores))
        out = only_valid(out, where)
        if state is not None and (retention.ends or self.held(state) < self.all_slots):
            out, lse = beyond_is_nan(out, lse, where.positions >= self.held(state))
        return out, lse, new

    # --- the sinks

    def _sinks(
        self,
        q: Queries,
        unturned: Queries,
        k: Keys,
        v: Values,
        where: Segments,
        state: MoBAState | None,
        new: MoBAState | None,
        reset: Booleans | None,
        scores: Scores,
    ) -> tuple[Array, LogSumExp]:
        sinks = self.sinks
        if self.kept.retention.in_cache:
            first = self.choice.first_seen(where.positions - sinks) + sinks
            start = jnp.full(q.shape[:1], sinks)
            q = scores.rotary(unturned, place_in_cache(where.positions, where.ids, start, sinks, first))
        chunk = new_span(k, v, where)
        if state is None:
            return attend_sinks(q, where, scores, sinks, None, chunk)
        source = (new if reset is None else state).cache
        stored = self.kept.read(source, k, slice(0, sinks))
        return attend_sinks(q, where, scores, sinks, stored, None if reset is None else chunk)

    # --- whole sequences

    def _own_aligned(self, q: Queries, k: Keys, v: Values, scores: Scores) -> tuple[Array, LogSumExp]:
        """Causal attention inside each block, blocks as rows."""
        count, (q, k, v) = min(self.sinks, q.shape[1]), (x[:, self.sinks :] for x in (q, k, v))
        t = q.shape[1]
        size = min(self.choice.block, t)  # t = 0 has no blocks
        if not t:
            out, lse = kernels.attention(q, k, v, **scores.limits)
        else:
            rows = (
                jnp.pad(x, ((0, 0), (0, -t % size), (0, 0), (0, 0))).reshape(-1, size, *x.shape[2:])
                for x in (q, k, v)
            )
            out, lse = kernels.attention(*rows, **scores.limits)
            out, lse = (x.reshape(q.shape[0], -1, *x.shape[2:])[:, :t] for x in (out, lse))
        before = ((0, 0), (count, 0), (0, 0))
        return jnp.pad(out, (*before, (0, 0))), jnp.pad(lse, before, constant_values=-jnp.inf)

    def whole(self, k: Keys, v: Values) -> Candidates:
        """The blocks behind which another query stands."""
        k, v = k[:, self.sinks :], v[:, self.sinks :]
        b, t = k.shape[:2]
        n = max(t - 1, 0) // self.choice.block
        k, v = (x[:, : n * self.choice.block] for x in (k, v))
        index = jnp.broadcast_to(jnp.arange(n), (b, n))
        return Candidates(k, v, self.choice.block_sums(k, n), jnp.ones_like(index), index)

    # --- chunks

    def _own(
        self,
        q: Queries,
        k: Keys,
        v: Values,
        behind: Segments,
        before: Int[Array, "..."],
        state: MoBAState | None,
        new: MoBAState | None,
        reset: Booleans | None,
        scores: Scores,
    ) -> tuple[tuple[Array, LogSumExp], Candidates]:
        """Attention over the query's own block, and the blocks that it may choose from."""
        # Where nothing is overwritten that a query may see, all of it is in the new state: what is not read
        # is not copied.
        ends = self.kept.retention.ends
        whole = state is not None and (q.shape[1] == 1 or (ends and reset is None))
        open_part = None
        if state is not None:
            source = new if whole else state
            open_part = self._open_part(source.cache, before, state.sums, k)
        span, rank = self._ranked(k, v, behind, open_part)
        near = attend(q, behind.positions, behind._replace(ids=rank), span, scores, window=self.choice.block)
        if whole:
            return near, self._held(new, k)
        blocks = self._closed(span, behind, open_part)
        if state is not None:
            both = zip(self._held(state, k), blocks, strict=True)
            blocks = Candidates(*(jnp.concatenate([a.astype(b.dtype), b], axis=1) for a, b in both))
        return near, blocks

    def _held(self, state: MoBAState, like: Array) -> Candidates:
        found = self.choice.held(state.sums, jnp.maximum(state.cache.length - self.sinks, 0))
        span = self.kept.read(state.cache, like, slice(self.sinks, None))
        return found._replace(k=span.k, v=span.v)

    def _open_part(
        self, cache: CacheState, seen: Int[Array, " b"], sums: Array, like: Array | None = None
    ) -> Span:
        """The steps of the block that is not full yet after `seen` steps behind the sinks, in all its
        slots."""
        block, like = self.choice.block, sums if like is None else like
        positions = seen[:, None] // block * block + jnp.arange(block)
        place = jnp.arange(seen.shape[0]), slice(None), seen // block % sums.shape[1]

        def read(x: Any) -> Array:
            def mine(leaf: Array) -> Array:
                behind = leaf[:, :, self.sinks :]
                return behind.reshape(*leaf.shape[:2], -1, block, leaf.shape[3])[place]

            return self.kept.storage.decode(jax.tree.map(mine, x), like.dtype).swapaxes(1, 2)

        here = positions < seen[:, None]
        return Span(read(cache.k), read(cache.v), jnp.where(here, positions, NEVER), here.astype(jnp.int32))

    def _ranked(self, k: Keys, v: Values, where: Segments, open_part: Span | None) -> tuple[Span, Array]:
        """The keys of the open block and of the chunk with the rank of their block among these as their
        segment, and the queries' ranks."""
        starts = (where.ids > 0) & (where.positions % self.choice.block == 0)
        rank = jnp.where(where.ids > 0, 1 + jnp.cumsum(starts, axis=1, dtype=jnp.int32), 0)
        span = Span(k, v, where.positions, rank)
        return span if open_part is None else joined(open_part, span), rank

    def _closed(self, span: Span, where: Segments, open_part: Span | None) -> Candidates:
        """The blocks of a span that end in it, whole, side by side."""
        (b, e), rows, block = span.k.shape[:2], jnp.arange(span.k.shape[0])[:, None], self.choice.block
        n = (e if open_part is None else e - 1) // block
        ids = where.ids if open_part is None else jnp.concatenate([open_part.segments, where.ids], axis=1)
        place = span.positions % block
        ends = (span.segments > 0) & (place == block - 1)
        # Of the blocks that ended before; the next one to end is the step's own, or later.
        number = jnp.cumsum(ends, axis=1) - ends

        def at_ends(values: Array) -> Array:
            return jnp.zeros((b, n), jnp.int32).at[rows, jnp.where(ends, number, n)].set(values, mode="drop")

        rank = at_ends(span.segments)
        mine = (span.segments > 0) & (
            span.segments
            == jnp.take_along_axis(jnp.pad(rank, ((0, 0), (0, 1))), jnp.minimum(number, n), axis=1)
        )
        slots = jnp.where(mine, number * block + place, n * block)
        k, v = (
            jnp.zeros((b, n * block, *x.shape[2:]), x.dtype).at[rows, slots].set(x, mode="drop")
            for x in (span.k, span.v)
        )
        sums = self.choice.block_sums(k, n)
        return Candidates(k, v, sums, at_ends(ids), at_ends(span.positions // block))
