"""Attention on a TPU: the tiles of `xla`, one at a time in vector memory (FlashAttention-2, arXiv
2307.08691).

Three kernels. The forward pass and dq loop, for a tile of queries, over the tiles of keys it sees. dk and dv
loop, for a tile of keys, over the tiles of queries that see it, of all heads that share it, and compute
transposed logits [keys, queries], so that no product or sum needs a transpose of a tile. The equations are
those of `xla`.

A tile sees one range of tiles, given by tables read by every index map, and before it the tiles of the sinks.
The grid has as many steps as the longest range, so that a window costs O(t W). A step beyond a range repeats
the previous tile, which copies nothing.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl

from seqlab.kernels import pallas
from seqlab.kernels.attention.pallas_tiles import (
    Grid,
    Ranges,
    beside_sinks,
    distances,
    lay,
    logits_of,
    mask_of,
    ranges_of,
    tile_at,
)
from seqlab.kernels.attention.reference import visible
from seqlab.kernels.attention.ring import with_sink
from seqlab.kernels.attention.xla import Places, Rule, _ends, _needed, _positions
from seqlab.kernels.blocks import find

_UNIT = pallas.LANES  # tiles are multiples of it: rows of a tile become lanes of another


def attention(
    q,
    k,
    v,
    *,
    left,
    right,
    sinks,
    q_positions,
    kv_positions,
    q_segments,
    kv_segments,
    softcap,
    sink_logits,
    alibi,
    scale,
):
    """See `seqlab.kernels.attention.attention`, which has checked the arguments. Positions and segments come
    in pairs or not at all."""
    pallas.require(q, k, v, sink_logits, alibi)
    rule = Rule(left, right, sinks, softcap, scale)
    places = Places(q_positions, q_segments, kv_positions, kv_segments)
    return _attend(rule, q, k, v, sink_logits, alibi, places)


def attention_gradient(q, k, v, alibi, out, lse, dout, dlse, *, left, right, sinks, softcap, scale, **places):
    """`dq, dk, dv, dalibi` for a part of the keys of an attention: `out` and `lse` are those over all
    keys."""
    pallas.require(q, k, v, alibi)
    rule = Rule(left, right, sinks, softcap, scale)
    dq, dk, dv, _, dalibi, _ = _attend_bwd(
        rule, (q, k, v, None, alibi, Places(**places), out, lse), (dout, dlse)
    )
    return dq, dk, dv, dalibi


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    rule: Rule, q: Array, k: Array, v: Array, sink: Array | None, alibi: Array | None, places: Places
) -> tuple[Array, Array]:
    if q.shape[1] == 1 and k.shape[1] and alibi is None:
        return _one_query(rule, q, k, v, sink, places)
    grid, by_queries, _ = _plan(rule, q, k, v, sink, alibi, places)
    (b, t, h, width), values, tiles = q.shape, v.shape[3], grid.tiles[0]
    (of_q, of_k, of_v, of_out, of_row), extra, extra_specs = _query_blocks(
        grid, h // k.shape[2], width, values, places
    )
    sinks = (
        []
        if sink is None
        else [jnp.broadcast_to(sink.astype(jnp.float32)[:, None, None], (h, 1, pallas.LANES))]
    )
    of_sink = pl.BlockSpec((None, 1, pallas.LANES), lambda b, h, i, n, *_: (h, 0, 0))
    slopes, of_slopes = _slopes(alibi, lambda b, h, i, n, *_: (b, h, 0, 0))
    out, lse = pallas.call(
        functools.partial(_forward_kernel, grid),
        [_heads(q, grid.rows), _heads(k, grid.keys), _heads(v, grid.keys), *sinks, *slopes, *extra],
        [((b, h, tiles * grid.rows, values), q.dtype), ((b, h, 1, tiles * grid.rows), jnp.float32)],
        grid=(b, h, tiles, grid.sinks + by_queries.longest),
        in_specs=[of_q, of_k, of_v, *[of_sink] * len(sinks), *of_slopes, *extra_specs],
        out_specs=[of_out, of_row],
        scratch=[
            *[pallas.vector((grid.rows, 1))] * 2,
            pallas.vector((grid.rows, values)),
            *_columns(grid, grid.rows),
        ],
        parallel=3,
        tables=by_queries[:2],
    )
    return jnp.swapaxes(out[:, :, :t], 1, 2), jnp.swapaxes(lse[:, :, 0, :t], 1, 2)


def _one_query(
    rule: Rule, q: Array, k: Array, v: Array, sink: Array | None, places: Places
) -> tuple[Array, Array]:
    """Decoding, by the kernel of `decode_attention`: the queries that share a key head are the rows of one
    tile. Keys stored as [heads, slots] are read without a copy; the caller's transposition cancels out."""
    from seqlab.kernels.decode_attention.pallas_tpu import decode_attention

    b, s = len(q), k.shape[1]
    query, key = _positions(places, 1, s)
    keep = visible(
        query,
        places.q_segments,
        key,
        places.kv_segments,
        left=rule.left,
        right=rule.right,
        sinks=rule.sinks,
    )
    heads_first = (x.swapaxes(1, 2) for x in (k, v))
    seen = jnp.broadcast_to(keep, (b, s))
    found = decode_attention(
        q[:, 0], *heads_first, seen, softcap=rule.softcap, scale=rule.scale, bits=(None, None)
    )
    out, lse = (x[:, None] for x in found)
    return (out, lse) if sink is None else with_sink(out, lse, sink, places.q_segments)


def _query_blocks(
    grid: Grid, heads: int, width: int, values: int, places: Places
) -> tuple[list[pl.BlockSpec], list[Array], list[Any]]:
    """On a grid of rows, heads, tiles of queries and their tiles of keys: blocks of q, k, v, out and of one
    number per query; positions and segments."""

    def of_query(b, h, i, n, *tables):
        return b, h, i, 0

    def of_key(b, h, i, n, *tables):
        return b, jax.lax.div(h, heads), tile_at(grid, grid.tiles[0], b, i, n, tables, grid.sinks)[0], 0

    blocks = [
        pl.BlockSpec((None, None, grid.rows if at is of_query else grid.keys, size), at)
        for size, at in ((width, of_query), (width, of_key), (values, of_key), (values, of_query))
    ]
    row = pl.BlockSpec((None, None, 1, grid.rows), lambda b, h, i, n, *_: (b, h, 0, i))
    return [*blocks, row], *_place_arrays(
        grid, places, lambda b, h, i, n, *_: (b, 0, i), lambda *at: (at[0], 0, of_key(*at)[2])
    )


def _forward_kernel(grid: Grid, first, last, q, k, v, *rest):
    sink, rest = (rest[0], rest[1:]) if grid.sink else (None, rest)
    slope, rest = (rest[0], rest[1:]) if grid.alibi else (None, rest)
    queries, keys, rest = _place_refs(grid, rest)
    out, lse, top, total, mass, *columns = rest
    i, n = pl.program_id(2), pl.program_id(3)
    j, live = tile_at(grid, grid.tiles[0], pl.program_id(0), i, n, (first, last), grid.sinks)

    @pl.when(n == 0)
    def _():
        lay(queries, columns)
        z = (
            jnp.full(top.shape, -jnp.inf, jnp.float32)
            if sink is None
            else jnp.broadcast_to(sink[:, :1], top.shape)
        )
        if grid.segments:  # padding is no query: its row is dead whatever the sink
            z = jnp.where(columns[-1][...] == 0, -jnp.inf, z)
        top[...], total[...], mass[...] = z, jnp.where(z == -jnp.inf, 0.0, 1.0), jnp.zeros_like(mass)

    @pl.when(live)
    def _():
        x, _ = logits_of(grid.rule, q[...], k[...])
        if slope is not None:
            x = x - slope[:, :1] * distances(grid, i, j, columns, keys, 0)
        x = jnp.where(mask_of(grid, i, j, columns, keys, 0), x, -jnp.inf)
        new = jnp.maximum(top[...], jnp.max(x, axis=1, keepdims=True))
        base = jnp.where(new == -jnp.inf, 0, new)
        fade, p = jnp.exp(top[...] - base), jnp.exp(x - base)
        top[...] = new
        total[...] = total[...] * fade + jnp.sum(p, axis=1, keepdims=True)
        mass[...] = mass[...] * fade + pallas.dot(p.astype(v.dtype), v[...])

    @pl.when(n == pl.num_programs(3) - 1)
    def _():
        none = total[...] == 0
        some = jnp.where(none, 1, total[...])
        out[...] = (mass[...] / some).astype(out.dtype)
        lse[...] = pallas.row(jnp.where(none, -jnp.inf, top[...] + jnp.log(some)))


def _attend_fwd(rule: Rule, q, k, v, sink, alibi, places: Places):
    out, lse = _attend(rule, q, k, v, sink, alibi, places)
    return (out, lse), (q, k, v, sink, alibi, places, out, lse)


def _attend_bwd(rule: Rule, residuals, cotangents):
    (q, k, v, sink, alibi, places, out, lse), (dout, dlse) = residuals, cotangents
    # A row that saw nothing has no gradient, whatever its cotangents are: those of log(0) tend to be NaN.
    dead = lse == -jnp.inf
    dout = jnp.where(dead[..., None], jnp.zeros((), dout.dtype), dout)
    d = jnp.where(dead, 0, (out.astype(jnp.float32) * dout.astype(jnp.float32)).sum(-1) - dlse)
    lse = jnp.where(dead, 0, lse)
    grid, by_queries, by_keys = _plan(rule, q, k, v, None, alibi, places)
    rows = [_heads(x[..., None], grid.rows)[:, :, None, :, 0] for x in (lse, d)]
    arrays = [
        _heads(q, grid.rows),
        _heads(k, grid.keys),
        _heads(v, grid.keys),
        _heads(dout, grid.rows),
        *rows,
    ]
    dq, *by_row = _of_queries(grid, by_queries, arrays, alibi, places, q.dtype)
    dk, dv = _of_keys(grid, by_keys, arrays, alibi, places, (k.dtype, v.dtype))
    dalibi = by_row[0].sum((2, 3)).astype(alibi.dtype) if by_row else None
    dsink = None
    if sink is not None:
        weight = jnp.where(dead, 0, jnp.exp(sink.astype(jnp.float32)[None, None] - lse))
        dsink = -(weight * d).sum((0, 1)).astype(sink.dtype)
    dq, dk, dv = (
        jnp.swapaxes(x[:, :, :size], 1, 2) for x, size in ((dq, grid.t), (dk, grid.s), (dv, grid.s))
    )
    return dq, dk, dv, dsink, dalibi, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _of_queries(
    grid: Grid, ranges: Ranges, arrays: list[Array], alibi: Array | None, places: Places, dtype: Any
) -> list[Array]:
    """dq, and with ALiBi slopes the contribution of each row to their gradient [b, h, 1, t]."""
    (b, h, _, width), (groups, values) = arrays[0].shape, (arrays[1].shape[1], arrays[2].shape[3])
    (of_q, of_k, of_v, of_out, of_row), extra, extra_specs = _query_blocks(
        grid, h // groups, width, values, places
    )
    slopes, of_slopes = _slopes(alibi, lambda b, h, i, n, *_: (b, h, 0, 0))
    return pallas.call(
        functools.partial(_query_kernel, grid),
        [*arrays, *slopes, *extra],
        [(arrays[0].shape, dtype), *[(arrays[4].shape, jnp.float32)] * grid.alibi],
        grid=(b, h, grid.tiles[0], grid.sinks + ranges.longest),
        in_specs=[of_q, of_k, of_v, of_out, of_row, of_row, *of_slopes, *extra_specs],
        out_specs=[of_q, *[of_row] * grid.alibi],
        scratch=[
            pallas.vector((grid.rows, width)),
            *[pallas.vector((grid.rows, 1))] * (2 + grid.alibi),
            *_columns(grid, grid.rows),
        ],
        parallel=3,
        tables=ranges[:2],
    )


def _query_kernel(grid: Grid, first, last, q, k, v, dout, lse, d, *rest):
    slope, rest = (rest[0], rest[1:]) if grid.alibi else (None, rest)
    queries, keys, (dq, *rest) = _place_refs(grid, rest)
    by_row, rest = (rest[0], rest[1:]) if grid.alibi else (None, rest)
    total, lse_column, d_column, *columns = rest
    row_sum, columns = (columns[0], columns[1:]) if grid.alibi else (None, columns)
    i, n = pl.program_id(2), pl.program_id(3)
    j, live = tile_at(grid, grid.tiles[0], pl.program_id(0), i, n, (first, last), grid.sinks)

    @pl.when(n == 0)
    def _():
        total[...] = jnp.zeros_like(total)
        if row_sum is not None:
            row_sum[...] = jnp.zeros_like(row_sum)
        lay([lse, d, *queries], [lse_column, d_column, *columns])

    @pl.when(live)
    def _():
        x, bend = logits_of(grid.rule, q[...], k[...])
        far = None if slope is None else distances(grid, i, j, columns, keys, 0)
        x = x if slope is None else x - slope[:, :1] * far
        p = jnp.exp(jnp.where(mask_of(grid, i, j, columns, keys, 0), x - lse_column[...], -jnp.inf))
        dx = p * (pallas.dot(dout[...], v[...], transposed=True) - d_column[...])
        if row_sum is not None:
            row_sum[...] -= jnp.sum(dx * far, axis=1, keepdims=True)
        total[...] += pallas.dot((dx * bend).astype(k.dtype), k[...])

    @pl.when(n == pl.num_programs(3) - 1)
    def _():
        dq[...] = (total[...] * grid.rule.scale).astype(dq.dtype)
        if by_row is not None:
            by_row[...] = pallas.row(row_sum[...])


def _of_keys(
    grid: Grid,
    parts: list[tuple[int, Ranges]],
    arrays: list[Array],
    alibi: Array | None,
    places: Places,
    dtypes: tuple[Any, Any],
) -> list[Array]:
    """dk and dv, separately for tiles of sinks and other keys: sinks are seen by many more queries."""
    starts = np.cumsum([0, *(tiles for tiles, _ in parts)]).tolist()
    pieces = [
        _of_some_keys(grid, start, *part, arrays, alibi, places, dtypes)
        for start, part in zip(starts, parts, strict=False)
    ]
    return [jnp.concatenate(piece, axis=2) for piece in zip(*pieces, strict=True)]


def _of_some_keys(
    grid: Grid,
    start: int,
    tiles: int,
    ranges: Ranges,
    arrays: list[Array],
    alibi: Array | None,
    places: Places,
    dtypes: tuple[Any, Any],
) -> list[Array]:
    """On a grid of rows, groups, `tiles` tiles of keys from `start` on, heads of the group, and tiles of
    queries."""
    (b, h, _, width), (groups, values) = arrays[0].shape, (arrays[1].shape[1], arrays[2].shape[3])
    heads = h // groups

    def of_query(b, g, j, r, n, *tables):
        return b, g * heads + r, tile_at(grid, tiles, b, j, n, tables)[0], 0

    def of_key(b, g, j, r, n, *tables):
        return b, g, j + start, 0

    def of_row(*at):
        b, h, i, _ = of_query(*at)
        return b, h, 0, i

    extra, extra_specs = _place_arrays(
        grid, places, lambda *at: (at[0], 0, of_query(*at)[2]), lambda *at: (at[0], 0, of_key(*at)[2])
    )
    of_q, of_out = (pl.BlockSpec((None, None, grid.rows, size), of_query) for size in (width, values))
    of_k, of_v = (pl.BlockSpec((None, None, grid.keys, size), of_key) for size in (width, values))
    row = pl.BlockSpec((None, None, 1, grid.rows), of_row)
    slopes, of_slopes = _slopes(alibi, lambda b, g, j, r, n, *_: (b, g * heads + r, 0, 0))
    return pallas.call(
        functools.partial(_key_kernel, grid, start, tiles),
        [*arrays, *slopes, *extra],
        [
            ((b, groups, tiles * grid.keys, size), dtype)
            for size, dtype in zip((width, values), dtypes, strict=True)
        ],
        grid=(b, groups, tiles, heads, ranges.longest),
        in_specs=[of_q, of_k, of_v, of_out, row, row, *of_slopes, *extra_specs],
        out_specs=[
            pl.BlockSpec((None, None, grid.keys, size), lambda b, g, j, r, n, *_: (b, g, j, 0))
            for size in (width, values)
        ],
        scratch=[*(pallas.vector((grid.keys, size)) for size in (width, values)), *_columns(grid, grid.keys)],
        parallel=3,
        tables=ranges[:2],
    )


def _key_kernel(grid: Grid, start: int, tiles: int, first, last, q, k, v, dout, lse, d, *rest):
    slope, rest = (rest[0], rest[1:]) if grid.alibi else (None, rest)
    queries, keys, (dk, dv, dk_sum, dv_sum, *columns) = _place_refs(grid, rest)
    j, head, n = pl.program_id(2), pl.program_id(3), pl.program_id(4)
    i, live = tile_at(grid, tiles, pl.program_id(0), j, n, (first, last))

    @pl.when((head == 0) & (n == 0))
    def _():
        dk_sum[...], dv_sum[...] = jnp.zeros_like(dk_sum), jnp.zeros_like(dv_sum)
        lay(keys, columns)

    @pl.when(live)
    def _():
        x, bend = logits_of(grid.rule, k[...], q[...])  # keys before queries
        if slope is not None:
            x = x - slope[:, :1] * distances(grid, i, j + start, queries, columns, 1)
        p = jnp.exp(jnp.where(mask_of(grid, i, j + start, queries, columns, 1), x - lse[...], -jnp.inf))
        dx = p * (pallas.dot(v[...], dout[...], transposed=True) - d[...]) * bend
        dk_sum[...] += pallas.dot(dx.astype(q.dtype), q[...])
        dv_sum[...] += pallas.dot(p.astype(dout.dtype), dout[...])

    @pl.when((head == pl.num_programs(3) - 1) & (n == pl.num_programs(4) - 1))
    def _():
        dk[...], dv[...] = (dk_sum[...] * grid.rule.scale).astype(dk.dtype), dv_sum[...].astype(dv.dtype)


# --- which tiles


def _plan(
    rule: Rule, q: Array, k: Array, v: Array, sink: Array | None, alibi: Array | None, places: Places
) -> tuple[Grid, Ranges, list[tuple[int, Ranges]]]:
    """The grid, the ranges of keys by tile of queries, and those of queries by tile of keys, part after
    part."""
    t, s, width = q.shape[1], k.shape[1], max(q.shape[3], v.shape[3])
    most = find("attention/pallas_tpu/tile", k.dtype.itemsize, width)["tile"]
    if rule.span is not None:
        most = min(most, max(pallas.up(rule.span, _UNIT), _UNIT))
    rows, keys = (pallas.up(pl.cdiv(size, max(pl.cdiv(size, most), 1)) or 1, _UNIT) for size in (t, s))
    spelt = [places.q_positions is not None, places.q_segments is not None]
    grid = Grid(rule, t, s, rows, keys, 0, any(spelt), *spelt, sink is not None, alibi is not None)
    xp = jnp if grid.by_row else np
    q_positions, kv_positions = (
        _positions(places, t, s) if grid.by_row else (np.arange(s - t, s)[None], np.arange(s)[None])
    )
    if not t or not s:
        needed = np.zeros((1, *grid.tiles), bool)
        return (
            grid._replace(by_row=False),
            ranges_of(np, needed),
            [(grid.tiles[1], ranges_of(np, needed.swapaxes(1, 2)))],
        )
    needed = _needed(rule, _ends(xp, q_positions, rows), _ends(xp, kv_positions, keys))
    if grid.segments:
        (q_low, q_high), (k_low, k_high) = (
            _ends(jnp, places.q_segments, rows, skip=0),
            _ends(jnp, places.kv_segments, keys, skip=0),
        )
        needed = needed & (q_low[:, :, None] <= k_high[:, None]) & (k_low[:, None] <= q_high[:, :, None])
    needed = xp.broadcast_to(needed, (len(q) if grid.by_row else 1, *grid.tiles))
    if rule.left is not None and rule.sinks and not grid.by_row:
        return beside_sinks(grid, needed)
    return grid, ranges_of(xp, needed), [(grid.tiles[1], ranges_of(xp, needed.swapaxes(1, 2)))]


# --- arrays


def _heads(x: Array, size: int) -> Array:
    """[b, t, h, k] -> [b, h, t, k], padded to whole tiles with zeros: one copy."""
    more = max(pallas.up(x.shape[1], size), size) - x.shape[1]
    return jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, more), (0, 0)))


def _place_arrays(
    grid: Grid, places: Places, of_query: Any, of_key: Any
) -> tuple[list[Array], list[pl.BlockSpec]]:
    """Positions and segments where given, those of the queries first: [b, 1, t] and [b, 1, s]."""
    pairs = [(places.q_positions, places.kv_positions)] * grid.positions + [
        (places.q_segments, places.kv_segments)
    ] * grid.segments
    arrays, specs = [], []
    for side, (size, at) in enumerate(((grid.rows, of_query), (grid.keys, of_key))):
        for pair in pairs:
            x = pair[side].astype(jnp.int32)
            arrays.append(
                jnp.pad(x, ((0, 0), (0, max(pallas.up(x.shape[1], size), size) - x.shape[1])))[:, None]
            )
            specs.append(pl.BlockSpec((None, 1, size), at))
    return arrays, specs


def _place_refs(grid: Grid, refs: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """Split into those of the queries, those of the keys, and the rest."""
    count = grid.positions + grid.segments
    return list(refs[:count]), list(refs[count : 2 * count]), list(refs[2 * count :])


def _slopes(alibi: Array | None, at: Any) -> tuple[list[Array], list[pl.BlockSpec]]:
    """Slopes per row of the batch and head, if any, each broadcast to all lanes."""
    if alibi is None:
        return [], []
    wide = jnp.broadcast_to(alibi.astype(jnp.float32)[:, :, None, None], (*alibi.shape, 1, pallas.LANES))
    return [wide], [pl.BlockSpec((None, None, 1, pallas.LANES), at)]


def _columns(grid: Grid, size: int) -> list[Any]:
    """Scratch memory for positions and segments as columns."""
    return [pallas.vector((size, 1), jnp.int32)] * (grid.positions + grid.segments)
