"""Streaming generation: an iterator over tokens that can run indefinitely in constant memory.

A model is anything that maps tokens and a state to features and logits (`LanguageModel`). Its prompt is read
in chunks of a few fixed sizes, then tokens are drawn in blocks inside one compiled loop. Whatever the chunks,
the blocks or the row of the batch, the same prompt and seed give the same tokens, because every one of these
is a split of one sequence. Settings are arguments of the compiled functions: new values do not recompile.
"""

import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seqlab.checks import UserError, shown
from seqlab.mixer import as_mixer
from seqlab.models.attention import with_cache
from seqlab.module import Module, in_evaluation, split
from seqlab.streaming.drafts import Draft, EarlyExit, NGram, Paired, PairState, planned
from seqlab.streaming.programs import (
    BLOCK_LIMIT,
    LogitsContext,
    LogitsFunction,
    programs,
    rewind_stream,
)
from seqlab.streaming.prompts import (
    Prompt,
    check_chunks,
    check_flag,
    check_function,
    check_limits,
    check_number,
    check_tokenizer,
    read_ends,
    read_prompts,
)
from seqlab.streaming.sampling import Sampling, check_sampling, draw
from seqlab.streaming.states import (
    RECENT,
    Past,
    StreamState,
    adopted,
    check_seed,
    stream_state,
    unrolled,
    with_room_for,
)
from seqlab.streaming.stream import BeyondTraining, Setup, Stream, Token, padded, slots_of
from seqlab.tokenizers import ByteTokenizer, Tokenizer

__all__ = [
    "PREFILL_CHUNKS",
    "BeyondTraining",
    "LogitsContext",
    "Past",
    "Sampling",
    "Stream",
    "StreamState",
    "Token",
    "check_sampling",
    "draw",
    "rewind_stream",
    "stream_generate",
    "stream_state",
    "warm_up",
]

PREFILL_CHUNKS = (16, 128, 512)
_POSITIONS = 2**31 - 2**16  # steps that int32 counts, with room for the arithmetic of a chunk


def stream_generate(
    model: Module,
    prompt: Prompt | Sequence[Prompt] = (),
    *,
    max_tokens: int | Sequence[int | None] | None = None,
    temperature: float | Sequence[float] = 1.0,
    top_k: int | Sequence[int | None] | None = None,
    top_p: float | Sequence[float | None] | None = None,
    seed: int | Sequence[int] | None = None,
    state: StreamState | None = None,
    stop: Any = (),
    tokenizer: Tokenizer | None = None,
    cache: Any = None,
    block: int | None = None,
    prefill_chunks: Sequence[int] = PREFILL_CHUNKS,
    min_p: float | Sequence[float | None] | None = None,
    repetition_penalty: float | Sequence[float] = 1.0,
    presence_penalty: float | Sequence[float] = 0.0,
    frequency_penalty: float | Sequence[float] = 0.0,
    logit_bias: Mapping[int, float] | Sequence[Mapping[int, float] | None] | None = None,
    stop_tokens: Any = None,
    include_stop: bool = True,
    logits: LogitsFunction | None = None,
    logits_values: Any = None,
    top_logprobs: int = 0,
    draft: NGram | Draft | EarlyExit | None = None,
) -> Stream:
    """Generate after `prompt`, token by token, indefinitely unless told to stop.

        for token in seqlab.stream_generate(model, "def "):
            print(token.text, end="", flush=True)

    Settings from `max_tokens` to `seed` and from `min_p` to `logit_bias` are one value for all rows or a
    sequence of one per row; other values do not recompile, nor does another number of rows up to the next
    power of two. Each row gives the same tokens as alone.

    Args:
      prompt: text, bytes or token ids [t], or a list of prompts of any lengths or an integer array [b, t],
        one per row. Text at the start of a stream is preceded by the tokenizer's `bos`, or by the prefix of a
        published tokenizer. May be empty if `state` is given.
      max_tokens: tokens per row; None for no end, 0 to read the prompt only.
      temperature: 0 (or less than 1e-6) takes the likeliest token, the lowest among equals.
      top_k, top_p, min_p: sample among the k likeliest; of these among the fewest with total probability of
        at least p; of these among those with at least `min_p` times the probability of the likeliest. Among
        equals the lowest stay.
      seed: of sampling: equal prompts and seeds give equal rows. None is 0, or the seed of `state`.
      state: continue from `Stream.state`; its rows are the batch. It stays valid. A cache of turns,
        `window(n, turn=m)`, makes room for the prompt and `max_tokens` before it goes on.
      stop: a row ends after a token that completes one of these: texts, bytes, tokens or sequences of tokens,
        of at most 256 bytes or tokens. Text of a stream continued by `state` counts, text of prompts does
        not.
      tokenizer: bytes by default. Tokens unknown to it have no text.
      cache: the cache policy of the attention layers instead of the model's own: a policy of
        `seqlab.models.cache`, one per layer, or a string such as "sinks(4)+window(1020)+int4". A continued
        `state` must have been made with the same policy.
      block: tokens sampled per dispatch, at most 128; by default as many as take 30 ms. It does not affect
        the tokens.
      prefill_chunks: the chunk sizes for reading prompts; each is compiled once.
      repetition_penalty, presence_penalty, frequency_penalty: for the last 512 tokens of a row, its prompt
        included: the first divides their positive logits and multiplies the negative ones, the second is
        subtracted, the third once per occurrence.
      logit_bias: {token: number added to its logit}; -inf forbids it.
      stop_tokens: tokens that end a row, one set for all rows or one per row, besides the tokenizer's `eos`.
      include_stop: False withholds the text of the stop, and text that may become one until it cannot.
      logits: a function of logits [b, v] and a `LogitsContext` that returns the logits to sample from, -inf
        for forbidden tokens. It is compiled into the loop: pass the same function each time.
      logits_values: arrays with one row per row of the batch, available to `logits` as `context.values`.
      top_logprobs: the number of likeliest tokens in `Token.top`.
      draft: speculative decoding: `seqlab.NGram`, `seqlab.Draft` or `seqlab.EarlyExit` proposes tokens, which
        the model verifies several at a time. Greedy rows, and by default sampled ones, give the tokens that
        they give without a draft.
    Raises:
      ValueError: an option out of range, by its name; a token outside the vocabulary, an empty prompt without
        state, or more tokens than a bounded cache can hold; all before anything is computed.
    """
    model = streamable(model, cache)
    plan, streamed = planned(draft, model, functools.partial(streamable, cache=None))
    tokenizer = check_tokenizer(ByteTokenizer() if tokenizer is None else tokenizer)
    vocabulary = model.vocab_size
    rows = read_prompts(prompt, tokenizer, vocabulary, fresh=state is None)
    if state is not None:
        state = adopted(model, state)
        rows = _rows_of(state, rows)
    count = len(rows)
    if seed is None:
        seed = 0 if state is None else np.asarray(state.seed)
    seeds = check_seed(seed, count)
    sampling = check_sampling(
        temperature,
        top_k,
        top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logit_bias=logit_bias,
        rows=count,
        vocab_size=vocabulary,
    )
    limits = check_limits(max_tokens, count)
    if state is not None:
        state = state._replace(model=as_mixer(model).make_room(state.model, coming_steps(rows, limits)))
        if isinstance(streamed, Paired):
            state = beside(streamed, state)
    model = streamed
    before = 0 if state is None else np.asarray(state.length, np.int64)
    setup = Setup(
        model=model,
        rows=rows,
        state=state,
        seeds=seeds,
        sampling=sampling,
        limits=limits,
        room=room_left(model, before, rows, limits),
        ends=read_ends(stop, stop_tokens, tokenizer, count, vocabulary),
        withhold=not check_flag("include_stop", include_stop),
        tokenizer=tokenizer,
        block=None if block is None else check_number("block", block, 1, BLOCK_LIMIT),
        chunks=check_chunks(prefill_chunks),
        function=check_function("logits", logits),
        values=check_values(logits, logits_values, count, vocabulary),
        top=check_number("top_logprobs", top_logprobs, 0, vocabulary),
        plan=plan,
    )
    longest = max(map(len, rows)) + 1

    def start(batch: int) -> StreamState:
        state = with_room_for(model, longest, batch)
        return state._replace(seed=jnp.asarray(np.pad(seeds, (0, batch - count))))

    return Stream(setup, start)


def beside(pair: Paired, state: StreamState) -> StreamState:
    """`state` of the target continued with a draft, which reads the last tokens that the state knows."""
    batch, known = state.length.shape[0], np.asarray(state.past.known)
    tokens = np.asarray(state.past.tokens)
    own = split(in_evaluation(pair.draft))
    fresh = as_mixer(pair.draft).state_for(batch, RECENT)
    start = StreamState(fresh, state.logits, state.seed, jnp.zeros_like(state.length), state.past)
    place = np.minimum(np.arange(RECENT) + RECENT - known[:, None], RECENT - 1)
    valid = jnp.asarray(np.arange(RECENT) < known[:, None])
    ordered = jnp.asarray(np.take_along_axis(tokens, place, axis=1))
    read = programs(own[0]).prefill(tuple(own[1].values()), programs(own[0]).copy(start), ordered, valid)
    return state._replace(model=PairState(state.model, read.model))


def warm_up(
    model: Module,
    rows: int | Sequence[int] = 1,
    *,
    steps: int = 1,
    cache: Any = None,
    prefill_chunks: Sequence[int] = PREFILL_CHUNKS,
    top_logprobs: int = 0,
    logits: LogitsFunction | None = None,
    logits_values: Any = None,
) -> dict[str, float]:
    """Compile the programs of streams of `model`, so that the first request does not wait.

    Args:
      rows: the number of rows, or several numbers; rounded up to powers of two.
      steps: the longest stream, prompt included: growing caches are compiled in every size up to it.
      cache, prefill_chunks, top_logprobs, logits, logits_values: as in `stream_generate`.
    Returns:
      `programs`, the number compiled so far for this model, and `seconds`, the time taken.
    Raises:
      ValueError: an option out of range, by its name.
    """
    begin = time.perf_counter()
    model = streamable(model, cache)
    sizes = [rows] if not isinstance(rows, Sequence) else list(rows)
    sizes = sorted({padded(check_number("rows", size, 1, 2**20)) for size in sizes})
    chunks = check_chunks(prefill_chunks)
    top = slots_of(check_number("top_logprobs", top_logprobs, 0, model.vocab_size))
    check_function("logits", logits)
    static, params = split(model)
    leaves, use = tuple(params.values()), programs(static)
    for size in sizes:
        ends = read_ends((), None, ByteTokenizer(), size, model.vocab_size).tokens
        values = check_values(logits, _resized(logits_values, size), size, model.vocab_size)
        settings = jax.tree.map(jnp.asarray, (check_sampling(rows=size), ends, values))
        none = np.zeros(size, np.int32)
        for fresh in _sizes_of(model, size, check_number("steps", steps, 1, _POSITIONS)):
            state = use.copy(fresh)
            for chunk in chunks:
                tokens, valid = np.zeros((size, chunk), np.int32), np.zeros((size, chunk), bool)
                state = use.prefill(leaves, state, tokens, valid)
            use.decode(leaves, use.copy(state), none, *settings, top=top, function=logits)
    return {"programs": use.compiled(), "seconds": time.perf_counter() - begin}


def _sizes_of(model: Module, rows: int, steps: int) -> Iterator[StreamState]:
    """Fresh states in every size up to `steps` steps."""
    seen, reached = set(), 1
    while reached < 2 * steps:
        shapes = jax.eval_shape(functools.partial(with_room_for, model, min(reached, steps), rows))
        key = tuple(leaf.shape for leaf in jax.tree.leaves(shapes))
        if key not in seen:
            seen.add(key)
            yield with_room_for(model, min(reached, steps), rows)
        reached *= 2


def _resized(values: Any, rows: int) -> Any:
    return jax.tree.map(lambda leaf: np.resize(leaf, (rows, *np.shape(leaf)[1:])), values)


def streamable(model: Any, cache: Any) -> Module:
    """`model` prepared for decoding, with `cache` if given."""
    needed = ("vocab_size", "features", "read_out", "init_state")
    lacking = [name for name in needed if not hasattr(model, name)]
    if lacking or not isinstance(model, Module):
        reason = f"has no {', '.join(lacking)}" if lacking else "is no seqlab.Module"
        raise UserError(f"model must be a language model, but {type(model).__name__} {reason}")
    if not as_mixer(model).causal:
        raise UserError(f"model: {type(model).__name__} is not causal, and cannot generate step by step")
    try:
        return in_evaluation(unrolled(model if cache is None else with_cache(model, cache)))
    except UserError:
        raise
    except (TypeError, AttributeError, ValueError) as error:
        raise UserError(f"cache: {shown(cache)} is no cache for this model ({error})") from error


def _rows_of(state: StreamState, rows: list[np.ndarray]) -> list[np.ndarray]:
    """The prompts of the rows of `state`."""
    batch = state.length.shape[0]
    if len(rows) == 1 and not len(rows[0]):
        rows = rows * batch
    if len(rows) != batch:
        raise UserError(f"prompt has {len(rows)} rows, state has {batch}")
    empty = [row for row, ids in enumerate(rows) if not len(ids) and not int(state.length[row])]
    if empty:
        raise UserError(f"prompt {empty[0]} is empty, and the state has not read anything yet")
    return rows


def coming_steps(rows: list[np.ndarray], limits: np.ndarray) -> np.ndarray:
    """The steps of a turn per row: of its prompt, and of its answer if limited."""
    endless = limits == np.iinfo(np.int64).max
    steps = np.asarray([len(row) for row in rows], np.int64) + np.where(endless, 0, limits)
    return np.minimum(steps, _POSITIONS).astype(np.int32)


def room_left(
    model: Module, before: np.ndarray | int, rows: list[np.ndarray], limits: np.ndarray
) -> np.ndarray:
    """The number of tokens each row can still hold after `before` [b] steps and its prompt: positions are
    int32, and caches bounded."""
    used = np.asarray([len(row) for row in rows], np.int64) + before
    if (used > _POSITIONS).any():
        row = int(np.argmax(used))
        raise UserError(
            f"prompt {row} ends at step {used[row]} of its stream, and positions end at {_POSITIONS}: "
            "begin a new stream"
        )
    room = _POSITIONS - used
    capacity = as_mixer(model).capacity
    if capacity is None:
        return room
    wanted = np.where(limits == np.iinfo(np.int64).max, 0, np.minimum(limits, 2**62))
    if (used + wanted > capacity).any():
        row = int(np.argmax(used + wanted))
        raise UserError(
            f"row {row} needs {used[row]} steps for its prompt and {wanted[row]} for max_tokens, but the "
            f"model's full cache holds {capacity}: shorten them, or build the model with a larger "
            "Full(capacity) or with a Window"
        )
    return np.minimum(room, capacity - used)


def check_values(function: Any, values: Any, rows: int, vocabulary: int) -> Any:
    """`values` as arrays, and `function` checked on shapes, before any work."""
    try:
        arrays = jax.tree.map(jnp.asarray, values)
    except Exception as error:  # whatever JAX says of what is no array
        raise UserError(f"logits_values must be arrays with a row per row of the batch ({error})") from error
    if any(leaf.ndim < 1 or leaf.shape[0] != rows for leaf in jax.tree.leaves(arrays)):
        shapes = [leaf.shape for leaf in jax.tree.leaves(arrays)]
        raise UserError(f"logits_values must have one row per each of {rows} rows, got {shapes}")
    if function is None or not callable(function):
        return arrays
    whole = jax.ShapeDtypeStruct((rows, vocabulary), jnp.float32)
    counts = jax.ShapeDtypeStruct((rows,), jnp.int32)
    recent = jax.ShapeDtypeStruct((rows, RECENT), jnp.int32)
    try:
        made = jax.eval_shape(function, whole, LogitsContext(recent, counts, counts, arrays))
    except Exception as error:  # the user's own function
        raise UserError(f"logits: the function fails on logits [{rows}, {vocabulary}] ({error})") from error
    if getattr(made, "shape", None) != whole.shape:
        raise UserError(f"logits must return an array {whole.shape}, got {shown(made)}")
    return arrays
