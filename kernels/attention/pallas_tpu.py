"""Attention on a TPU: the tiles of `xla`, one at a time in vector memory (FlashAttention-2, arXiv
2307.08691).

Three kernels. The forward pass and dq walk, for a tile of queries, the tiles of keys that it sees; dk and dv
walk for a tile of keys the
tiles of queries that see it, of all heads that share it, and compute logits transposed, keys before queries:
then no product and no sum anywhere needs a transpose of a tile. The equations are those of `xla`.

What a tile sees is one range of tiles, from tables that every index map reads, and in front of it the tiles
of sinks: the grid has as many steps as the longest range, so that a window costs O(t W). A step beyond a
range names the tile before it again, which copies nothing.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl

from seqlab.kernels import pallas
from seqlab.kernels.attention.reference import visible
from seqlab.kernels.attention.ring import with_sink
from seqlab.kernels.attention.xla import Places, Rule, _ends, _needed, _positions
from seqlab.kernels.blocks import find

_UNIT = pallas.LANES  # tiles are multiples of it: rows of a tile become lanes of another


class Grid(NamedTuple):
    """What is fixed when tracing: how the logits are cut, and which arrays come along."""

    rule: Rule
    t: int
    s: int
    rows: int  # queries of a tile
    keys: int
    sinks: int  # tiles of keys in front of the range
    by_row: bool  # the tables differ from row to row of the batch
    positions: bool
    segments: bool
    sink: bool  # there are sink logits

    @property
    def tiles(self) -> tuple[int, int]:
        return max(pl.cdiv(self.t, self.rows), 1), max(pl.cdiv(self.s, self.keys), 1)


class Ranges(NamedTuple):
    """First and last tile that each tile needs, [rows of the batch or 1, tiles] flattened, last < first for
    none; and the longest range."""

    first: Array | np.ndarray
    last: Array | np.ndarray
    longest: int


def attention(
    q,
    k,
    v,
    *,
    causal,
    window,
    sinks,
    q_positions,
    kv_positions,
    q_segments,
    kv_segments,
    softcap,
    sink_logits,
    scale,
):
    """See `seqlab.kernels.attention.attention`, which has checked the arguments. Positions and segments come
    in pairs or not at all."""
    pallas.require(q, k, v, sink_logits)
    rule = Rule(causal, window, sinks, softcap, scale)
    return _attend(rule, q, k, v, sink_logits, Places(q_positions, q_segments, kv_positions, kv_segments))


def attention_gradient(q, k, v, out, lse, dout, dlse, *, causal, window, sinks, softcap, scale, **places):
    """`dq, dk, dv` of an attention to which these keys are a part: `out` and `lse` are those of all of it."""
    pallas.require(q, k, v)
    rule = Rule(causal, window, sinks, softcap, scale)
    return _attend_bwd(rule, (q, k, v, None, Places(**places), out, lse), (dout, dlse))[:3]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    rule: Rule, q: Array, k: Array, v: Array, sink: Array | None, places: Places
) -> tuple[Array, Array]:
    if q.shape[1] == 1 and k.shape[1]:
        return _one_query(rule, q, k, v, sink, places)
    grid, by_queries, _ = _plan(rule, q, k, v, sink, places)
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
    out, lse = pallas.call(
        functools.partial(_forward_kernel, grid),
        [_heads(q, grid.rows), _heads(k, grid.keys), _heads(v, grid.keys), *sinks, *extra],
        [((b, h, tiles * grid.rows, values), q.dtype), ((b, h, 1, tiles * grid.rows), jnp.float32)],
        grid=(b, h, tiles, grid.sinks + by_queries.longest),
        in_specs=[of_q, of_k, of_v, *[of_sink] * len(sinks), *extra_specs],
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
    """Decoding, by the kernel for it: the queries that share a head of keys are the rows of one tile, and
    keys stored with heads before slots are read as they lie; the transposition of those passed has been
    undone."""
    from seqlab.kernels.decode_attention.pallas_tpu import decode_attention

    b, s = len(q), k.shape[1]
    query, key = _positions(places, 1, s)
    keep = visible(
        query,
        places.q_segments,
        key,
        places.kv_segments,
        causal=rule.causal,
        window=rule.window,
        sinks=rule.sinks,
    )
    heads_first = (x.swapaxes(1, 2) for x in (k, v))
    found = decode_attention(
        q[:, 0], *heads_first, jnp.broadcast_to(keep, (b, s)), softcap=rule.softcap, scale=rule.scale
    )
    out, lse = (x[:, None] for x in found)
    return (out, lse) if sink is None else with_sink(out, lse, sink, places.q_segments)


def _query_blocks(
    grid: Grid, heads: int, width: int, values: int, places: Places
) -> tuple[list[pl.BlockSpec], list[Array], list[Any]]:
    """On a grid of rows, heads, tiles of queries and their tiles of keys: blocks of q, k, v, out and of a
    number a query; the places."""

    def of_query(b, h, i, n, *tables):
        return b, h, i, 0

    def of_key(b, h, i, n, *tables):
        return b, jax.lax.div(h, heads), _tile(grid, grid.tiles[0], b, i, n, tables, grid.sinks)[0], 0

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
    queries, keys, rest = _place_refs(grid, rest)
    out, lse, top, total, mass, *columns = rest
    i, n = pl.program_id(2), pl.program_id(3)
    j, live = _tile(grid, grid.tiles[0], pl.program_id(0), i, n, (first, last), grid.sinks)

    @pl.when(n == 0)
    def _():
        _lay(queries, columns)
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
        x, _ = _logits(grid.rule, q[...], k[...])
        x = jnp.where(_keep(grid, i, j, columns, keys, 0), x, -jnp.inf)
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


def _attend_fwd(rule: Rule, q, k, v, sink, places: Places):
    out, lse = _attend(rule, q, k, v, sink, places)
    return (out, lse), (q, k, v, sink, places, out, lse)


def _attend_bwd(rule: Rule, residuals, cotangents):
    (q, k, v, sink, places, out, lse), (dout, dlse) = residuals, cotangents
    # A row that saw nothing passes nothing on, whatever its cotangents are: those of log(0) tend to be NaN.
    dead = lse == -jnp.inf
    dout = jnp.where(dead[..., None], jnp.zeros((), dout.dtype), dout)
    d = jnp.where(dead, 0, (out.astype(jnp.float32) * dout.astype(jnp.float32)).sum(-1) - dlse)
    lse = jnp.where(dead, 0, lse)
    grid, by_queries, by_keys = _plan(rule, q, k, v, None, places)
    rows = [_heads(x[..., None], grid.rows)[:, :, None, :, 0] for x in (lse, d)]
    arrays = [
        _heads(q, grid.rows),
        _heads(k, grid.keys),
        _heads(v, grid.keys),
        _heads(dout, grid.rows),
        *rows,
    ]
    dq = _of_queries(grid, by_queries, arrays, places, q.dtype)
    dk, dv = _of_keys(grid, by_keys, arrays, places, (k.dtype, v.dtype))
    dsink = None
    if sink is not None:
        weight = jnp.where(dead, 0, jnp.exp(sink.astype(jnp.float32)[None, None] - lse))
        dsink = -(weight * d).sum((0, 1)).astype(sink.dtype)
    dq, dk, dv = (
        jnp.swapaxes(x[:, :, :size], 1, 2) for x, size in ((dq, grid.t), (dk, grid.s), (dv, grid.s))
    )
    return dq, dk, dv, dsink, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _of_queries(grid: Grid, ranges: Ranges, arrays: list[Array], places: Places, dtype: Any) -> Array:
    (b, h, _, width), (groups, values) = arrays[0].shape, (arrays[1].shape[1], arrays[2].shape[3])
    (of_q, of_k, of_v, of_out, of_row), extra, extra_specs = _query_blocks(
        grid, h // groups, width, values, places
    )
    (dq,) = pallas.call(
        functools.partial(_query_kernel, grid),
        [*arrays, *extra],
        [(arrays[0].shape, dtype)],
        grid=(b, h, grid.tiles[0], grid.sinks + ranges.longest),
        in_specs=[of_q, of_k, of_v, of_out, of_row, of_row, *extra_specs],
        out_specs=[of_q],
        scratch=[
            pallas.vector((grid.rows, width)),
            *[pallas.vector((grid.rows, 1))] * 2,
            *_columns(grid, grid.rows),
        ],
        parallel=3,
        tables=ranges[:2],
    )
    return dq


def _query_kernel(grid: Grid, first, last, q, k, v, dout, lse, d, *rest):
    queries, keys, (dq, total, lse_column, d_column, *columns) = _place_refs(grid, rest)
    i, n = pl.program_id(2), pl.program_id(3)
    j, live = _tile(grid, grid.tiles[0], pl.program_id(0), i, n, (first, last), grid.sinks)

    @pl.when(n == 0)
    def _():
        total[...] = jnp.zeros_like(total)
        _lay([lse, d, *queries], [lse_column, d_column, *columns])

    @pl.when(live)
    def _():
        x, slope = _logits(grid.rule, q[...], k[...])
        p = jnp.exp(jnp.where(_keep(grid, i, j, columns, keys, 0), x - lse_column[...], -jnp.inf))
        dx = p * (pallas.dot(dout[...], v[...], transposed=True) - d_column[...]) * slope
        total[...] += pallas.dot(dx.astype(k.dtype), k[...])

    @pl.when(n == pl.num_programs(3) - 1)
    def _():
        dq[...] = (total[...] * grid.rule.scale).astype(dq.dtype)


def _of_keys(
    grid: Grid, parts: list[tuple[int, Ranges]], arrays: list[Array], places: Places, dtypes: tuple[Any, Any]
) -> list[Array]:
    """dk and dv, part after part of the tiles of keys: sinks are seen by many more queries than what a window
    leaves behind."""
    starts = np.cumsum([0, *(tiles for tiles, _ in parts)]).tolist()
    pieces = [
        _of_some_keys(grid, start, *part, arrays, places, dtypes)
        for start, part in zip(starts, parts, strict=False)
    ]
    return [jnp.concatenate(piece, axis=2) for piece in zip(*pieces, strict=True)]


def _of_some_keys(
    grid: Grid, start: int, tiles: int, ranges: Ranges, arrays: list[Array], places: Places, dtypes: Any
) -> list[Array]:
    """On a grid of rows, groups, `tiles` tiles of keys from `start` on, heads of the group, and tiles of
    queries."""
    (b, h, _, width), (groups, values) = arrays[0].shape, (arrays[1].shape[1], arrays[2].shape[3])
    heads = h // groups

    def of_query(b, g, j, r, n, *tables):
        return b, g * heads + r, _tile(grid, tiles, b, j, n, tables)[0], 0

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
    return pallas.call(
        functools.partial(_key_kernel, grid, start, tiles),
        [*arrays, *extra],
        [
            ((b, groups, tiles * grid.keys, size), dtype)
            for size, dtype in zip((width, values), dtypes, strict=True)
        ],
        grid=(b, groups, tiles, heads, ranges.longest),
        in_specs=[of_q, of_k, of_v, of_out, row, row, *extra_specs],
        out_specs=[
            pl.BlockSpec((None, None, grid.keys, size), lambda b, g, j, r, n, *_: (b, g, j, 0))
            for size in (width, values)
        ],
        scratch=[*(pallas.vector((grid.keys, size)) for size in (width, values)), *_columns(grid, grid.keys)],
        parallel=3,
        tables=ranges[:2],
    )


def _key_kernel(grid: Grid, start: int, tiles: int, first, last, q, k, v, dout, lse, d, *rest):
    queries, keys, (dk, dv, dk_sum, dv_sum, *columns) = _place_refs(grid, rest)
    j, head, n = pl.program_id(2), pl.program_id(3), pl.program_id(4)
    i, live = _tile(grid, tiles, pl.program_id(0), j, n, (first, last))

    @pl.when((head == 0) & (n == 0))
    def _():
        dk_sum[...], dv_sum[...] = jnp.zeros_like(dk_sum), jnp.zeros_like(dv_sum)
        _lay(keys, columns)

    @pl.when(live)
    def _():
        x, slope = _logits(grid.rule, k[...], q[...])  # keys before queries
        p = jnp.exp(jnp.where(_keep(grid, i, j + start, queries, columns, 1), x - lse[...], -jnp.inf))
        dx = p * (pallas.dot(v[...], dout[...], transposed=True) - d[...]) * slope
        dk_sum[...] += pallas.dot(dx.astype(q.dtype), q[...])
        dv_sum[...] += pallas.dot(p.astype(dout.dtype), dout[...])

    @pl.when((head == pl.num_programs(3) - 1) & (n == pl.num_programs(4) - 1))
    def _():
        dk[...], dv[...] = (dk_sum[...] * grid.rule.scale).astype(dk.dtype), dv_sum[...].astype(dv.dtype)


# --- what is inside a tile


def _logits(rule: Rule, x: Array, y: Array) -> tuple[Array, Array | float]:
    """The logits of two tiles of vectors, and by what a softcap multiplies their gradient."""
    logits = pallas.dot(x, y, transposed=True) * rule.scale
    if rule.softcap is None:
        return logits, 1.0
    bent = jnp.tanh(logits / rule.softcap)
    return rule.softcap * bent, 1 - bent * bent


def _keep(grid: Grid, i: Any, j: Any, queries: list[Any], keys: list[Any], axis: int) -> Array:
    """The mask of tile (i, j): queries along `axis`, keys along the other, and their places so already."""
    shapes = [
        [size if n == at else 1 for n in range(2)] for size, at in ((grid.rows, axis), (grid.keys, 1 - axis))
    ]
    index = pallas.places(shapes[1], 1 - axis) + j * grid.keys
    query, key = ([x[...] for x in side] for side in (queries, keys))
    if not grid.positions:
        query.insert(0, pallas.places(shapes[0], axis) + (i * grid.rows + grid.s - grid.t))
        key.insert(0, index)
    rule, none = grid.rule, [None] * (not grid.segments)
    keep = visible(*query, *none, *key, *none, causal=rule.causal, window=rule.window, sinks=rule.sinks)
    keep = keep if grid.s % grid.keys == 0 and grid.s else keep & (index < grid.s)
    return jnp.broadcast_to(keep, np.maximum(*shapes))


def _lay(rows: list[Any], columns: list[Any]) -> None:
    for row, column in zip(rows, columns, strict=True):
        column[...] = pallas.column(row[...])


# --- which tiles


def _tile(
    grid: Grid, tiles: int, b: Any, own: Any, n: Any, tables: tuple[Any, Any], sinks: int = 0
) -> tuple[Any, Any]:
    """The n-th tile that tile `own` of `tiles` needs, after the first `sinks` of all, and whether there are
    so many."""
    entry = (b * tiles if grid.by_row else 0) + own
    first, last = tables[0][entry], tables[1][entry]
    wanted = first + n if not sinks else jnp.where(n < sinks, n, first + n - sinks)
    return jnp.maximum(jnp.minimum(wanted, last), 0), wanted <= last


def _plan(
    rule: Rule, q: Array, k: Array, v: Array, sink: Array | None, places: Places
) -> tuple[Grid, Ranges, list[tuple[int, Ranges]]]:
    """The grid, the ranges of keys by tile of queries, and those of queries by tile of keys, part after
    part."""
    t, s, width = q.shape[1], k.shape[1], max(q.shape[3], v.shape[3])
    most = find("attention/pallas_tpu/tile", k.dtype.itemsize, width)["tile"]
    if rule.window is not None:
        most = min(most, max(pallas.up(rule.window, _UNIT), _UNIT))
    rows, keys = (pallas.up(pl.cdiv(size, max(pl.cdiv(size, most), 1)) or 1, _UNIT) for size in (t, s))
    spelt = [places.q_positions is not None, places.q_segments is not None]
    grid = Grid(rule, t, s, rows, keys, 0, any(spelt), *spelt, sink is not None)
    xp = jnp if grid.by_row else np
    q_positions, kv_positions = (
        _positions(places, t, s) if grid.by_row else (np.arange(s - t, s)[None], np.arange(s)[None])
    )
    if not t or not s:
        needed = np.zeros((1, *grid.tiles), bool)
        return (
            grid._replace(by_row=False),
            _ranges(np, needed),
            [(grid.tiles[1], _ranges(np, needed.swapaxes(1, 2)))],
        )
    needed = _needed(rule, _ends(xp, q_positions, rows), _ends(xp, kv_positions, keys))
    if grid.segments:
        (q_low, q_high), (k_low, k_high) = (
            _ends(jnp, places.q_segments, rows, skip=0),
            _ends(jnp, places.kv_segments, keys, skip=0),
        )
        needed = needed & (q_low[:, :, None] <= k_high[:, None]) & (k_low[:, None] <= q_high[:, :, None])
    needed = xp.broadcast_to(needed, (len(q) if grid.by_row else 1, *grid.tiles))
    if rule.window is not None and rule.sinks and not grid.by_row:
        return _beside_sinks(grid, needed)
    return grid, _ranges(xp, needed), [(grid.tiles[1], _ranges(xp, needed.swapaxes(1, 2)))]


def _beside_sinks(grid: Grid, needed: np.ndarray) -> tuple[Grid, Ranges, list[tuple[int, Ranges]]]:
    """The plan where between the sinks and a window lies what nobody reads."""
    tiles = grid.tiles[1]
    sinks = min(pl.cdiv(grid.rule.sinks, grid.keys), tiles)
    first, last, longest = _ranges(np, needed & (np.arange(tiles) >= sinks))
    none, columns = last < first, needed.swapaxes(1, 2)
    beyond = Ranges(
        np.where(none, np.int32(sinks), first), np.where(none, _ranges(np, needed).last, last), longest
    )
    parts = [(sinks, columns[:, :sinks]), (tiles - sinks, columns[:, sinks:])]
    return grid._replace(sinks=sinks), beyond, [(count, _ranges(np, part)) for count, part in parts if count]


def _ranges(xp: Any, needed: Any) -> Ranges:
    """The ranges along the last axis of [b, i, j]; as long as can be where they are not known."""
    tiles, some = needed.shape[2], needed.any(2)
    first = xp.where(some, needed.argmax(2), 0)
    last = xp.where(some, tiles - 1 - needed[:, :, ::-1].argmax(2), -1)
    longest = int((last - first).max(initial=0)) + 1 if xp is np else tiles
    return Ranges(first.astype(np.int32).ravel(), last.astype(np.int32).ravel(), longest)


# --- arrays


def _heads(x: Array, size: int) -> Array:
    """[b, t, h, k] -> [b, h, t, k], filled up to whole tiles with zeros: one copy."""
    more = max(pallas.up(x.shape[1], size), size) - x.shape[1]
    return jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, more), (0, 0)))


def _place_arrays(
    grid: Grid, places: Places, of_query: Any, of_key: Any
) -> tuple[list[Array], list[pl.BlockSpec]]:
    """Positions and segments, as far as there are any: those of the queries first. [b, 1, t] and [b, 1,
    s]."""
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
    """Those of the queries, those of the keys, and what comes after them."""
    count = grid.positions + grid.segments
    return list(refs[:count]), list(refs[count : 2 * count]), list(refs[2 * count :])


def _columns(grid: Grid, size: int) -> list[Any]:
    """Room for places as columns."""
    return [pallas.vector((size, 1), jnp.int32)] * (grid.positions + grid.segments)
