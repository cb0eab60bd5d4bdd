"""The state of a stream: creation, checks, and the tokens needed to continue its text."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from seqlab.checks import UserError, shown
from seqlab.mixer import as_mixer
from seqlab.module import Module
from seqlab.state import State, check_state

RECENT = 512  # tokens per row kept in the state, for continued text, stop texts and penalties


class Past(NamedTuple):
    """The last tokens of each row, so that a stream continued from its state reads as one.

    `tokens` [b, 512]: the newest last. `known` [b]: their number. `spoken` [b]: the number of those generated
    since the prompt, which can be part of a stop text. `held` [b]: bytes of their text that were withheld,
    because they may begin a stop text; -1: as many as possible.
    """

    tokens: Int[Array, "b r"]
    known: Int[Array, " b"]
    spoken: Int[Array, " b"]
    held: Int[Array, " b"]


class StreamState(NamedTuple):
    """Complete state of a batch of streams. Supports the row operations of `seqlab.state` (take, put, fork,
    save).

    `model`: the model's state after `length` [b] tokens. `logits` [b, v]: of the next one. `seed` [b]: of
    each row's draws. `past`: the last tokens, for text and penalties.
    """

    model: State
    logits: Float[Array, "b v"]
    seed: UInt32[Array, " b"]
    length: Int[Array, " b"]
    past: Past


def unrolled(model: Module) -> Module:
    """`model` in its best form for decoding; its states have another structure if its layers were scanned."""
    return as_mixer(model).unrolled()


def fresh_state(model: Module, seeds: np.ndarray, steps: int | None = None) -> StreamState:
    """The state of one fresh stream per seed, with the room that `steps` steps need, None for all; `model` is
    unrolled."""
    batch = len(seeds)
    none = [jnp.zeros((batch,), jnp.int32) for _ in range(4)]
    past = Past(jnp.zeros((batch, RECENT), jnp.int32), *none[:3])
    logits = jnp.zeros((batch, model.vocab_size), jnp.float32)
    own = model.init_state(batch) if steps is None else as_mixer(model).state_for(batch, steps)
    return StreamState(own, logits, jnp.asarray(seeds, jnp.uint32), none[3], past)


def stream_state(model: Module, batch: int = 1, seed: Any = 0) -> StreamState:
    """The state of `batch` fresh streams.

    Args:
      seed: of sampling: one integer in [0, 2**32) for all rows, or one per row.
    """
    if isinstance(batch, bool) or not isinstance(batch, int | np.integer) or batch < 1:
        raise UserError(f"batch must be a positive integer, got {batch!r}")
    return fresh_state(unrolled(model), check_seed(seed, int(batch)))


def check_seed(seed: Any, rows: int) -> np.ndarray:
    """`seed` as one number per row [b], ValueError if it is out of range."""
    try:
        seeds = np.asarray(seed)
    except Exception:  # ragged, or of a library that refuses
        seeds = np.asarray(None)
    if (
        seeds.dtype.kind not in "iu"
        or seeds.ndim > 1
        or (seeds.ndim == 1 and len(seeds) != rows)
        or (seeds < 0).any()
        or (seeds >= 2**32).any()
    ):
        raise UserError(
            f"seed must be one integer in [0, 2**32), or one for each of {rows} rows, got {shown(seed)}"
        )
    return np.broadcast_to(seeds.astype(np.uint32), (rows,))


def adopted(model: Module, state: Any) -> StreamState:
    """A state to continue, refused if another model or cache made it; `model` is unrolled. Caches may have
    any size that streaming gives them."""
    if not isinstance(state, StreamState):
        raise UserError(f"state must be a StreamState, as Stream.state is, got {type(state).__name__}")
    whole = jax.eval_shape(lambda: fresh_state(model, np.zeros(1, np.uint32)))
    if jax.tree.structure(state) != jax.tree.structure(whole):
        check_state(state, whole)
    state = state._replace(model=as_mixer(model).adopt(state.model))
    sizes = sorted({size for leaf in jax.tree.leaves(state.model) for size in leaf.shape if size})
    reason = None
    for steps in (None, *sizes):
        like = jax.eval_shape(lambda steps=steps: with_room_for(model, steps))
        try:
            check_state(state, like)
        except UserError as error:
            reason = reason or error
        else:
            return state
    raise reason


def with_room_for(model: Module, steps: int | None, rows: int = 1) -> StreamState:
    """A fresh state with room for streams of `steps` steps; None for the maximum."""
    return fresh_state(model, np.zeros(rows, np.uint32), steps)
