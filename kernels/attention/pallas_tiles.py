"""Tiles of the kernels for TPUs: which of them a tile needs, from tables that index maps read, and what is
inside one."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl

from seqlab.kernels import pallas
from seqlab.kernels.attention.reference import distance, visible
from seqlab.kernels.attention.xla import Rule


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
    alibi: bool  # there are slopes

    @property
    def tiles(self) -> tuple[int, int]:
        return max(pl.cdiv(self.t, self.rows), 1), max(pl.cdiv(self.s, self.keys), 1)


class Ranges(NamedTuple):
    """First and last tile that each tile needs, [rows of the batch or 1, tiles] flattened, last < first for
    none; and the longest range."""

    first: Array | np.ndarray
    last: Array | np.ndarray
    longest: int


def tile_at(
    grid: Grid, tiles: int, b: Any, own: Any, n: Any, tables: tuple[Any, Any], sinks: int = 0
) -> tuple[Any, Any]:
    """The n-th tile that tile `own` of `tiles` needs, after the first `sinks` of all, and whether there are
    so many."""
    entry = (b * tiles if grid.by_row else 0) + own
    first, last = tables[0][entry], tables[1][entry]
    wanted = first + n if not sinks else jnp.where(n < sinks, n, first + n - sinks)
    return jnp.maximum(jnp.minimum(wanted, last), 0), wanted <= last


def beside_sinks(grid: Grid, needed: np.ndarray) -> tuple[Grid, Ranges, list[tuple[int, Ranges]]]:
    """The plan where between the sinks and a window lies what nobody reads."""
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
    """The ranges along the last axis of [b, i, j]; as long as can be where they are not known."""
    tiles, some = needed.shape[2], needed.any(2)
    first = xp.where(some, needed.argmax(2), 0)
    last = xp.where(some, tiles - 1 - needed[:, :, ::-1].argmax(2), -1)
    longest = int((last - first).max(initial=0)) + 1 if xp is np else tiles
    return Ranges(first.astype(np.int32).ravel(), last.astype(np.int32).ravel(), longest)


# --- what is inside a tile


def logits_of(rule: Rule, x: Array, y: Array) -> tuple[Array, Array | float]:
    """The logits of two tiles of vectors, and by what a softcap multiplies their gradient."""
    logits = pallas.dot(x, y, transposed=True) * rule.scale
    if rule.softcap is None:
        return logits, 1.0
    bent = jnp.tanh(logits / rule.softcap)
    return rule.softcap * bent, 1 - bent * bent


def mask_of(grid: Grid, i: Any, j: Any, queries: list[Any], keys: list[Any], axis: int) -> Array:
    """The mask of tile (i, j): queries along `axis`, keys along the other, and their places so already."""
    shapes, index, query, key = _where(grid, i, j, queries, keys, axis)
    rule, none = grid.rule, [None] * (not grid.segments)
    keep = visible(*query, *none, *key, *none, left=rule.left, right=rule.right, sinks=rule.sinks)
    keep = keep if grid.s % grid.keys == 0 and grid.s else keep & (index < grid.s)
    return jnp.broadcast_to(keep, np.maximum(*shapes))


def distances(grid: Grid, i: Any, j: Any, queries: list[Any], keys: list[Any], axis: int) -> Array:
    """How far the queries and keys of tile (i, j) stand apart, laid out as its mask is."""
    _, _, query, key = _where(grid, i, j, queries, keys, axis)
    return distance(query[0], key[0], jnp.float32)


def _where(
    grid: Grid, i: Any, j: Any, queries: list[Any], keys: list[Any], axis: int
) -> tuple[list[list[int]], Array, list[Array], list[Array]]:
    """Of tile (i, j): the shapes of what belongs to queries and keys, the keys' indices, and the places of
    both, positions first."""
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
