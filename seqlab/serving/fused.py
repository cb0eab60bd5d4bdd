"""The compiled functions of a batcher: one call reads pieces of prompts into some rows and draws tokens of
others.

Shapes depend on the number of rows, the size of the pieces and the room of the state only; everything else is
an argument, so that nothing is compiled after `Batcher.warm_up`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt32

from seqlab.mixer import as_mixer
from seqlab.module import Module, Static, merge
from seqlab.state import by_row, take_rows
from seqlab.streaming.programs import Drawn, draw_block, read_chunk
from seqlab.streaming.states import StreamState


class Pieces(NamedTuple):
    """Pieces of prompts, the first `count` of p slots. `row` [p]: the row that reads it. `begins` [p]:
    whether the row starts fresh, with `seed` [p]. `tokens` [p, c], of which the first `valid` [p] count."""

    count: Int[Array, ""]
    row: Int[Array, " p"]
    begins: Bool[Array, " p"]
    seed: UInt32[Array, " p"]
    tokens: Int[Array, "p c"]
    valid: Int[Array, " p"]


class BatchPrograms(NamedTuple):
    """`step(leaves, state, fresh, pieces, limits, sampling, ends, values, top=, function=)` reads pieces,
    then draws up to `limits` [b] tokens per row; `draw` is the same without pieces. Both consume the state.
    `take(state, row)`: a copy of one row. `place(state, row, one, seed)`: puts one back, consumes the
    state. `gather(state, rows)`: a copy of rows [w], in that order."""

    step: Callable[..., tuple[StreamState, Drawn]]
    draw: Callable[..., tuple[StreamState, Drawn]]
    take: Callable[[StreamState, Any], StreamState]
    place: Callable[[StreamState, Any, StreamState, Any], StreamState]
    gather: Callable[[StreamState, Any], StreamState]


@functools.lru_cache(maxsize=16)
def batch_programs(static: Static) -> BatchPrograms:
    """The compiled functions for a model; parameters are passed as a flat tuple."""

    def model(leaves: tuple[Array, ...]) -> Any:
        return merge(static, dict(zip(static.names, leaves, strict=True)))

    def step(leaves, state, fresh, pieces, limits, sampling, ends, values, *, top, function):
        net = model(leaves)
        state = _read(net, state, fresh, pieces)
        return draw_block(net, state, limits, sampling, ends, values, top, function)

    def draw(leaves, state, limits, sampling, ends, values, *, top, function):
        return draw_block(model(leaves), state, limits, sampling, ends, values, top, function)

    def place(state, row, one, seed):
        return _put(state, row, one._replace(seed=seed[None]))

    options = {"donate_argnums": 1, "static_argnames": ("top", "function")}
    return BatchPrograms(
        jax.jit(step, **options),
        jax.jit(draw, **options),
        jax.jit(_take),
        jax.jit(place, donate_argnums=0),
        jax.jit(take_rows),
    )


def resizing(model: Module) -> tuple[Callable[..., StreamState], Callable[..., StreamState]]:
    """`grown(state, steps=)` and `shrunk(state, steps=)`: the state with the room that streams of `steps`
    steps need, compiled once per pair of sizes; `model` is unrolled."""

    def resized(function: Callable[[Any, int], Any]) -> Callable[..., StreamState]:
        def new(state: StreamState, *, steps: int) -> StreamState:
            return state._replace(model=function(state.model, steps))

        return jax.jit(new, static_argnames="steps")

    asked = as_mixer(model)
    return resized(asked.with_room), resized(asked.compact)


def _read(net: Any, state: StreamState, fresh: StreamState, pieces: Pieces) -> StreamState:
    """`state` after the pieces, one after the other: a row at a time, since prompts differ in length and a
    padded batch of them would mostly compute padding."""

    def body(carry: tuple[Array, StreamState]) -> tuple[Array, StreamState]:
        i, state = carry
        one = _take(state, pieces.row[i])
        begun = fresh._replace(seed=pieces.seed[i][None])
        one = jax.tree.map(lambda new, old: jnp.where(pieces.begins[i], new, old), begun, one)
        valid = jnp.arange(pieces.tokens.shape[1])[None] < pieces.valid[i]
        one = read_chunk(net, one, pieces.tokens[i][None], valid)
        return i + 1, _put(state, pieces.row[i], one)

    begin = (jnp.zeros((), jnp.int32), state)
    return jax.lax.while_loop(lambda carry: carry[0] < pieces.count, body, begin)[1]


def _take(state: StreamState, row: Int[Array, ""]) -> StreamState:
    return by_row(lambda leaf, axis: jax.lax.dynamic_slice_in_dim(leaf, row, 1, axis), state)


def _put(state: StreamState, row: Int[Array, ""], one: StreamState) -> StreamState:
    def put(leaf: Array, axis: int, new: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(leaf, new, row, axis)

    return by_row(put, state, one)
