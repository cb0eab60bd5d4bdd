"""The choice of blocks by their mean keys, whatever way the keys are kept."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from seqlab.models.cache.common import resized
from seqlab.shapes import Keys, Queries, Values, accumulator
from seqlab.state import Segments


class MoBAState(NamedTuple):
    """`cache`: the state of the kept steps. `sums` [b, n, g, k]: of the keys of the block in each place, in
    float32 at least, from which its mean is taken; they grow with every step."""

    cache: Any
    sums: Float[Array, "b n g k"]


class Candidates(NamedTuple):
    """Blocks that may be chosen: `sums` [b, n, g, k] of the keys, and of which segment and which block of it
    [b, n] each is; segment 0 is none. `k`, `v` [b, n * block, g, k]: their keys and values, None where these
    lie elsewhere."""

    k: Keys | None
    v: Values | None
    sums: Float[Array, "b n g k"]
    segments: Int[Array, "b n"]
    index: Int[Array, "b n"]


def behind_sinks(where: Segments, sinks: int) -> Segments:
    """`where`, counted behind the sinks; sinks are padding."""
    if not sinks:
        return where
    places = where.positions - sinks
    ids = jnp.where(places >= 0, where.ids, 0)
    return Segments(ids, places, jnp.maximum(where.length - sinks, 0), where.last)


@dataclasses.dataclass(frozen=True)
class Choice:
    """How queries choose: blocks of `block` steps, `top_k` of them, the own one counted; of the last
    `stored`, None for all. Steps are counted behind the sinks."""

    block: int
    top_k: int
    stored: int | None

    def choose(self, q: Queries, blocks: Candidates, where: Segments) -> Int[Array, "b t h c"]:
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

    def first_seen(self, place: Int[Array, "*n"]) -> Int[Array, "*n"]:
        """The first step that a query may choose to see."""
        if self.stored is None:
            return jnp.zeros_like(place)
        return (place // self.block - self.stored + 1) * self.block

    def places(self, length: Int[Array, " b"], n: int) -> Int[Array, "b n"]:
        """Which block lies in each of n places after `length` steps; below 0 for none."""
        last = (length[:, None] - 1) // self.block
        last = last if self.stored is not None else jnp.minimum(last, n - 1)
        return last - (last - jnp.arange(n)) % n

    def held(self, sums: Array, length: Int[Array, " b"]) -> Candidates:
        """The blocks that are whole after `length` steps, by place."""
        index = self.places(length, sums.shape[1])
        ids = ((index >= 0) & ((index + 1) * self.block <= length[:, None])).astype(jnp.int32)
        return Candidates(None, None, sums, ids, index)

    def summed(self, sums: Array, before: Int[Array, " b"], k: Keys, where: Segments) -> Array:
        """The sums after a chunk of keys of a sequence that had seen `before` steps."""
        n = sums.shape[1]
        old, after = self.places(before, n), self.places(where.length, n)
        same = (old == after) & (where.last == 1)[:, None]
        own = where.positions // self.block
        counts = (where.ids == where.last[:, None]) & (where.ids > 0)
        counts = counts & (jnp.take_along_axis(after, own % n, axis=1) == own)
        rows, place = jnp.arange(k.shape[0])[:, None], jnp.where(counts, own % n, n)
        sums = jnp.where(same[..., None, None], sums, 0)
        return sums.at[rows, place].add(k.astype(sums.dtype), mode="drop")

    def rewound(self, sums: Array, length: Int[Array, " b"], k: Keys, mine: Bool[Array, "b e"]) -> Array:
        """The sums after `length` steps, of which those in the open block are the keys k [b, e, g, .] that
        are `mine`."""
        at = jnp.arange(length.shape[0]), length // self.block % sums.shape[1]
        sums = jnp.where((self.places(length, sums.shape[1]) >= 0)[..., None, None], sums, 0)
        own = jnp.where(mine[..., None, None], k, 0).astype(sums.dtype).sum(1)
        open_ = (length % self.block > 0)[:, None, None]
        return sums.at[at].set(jnp.where(open_, own, sums[at]))

    def block_sums(self, k: Keys, n: int) -> Float[Array, "b n g k"]:
        """The sums of n whole blocks of keys side by side."""
        return k.reshape(k.shape[0], n, self.block, *k.shape[2:]).astype(accumulator(k.dtype)).sum(2)


def resized_sums(sums: Array, blocks: int) -> Array:
    """Sums of the first `blocks` places, or with empty ones behind them."""
    return resized(sums, blocks, 1)
