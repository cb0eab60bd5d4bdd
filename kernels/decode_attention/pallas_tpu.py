"""Decoding on a TPU: the queries that share a key head are the rows of a tile, and the cache is read in tiles
of slots.

Codes are not dequantized one by one where possible, since the vector units are the bottleneck. A code of up
to eight bits is exact in bfloat16, so the matrix units multiply codes directly. With u the group of channel
c:

    values   sum_s p_s (code_cs scale_us + least_us) = sum_s (p_s scale_us) code_cs + sum_s p_s least_us

The weights of all groups are rows of one product; each channel selects the result of its group at the end.
With u the group of slot s:

    keys     sum_c q_c (code_cs scale_cu + least_cu) = sum_c q_c (code_cs scale_cu) + (sum_c q_c least_cu)

Scales are spread over the slots of their groups by a product with zeros and ones.

Only the tiles of a row from the first to the last with anything visible are read. Beyond them the grid
repeats the last one, which copies nothing. If rows and heads alone would leave one of two cores idle, tiles
are split between them.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from seqlab.kernels import pallas
from seqlab.kernels.attention import merge
from seqlab.kernels.blocks import find

_UNIT = pallas.LANES  # tiles are multiples of it


class Cut(NamedTuple):
    """Static configuration: `rows` queries of a group, padded; `values` channels; slots of a tile; options of
    the logits."""

    rows: int
    values: int
    slots: int
    splits: int
    k_bits: int | None  # None for plain numbers
    v_bits: int | None
    steps: int  # steps that share a scale of keys
    softcap: float | None
    scale: float


def decode_attention(q, k, v, visible, *, softcap, scale, bits):
    """`out, lse`; see `seqlab.kernels.decode_attention`, which has checked the arguments. Not
    differentiable."""
    from seqlab.kernels.decode_attention import Coded, seen_tiles

    (b, h, width), s, coded = q.shape, visible.shape[1], isinstance(k, Coded)
    arrays = (*k, *v) if coded else (k, v)
    pallas.require(q, *(x for x in arrays if x.dtype != jnp.uint32))
    if 0 in (b, h, s):
        raise NotImplementedError("nothing to attend to")
    g = arrays[0].shape[1]
    values = 32 * v.words.shape[2] // bits[1] if coded else v.shape[3]
    steps = s // k.scale.shape[2] if coded else 1
    slots = _slots(
        s, steps, find("decode_attention/pallas_tpu/tile", q.dtype.itemsize, max(width, values))["tile"]
    )
    tiles = pl.cdiv(s, slots)
    splits = min(2, tiles) if b * g % 2 else 1
    cut = Cut(pallas.up(h // g, pallas.ROWS), values, slots, splits, *bits, steps, softcap, scale)
    first, count = seen_tiles(visible, slots)
    queries = jnp.pad(q.reshape(b, g, h // g, width), ((0, 0), (0, 0), (0, cut.rows - h // g), (0, 0)))
    see = jnp.pad(visible.astype(jnp.int32), ((0, 0), (0, tiles * slots - s)))[:, None]
    out, lse = pallas.call(
        functools.partial(_kernel, cut),
        [queries, *arrays, see],
        [
            ((b, g, splits, cut.rows, values), jnp.float32),
            ((b, g, splits, cut.rows, pallas.LANES), jnp.float32),
        ],
        grid=(b, g, splits, pl.cdiv(tiles, splits)),
        in_specs=_blocks(cut, queries, arrays),
        out_specs=[
            pl.BlockSpec((None, None, None, cut.rows, size), lambda b, g, i, n, *_: (b, g, i, 0, 0))
            for size in (values, pallas.LANES)
        ],
        scratch=_scratch(cut, v if coded else None),
        parallel=3,
        tables=(first, count),
    )
    parts = [(out[:, :, i], lse[:, :, i, :, 0]) for i in range(splits)]
    out, lse = merge(*parts[0], *parts[1]) if splits == 2 else parts[0]
    return out[:, :, : h // g].reshape(b, h, values).astype(q.dtype), lse[:, :, : h // g].reshape(b, h)


def _slots(s: int, steps: int, most: int) -> int:
    """The slots of a tile: whole groups of keys, a multiple of eight of them or all."""
    unit = math.lcm(_UNIT, 8 * steps)
    slots = max(unit, most // unit * unit)
    return pallas.up(s, _UNIT) if s <= slots else slots


def _blocks(cut: Cut, q: Array, arrays: tuple[Array, ...]) -> list[pl.BlockSpec]:
    """Blocks of the queries, of the keys and values with their scales, and of `visible`."""

    def last(b, g, i, n, *tables):
        return b, g, 0, _tile(cut, b, i, n, tables)[0]

    def before_last(b, g, i, n, *tables):
        return b, g, _tile(cut, b, i, n, tables)[0], 0

    queries = pl.BlockSpec((None, None, *q.shape[2:]), lambda b, g, i, n, *_: (b, g, 0, 0))
    visible = pl.BlockSpec(
        (None, 1, cut.slots), lambda b, g, i, n, *tables: (b, 0, _tile(cut, b, i, n, tables)[0])
    )
    if cut.k_bits is None:
        return [
            queries,
            *(pl.BlockSpec((None, None, cut.slots, x.shape[3]), before_last) for x in arrays),
            visible,
        ]
    words, scale, _, *values = arrays
    groups = min(scale.shape[2], pl.cdiv(cut.slots, cut.steps))
    shared = pl.BlockSpec((None, None, groups, scale.shape[3]), before_last)
    by_slot = [pl.BlockSpec((None, None, x.shape[2], cut.slots), last) for x in (words, *values)]
    return [queries, by_slot[0], shared, shared, *by_slot[1:], visible]


def _scratch(cut: Cut, v: Any) -> list[Any]:
    """Scratch: the largest logit, the sum of weights, and the weighted sums of values: of codes one row per
    group, and of least values."""
    groups = 1 if v is None else v.scale.shape[2]
    sums = [pallas.vector((groups * cut.rows, cut.values))] + [pallas.vector((cut.rows, groups))] * (
        v is not None
    )
    return [*[pallas.vector((cut.rows, 1))] * 2, *sums]


def _tile(cut: Cut, b: Any, split: Any, n: Any, tables: tuple[Any, Any]) -> tuple[Any, Any]:
    """The n-th tile of a split of row b, and whether it exists."""
    first, count = (table[b] for table in tables)
    begin, end = (jax.lax.div(count * i, cut.splits) for i in (split, split + 1))
    return first + jnp.maximum(jnp.minimum(begin + n, end - 1), 0), begin + n < end


def _kernel(cut: Cut, first, count, q, *refs):
    (*arrays, visible, out, lse, top, total), sums = (
        (refs[:7], refs[7:]) if cut.k_bits is None else (refs[:11], refs[11:])
    )
    split, n = pl.program_id(2), pl.program_id(3)
    _, live = _tile(cut, pl.program_id(0), split, n, (first, count))

    @pl.when(n == 0)
    def _():
        top[...], total[...] = jnp.full_like(top, -jnp.inf), jnp.zeros_like(total)
        for x in sums:
            x[...] = jnp.zeros_like(x)

    @pl.when(live)
    def _():
        see = visible[...] != 0
        x = (_logits if cut.k_bits is None else _coded_logits)(
            cut, q[...], see, *arrays[: len(arrays) // 2]
        ) * cut.scale
        x = x if cut.softcap is None else cut.softcap * jnp.tanh(x / cut.softcap)
        x = jnp.where(see, x, -jnp.inf)
        new = jnp.maximum(top[...], jnp.max(x, axis=1, keepdims=True))
        base = jnp.where(new == -jnp.inf, 0, new)
        fade, p = jnp.exp(top[...] - base), jnp.exp(x - base)
        top[...] = new
        total[...] = total[...] * fade + jnp.sum(p, axis=1, keepdims=True)
        (_absorb if cut.k_bits is None else _coded_absorb)(
            cut, q.dtype, p, fade, see, sums, *arrays[len(arrays) // 2 :]
        )

    @pl.when(n == pl.num_programs(3) - 1)
    def _():
        none = total[...] == 0
        some = jnp.where(none, 1, total[...])
        out[...] = (sums[0][...] if cut.k_bits is None else _by_group(cut, *sums)) / some
        lse[...] = jnp.broadcast_to(jnp.where(none, -jnp.inf, top[...] + jnp.log(some)), lse.shape)


# --- numbers


def _logits(cut: Cut, q: Array, see: Array, k: Any) -> Array:
    return pallas.dot(q, k[...], transposed=True)


def _absorb(cut: Cut, dtype: Any, p: Array, fade: Array, see: Array, sums: Any, v: Any) -> None:
    hidden = pallas.column(see.astype(jnp.int32)) == 0
    clean = jnp.where(hidden, jnp.zeros((), v.dtype), v[...])  # 0 * NaN is NaN
    sums[0][...] = sums[0][...] * fade + pallas.dot(p.astype(v.dtype), clean)


# --- codes


def _coded_logits(cut: Cut, q: Array, see: Array, words: Any, scale: Any, least: Any) -> Array:
    group = pallas.places((scale.shape[0], cut.slots), 0)
    within = group == jax.lax.div(pallas.places(group.shape, 1), cut.steps)
    # Scales of unseen groups may hold NaN, and 0 * NaN is NaN.
    seen = jnp.max((within & see).astype(jnp.float32), axis=1, keepdims=True) > 0
    scales, leasts = (jnp.where(seen, x[...].astype(jnp.float32), 0).astype(x.dtype) for x in (scale, least))
    spread = pallas.dot(jnp.swapaxes(scales, 0, 1), within.astype(scale.dtype))
    keys = (_codes(cut.k_bits, words).astype(jnp.float32) * spread).astype(q.dtype)
    return pallas.dot(q, keys) + pallas.dot(
        pallas.dot(q, leasts, transposed=True), within.astype(jnp.float32)
    )


def _coded_absorb(
    cut: Cut, dtype: Any, p: Array, fade: Array, see: Array, sums: Any, words: Any, scale: Any, least: Any
) -> None:
    mass, low = sums
    scales, leasts = (jnp.where(see, x[...].astype(jnp.float32), 0) for x in (scale, least))
    groups = scale.shape[0]
    weights = jnp.concatenate([p * scales[i : i + 1] for i in range(groups)], axis=0)
    codes = _codes(cut.v_bits, words).astype(jnp.float32).astype(dtype)
    mass[...] = mass[...] * jnp.concatenate([fade] * groups, axis=0) + pallas.dot(
        weights.astype(dtype), codes, transposed=True
    )
    low[...] = low[...] * fade + pallas.dot(p, leasts, transposed=True)


def _codes(bits: int, words: Any) -> Array:
    """[channels, slots] of int32."""
    parts = [(words[...] >> jnp.uint32(shift)) & jnp.uint32(2**bits - 1) for shift in range(0, 32, bits)]
    return jnp.concatenate([part.astype(jnp.int32) for part in parts], axis=0)


def _by_group(cut: Cut, mass: Any, low: Any) -> Array:
    """Each channel's own entry of the sums per group of channels, plus the term of its least value."""
    groups = low.shape[1]
    own = jax.lax.div(pallas.places((cut.rows, cut.values), 1), cut.values // groups)
    parts = (mass[i * cut.rows : (i + 1) * cut.rows] + low[:, i : i + 1] for i in range(groups))
    return functools.reduce(
        lambda x, part: jnp.where(own == part[0], part[1], x),
        enumerate(parts),
        jnp.zeros(own.shape, jnp.float32),
    )
