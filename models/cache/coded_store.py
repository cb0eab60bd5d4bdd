"""How steps become codes: a chunk, and a single step."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seqlab.kernels.decode_attention import Coded, keys_of, words_of
from seqlab.models.cache.coded_parts import QuantizedState, Recent, put_slot, put_slots
from seqlab.models.cache.quantize import Groups, encode, groups_of, quantize
from seqlab.shapes import Keys, accumulator
from seqlab.state import Segments


class Layout:
    """Where the codes of a cache lie: base of `CodedSteps`."""

    retention: Any
    storage: Any

    @property
    def residual(self) -> int:
        return self.storage.residual

    @property
    def group(self) -> int:
        return self.storage.group

    @property
    def bits(self) -> int:
        return self.storage.bits

    @property
    def v_bits(self) -> int:
        return self.storage.v_bits

    def ends(self, state: QuantizedState) -> tuple[Array, Array]:
        """[b, 1]: steps behind the sinks that were seen, and how many of their keys are quantized."""
        seen = jnp.maximum(state.length - self.retention.sinks, 0)[:, None]
        return seen, seen // self.residual * self.residual

    def as_kept(self, groups: Groups) -> Groups:
        """As precise as they are stored."""
        if not self.storage.half_groups:
            return groups
        return Groups(*(x.astype(jnp.float16).astype(x.dtype) for x in groups))


def recent_keys(rule: Layout, state: QuantizedState) -> tuple[Float[Array, "b g r k"], Int[Array, "b r"]]:
    """The keys of the steps whose values lie in the residual, and the steps. Those before the last
    multiple of `residual` are coded, in the block before it, as far from its start as their values from
    that of the ring."""
    seen, coded = rule.ends(state)
    at = coded + jnp.arange(rule.residual)[None]
    exact = at < seen
    begin = (coded[:, 0] - rule.residual) % state.k.words.shape[3]

    def block(x: Array, begin: Array, size: int, axis: int) -> Array:
        return jax.vmap(lambda x, n: jax.lax.dynamic_slice_in_dim(x, n, size, axis))(x, begin)

    count = rule.residual // rule.group
    groups = (block(x, begin // rule.group, count, 1) for x in state.k[1:])
    keys = keys_of(
        Coded(block(state.k.words, begin, rule.residual, 2), *groups),
        rule.bits,
        accumulator(state.rest_k.dtype),
    )
    keys = jnp.where(exact[:, None, :, None], state.rest_k, keys.astype(state.rest_k.dtype))
    return keys, jnp.where(exact, at, at - rule.residual)


def _group_index(rule: Layout, places: Array, ids: Array, coded: Array) -> Array:
    """[b, e]: the number of the group in the list: those of the carried sequence first, then those of the
    documents that follow."""
    carried = (places - coded) // rule.group
    count = places.shape[1] // rule.group + 2
    later = count + jnp.cumsum((ids > 1) & (places % rule.group == 0) & (places >= 0), axis=1)
    return jnp.where(ids == 1, carried, later)


def key_groups(rule: Layout, k: Keys, places: Array, ids: Array, coded: Array, mine: Array) -> Groups:
    """Scale and least value of the group of each key that is `mine`, [b, e, g, k]. The steps stand at
    `places` [b, e] of the sequences `ids`; `coded` [b, 1] of the first one are quantized already."""
    index = _group_index(rule, places, ids, coded)
    count = index.shape[1] // rule.group + 3 + index.shape[1]
    index = jnp.where(mine, index, count)  # dropped
    rows = jnp.arange(k.shape[0])[:, None]
    acc = k.astype(accumulator(k.dtype))
    shape = (k.shape[0], count, *k.shape[2:])
    least = jnp.full(shape, jnp.inf, acc.dtype).at[rows, index].min(acc, mode="drop")
    greatest = jnp.full(shape, -jnp.inf, acc.dtype).at[rows, index].max(acc, mode="drop")
    found = jnp.isfinite(least)
    groups = groups_of(jnp.where(found, least, 0), jnp.where(found, greatest, 0), rule.bits)
    index = jnp.minimum(index, count - 1)
    return rule.as_kept(Groups(*(x[rows, index] for x in groups)))


def store_chunk(rule: Layout, state: QuantizedState, recent: Recent, where: Segments) -> QuantizedState:
    """The state after a chunk."""
    carried = (where.last == 1)[:, None]
    length = where.length
    seen = jnp.maximum(length - rule.retention.sinks, 0)[:, None]
    coded = seen // rule.residual * rule.residual
    u, current = recent.places, (recent.segments == where.last[:, None]) & (recent.segments > 0)
    old = jnp.arange(u.shape[1])[None] < rule.residual
    slots = state.k.words.shape[3]
    key_here = current & recent.open_

    def put(x: Array, values: Array, slots: Array, keep: Array, last: bool = False) -> Array:
        """x [b, g, s, .], or [b, g, ., s] where slots come `last`, with values [b, e, g, .] in their
        slots."""
        x = jnp.where(carried[..., None, None], x, jnp.zeros((), x.dtype))
        if not x.size:
            return x  # no sinks
        slots = jnp.where(keep, slots, x.shape[3 if last else 2])[:, None]
        rows, heads = jnp.arange(x.shape[0])[:, None, None], jnp.arange(x.shape[1])[:, None]
        index = (rows, heads, slice(None), slots) if last else (rows, heads, slots)
        return x.at[index].set(values.swapaxes(1, 2).astype(x.dtype), mode="drop")

    def packed(codes: Array, bits: int) -> Array:
        return words_of(codes[..., None], bits)[..., 0]

    newest_k, newest_v = u >= coded, u >= seen - rule.residual
    codes = encode(recent.k, recent.groups, rule.bits)
    flush_k = key_here & (u < coded) & (u >= coded - slots)
    ends = flush_k & (u % rule.group == rule.group - 1)
    v_codes, v_groups = quantize(recent.v, rule.group, rule.v_bits)
    flush_v = current & (u >= 0) & (u < seen - rule.residual) & (u >= seen - rule.residual - slots)
    first = current & (u < 0) & ~old
    slot, ring = u % slots, u % rule.residual
    rest_k = put(state.rest_k, recent.k, ring, key_here & newest_k & ~old)
    # What was coded leaves nothing behind.
    held = (coded + jnp.arange(rule.residual)[None] < seen)[:, None, :, None]
    k_groups = (put(x, y, slot // rule.group, ends) for x, y in zip(state.k[1:], recent.groups, strict=True))
    v_parts = zip(state.v, (packed(v_codes, rule.v_bits), *v_groups), strict=True)
    return QuantizedState(
        put(state.sink_k, recent.k, u + rule.retention.sinks, first),
        put(state.sink_v, recent.v, u + rule.retention.sinks, first),
        Coded(put(state.k.words, packed(codes, rule.bits), slot, flush_k, last=True), *k_groups),
        Coded(*(put(x, y, slot, flush_v, last=True) for x, y in v_parts)),
        jnp.where(held, rest_k, jnp.zeros((), rest_k.dtype)),
        put(state.rest_v, recent.v, ring, current & (u >= 0) & newest_v & ~old),
        length,
    )


def store_step(rule: Layout, state: QuantizedState, k: Array, v: Array, where: Segments) -> QuantizedState:
    """The state after one step with key and value [b, g, .]: they go into the residual; the value that is
    displaced there is quantized, and all its keys once they fill it."""
    u, size, slots = where.positions[:, 0] - rule.retention.sinks, rule.residual, state.k.words.shape[3]
    here, ring = where.ids[:, 0] > 0, u % size
    sink, behind = here & (u < 0), here & (u >= 0)
    fills = behind & (ring == size - 1)
    old_v = jnp.take_along_axis(state.rest_v, ring[:, None, None, None], axis=2)
    codes, groups = quantize(old_v, rule.group, rule.v_bits)
    coded_v = (
        words_of(codes.swapaxes(2, 3), rule.v_bits),
        *(x.swapaxes(2, 3) for x in rule.as_kept(groups)),
    )
    displaced, oldest = behind & (u >= size), (u - size) % slots
    rest_k = put_slot(state.rest_k, k, ring, behind)
    parts = rest_k.reshape(*rest_k.shape[:2], -1, rule.group, rest_k.shape[3])
    groups = rule.as_kept(groups_of(parts.min(3), parts.max(3), rule.bits))
    codes = encode(parts, Groups(*(x[:, :, :, None] for x in groups)), rule.bits).reshape(rest_k.shape)
    words, first = words_of(codes.swapaxes(2, 3), rule.bits), (u - size + 1) % slots
    coded_k = Coded(
        put_slots(state.k.words, words, first, fills, 3),
        *(put_slots(x, y, first // rule.group, fills, 2) for x, y in zip(state.k[1:], groups, strict=True)),
    )
    return QuantizedState(
        put_slot(state.sink_k, k, u + rule.retention.sinks, sink),
        put_slot(state.sink_v, v, u + rule.retention.sinks, sink),
        coded_k,
        Coded(*(put_slots(x, y, oldest, displaced, 3) for x, y in zip(state.v, coded_v, strict=True))),
        jnp.where(fills[:, None, None, None], jnp.zeros((), rest_k.dtype), rest_k),
        put_slot(state.rest_v, v, ring, behind),
        where.length,
    )
