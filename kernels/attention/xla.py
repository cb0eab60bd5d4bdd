"""Attention in plain XLA, tile by tile, with memory linear in time; the default on all platforms.

Forward: the online softmax (arXiv 1805.02867, 2205.14135). Each query row keeps the largest logit so far,
`top`, and relative to it the sums `total` = Σ_j exp(x_j - top) and `mass` = Σ_j exp(x_j - top) v_j; they
absorb one tile of keys after another. They start at (-inf, 0, 0), or with a sink logit z at (z, 1, 0); at the
end out = mass / total and lse = top + log total.

Backward: of the weights only lse is kept. Every tile is recomputed, P = exp(X - lse), and with D = Σ dout·out
- dlse

    dv = P^T dout;  dX = P (dout v^T - D);  da = -Σ dX_ij |i - j|;  under a softcap c dX times 1 - (X / c)^2
    dq = scale dX k;  dk = scale dX^T q;  dz = -Σ_i exp(z - lse_i) D_i

Tiles are laid out [keys, queries] and dq is accumulated as [width, time], so that no matmul contracts its
left operand's major axis (twice as slow on a CPU).

Visible tiles are determined before the loop: from the shapes with default positions and segments, otherwise
from the minimum and maximum position and segment of each tile. The others are skipped: a causal call does
half the work, a window O(t W), packed documents only their own pairs. Tiles are processed by a loop even if
they are few: unrolled, XLA would hold all of them at once.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from seqlab.kernels.attention.reference import distance, visible
from seqlab.shapes import accumulator

_DENSE = 2**15  # up to this many logits per head one tile is as fast and compiles sooner
_EDGES = 128, 512  # the least and the greatest length of a tile
_CACHED = 2**20  # logits of all heads in a tile; more leave a CPU's cache between one operation and the next
_MOST_TILES = 512  # along either axis: bounds the list of tiles to walk


class Rule(NamedTuple):
    """Static configuration."""

    left: int | None
    right: int | None
    sinks: int
    softcap: float | None
    scale: float

    @property
    def span(self) -> int | None:
        """The number of positions in a window, None if it is unbounded on a side."""
        return None if self.left is None or self.right is None else self.left + self.right + 1


class Places(NamedTuple):
    """Positions and segments of the queries [b, t] and keys [b, s]; None for the default. Integers, so not
    differentiated."""

    q_positions: Array | None
    q_segments: Array | None
    kv_positions: Array | None
    kv_segments: Array | None


class Plan(NamedTuple):
    """The tiling of the logits into `rows` queries by `keys` keys, and the tiles (i, j) to visit: the first
    `count`."""

    rows: int
    keys: int
    t: int  # padded to a multiple of rows
    s: int  # padded to a multiple of keys
    i: Array | np.ndarray
    j: Array | np.ndarray
    count: int | Array

    def walk(self, visit: Callable[[Any, Any, Any], Any], carry: Any) -> Any:
        if self.t == self.rows and self.s == self.keys:
            return visit(0, 0, carry)
        i, j = jnp.asarray(self.i), jnp.asarray(self.j)
        return lax.fori_loop(0, self.count, lambda n, carry: visit(i[n], j[n], carry), carry)


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
    rule = Rule(left, right, sinks, softcap, scale)
    places = Places(q_positions, q_segments, kv_positions, kv_segments)
    return _attend(rule, q, k, v, sink_logits, alibi, places)


def attention_gradient(q, k, v, alibi, out, lse, dout, dlse, *, left, right, sinks, softcap, scale, **places):
    """`dq, dk, dv, dalibi` for a part of the keys of an attention: `out` and `lse` are those over all
    keys."""
    rule = Rule(left, right, sinks, softcap, scale)
    dq, dk, dv, _, dalibi, _ = _attend_backward(
        rule, (q, k, v, None, alibi, Places(**places), out, lse), (dout, dlse)
    )
    return dq, dk, dv, dalibi


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    rule: Rule, q: Array, k: Array, v: Array, sink: Array | None, alibi: Array | None, places: Places
) -> tuple[Array, Array]:
    if q.shape[1] == 1:
        return _one_query(rule, q, k, v, sink, alibi, places)
    return _many_queries(rule, q, k, v, sink, alibi, places)


def _many_queries(
    rule: Rule, q: Array, k: Array, v: Array, sink: Array | None, alibi: Array | None, places: Places
) -> tuple[Array, Array]:
    dtype, (b, t, h, _), (s, g) = accumulator(jnp.result_type(q, k, v)), q.shape, k.shape[1:3]
    plan = _plan(rule, places, b * h, t, s)
    tile_mask, tile_distance = _masks(rule, places, plan, t, s)
    slopes = None if alibi is None else alibi.astype(dtype).reshape(b, g, h // g, 1, 1)
    zero = _zero(dtype, q, k, v, sink, alibi, *places)
    z = _first_logit(sink, places, (b, t, h), dtype)
    start = (z, jnp.where(z == -jnp.inf, 0, jnp.ones((), dtype)), jnp.zeros((b, t, h, v.shape[3]), dtype))
    start = jax.tree.map(lambda x: _heads(x, g, plan.t) + zero, start)
    q_heads, k_heads, v_heads = (
        _heads(q, g, plan.t),
        _heads(k, g, plan.s)[:, :, 0],
        _heads(v, g, plan.s)[:, :, 0],
    )

    def absorb(i, j, sums):
        top, total, mass = (_cut(x, 3, i, plan.rows) for x in sums)
        x, _ = _logits(
            rule, "bgrtk,bgsk->bgrts", _cut(q_heads, 3, i, plan.rows), _cut(k_heads, 2, j, plan.keys), dtype
        )
        at = i, j, (0, None, None, 1, None), (0, None, None, None, 1)
        x = x if slopes is None else x - slopes * tile_distance(*at, dtype)
        x = jnp.where(tile_mask(*at), x, -jnp.inf)
        new_top = jnp.maximum(top, x.max(-1, initial=-jnp.inf))
        base = jnp.where(new_top == -jnp.inf, 0, new_top)
        fade, p = jnp.exp(top - base), jnp.exp(x - base[..., None])
        mass = mass * fade[..., None] + _dot(
            "bgrts,bgsv->bgrtv", p.astype(v.dtype), _cut(v_heads, 2, j, plan.keys), dtype
        )
        return tuple(
            _put(x, 3, i, new) for x, new in zip(sums, (new_top, total * fade + p.sum(-1), mass), strict=True)
        )

    top, total, mass = plan.walk(absorb, start)
    some = jnp.where(total == 0, 1, total)
    lse = jnp.where(total == 0, -jnp.inf, top + jnp.log(some))
    return _unheads(mass / some[..., None], t).astype(q.dtype), _unheads(lse, t)


def _one_query(
    rule: Rule, q: Array, k: Array, v: Array, sink: Array | None, alibi: Array | None, places: Places
) -> tuple[Array, Array]:
    """Decoding. Keys stored as [heads, slots] are read in place; XLA copies others."""
    dtype, (b, t, h, width), (s, g) = accumulator(jnp.result_type(q, k, v)), q.shape, k.shape[1:3]
    x, _ = _logits(rule, "bgrk,bsgk->bsgr", q.reshape(b, g, h // g, width), k, dtype)
    keep, distances = _masks(rule, places, Plan(1, s, 1, s, 0, 0, 1), t, s)
    at = 0, 0, (0, 1, None, None), (0, 1, None, None)
    if alibi is not None:
        x = x - alibi.astype(dtype).reshape(b, 1, g, h // g) * distances(*at, dtype)
    x = jnp.where(keep(*at), x, -jnp.inf)
    z = _first_logit(sink, places, (b, t, h), dtype).reshape(b, g, h // g)
    top = jnp.maximum(z, x.max(1, initial=-jnp.inf))
    base = jnp.where(top == -jnp.inf, 0, top)
    p = jnp.exp(x - base[:, None])
    total = p.sum(1) + jnp.exp(z - base)
    some = jnp.where(total == 0, 1, total)
    out = _dot("bsgr,bsgv->bgrv", p.astype(v.dtype), v, dtype) / some[..., None]
    lse = jnp.where(total == 0, -jnp.inf, base + jnp.log(some))
    return out.reshape(b, t, h, v.shape[3]).astype(q.dtype), lse.reshape(b, t, h)


def _attend_forward(rule: Rule, q, k, v, sink, alibi, places: Places):
    out, lse = _attend(rule, q, k, v, sink, alibi, places)
    return (out, lse), (q, k, v, sink, alibi, places, out, lse)


def _attend_backward(rule: Rule, residuals, cotangents):
    (q, k, v, sink, alibi, places, out, lse), (dout, dlse) = residuals, cotangents
    dtype, (b, t, h), (s, g) = lse.dtype, lse.shape, k.shape[1:3]
    # A row that saw nothing has no gradient, whatever its cotangents are: those of log(0) tend to be NaN.
    dead = lse == -jnp.inf
    dout = jnp.where(dead[..., None], jnp.zeros((), dout.dtype), dout)
    lse = jnp.where(dead, 0, lse)
    d = jnp.where(dead, 0, (out.astype(dtype) * dout.astype(dtype)).sum(-1) - dlse)
    plan = _plan(rule, places, b * h, t, s)
    tile_mask, tile_distance = _masks(rule, places, plan, t, s)
    slopes = None if alibi is None else alibi.astype(dtype).reshape(b, g, 1, h // g, 1)
    zero = _zero(dtype, q, k, v, sink, alibi, *places, dout, dlse)
    rows = tuple(_heads(x, g, plan.t) for x in (q, dout, lse, d))
    k_heads, v_heads = _heads(k, g, plan.s)[:, :, 0], _heads(v, g, plan.s)[:, :, 0]
    k_widths = k_heads.swapaxes(2, 3)

    def accumulate(i, j, sums):
        q_tile, dout_tile, lse_tile, d_tile = (_cut(x, 3, i, plan.rows) for x in rows)
        k_tile, v_tile = (_cut(x, 2, j, plan.keys) for x in (k_heads, v_heads))
        x, slope = _logits(rule, "bgsk,bgrtk->bgsrt", k_tile, q_tile, dtype)
        at = i, j, (0, None, None, None, 1), (0, None, 1, None, None)
        far = None if slopes is None else tile_distance(*at, dtype)
        x = x if slopes is None else x - slopes * far
        p = jnp.exp(jnp.where(tile_mask(*at), x - lse_tile[:, :, None], -jnp.inf))
        dx = p * (_dot("bgsv,bgrtv->bgsrt", v_tile, dout_tile, dtype) - d_tile[:, :, None])
        dslopes = () if slopes is None else (sums[3] - (dx * far).sum((2, 4)),)
        dx = dx * slope
        dq = _dot("bgks,bgsrt->bgkrt", _cut(k_widths, 3, j, plan.keys), dx.astype(k.dtype), dtype)
        dk = _dot("bgsrt,bgrtk->bgsk", dx.astype(q.dtype), q_tile, dtype)
        dv = _dot("bgsrt,bgrtv->bgsv", p.astype(dout.dtype), dout_tile, dtype)
        dq_sum, dk_sum, dv_sum, *_ = sums
        return _add(dq_sum, 4, i, dq), _add(dk_sum, 2, j, dk), _add(dv_sum, 2, j, dv), *dslopes

    shapes = [jnp.moveaxis(rows[0], 4, 2).shape, k_heads.shape, v_heads.shape]
    shapes += [] if slopes is None else [(b, g, h // g)]
    dq, dk, dv, *dslopes = plan.walk(accumulate, tuple(jnp.zeros(shape, dtype) + zero for shape in shapes))
    dq, dk, dv = (
        _unheads(jnp.moveaxis(dq, 2, 4) * rule.scale, t),
        _unheads(dk[:, :, None] * rule.scale, s),
        _unheads(dv[:, :, None], s),
    )
    dsink = None
    if sink is not None:
        weight = jnp.where(dead, 0, jnp.exp(sink.astype(dtype)[None, None] - lse))
        dsink = -(weight * d).sum((0, 1)).astype(sink.dtype)
    dalibi = dslopes[0].reshape(b, h).astype(alibi.dtype) if dslopes else None
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), dsink, dalibi, None


_attend.defvjp(_attend_forward, _attend_backward)


def _logits(rule: Rule, equation: str, x: Array, y: Array, dtype: Any) -> tuple[Array, Array | float]:
    """The logits of a tile, and the factor of the softcap in their gradient."""
    logits = _dot(equation, x, y, dtype) * rule.scale
    if rule.softcap is None:
        return logits, 1.0
    bent = jnp.tanh(logits / rule.softcap)
    return rule.softcap * bent, 1 - bent * bent


def _dot(equation: str, x: Array, y: Array, dtype: Any) -> Array:
    return jnp.einsum(equation, x, y, preferred_element_type=dtype)


def _first_logit(sink: Array | None, places: Places, shape: tuple[int, int, int], dtype: Any) -> Array:
    """[b, t, h]: the initial logit of each row: its head's sink, or -inf. Padding has none."""
    z = jnp.broadcast_to(-jnp.inf if sink is None else sink.astype(dtype)[None, None], shape).astype(dtype)
    return z if places.q_segments is None else jnp.where((places.q_segments == 0)[:, :, None], -jnp.inf, z)


def _plan(rule: Rule, places: Places, heads: int, t: int, s: int) -> Plan:
    if t * s <= _DENSE or t == 1:
        return Plan(t, s, t, s, 0, 0, 1)
    edge = _edge(rule, heads, max(t, s))
    rows = _tile(t, edge)
    keys = _tile(s, edge * max(1, edge // rows))
    i, j = -(-t // rows), -(-s // keys)
    if all(x is None for x in places):
        needed = _needed(
            rule, _ends(np, np.arange(s - t, s)[None], rows), _ends(np, np.arange(s)[None], keys)
        )[0]
        listed = np.nonzero(needed)
        return Plan(rows, keys, i * rows, j * keys, *(x.astype(np.int32) for x in listed), len(listed[0]))
    q_positions, kv_positions = _positions(places, t, s)
    needed = _needed(rule, _ends(jnp, q_positions, rows), _ends(jnp, kv_positions, keys))
    if places.q_segments is not None:
        q_low, q_high = _ends(jnp, places.q_segments, rows, skip=0)
        k_low, k_high = _ends(jnp, places.kv_segments, keys, skip=0)
        needed = needed & (q_low[:, :, None] <= k_high[:, None]) & (k_low[:, None] <= q_high[:, :, None])
    needed = needed.any(0).ravel()
    (listed,) = jnp.nonzero(needed, size=i * j, fill_value=0)
    return Plan(rows, keys, i * rows, j * keys, listed // j, listed % j, needed.sum())


def _edge(rule: Rule, heads: int, length: int) -> int:
    """The tile length: long tiles make efficient products, short ones skip more and, `heads` at a time, stay
    in cache."""
    edge, most = _EDGES
    if jax.default_backend() != "cpu":
        return most
    most = min(most, length // 4, rule.span or length, math.isqrt(_CACHED // max(heads, 1)))
    while 2 * edge <= most:
        edge *= 2
    return edge


def _tile(length: int, edge: int) -> int:
    """The size of equal tiles of about `edge`, a multiple of 16, few enough."""
    count = min(-(-length // edge), _MOST_TILES)
    return math.ceil(length / count / 16) * 16 if count > 1 else length


def _ends(xp: Any, x: Array | np.ndarray, size: int, skip: int | None = None) -> tuple[Any, Any]:
    """Minimum and maximum of every `size` entries of x [b, length], [b, tiles] each; entries equal to `skip`
    do not count."""
    x = xp.pad(x, ((0, 0), (0, -x.shape[1] % size)), mode="edge").reshape(x.shape[0], -1, size)
    if skip is None:
        return x.min(-1), x.max(-1)
    limits = np.iinfo(x.dtype)
    return xp.where(x == skip, limits.max, x).min(-1), xp.where(x == skip, limits.min, x).max(-1)


def _needed(rule: Rule, q_ends: tuple[Any, Any], k_ends: tuple[Any, Any]) -> Any:
    """[b, i, j]: whether a query of tile i may see a key of tile j, judged by their minimum and maximum
    positions."""
    (q_low, q_high), (k_low, k_high) = ((low[:, :, None], high[:, :, None]) for low, high in (q_ends, k_ends))
    k_low, k_high = k_low.swapaxes(1, 2), k_high.swapaxes(1, 2)
    needed = (k_low <= q_high) | True if rule.right is None else k_low <= q_high + rule.right
    if rule.left is not None:
        needed = needed & ((q_low - k_high <= rule.left) | (k_low < rule.sinks))
    return needed


def _positions(places: Places, t: int, s: int) -> tuple[Array, Array]:
    if places.q_positions is None:
        return jnp.arange(s - t, s, dtype=jnp.int32)[None], jnp.arange(s, dtype=jnp.int32)[None]
    return places.q_positions, places.kv_positions


def _masks(
    rule: Rule, places: Places, plan: Plan, t: int, s: int
) -> tuple[Callable[..., Array], Callable[..., Array]]:
    """Functions for the mask of tile (i, j) and for the distances of its queries and keys, laid out along the
    given axes (see `_lay`)."""
    q_positions, kv_positions = _positions(places, t, s)
    index = jnp.arange(plan.s, dtype=jnp.int32)[None]

    def pad(x: Array | None, length: int) -> Array | None:
        return None if x is None else jnp.pad(x, ((0, 0), (0, length - x.shape[1])))

    queries = [pad(x, plan.t) for x in (q_positions, places.q_segments)]
    keys = [pad(x, plan.s) for x in (kv_positions, places.kv_segments)]

    def mask(i: Any, j: Any, q_axes: tuple[int | None, ...], k_axes: tuple[int | None, ...]) -> Array:
        query = [_lay(x, q_axes, i, plan.rows) for x in queries]
        key = [_lay(x, k_axes, j, plan.keys) for x in keys]
        keep = visible(*query, *key, left=rule.left, right=rule.right, sinks=rule.sinks)
        return keep if plan.s == s else keep & (_lay(index, k_axes, j, plan.keys) < s)

    def distances(
        i: Any, j: Any, q_axes: tuple[int | None, ...], k_axes: tuple[int | None, ...], dtype: Any
    ) -> Array:
        return distance(_lay(queries[0], q_axes, i, plan.rows), _lay(keys[0], k_axes, j, plan.keys), dtype)

    return mask, distances


def _lay(x: Array | None, axes: tuple[int | None, ...], tile: Any, size: int) -> Array | None:
    """One tile of x [b, length], its two axes at the places of 0 and 1 in `axes`, with size 1 elsewhere."""
    if x is None:
        return None
    return jnp.expand_dims(_cut(x, 1, tile, size), tuple(n for n, axis in enumerate(axes) if axis is None))


def _zero(dtype: Any, *arrays: Array | None) -> Array:
    """A zero that varies over every mesh axis over which any of the arrays does: inside shard_map a loop must
    start as it ends."""
    zeros = [jnp.zeros_like(x, dtype, shape=()) for x in arrays if x is not None]
    return functools.reduce(jnp.add, zeros)


def _heads(x: Array, g: int, length: int) -> Array:
    """[b, t, h, ...] -> [b, g, h // g, length, ...], padded with zeros."""
    x = jnp.moveaxis(x, 1, 2)
    x = x.reshape(x.shape[0], g, x.shape[1] // g, *x.shape[2:])
    return jnp.pad(x, [(0, length - x.shape[3]) if axis == 3 else (0, 0) for axis in range(x.ndim)])


def _unheads(x: Array, t: int) -> Array:
    """[b, g, r, length, ...] -> [b, t, g * r, ...]."""
    x = x[:, :, :, :t]
    return jnp.moveaxis(x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:]), 1, 2)


def _cut(x: Array, axis: int, tile: Any, size: int) -> Array:
    return x if x.shape[axis] == size else lax.dynamic_slice_in_dim(x, tile * size, size, axis)


def _put(x: Array, axis: int, tile: Any, new: Array) -> Array:
    return (
        new if x.shape == new.shape else lax.dynamic_update_slice_in_dim(x, new, tile * new.shape[axis], axis)
    )


def _add(x: Array, axis: int, tile: Any, new: Array) -> Array:
    return _put(x, axis, tile, _cut(x, axis, tile, new.shape[axis]) + new)
