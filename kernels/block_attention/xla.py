"""Selected blocks in plain XLA. A few queries gather their blocks; many queries are gathered by block into
dense tiles.

A pair is a query head and one selected block. The pairs of a row and a key/value head are sorted into tiles
of `rows` pairs that share a block; a block's last tile is padded with dummy pairs whose query is zero.
Nothing inside a tile is masked: a block is seen whole. Each tile is a softmax over its block, (out, lse) per
pair, and the pairs of a query merge by their lse. All rows and heads process their tiles in parallel, one
tile at a time, so that a batch may be sharded; they have about equally many.

Backward, with the merged lse and D = Σ dout·out - dlse: P = exp(X - lse), dv = P^T dout, dX = P (dout v^T -
D), dq = scale dX k, dk = scale dX^T q, where a dummy pair has lse = inf and therefore no weight.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from seqlab.shapes import accumulator

_CACHED = 2**20  # logits of all heads in a tile; more leave a CPU's cache between one operation and the next
_ROWS = 32, 512  # the least and the greatest number of pairs in a tile


class Tiles(NamedTuple):
    """Tiles [x, l] of the pairs [x, p] of x rows and heads: their `block`, the `queries` [x, l, rows] (n for
    a dummy), the number of non-empty tiles, `count`; and the `place` [x, p] of each pair in the concatenated
    tiles, n_tiles * rows for pairs without a block."""

    block: Array
    queries: Array
    place: Array
    count: Array


class Rule(NamedTuple):
    """Static configuration of the logits."""

    scale: float
    softcap: float | None


def block_attention(q, k, v, chosen, *, block, scale, softcap):
    """See `seqlab.kernels.block_attention.block_attention`, which has checked the arguments."""
    (b, t, h, _), (s, g) = q.shape, k.shape[1:3]
    r, c, n = h // g, chosen.shape[3], s // block
    if 0 in (b, t, c, n):
        dtype = accumulator(jnp.result_type(q, k, v))
        return jnp.zeros((b, t, h, v.shape[3]), q.dtype), jnp.full((b, t, h), -jnp.inf, dtype)
    # One axis x of rows and key/value heads, one y of the queries that read them.
    q, chosen = (x.reshape(b, t, g, r, -1).swapaxes(1, 2).reshape(b * g, t * r, -1) for x in (q, chosen))
    k, v = (x.swapaxes(1, 2).reshape(b * g, n, block, -1) for x in (k, v))
    attend = _by_query if t * r * c <= max(n, r * c) else _by_block
    out, lse = attend(Rule(scale, softcap), q, k, v, chosen)
    out, lse = (
        x.reshape(b, g, t, r, *x.shape[2:]).swapaxes(1, 2).reshape(b, t, h, *x.shape[2:]) for x in (out, lse)
    )
    return out, lse


def _by_query(rule: Rule, q: Array, k: Array, v: Array, chosen: Array) -> tuple[Array, Array]:
    dtype = accumulator(jnp.result_type(q, k, v))
    x = jnp.arange(q.shape[0])[:, None, None]
    k, v = (blocks[x, jnp.maximum(chosen, 0)] for blocks in (k, v))  # [x, y, c, block, .]
    logits, _ = _bent(rule, _dot("xyk,xycsk->xycs", q, k, dtype))
    logits = jnp.where((chosen >= 0)[..., None], logits, -jnp.inf)
    top = logits.max((2, 3), keepdims=True)
    top = lax.stop_gradient(jnp.where(top == -jnp.inf, 0, top))
    p = jnp.exp(logits - top)
    total = p.sum((2, 3))
    some = jnp.where(total == 0, 1, total)
    out = jnp.einsum("xycs,xycsv->xyv", p.astype(v.dtype), v, preferred_element_type=dtype) / some[..., None]
    return out.astype(q.dtype), jnp.where(total == 0, -jnp.inf, top[:, :, 0, 0] + jnp.log(some))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_block(rule: Rule, q: Array, k: Array, v: Array, chosen: Array) -> tuple[Array, Array]:
    dtype, (x, y, c) = accumulator(jnp.result_type(q, k, v)), chosen.shape
    tiles = _tiles(chosen, *k.shape[1:3])
    queries = _with_nobody(q, 0)

    def visit(i, sums):
        here, block = _tile(tiles, i)
        logits, _ = _bent(rule, _dot("xqk,xsk->xqs", _rows(queries, here), _block(k, block), dtype))
        top = logits.max(-1)
        p = jnp.exp(logits - top[..., None])
        total = p.sum(-1)
        out = _dot("xqs,xsv->xqv", p.astype(v.dtype), _block(v, block), dtype) / total[..., None]
        return tuple(_put(a, 1, i, new) for a, new in zip(sums, (out, top + jnp.log(total)), strict=True))

    zero = _zero(dtype, q, k, v)
    length = tiles.queries.shape[1] * tiles.queries.shape[2]
    start = jnp.zeros((x, length, v.shape[3]), dtype) + zero, jnp.zeros((x, length), dtype) + zero
    outs, lses = lax.fori_loop(0, tiles.count, visit, start)
    lses = _rows(_with_nobody(lses, -jnp.inf), tiles.place).reshape(x, y, c)
    outs = _rows(outs, jnp.minimum(tiles.place, length - 1)).reshape(x, y, c, -1)
    top = lses.max(-1)
    base = jnp.where(top == -jnp.inf, 0, top)
    weights = jnp.exp(lses - base[..., None])
    total = weights.sum(-1)
    some = jnp.where(total == 0, 1, total)
    out = jnp.where(weights[..., None] > 0, outs, 0)
    out = jnp.einsum("xyc,xycv->xyv", weights / some[..., None], out)
    return out.astype(q.dtype), jnp.where(total == 0, -jnp.inf, base + jnp.log(some))


def _forward(rule: Rule, q: Array, k: Array, v: Array, chosen: Array):
    out, lse = _by_block(rule, q, k, v, chosen)
    return (out, lse), (q, k, v, chosen, out, lse)


def _backward(rule: Rule, residuals, cotangents):
    (q, k, v, chosen, out, lse), (dout, dlse) = residuals, cotangents
    dtype, (x, y, c) = lse.dtype, chosen.shape
    tiles = _tiles(chosen, *k.shape[1:3])
    # A query that saw nothing has no gradient, whatever its cotangents are: those of log(0) tend to be NaN.
    dead = lse == -jnp.inf
    dout = jnp.where(dead[..., None], jnp.zeros((), dout.dtype), dout)
    d = jnp.where(dead, 0, (out.astype(dtype) * dout.astype(dtype)).sum(-1) - dlse)
    rows = _with_nobody(q, 0), _with_nobody(dout, 0), _with_nobody(lse, jnp.inf), _with_nobody(d, 0)

    k_widths = k.swapaxes(2, 3)

    # Tiles are laid out [keys, queries] and dq as [width, queries]: see `seqlab.kernels.attention.xla`.
    def visit(i, sums):
        here, block = _tile(tiles, i)
        q_tile, dout_tile, lse_tile, d_tile = (_rows(a, here) for a in rows)
        logits, slope = _bent(rule, _dot("xsk,xqk->xsq", _block(k, block), q_tile, dtype))
        p = jnp.exp(logits - lse_tile[:, None])
        dx = p * (_dot("xsv,xqv->xsq", _block(v, block), dout_tile, dtype) - d_tile[:, None]) * slope
        dq = _dot("xks,xsq->xkq", _block(k_widths, block), dx.astype(k.dtype), dtype)
        dk = _dot("xsq,xqk->xsk", dx.astype(q.dtype), q_tile, dtype)
        dv = _dot("xsq,xqv->xsv", p.astype(dout.dtype), dout_tile, dtype)
        dq_sum, dk_sum, dv_sum = sums
        return (
            _put(dq_sum, 2, i, dq),
            dk_sum.at[jnp.arange(x), block].add(dk),
            dv_sum.at[jnp.arange(x), block].add(dv),
        )

    zero = _zero(dtype, q, k, v, dout, dlse)
    length = tiles.queries.shape[1] * tiles.queries.shape[2]
    start = tuple(jnp.zeros(shape, dtype) + zero for shape in ((x, q.shape[2], length), k.shape, v.shape))
    dq, dk, dv = lax.fori_loop(0, tiles.count, visit, start)
    dq = _rows(_with_nobody(dq.swapaxes(1, 2), 0), tiles.place).reshape(x, y, c, -1).sum(2)
    return (rule.scale * dq).astype(q.dtype), (rule.scale * dk).astype(k.dtype), dv.astype(v.dtype), None


_by_block.defvjp(_forward, _backward)


def _bent(rule: Rule, products: Array) -> tuple[Array, Array | float]:
    """Logits from products of queries and keys, and the factor of the softcap in their gradient."""
    logits = rule.scale * products
    if rule.softcap is None:
        return logits, 1.0
    bent = jnp.tanh(logits / rule.softcap)
    return rule.softcap * bent, 1 - bent * bent


def _tiles(chosen: Array, n: int, block: int) -> Tiles:
    """The tiles of the pairs (query, c-th choice), in the order of choices [x, y, c]."""
    x, y, c = chosen.shape
    least, rows = _ROWS
    several = x if isinstance(x, int) else 1  # an exported program takes any number
    while rows > least and (rows * block * several > _CACHED or rows * n > 2 * y * c):
        rows //= 2
    chose = (chosen[..., None] == jnp.arange(n)).any(2)
    # Earlier pairs of the block, [x, y, n].
    before = jnp.cumsum(chose, axis=1, dtype=jnp.int32) - chose
    of_block = -(-(before[:, -1] + chose[:, -1]) // rows)  # tiles
    ends = jnp.cumsum(of_block, axis=1)
    index = jnp.arange(y * c // rows + n)
    of = jnp.minimum(jnp.sum(ends[:, None] <= index[:, None], axis=2), n - 1)
    first = (ends - of_block)[:, None] * rows + before
    place = jnp.where(
        chosen < 0, len(index) * rows, jnp.take_along_axis(first, jnp.maximum(chosen, 0), axis=2)
    ).reshape(x, y * c)
    queries = (
        jnp.full((x, len(index) * rows), y)
        .at[jnp.arange(x)[:, None], place]
        .set(jnp.arange(y * c) // c, mode="drop")
    )
    return Tiles(of, queries.reshape(x, len(index), rows), place, ends[:, -1].max())


def _tile(tiles: Tiles, i: Any) -> tuple[Array, Array]:
    """The queries [x, rows] and the block [x] of each tile i."""
    return lax.dynamic_index_in_dim(tiles.queries, i, 1, keepdims=False), lax.dynamic_index_in_dim(
        tiles.block, i, 1, keepdims=False
    )


def _with_nobody(a: Array, value: float) -> Array:
    """`a` [x, y, ...] with one more query, the dummy."""
    return jnp.pad(a, [(0, 1) if axis == 1 else (0, 0) for axis in range(a.ndim)], constant_values=value)


def _rows(a: Array, index: Array) -> Array:
    """a [x, y, ...] at index [x, i]."""
    return a[jnp.arange(a.shape[0])[:, None], index]


def _block(a: Array, index: Array) -> Array:
    """a [x, n, block, .] at index [x]."""
    return a[jnp.arange(a.shape[0]), index]


def _put(a: Array, axis: int, i: Any, new: Array) -> Array:
    """`a` with tile i along the axis of all tiles' rows."""
    return lax.dynamic_update_slice_in_dim(a, new, i * new.shape[axis], axis)


def _dot(equation: str, a: Array, b: Array, dtype: Any) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=dtype)


def _zero(dtype: Any, *arrays: Array) -> Array:
    """A zero that varies over every mesh axis over which any of the arrays does: inside shard_map a loop must
    start as it ends."""
    return functools.reduce(jnp.add, (jnp.zeros_like(a, dtype, shape=()) for a in arrays))
