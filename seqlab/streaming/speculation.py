"""Speculative decoding, exact for every mixer: a draft proposes tokens, the model reads them as one chunk.

A recurrent state cannot go back, so the state before a chunk is kept until all of the chunk's tokens turn out
to be those of the stream. Each pass of the model reads, from that committed state, the tokens of the stream
that it has not committed yet, and drafted tokens after them. If all drafted tokens are accepted, the state
after the chunk is the new committed one. Otherwise the accepted tokens and the corrected one are read again
at the beginning of the next chunk. By chunk and padding invariance (C1, C2) this gives the states and logits
of plain decoding, whatever the mixer. Rows advance by different amounts.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from seqlab.module import Static, merge
from seqlab.state import select_rows
from seqlab.streaming.drafts import EarlyExit, NGram, Own, PairState, Plan, after_ngram, shallow
from seqlab.streaming.programs import (
    BLOCK_LIMIT,
    Drawn,
    LogitsContext,
    LogitsFunction,
    Programs,
    chosen,
    later,
    prepared,
    programs,
)
from seqlab.streaming.rejection import inverse_cdf, judge
from seqlab.streaming.sampling import Sampling, alters, probabilities
from seqlab.streaming.states import RECENT, StreamState

_VERDICT, _CORRECTION = 1, 2  # random numbers of a position beside those of plain sampling


class Block(NamedTuple):
    """A block of tokens with the number [b] of drafted tokens that were read and accepted."""

    drawn: Drawn
    offered: Int[Array, " b"]
    accepted: Int[Array, " b"]


class Settings(NamedTuple):
    """The arguments of a block that do not change from pass to pass. `most` [b]: tokens of a row in this
    block that must not be exceeded; `enough` [b]: after which the block may end."""

    sampling: Sampling
    values: Any
    ends: Int[Array, "b n"]
    enough: Int[Array, " b"]
    most: Int[Array, " b"]
    plain: Bool[Array, ""]
    function: LogitsFunction | None
    plan: Plan
    top: int


class Carry(NamedTuple):
    """`state`: committed. `pending` [b, w]: the tokens of the stream after it, the first `waiting` [b].
    `live` [b]: whether the row goes on after these."""

    state: StreamState
    pending: Int[Array, "b w"]
    waiting: Int[Array, " b"]
    live: Bool[Array, " b"]
    block: Block


class Chunk(NamedTuple):
    """The pending tokens of a row, and `offered` [b] drafted ones after them. `q` [b, g, v]: the
    distributions that these were drawn from, None under the rule "coupled". `own`: the state of a draft that
    has one, after all of them."""

    tokens: Int[Array, "b w"]
    offered: Int[Array, " b"]
    q: Float[Array, "b g v"] | None
    own: Any


class Verified(NamedTuple):
    """`tokens` [b, w]: those after the pending ones, of which the drafted `accepted` [b] are kept, and the
    one after these is added if it is `sound` [b]. `sampled`: their log-probabilities under the sampling
    distribution."""

    tokens: Int[Array, "b w"]
    sampled: Float[Array, "b w"]
    accepted: Int[Array, " b"]
    sound: Bool[Array, " b"]


@functools.lru_cache(maxsize=32)
def speculative(static: Static, plan: Plan) -> Programs:
    """The programs of a model, in which `decode` speculates: its `limits` [2, b] are after how many tokens a
    row's block may end, and how many the row may have at all."""
    traced = []

    def decode(leaves, state, limits, sampling, ends, values, *, top, function):
        traced.append("speculate")
        net = merge(static, dict(zip(static.names, leaves, strict=True)))
        plain, top = jnp.logical_not(alters(sampling)), min(top, state.logits.shape[1])
        settings = Settings(sampling, values, ends, *limits, plain, function, plan, top)
        return speculate_block(net, state, settings)

    plain = programs(static)
    return plain._replace(
        decode=jax.jit(decode, donate_argnums=1, static_argnames=("top", "function")),
        compiled=lambda: plain.compiled() + len(traced),
    )


def speculate_block(net: Any, state: StreamState, settings: Settings) -> tuple[StreamState, Block]:
    """Passes of the model until each row has `enough` tokens or has ended, and the state has read them."""
    batch, width = state.length.shape[0], settings.plan.tokens + 1
    shape, none = (batch, BLOCK_LIMIT + width), jnp.zeros((batch,), jnp.int32)
    floats = jnp.zeros(shape, jnp.float32)
    tops = tuple(jnp.zeros((*shape, settings.top), dtype) for dtype in (jnp.int32, jnp.float32))
    empty = Drawn(none, jnp.zeros((batch,), bool), jnp.zeros(shape, jnp.int32), floats, floats, tops)
    live = jnp.minimum(settings.enough, settings.most) > 0
    begin = Carry(state, jnp.zeros((batch, width), jnp.int32), none, live, Block(empty, none, none))
    end = jax.lax.while_loop(
        lambda carry: jnp.any(carry.live | (carry.waiting > 0)),
        functools.partial(_pass, net, settings),
        begin,
    )
    return end.state, end.block


def _pass(net: Any, settings: Settings, carry: Carry) -> Carry:
    """One pass of the model, and what follows from its logits."""
    state, waiting, made = carry.state, carry.waiting, carry.block.drawn
    chunk = _drafted(net, carry, settings)
    read = waiting + chunk.offered
    logits, model = _read(net, state, chunk, read, settings.plan)
    width = chunk.tokens.shape[1]
    # Those that the tokens after the pending ones are drawn from.
    places = jnp.minimum(waiting[:, None] + jnp.arange(width), width)
    raw = jnp.take_along_axis(logits, places[..., None], axis=1)
    verified = _verified(state, chunk, waiting, raw, settings)

    accepted = jnp.where(carry.live, verified.accepted, 0)
    count = jnp.where(carry.live, accepted + verified.sound, 0)
    emitted = jnp.arange(width) < count[:, None]
    ending = emitted & jnp.any(verified.tokens[..., None] == settings.ends[:, None, :], axis=2)
    ended = jnp.any(ending, axis=1)
    count = jnp.where(ended, jnp.argmax(ending, axis=1) + 1, count).astype(jnp.int32)
    kept = jnp.minimum(accepted, count)
    broken = carry.live & ~verified.sound & ~ended
    block = Block(
        _written(made, raw, verified, count, broken, settings.top),
        carry.block.offered + chunk.offered,
        carry.block.accepted + kept,
    )

    commits = kept == chunk.offered
    last = jnp.take_along_axis(logits, read[:, None, None], axis=1)[:, 0]
    after = StreamState(model, last, state.seed, state.length + read, later(state.past, chunk.tokens, read))
    state = select_rows(commits, after, state)  # a conditional would copy both
    # The tokens of the stream after the committed state.
    start = jnp.where(commits, kept, -waiting)[:, None] + jnp.arange(width)
    fresh = jnp.take_along_axis(verified.tokens, jnp.clip(start, 0, width - 1), axis=1)
    pending = jnp.where(start < 0, chunk.tokens, fresh)
    waiting = jnp.where(commits, count - kept, waiting + count)
    going = block.drawn.count < jnp.minimum(settings.enough, settings.most)
    return Carry(state, pending, waiting, carry.live & ~broken & ~ended & going, block)


def _written(made: Drawn, raw: Array, verified: Verified, count: Array, broken: Array, top: int) -> Drawn:
    """`made` with the first `count` [b] verified tokens; `raw` [b, w, v]: the logits each was drawn from."""
    batch, width = verified.tokens.shape
    logprobs = jax.nn.log_softmax(raw)
    own = jnp.take_along_axis(logprobs, verified.tokens[..., None], axis=2)[..., 0]
    likeliest = jax.lax.top_k(logprobs, top)[::-1] if top else tuple(part[:, :width] for part in made.top)
    # What is beyond `count` is overwritten by the next pass.
    at = (jnp.arange(batch)[:, None], made.count[:, None] + jnp.arange(width))
    return Drawn(
        made.count + count,
        made.broken | broken,
        made.tokens.at[at].set(verified.tokens),
        made.logprobs.at[at].set(own),
        made.sampled.at[at].set(verified.sampled),
        tuple(whole.at[at].set(part) for whole, part in zip(made.top, likeliest, strict=True)),
    )


def _read(
    net: Any, state: StreamState, chunk: Chunk, read: Int[Array, " b"], plan: Plan
) -> tuple[Float[Array, "b w+1 v"], Any]:
    """The logits at hand and those after each token of the chunk, and the model's state after it."""
    target, own = (net.target, state.model.target) if isinstance(plan, Own) else (net, state.model)
    width = chunk.tokens.shape[1]

    def whole(size: int) -> tuple[Array, Any]:
        valid = jnp.arange(size) < read[:, None]
        logits, new = target(chunk.tokens[:, :size], own, None, valid)
        return jnp.pad(logits.astype(jnp.float32), ((0, 0), (0, width - size), (0, 0))), new

    # A conditional of two branches: each further one would copy the state.
    single = jnp.max(read) < 2
    logits, new = jax.lax.cond(single, functools.partial(whole, 1), functools.partial(whole, width))
    model = PairState(new, chunk.own) if isinstance(plan, Own) else new
    return jnp.concatenate([state.logits[:, None], logits], axis=1), model


def _drafted(net: Any, carry: Carry, settings: Settings) -> Chunk:
    """The pending tokens with drafted ones, as many as there is room for."""
    plan, state, waiting = settings.plan, carry.state, carry.waiting
    width = plan.tokens + 1
    most = jnp.minimum(width - waiting, settings.most - carry.block.drawn.count - 1)
    most = jnp.where(carry.live & (waiting > 0), jnp.maximum(most, 0), 0)
    exact = plan.rule == "rejection"
    if isinstance(plan, NGram):
        drafted, found = after_ngram(plan, later(state.past, carry.pending, waiting))
        place = jnp.arange(width) - waiting[:, None]
        tokens = jnp.take_along_axis(drafted, jnp.clip(place, 0, plan.tokens - 1), axis=1)
        q = jax.nn.one_hot(drafted, state.logits.shape[1]) if exact else None
        return Chunk(jnp.where(place < 0, carry.pending, tokens), jnp.where(found, most, 0), q, None)

    draft = net.draft if isinstance(plan, Own) else shallow(net, plan.layers)
    own = state.model.draft if isinstance(plan, Own) else tuple(state.model[i] for i in plan.layers)
    read = waiting + most

    def one(scanned, i):
        token, own, recent = scanned
        recent = jnp.concatenate([recent[:, 1:], token[:, None]], axis=1)
        logits, own = draft(token[:, None], own, None, (i < read)[:, None])
        known = jnp.minimum(state.past.known + i + 1, RECENT)
        context = LogitsContext(recent, known, state.length + i + 1, settings.values)
        raw = logits[:, 0].astype(jnp.float32)
        drawn = chosen(raw, state.seed, context, settings.sampling, settings.plain, settings.function)[0]
        q = None
        if exact:
            ready = prepared(raw, context, settings.sampling, settings.function)
            q = probabilities(ready, settings.sampling)
        following = carry.pending[:, jnp.minimum(i + 1, width - 1)]
        token = jnp.where(i + 1 < waiting, following, drawn)
        return (token, own, recent), (token, q)

    # A draft with its own state reads the last token too.
    steps = jnp.arange(width - isinstance(plan, EarlyExit))
    begin = (carry.pending[:, 0], own, state.past.tokens)
    (_, own, _), (tokens, q) = jax.lax.scan(one, begin, steps)
    tokens = jnp.concatenate([carry.pending[:, :1], tokens.T[:, : plan.tokens]], axis=1)
    if q is not None:  # of the first drafted token first
        place = jnp.clip(waiting[:, None] - 1 + jnp.arange(plan.tokens), 0, plan.tokens - 1)
        q = jnp.take_along_axis(q.transpose(1, 0, 2), place[..., None], axis=1)
    return Chunk(tokens, most, q, own if isinstance(plan, Own) else None)


def _verified(
    state: StreamState,
    chunk: Chunk,
    waiting: Int[Array, " b"],
    raw: Float[Array, "b w v"],
    settings: Settings,
) -> Verified:
    """What the model draws after the pending tokens, and how many of the drafted ones are accepted."""
    sampling, values, function = settings.sampling, settings.values, settings.function
    batch, width = chunk.tokens.shape
    steps = waiting[:, None] + jnp.arange(width)  # tokens after the committed state
    wide = jnp.concatenate([state.past.tokens, chunk.tokens], axis=1)
    place = jnp.minimum(steps, width)[..., None] + jnp.arange(RECENT)
    recent = jnp.take_along_axis(wide[:, None], place, axis=2)

    def flat(x: Array) -> Array:
        return x.reshape(batch * width, *x.shape[2:])

    def each(raw: Array, context: LogitsContext) -> Array:
        """The user's function, on batches of the rows that it was written for."""
        parts = jax.tree.map(lambda x: x.reshape(batch, width, *x.shape[1:]), (raw, context))

        def call(raw: Array, context: LogitsContext) -> Array:
            return function(raw, context._replace(values=values))

        return flat(jax.vmap(call, in_axes=1, out_axes=1)(*parts))

    known = jnp.minimum(state.past.known[:, None] + steps, RECENT)
    context = LogitsContext(flat(recent), flat(known), flat(state.length[:, None] + steps), ())
    settled = jax.tree.map(lambda leaf: jnp.repeat(jnp.asarray(leaf), width, axis=0), sampling)
    rows = flat(raw), jnp.repeat(state.seed, width), context, settled
    called = None if function is None else each
    tokens, sampled, sound = (x.reshape(batch, width) for x in chosen(*rows, settings.plain, called))
    index = jnp.clip(steps, 0, width - 1)
    drafted = jnp.take_along_axis(chunk.tokens, index, axis=1)
    counts = jnp.arange(width) < chunk.offered[:, None]
    if settings.plan.rule == "coupled":
        equal = (tokens == drafted) & sound & counts
        accepted = jnp.sum(jnp.cumprod(equal, axis=1, dtype=jnp.int32), axis=1, dtype=jnp.int32)
    else:
        p = probabilities(prepared(rows[0], context, settled, called), settled).reshape(*tokens.shape, -1)
        u, r = (
            _uniform(rows[1], context.length, salt).reshape(batch, width) for salt in (_VERDICT, _CORRECTION)
        )
        verdict = judge(p, chunk.q, drafted[:, :-1], u[:, :-1], chunk.offered)
        accepted = verdict.accepted
        corrected = inverse_cdf(verdict.following, jnp.take_along_axis(r, accepted[:, None], axis=1)[:, 0])
        beyond = jnp.where((accepted < chunk.offered)[:, None], corrected[:, None], tokens)
        tokens = jnp.where(jnp.arange(width) < accepted[:, None], drafted, beyond)
        of_p = jnp.take_along_axis(p, tokens[..., None], axis=2)[..., 0]
        sampled = jnp.log(of_p)
    sound = jnp.take_along_axis(sound, accepted[:, None], axis=1)[:, 0]
    return Verified(tokens, sampled, accepted, sound)


def _uniform(seed: Array, index: Array, salt: int) -> Float[Array, " n"]:
    """Numbers in [0, 1) that depend on seed and position only."""

    def one(seed: Array, index: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), index), salt)
        return jax.random.uniform(key)

    return jax.vmap(one)(seed, index)
