"""Tiles of the TPU kernels: which tiles a tile needs, from tables read by index maps, and computations inside
a tile."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl

from seqlab.kernels import pallas
from seqlab.kernels.attention.reference import distance, visible
from seqlab.kernels.attention.xla import Rule


class Grid(NamedTuple):
    """Static configuration: the tiling of the logits, and which optional arrays are present."""

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
    alibi: bool  # there are slopes

    @property
    def tiles(self) -> tuple[int, int]:
        return max(pl.cdiv(self.t, self.rows), 1), max(pl.cdiv(self.s, self.keys), 1)


class Ranges(NamedTuple):
    """First and last tile needed by each tile, [rows of the batch or 1, tiles] flattened, last < first for
    none; and the longest range."""

    first: Array | np.ndarray
    last: Array | np.ndarray
    longest: int


def tile_at(
    grid: Grid, tiles: int, b: Any, own: Any, n: Any, tables: tuple[Any, Any], sinks: int = 0
) -> tuple[Any, Any]:
    """The n-th tile needed by tile `own` of `tiles`, after the first `sinks` of all, and whether it
    exists."""
    entry = (b * tiles if grid.by_row else 0) + own
    first, last = tables[0][entry], tables[1][entry]
    wanted = first + n if not sinks else jnp.where(n < sinks, n, first + n - sinks)
    return jnp.maximum(jnp.minimum(wanted, last), 0), wanted <= last


def beside_sinks(grid: Grid, needed: np.ndarray) -> tuple[Grid, Ranges, list[tuple[int, Ranges]]]:
    """The plan for unread keys between the sinks and a window."""
    tiles = grid.tiles[1]
    sinks = min(pl.cdiv(grid.rule.sinks, grid.keys), tiles)
    first, last, longest = ranges_of(np, needed & (np.arange(tiles) >= sinks))
    none, columns = last < first, needed.swapaxes(1, 2)
    beyond = Ranges(
        np.where(none, np.int32(sinks), first), np.where(none, ranges_of(np, needed).last, last), longest
    )
    parts = [(sinks, columns[:, :sinks]), (tiles - sinks, columns[:, sinks:])]
    return (
        grid._replace(sinks=sinks),
        beyond,
        [(count, ranges_of(np, part)) for count, part in parts if count],
    )


def ranges_of(xp: Any, needed: Any) -> Ranges:
    """Ranges along the last axis of [b, i, j]; maximal if they are unknown."""
    tiles, some = needed.shape[2], needed.any(2)
    first = xp.where(some, needed.argmax(2), 0)
    last = xp.where(some, tiles - 1 - needed[:, :, ::-1].argmax(2), -1)
    longest = int((last - first).max(initial=0)) + 1 if xp is np else tiles
    return Ranges(first.astype(np.int32).ravel(), last.astype(np.int32).ravel(), longest)


# --- what is inside a tile


def logits_of(rule: Rule, x: Array, y: Array) -> tuple[Array, Array | float]:
    """The logits of two tiles of vectors, and the factor of the softcap in their gradient."""
    logits = pallas.dot(x, y, transposed=True) * rule.scale
    if rule.softcap is None:
        return logits, 1.0
    bent = jnp.tanh(logits / rule.softcap)
    return rule.softcap * bent, 1 - bent * bent


def mask_of(grid: Grid, i: Any, j: Any, queries: list[Any], keys: list[Any], axis: int) -> Array:
    """The mask of tile (i, j): queries along `axis`, keys along the other; their positions are laid out
    alike."""
    shapes, index, query, key = _where(grid, i, j, queries, keys, axis)
    rule, none = grid.rule, [None] * (not grid.segments)
    keep = visible(*query, *none, *key, *none, left=rule.left, right=rule.right, sinks=rule.sinks)
    keep = keep if grid.s % grid.keys == 0 and grid.s else keep & (index < grid.s)
    return jnp.broadcast_to(keep, np.maximum(*shapes))


def distances(grid: Grid, i: Any, j: Any, queries: list[Any], keys: list[Any], axis: int) -> Array:
    """Distances of the queries and keys of tile (i, j), laid out like its mask."""
    _, _, query, key = _where(grid, i, j, queries, keys, axis)
    return distance(query[0], key[0], jnp.float32)


def _where(
    grid: Grid, i: Any, j: Any, queries: list[Any], keys: list[Any], axis: int
) -> tuple[list[list[int]], Array, list[Array], list[Array]]:
    """For tile (i, j): shapes of query and key arrays, the keys' indices, and positions and segments of both,
    positions first."""
    shapes = [
        [size if n == at else 1 for n in range(2)] for size, at in ((grid.rows, axis), (grid.keys, 1 - axis))
    ]
    index = pallas.places(shapes[1], 1 - axis) + j * grid.keys
    query, key = ([x[...] for x in side] for side in (queries, keys))
    if not grid.positions:
        query.insert(0, pallas.places(shapes[0], axis) + (i * grid.rows + grid.s - grid.t))
        key.insert(0, index)
    return shapes, index, query, key


def lay(rows: list[Any], columns: list[Any]) -> None:
    for row, column in zip(rows, columns, strict=True):
        column[...] = pallas.column(row[...])
