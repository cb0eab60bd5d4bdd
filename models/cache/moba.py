"""Mixture of block attention: a query reads its own block and the past blocks whose mean key it likes best
(MoBA, arXiv 2502.13189)."""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seqlab import kernels
from seqlab.checks import UserError, check_positive
from seqlab.kernels.attention import merge
from seqlab.models.cache.common import (
    NEVER,
    CacheState,
    Scores,
    Span,
    attend,
    beyond_is_nan,
    earlier,
    empty,
    forget_from,
    joined,
    only_valid,
    resized,
    store,
    with_slots,
)
from seqlab.models.cache.policy import Policy, slots_for
from seqlab.shapes import Keys, LogSumExp, Queries, Steps, Values, accumulator
from seqlab.state import Segments, mask_steps, segments


class MoBAState(NamedTuple):
    """`cache`: the keys and values of whole blocks, step p in slot p modulo their number. `sums` [b, n, g,
    k]: of the keys of the block in each place, in float32 at least, from which its mean is taken; they grow
    with every step."""

    cache: CacheState
    sums: Float[Array, "b n g k"]


class Blocks(NamedTuple):
    """Blocks that may be chosen: keys and values [b, n * block, g, k], `sums` [b, n, g, k] of the keys, and
    of which segment and which block of it [b, n] each is; segment 0 is none."""

    k: Keys
    v: Values
    sums: Float[Array, "b n g k"]
    segments: Int[Array, "b n"]
    index: Int[Array, "b n"]


@dataclasses.dataclass(frozen=True)
class MoBA(Policy):
    """A query at step i of a sequence, in block β = i // block, sees its own block up to itself, and all of
    the top_k - 1 blocks m < β with the largest q·mean(k of block m), each query head by itself; all of them
    where there are fewer. Nothing is differentiated through the choice.

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
    state_type: ClassVar[type] = MoBAState

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

    def __str__(self) -> str:
        held = f"full({self.capacity})" if self.stored is None else f"window({self.span})"
        return f"{held}+moba({self.block}, {self.top_k})" + ("+grows" if self.grows else "")

    @property
    def span(self) -> int:
        return self.capacity if self.stored is None else self.stored * self.block

    @property
    def reach(self) -> int | None:
        return None if self.grows else self.span

    def init_state(
        self,
        batch: int,
        kv_heads: int,
        width: int,
        dtype: jax.typing.DTypeLike,
        v_width: int | None = None,
    ) -> MoBAState:
        sums = jnp.zeros((batch, self.span // self.block, kv_heads, width), accumulator(dtype))
        return MoBAState(empty(batch, self.span, kv_heads, width, dtype, v_width), sums)

    def __call__(
        self,
        q: Queries,
        k: Keys,
        v: Values,
        state: MoBAState | None,
        reset: Steps | None,
        valid: Steps | None,
        scores: Scores,
    ) -> tuple[Float[Array, "b t h v"], LogSumExp, MoBAState | None]:
        q, k, v = (mask_steps(x, valid) for x in (q, k, v))
        where = segments(q.shape[:2], 0 if state is None else state.cache.length, reset, valid)
        q, k = scores.rotary(q, where.positions), scores.rotary(k, where.positions)
        if state is None and reset is None and valid is None:
            near, blocks, new = self._own_aligned(q, k, v, scores), self.whole(k, v), None
        else:
            new = None if state is None else self._stored(state, k, v, where, reset)
            # Where nothing is overwritten that a query may see, all of it is in the new state: what is not
            # read is not copied.
            whole = state is not None and (q.shape[1] == 1 or (self.stored is None and reset is None))
            open_part = (
                None
                if state is None
                else self._open_part((new if whole else state).cache, state.cache.length)
            )
            span, rank = self._ranked(k, v, where, open_part)
            near = attend(q, where.positions, where._replace(ids=rank), span, scores, window=self.block)
            blocks = self._held(new) if whole else self._closed(span, where, open_part)
            if state is not None and not whole:
                both = zip(self._held(state), blocks, strict=True)
                blocks = Blocks(*(jnp.concatenate([a.astype(b.dtype), b], axis=1) for a, b in both))
        chosen = self.choose(q, blocks, where)
        out, lse = near
        if chosen.shape[3]:
            far = kernels.block_attention(q, blocks.k, blocks.v, chosen, block=self.block, **scores.limits)
            out, lse = merge(out, lse, *far)
        out = only_valid(out, where)
        if state is not None and (self.stored is None or self.held(state) < self.span):
            out, lse = beyond_is_nan(out, lse, where.positions >= self.held(state))
        return out, lse, new

    def choose(self, q: Queries, blocks: Blocks, where: Segments) -> Int[Array, "b t h c"]:
        """The indices of the past blocks that each query reads, -1 for none; by scores in float32 at
        least."""
        (b, t, h, _), (n, g) = q.shape, blocks.sums.shape[1:3]
        wide = blocks.sums.dtype
        q, sums = jax.lax.stop_gradient(
            (q.astype(wide).reshape(b, t, g, h // g, -1), blocks.sums / self.block)
        )
        scores = jnp.einsum("btgrk,bngk->btgrn", q, sums, precision=jax.lax.Precision.HIGHEST).reshape(
            b, t, h, n
        )
        own = where.positions[:, :, None] // self.block
        index = blocks.index[:, None]
        past = (
            (index < own) & (blocks.segments[:, None] == where.ids[:, :, None]) & (where.ids > 0)[:, :, None]
        )
        if self.stored is not None:
            past = past & (index > own - self.stored)
        best, chosen = jax.lax.top_k(jnp.where(past[:, :, None], scores, -jnp.inf), min(self.top_k - 1, n))
        return jnp.where(best == -jnp.inf, -1, chosen)

    def held(self, state: MoBAState) -> int:
        return state.cache.positions.shape[1]

    def slots_for(self, steps: int) -> int:
        slots = slots_for(steps, self.span, self.grows)
        return -(-slots // self.block) * self.block

    def resize(self, state: MoBAState, slots: int) -> MoBAState:
        return MoBAState(with_slots(state.cache, slots), resized(state.sums, slots // self.block, 1))

    def rewind(self, state: MoBAState, steps: Int[Array, " b"]) -> MoBAState:
        length = earlier(state.cache, steps)
        if self.stored is not None:
            needed = jnp.maximum(length // self.block - self.stored + 1, 0) * self.block
            if bool(jnp.any(state.cache.length - self.span > needed)):
                raise UserError(
                    f"steps={jnp.asarray(steps).tolist()} cannot be taken back: {self} has overwritten the "
                    "blocks before them"
                )
        cache = forget_from(state.cache, length)
        part = self._open_part(cache, length)
        at = jnp.arange(length.shape[0]), length // self.block % state.sums.shape[1]
        sums = jnp.where((self._places(length, state.sums.shape[1]) >= 0)[..., None, None], state.sums, 0)
        own = jnp.where((part.segments > 0)[..., None, None], part.k, 0).astype(sums.dtype).sum(1)
        open_ = (length % self.block > 0)[:, None, None]
        return MoBAState(cache, sums.at[at].set(jnp.where(open_, own, sums[at])))

    # --- whole sequences

    def _own_aligned(self, q: Queries, k: Keys, v: Values, scores: Scores) -> tuple[Array, LogSumExp]:
        """Causal attention inside each block, blocks as rows."""
        t = q.shape[1]
        size = min(self.block, t)  # t = 0 has no blocks
        if not t:
            return kernels.attention(q, k, v, **scores.limits)
        rows = (
            jnp.pad(x, ((0, 0), (0, -t % size), (0, 0), (0, 0))).reshape(-1, size, *x.shape[2:])
            for x in (q, k, v)
        )
        out, lse = kernels.attention(*rows, **scores.limits)
        return tuple(x.reshape(q.shape[0], -1, *x.shape[2:])[:, :t] for x in (out, lse))

    def whole(self, k: Keys, v: Values) -> Blocks:
        """The blocks behind which another query stands."""
        b, t = k.shape[:2]
        n = max(t - 1, 0) // self.block
        k, v = (x[:, : n * self.block] for x in (k, v))
        index = jnp.broadcast_to(jnp.arange(n), (b, n))
        return Blocks(k, v, self._sums(k, n), jnp.ones_like(index), index)

    def _sums(self, k: Keys, n: int) -> Float[Array, "b n g k"]:
        return k.reshape(k.shape[0], n, self.block, *k.shape[2:]).astype(accumulator(k.dtype)).sum(2)

    # --- chunks

    def _places(self, length: Int[Array, " b"], n: int) -> Int[Array, "b n"]:
        """Which block lies in each of n places after `length` steps; below 0 for none."""
        last = (length[:, None] - 1) // self.block
        last = last if self.stored is not None else jnp.minimum(last, n - 1)
        return last - (last - jnp.arange(n)) % n

    def _held(self, state: MoBAState) -> Blocks:
        index = self._places(state.cache.length, state.sums.shape[1])
        ids = ((index >= 0) & ((index + 1) * self.block <= state.cache.length[:, None])).astype(jnp.int32)
        return Blocks(state.cache.k.swapaxes(1, 2), state.cache.v.swapaxes(1, 2), state.sums, ids, index)

    def _open_part(self, cache: CacheState, length: Int[Array, " b"]) -> Span:
        """The steps of the block that is not full yet after `length` of them, in all its slots."""
        positions = length[:, None] // self.block * self.block + jnp.arange(self.block)
        place = (
            jnp.arange(length.shape[0]),
            slice(None),
            length // self.block % (cache.positions.shape[1] // self.block),
        )
        k, v = (
            x.reshape(*x.shape[:2], -1, self.block, x.shape[3])[place].swapaxes(1, 2)
            for x in (cache.k, cache.v)
        )
        here = positions < length[:, None]
        return Span(k, v, jnp.where(here, positions, NEVER), here.astype(jnp.int32))

    def _ranked(self, k: Keys, v: Values, where: Segments, open_part: Span | None) -> tuple[Span, Array]:
        """The keys of the open block and of the chunk with the rank of their block among these as their
        segment, and the queries' ranks."""
        starts = (where.ids > 0) & (where.positions % self.block == 0)
        rank = jnp.where(where.ids > 0, 1 + jnp.cumsum(starts, axis=1, dtype=jnp.int32), 0)
        span = Span(k, v, where.positions, rank)
        return span if open_part is None else joined(open_part, span), rank

    def _closed(self, span: Span, where: Segments, open_part: Span | None) -> Blocks:
        """The blocks of a span that end in it, whole, side by side."""
        (b, e), rows = span.k.shape[:2], jnp.arange(span.k.shape[0])[:, None]
        n = (e if open_part is None else e - 1) // self.block
        ids = where.ids if open_part is None else jnp.concatenate([open_part.segments, where.ids], axis=1)
        place = span.positions % self.block
        ends = (span.segments > 0) & (place == self.block - 1)
        number = (
            jnp.cumsum(ends, axis=1) - ends
        )  # of the blocks that ended before; the next one to end is the step's own, or later

        def at_ends(values: Array) -> Array:
            return jnp.zeros((b, n), jnp.int32).at[rows, jnp.where(ends, number, n)].set(values, mode="drop")

        rank = at_ends(span.segments)
        mine = (span.segments > 0) & (
            span.segments
            == jnp.take_along_axis(jnp.pad(rank, ((0, 0), (0, 1))), jnp.minimum(number, n), axis=1)
        )
        slots = jnp.where(mine, number * self.block + place, n * self.block)
        k, v = (
            jnp.zeros((b, n * self.block, *x.shape[2:]), x.dtype).at[rows, slots].set(x, mode="drop")
            for x in (span.k, span.v)
        )
        return Blocks(k, v, self._sums(k, n), at_ends(ids), at_ends(span.positions // self.block))

    def _stored(
        self, state: MoBAState, k: Keys, v: Values, where: Segments, reset: Steps | None
    ) -> MoBAState:
        n = state.sums.shape[1]
        before, after = self._places(state.cache.length, n), self._places(where.length, n)
        same = (before == after) & (where.last == 1)[:, None]
        # Of a chunk longer than the ring only the steps that survive it are stored: two writes to one slot
        # would race.
        slots = n * self.block
        survives = (
            where.positions < slots
            if self.stored is None
            else where.positions >= where.length[:, None] - slots
        )
        cache = store(state.cache, k, v, where, where.positions % slots, survives, reset)
        own = where.positions // self.block
        counts = (where.ids == where.last[:, None]) & (jnp.take_along_axis(after, own % n, axis=1) == own)
        rows, place = jnp.arange(k.shape[0])[:, None], jnp.where(counts, own % n, n)
        sums = jnp.where(same[..., None, None], state.sums, 0)
        return MoBAState(cache, sums.at[rows, place].add(k.astype(sums.dtype), mode="drop"))
