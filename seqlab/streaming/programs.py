"""The compiled functions of a stream, keyed by the model only; sampling settings are their arguments."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from seqlab.checks import UserError, shown
from seqlab.mixer import as_mixer
from seqlab.module import Module, Static, in_evaluation, merge, split
from seqlab.state import take_rows
from seqlab.streaming.sampling import Sampling, adjusted, alters, sample
from seqlab.streaming.states import RECENT, Past, StreamState, unrolled

BLOCK_LIMIT = 128  # tokens in one dispatch at most


class Drawn(NamedTuple):
    """A block of tokens. `count` [b]: the number of tokens of a row, up to its limit or its end token.
    `broken` [b]: the row's logits were non-finite after these. `top`: the likeliest tokens and their
    log-probabilities [b, block, n]."""

    count: Int[Array, " b"]
    broken: Bool[Array, " b"]
    tokens: Int[Array, "b block"]
    logprobs: Float[Array, "b block"]
    sampled: Float[Array, "b block"]
    top: tuple[Int[Array, "b block n"], Float[Array, "b block n"]]


class LogitsContext(NamedTuple):
    """The input of a `logits` function, one row per stream: the last tokens (newest last), their number, the
    number of tokens so far, and the user's `values`."""

    recent: Int[Array, "b r"]
    known: Int[Array, " b"]
    length: Int[Array, " b"]
    values: Any


LogitsFunction = Callable[[Float[Array, "b v"], LogitsContext], Float[Array, "b v"]]


class Programs(NamedTuple):
    """`prefill(leaves, state, tokens, valid)`, `decode(leaves, state, limits, sampling, ends, values, top=,
    function=)`: both consume (donate) their state; `copy(state)` protects a shared state; `rows(state,
    index)` is `take_rows`. `compiled()` counts the programs of the first two."""

    prefill: Callable[..., StreamState]
    decode: Callable[..., tuple[StreamState, Drawn]]
    copy: Callable[[StreamState], StreamState]
    rows: Callable[[StreamState, Array], StreamState]
    compiled: Callable[[], int]


def rewind_stream(model: Module, state: StreamState, steps: Any, last: Any = None) -> StreamState:
    """The stream `steps` tokens ago, one number for all rows or one per row.

    Args:
      last: [b], the last token of each row at that point, which is read again for its logits. By default
        taken from the state, which keeps the last 512 tokens.
    Raises:
      ValueError: a stream would be left without a token, or as raised by `Model.rewind`.
    """
    model, batch = unrolled(model), state.length.shape[0]
    given, steps = steps, row_integers("steps", steps, batch)
    lengths, known = np.asarray(state.length), np.asarray(state.past.known)
    if (steps < 0).any():
        raise UserError(f"steps must be 0 or more, got {given}")
    if (steps >= lengths).any():
        raise UserError(f"steps must leave a token of the {lengths.tolist()} in each row, got {given}")
    place = np.maximum(np.arange(RECENT) - steps[:, None], 0)
    tokens = np.take_along_axis(np.asarray(state.past.tokens), place, axis=1)
    if last is None:
        if (steps >= known).any():
            raise UserError(
                f"last must name the last token of each row: the state knows {known.tolist()} tokens, which "
                f"is not enough for steps={given}"
            )
    elif np.shape(last) != (batch,):
        raise UserError(f"last must name one token for each of {batch} rows, got {shown(last)}")
    else:
        tokens[:, -1] = row_integers("last", last, batch)
    if (tokens[:, -1] < 0).any() or (tokens[:, -1] >= model.vocab_size).any():
        raise UserError(f"last: {tokens[:, -1].tolist()} are not all in the vocabulary of {model.vocab_size}")
    static, params = split(in_evaluation(model))
    again = jnp.asarray(steps + 1, jnp.int32)
    back = state._replace(model=as_mixer(model).rewind(state.model, again), length=state.length - again)
    use = programs(static)
    read = use.prefill(
        tuple(params.values()), use.copy(back), jnp.asarray(tokens[:, -1:]), jnp.ones((batch, 1), bool)
    )
    past = Past(
        jnp.asarray(tokens),
        jnp.asarray(np.maximum(known - steps, 1), jnp.int32),
        jnp.asarray(np.maximum(np.asarray(state.past.spoken) - steps, 0), jnp.int32),
        jnp.full((batch,), -1, jnp.int32),
    )
    return read._replace(past=past)


def row_integers(name: str, value: Any, batch: int) -> np.ndarray:
    """`value` as one integer per row."""
    try:
        array = np.asarray(value)
    except Exception:  # ragged, or of a library that refuses
        array = np.asarray(None)
    if array.dtype.kind not in "iu" or array.shape not in ((), (batch,)):
        raise UserError(f"{name} must be one integer, or one for each of {batch} rows, got {shown(value)}")
    return np.broadcast_to(array.astype(np.int64), (batch,))


@functools.lru_cache(maxsize=32)
def programs(static: Static) -> Programs:
    """The compiled functions of a model: parameters are passed as a flat tuple, the cheapest argument of a
    jitted function."""
    traced = []

    def model(leaves: tuple[Array, ...]) -> Any:
        return merge(static, dict(zip(static.names, leaves, strict=True)))

    def prefill(leaves, state, tokens, valid):
        traced.append(tokens.shape)
        return read_chunk(model(leaves), state, tokens, valid)

    def decode(leaves, state, limits, sampling, ends, values, *, top, function):
        traced.append("decode")
        return draw_block(model(leaves), state, limits, sampling, ends, values, top, function)

    return Programs(
        jax.jit(prefill, donate_argnums=1),
        jax.jit(decode, donate_argnums=1, static_argnames=("top", "function")),
        jax.jit(lambda state: jax.tree.map(jnp.copy, state)),
        jax.jit(take_rows),
        lambda: len(traced),
    )


def read_chunk(
    net: Any, state: StreamState, tokens: Int[Array, "b t"], valid: Bool[Array, "b t"]
) -> StreamState:
    """The state after the valid `tokens`, which come first in each row."""
    count = jnp.sum(valid, axis=1, dtype=jnp.int32)
    features, new = net.features(tokens, state.model, None, valid)
    last = jnp.take_along_axis(features, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
    logits = jnp.where(count[:, None] > 0, net.read_out(last).astype(jnp.float32), state.logits)
    past = later(state.past, tokens.astype(jnp.int32), count)
    return StreamState(new, logits, state.seed, state.length + count, past)


def later(past: Past, tokens: Int[Array, "b t"], count: Int[Array, " b"]) -> Past:
    """`past` after the first `count` [b] of `tokens`."""
    places = count[:, None] + jnp.arange(RECENT)
    known = jnp.minimum(past.known + count, RECENT)
    return past._replace(
        tokens=jnp.take_along_axis(jnp.concatenate([past.tokens, tokens], axis=1), places, axis=1),
        known=known,
    )


def draw_block(
    net: Any,
    state: StreamState,
    limits: Int[Array, " b"],
    sampling: Sampling,
    ends: Int[Array, "b n"],
    values: Any,
    top: int,
    function: LogitsFunction | None,
) -> tuple[StreamState, Drawn]:
    """Draw up to `limits` [b] tokens per row: each is sampled from the state's logits and read by the
    model."""
    batch = limits.shape[0]
    past, length, seed = state.past, state.length, state.seed
    shape, top = (batch, BLOCK_LIMIT), min(top, state.logits.shape[1])
    likeliest = tuple(jnp.zeros((*shape, top), dtype) for dtype in (jnp.int32, jnp.float32))
    empty = Drawn(
        jnp.zeros((batch,), jnp.int32),
        jnp.zeros((batch,), bool),
        jnp.concatenate([past.tokens, jnp.zeros(shape, jnp.int32)], axis=1),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        likeliest,
    )

    plain = jnp.logical_not(alters(sampling))

    def step(carry):
        i, live, own, raw, made = carry
        known = jnp.minimum(past.known + i, RECENT)
        recent = jax.lax.dynamic_slice_in_dim(made.tokens, i, RECENT, axis=1)
        context = LogitsContext(recent, known, length + i, values)
        token, sampled, sound = chosen(raw, seed, context, sampling, plain, function)
        going = live & sound
        logprobs = jax.nn.log_softmax(raw)
        if top:
            found = jax.lax.top_k(logprobs, top)[::-1]
            made = made._replace(
                top=tuple(
                    jax.lax.dynamic_update_index_in_dim(whole, part.astype(whole.dtype), i, 1)
                    for whole, part in zip(made.top, found, strict=True)
                )
            )
        made = made._replace(
            count=made.count + going,
            broken=made.broken | (live & ~sound),
            tokens=made.tokens.at[:, RECENT + i].set(token),
            logprobs=made.logprobs.at[:, i].set(jnp.take_along_axis(logprobs, token[:, None], axis=1)[:, 0]),
            sampled=made.sampled.at[:, i].set(sampled),
        )
        logits, own = net(token[:, None], own, None, going[:, None])
        raw = jnp.where(going[:, None], logits[:, 0].astype(jnp.float32), raw)
        ended = jnp.any(token[:, None] == ends, axis=1)
        return i + 1, going & ~ended & (i + 1 < limits), own, raw, made

    _, _, own, raw, made = jax.lax.while_loop(
        lambda carry: jnp.any(carry[1]), step, (0, limits > 0, state.model, state.logits, empty)
    )
    made = made._replace(tokens=made.tokens[:, RECENT:])
    past = later(past, made.tokens, made.count)
    return StreamState(own, raw, seed, length + made.count, past), made


def chosen(
    raw: Float[Array, "b v"],
    seed: Array,
    context: LogitsContext,
    sampling: Sampling,
    plain: Bool[Array, ""],
    function: LogitsFunction | None,
) -> tuple[Int[Array, " b"], Float[Array, " b"], Bool[Array, " b"]]:
    """The next token of each row, its log-probability if sampled, and whether the logits were valid: neither
    NaN nor +inf, and not only -inf. `plain`: every row takes the likeliest."""
    sound = jnp.isfinite(jnp.max(raw, axis=1))

    def drawn() -> tuple[Array, Array, Array]:
        ready = prepared(raw, context, sampling, function)
        token, logprob = sample(ready, seed, context.length, sampling)
        return token, logprob, sound & jnp.isfinite(jnp.max(ready, axis=1))

    if function is not None:
        return drawn()
    likeliest = jnp.argmax(raw, axis=1).astype(jnp.int32)
    return jax.lax.cond(plain, lambda: (likeliest, jnp.zeros(seed.shape), sound), drawn)


def prepared(
    raw: Float[Array, "b v"], context: LogitsContext, sampling: Sampling, function: LogitsFunction | None
) -> Float[Array, "b v"]:
    """The logits to sample from: with bias and penalties, and changed by the user's function."""
    ready = adjusted(raw, context.recent, context.known, sampling)
    return ready if function is None else function(ready, context).astype(jnp.float32)
