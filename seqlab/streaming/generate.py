"""Streaming generation: an iterator over tokens that can run for ever in constant memory.

A model is anything that maps tokens and a state to features and logits (`LanguageModel`). Its prompt is read
in chunks of a few fixed sizes, then tokens are drawn in blocks inside one compiled loop. Whatever the chunks,
the blocks or the row of the batch, the same prompt and seed give the same tokens, because every one of these
is a split of one sequence.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from seqlab.checks import UserError
from seqlab.mixer import as_mixer
from seqlab.models.attention import with_cache
from seqlab.module import Module, Static, merge, split
from seqlab.state import State, check_state
from seqlab.streaming.sampling import Sampling, check_sampling, draw
from seqlab.tokenizers import ByteTokenizer, Tokenizer, begin, decoder_after, ends_of, special_text

PREFILL_CHUNKS = (16, 128, 512)
_BLOCK_LIMIT = 128  # tokens in one dispatch at most
_BLOCK_SECONDS = (
    0.03  # blocks grow until they take this long: text keeps appearing, and dispatch is a small share
)

Prompt = str | bytes | Sequence[int] | np.ndarray


class StreamState(NamedTuple):
    """Everything needed to go on: rows can be taken, put, forked and saved as those of any state.

    `model`: the model's state after `length` [b] tokens. `logits` [b, v]: of the next one. `seed` [b]: of
    each row's draws.
    """

    model: State
    logits: Float[Array, "b v"]
    seed: UInt32[Array, " b"]
    length: Int[Array, " b"]


class Token(NamedTuple):
    """One generated token: `row` of the batch, `index` among the row's generated tokens, the `text` that it
    completes (may be empty: characters are only given whole), `logprob` under the model, and `finished`:
    None, "stop", "length" or "capacity"."""

    row: int
    index: int
    token: int
    text: str
    logprob: float
    finished: str | None


def stream_state(model: Module, batch: int = 1, seed: int | Sequence[int] = 0) -> StreamState:
    """The state of `batch` fresh streams."""
    model = _unrolled(model)
    seeds = np.broadcast_to(np.asarray(seed, np.uint32), (batch,))
    return StreamState(
        model.init_state(batch),
        jnp.zeros((batch, model.vocab_size), jnp.float32),
        jnp.asarray(seeds),
        jnp.zeros((batch,), jnp.int32),
    )


def rewind_stream(
    model: Module, state: StreamState, steps: int | Sequence[int], last: Sequence[int]
) -> StreamState:
    """The stream `steps` tokens ago, each row; `last` [b] is the token that then was the last one. It is read
    again for its logits.

    Raises what `Model.rewind` raises, and ValueError where a stream would be left without a token.
    """
    model, last = _unrolled(model), np.asarray(last, np.int32)
    if last.shape != state.length.shape:
        raise UserError(
            f"last must name one token for each of {state.length.shape[0]} rows, got {last.tolist()}"
        )
    if np.any(np.asarray(steps) >= np.asarray(state.length)):
        raise UserError(f"steps must leave a token of the {state.length.tolist()} in each row, got {steps}")
    steps = jnp.broadcast_to(jnp.asarray(steps, jnp.int32) + 1, last.shape)
    static, params = split(model)
    back = state._replace(model=model.rewind(state.model, steps), length=state.length - steps)
    read = _programs(static, Sampling()).prefill
    return read(tuple(params.values()), back, jnp.asarray(last)[:, None], jnp.ones((len(last), 1), bool))


def stream_generate(
    model: Module,
    prompt: Prompt | Sequence[Prompt] = (),
    *,
    max_tokens: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | Sequence[int] = 0,
    state: StreamState | None = None,
    stop: str | bytes | Sequence[str | bytes] = (),
    tokenizer: Tokenizer | None = None,
    cache: Any = None,
    block: int | None = None,
    prefill_chunks: Sequence[int] = PREFILL_CHUNKS,
) -> "Stream":
    """Generate after `prompt`, token by token, for ever unless told to stop.

        for token in seqlab.stream_generate(model, "def "):
            print(token.text, end="", flush=True)

    Args:
      prompt: text, bytes or token ids, or a list of prompts of any lengths, one a row. Text at the start of a
        stream is preceded by the tokenizer's `bos`, or by what a published tokenizer's files say. May be empty where `state` is given.
      max_tokens: tokens a row; None for no end.
      temperature: 0 takes the likeliest token; `top_k`, `top_p` restrict the draw to the k likeliest, or to
        the smallest set of probability p.
      seed: of the draws. One number serves every row (equal prompts then give equal rows), or one number a
        row.
      state: continue from `Stream.state`; its rows are the batch.
      stop: a row ends after text that ends with one of these.
      tokenizer: bytes by default.
      cache: what the attention layers remember instead of what they were built with: a policy of
        `seqlab.models.cache`, one a layer, or words such as "sinks(4)+window(1020)+int4". A `state` that is
        continued must have been made with the same.
      block: tokens drawn in one dispatch; by default as many as take 30 ms. It changes no token.
      prefill_chunks: the chunk sizes in which prompts are read: each is compiled once.
    Raises:
      ValueError: an option out of range, a token that the vocabulary lacks, an empty prompt without state, or
      more tokens than a
        bounded cache can hold; all before anything is computed.
    """
    sampling = check_sampling(temperature, top_k, top_p)
    for name, value, most in (("max_tokens", max_tokens, 2**31), ("block", block, _BLOCK_LIMIT)):
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int | np.integer) or not 1 <= value <= most
        ):
            raise UserError(f"{name} must be an integer from 1 to {most}, or None, got {value!r}")
    chunks = tuple(sorted(set(prefill_chunks)))
    if not chunks or chunks[0] < 1 or len(chunks) > 8:
        raise UserError(f"prefill_chunks must be one to eight positive sizes, got {prefill_chunks!r}")
    model, tokenizer = (
        _unrolled(model if cache is None else with_cache(model, cache)),
        tokenizer or ByteTokenizer(),
    )
    rows = _rows(prompt, tokenizer, model.vocab_size, fresh=state is None)
    if state is None:
        state = stream_state(model, len(rows), _check_seed(seed, len(rows)))
        state = state._replace(model=as_mixer(model).compact(state.model, max(map(len, rows)) + 1))
    else:
        state = _adopted(model, state)
    if len(rows) == 1 and not len(rows[0]):
        rows = rows * state.length.shape[0]
    if len(rows) != state.length.shape[0]:
        raise UserError(f"prompt has {len(rows)} rows, state has {state.length.shape[0]}")
    room = _room(model, state, rows, max_tokens)
    stops = (stop,) if isinstance(stop, str | bytes) else tuple(stop)
    if not all(stops):
        raise UserError("stop must not contain an empty string")
    return Stream(model, rows, state, sampling, max_tokens, room, stops, tokenizer, block, chunks)


class Stream(Iterator[Token]):
    """The iterator that `stream_generate` returns: `Token`s, the rows of a batch in turn.

    `state` is the state after exactly the tokens that have been handed out; `stats` says how fast and how
    large it is.
    """

    def __init__(self, model, rows, state, sampling, max_tokens, room, stops, tokenizer, block, chunks):
        static, params = split(model)
        self._programs = _programs(static, sampling)
        self._leaves = tuple(params.values())
        self._before = self._after = state
        self._with_room = as_mixer(model).with_room
        self._left = np.minimum(room, np.iinfo(np.int32).max if max_tokens is None else max_tokens).astype(
            np.int64
        )
        self._room, self._fixed_block, self._block = room, block, block or 8
        self._decoders = [decoder_after(tokenizer, row) for row in rows]
        self._tokenizer, self._ends = tokenizer, ends_of(tokenizer)
        self._stops = tuple(s.encode() if isinstance(s, str) else s for s in stops)
        self._tails = [b""] * len(rows)
        self._made = np.zeros(len(rows), np.int64)
        self._done = self._left < 1
        self._pending: list[Token] = []
        self._next = 0
        self._given = np.zeros(len(rows), np.int64)  # of the current block
        self._clock = {"prefill": _Clock(), "decode": _Clock()}
        self._prompt_tokens = sum(map(len, rows))
        self._read(rows, chunks)

    @property
    def state(self) -> StreamState:
        """After the prompt and the tokens handed out so far, and no others: a value to save, fork or continue
        from."""
        if self._next >= len(self._pending) and not self._cut:
            return self._after
        return self._programs.decode(self._leaves, self._before, jnp.asarray(self._given, jnp.int32))[0]

    @property
    def stats(self) -> dict[str, float]:
        """Tokens read and made, how fast (compilation apart), bytes of state, compiled programs, tokens a
        block."""
        prefill, decode = self._clock["prefill"], self._clock["decode"]
        return {
            "prompt_tokens": self._prompt_tokens,
            "prompt_tokens_per_second": prefill.speed,
            "tokens": int(self._made.sum()),
            "tokens_per_second": decode.speed,
            "seconds": prefill.seconds + decode.seconds,
            "compile_seconds": prefill.compiling + decode.compiling,
            "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(self._after)),
            "programs": self._programs.compiled(),
            "block": self._block,
        }

    def __next__(self) -> Token:
        while self._next >= len(self._pending):
            if self._done.all():
                raise StopIteration
            self._generate()
        token = self._pending[self._next]
        self._next += 1
        self._given[token.row] += 1
        return token

    def _read(self, rows: list[np.ndarray], chunks: tuple[int, ...]) -> None:
        """Chunked prefill: ragged rows side by side, right-padded with invalid steps."""
        start, longest = 0, max(map(len, rows))
        while start < longest:
            fitting = [size for size in chunks if size <= longest - start]
            size = fitting[-1] if fitting else chunks[0]
            tokens, valid = np.zeros((len(rows), size), np.int32), np.zeros((len(rows), size), bool)
            for row, ids in enumerate(rows):
                piece = ids[start : start + size]
                tokens[row, : len(piece)], valid[row, : len(piece)] = piece, True
            self._after = self._run(
                "prefill", int(valid.sum()), self._grown(self._after, valid.sum(1)), tokens, valid
            )
            start += size
        self._before, self._cut = self._after, False

    def _run(self, program: str, tokens: int, *args: Any) -> Any:
        """Run a program to its end and book its time; a call that had to compile is booked as compilation."""
        known, begin = self._programs.compiled(), time.perf_counter()
        result = jax.block_until_ready(getattr(self._programs, program)(self._leaves, *args))
        self._clock[program].book(time.perf_counter() - begin, tokens, self._programs.compiled() > known)
        return result

    def _generate(self) -> None:
        """Draw a block of tokens and queue them; a row that meets a stop text hands out nothing after it."""
        limits = np.where(self._done, 0, np.minimum(self._left, self._block)).astype(np.int32)
        self._before = self._grown(self.state, limits)
        self._after, tokens, logprobs = self._run("decode", int(limits.sum()), self._before, limits)
        tokens, logprobs = np.asarray(tokens), np.asarray(logprobs)
        self._pending, self._next, self._cut = [], 0, False
        self._given[:] = 0
        for step in range(int(limits.max())):
            for row in np.flatnonzero((limits > step) & ~self._done):
                self._pending.append(
                    self._token(int(row), int(tokens[row, step]), float(logprobs[row, step]))
                )
                self._cut |= bool(self._done[row] and step + 1 < limits[row])
        if self._fixed_block is None and limits.max() == self._block:
            self._block = int(
                np.clip(self._block * min(2.0, _BLOCK_SECONDS / self._clock["decode"].last), 1, _BLOCK_LIMIT)
            )

    def _grown(self, state: StreamState, more: np.ndarray) -> StreamState:
        """`state` with room for `more` [b] steps, where the model's caches grow."""
        return state._replace(
            model=self._with_room(state.model, int(np.max(np.asarray(state.length) + more)))
        )

    def _token(self, row: int, token: int, logprob: float) -> Token:
        index = int(self._made[row])
        self._made[row] += 1
        self._left[row] -= 1
        text, finished = self._decoders[row].push(token), None
        if self._stops:
            seen = text + special_text(self._tokenizer, token)  # what chat formats end turns with has no text
            tail = self._tails[row] + seen.encode()
            finished = "stop" if seen and any(stop in tail for stop in self._stops) else None
            self._tails[row] = (
                tail[-max(map(len, self._stops)) + 1 :] if max(map(len, self._stops)) > 1 else b""
            )
        if token in self._ends:
            finished = "stop"
        if finished is None and self._left[row] < 1:
            finished = "capacity" if self._made[row] >= self._room[row] else "length"
        if finished:
            self._done[row] = True
            text += self._decoders[row].finish()
        return Token(row, index, token, text, logprob, finished)


@dataclasses.dataclass
class _Clock:
    """Seconds at work and at compiling, and the tokens of the former."""

    seconds: float = 0.0
    compiling: float = 0.0
    tokens: int = 0
    last: float = 1.0

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def book(self, seconds: float, tokens: int, compiled: bool) -> None:
        self.last = seconds
        if compiled:
            self.compiling += seconds
        else:
            self.seconds, self.tokens = self.seconds + seconds, self.tokens + tokens


class _Programs(NamedTuple):
    prefill: Callable[..., StreamState]
    decode: Callable[..., tuple[StreamState, Array, Array]]
    compiled: Callable[[], int]


@functools.lru_cache(maxsize=32)
def _programs(static: Static, sampling: Sampling) -> _Programs:
    """The compiled functions of a model: parameters travel as a flat tuple, the cheapest thing to hand to a
    jitted function."""
    traced = []

    def model(leaves: tuple[Array, ...]) -> Any:
        return merge(static, dict(zip(static.names, leaves, strict=True)))

    def prefill(leaves, state, tokens, valid):
        traced.append(tokens.shape)
        net = model(leaves)
        count = jnp.sum(valid, axis=1, dtype=jnp.int32)
        features, new = net.features(tokens, state.model, None, valid)
        last = jnp.take_along_axis(features, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
        logits = jnp.where(count[:, None] > 0, net.read_out(last).astype(jnp.float32), state.logits)
        return state._replace(model=new, logits=logits, length=state.length + count)

    def decode(leaves, state, limits):
        traced.append("decode")
        net, batch = model(leaves), limits.shape[0]

        def step(carry):
            i, state, tokens, logprobs = carry
            active = i < limits
            token = draw(state.logits, state.seed, state.length, sampling)
            logprob = jnp.take_along_axis(jax.nn.log_softmax(state.logits), token[:, None], axis=1)[:, 0]
            logits, new = net(token[:, None], state.model, None, active[:, None])
            logits = jnp.where(active[:, None], logits[:, 0].astype(jnp.float32), state.logits)
            state = StreamState(new, logits, state.seed, state.length + active)
            return i + 1, state, tokens.at[:, i].set(token), logprobs.at[:, i].set(logprob)

        empty = jnp.zeros((batch, _BLOCK_LIMIT), jnp.int32), jnp.zeros((batch, _BLOCK_LIMIT), jnp.float32)
        _, state, tokens, logprobs = jax.lax.while_loop(
            lambda carry: carry[0] < jnp.max(limits), step, (0, state, *empty)
        )
        return state, tokens, logprobs

    # The old state is not donated: `Stream.state` may have to replay a part of the block from it.
    return _Programs(jax.jit(prefill), jax.jit(decode), lambda: len(traced))


def _unrolled(model: Module) -> Module:
    """`model` as it decodes best; its states have another structure where its layers were scanned."""
    return as_mixer(model).unrolled()


def _adopted(model: Module, state: StreamState) -> StreamState:
    """A state that continues, refused if another model or cache made it. Caches may have any room that
    streaming gives them."""
    if not isinstance(state, StreamState):
        raise UserError(f"state must be a StreamState, as Stream.state is, got {type(state).__name__}")
    mixer, whole = as_mixer(model), jax.eval_shape(lambda: stream_state(model, 1))
    if jax.tree.structure(state) != jax.tree.structure(whole):
        check_state(state, whole)
    state = state._replace(model=mixer.adopt(state.model))
    sizes = sorted({size for leaf in jax.tree.leaves(state.model) for size in leaf.shape if size})
    reason = None
    for steps in (None, *sizes):
        like = jax.eval_shape(lambda steps=steps: _with_room_for(model, steps))
        try:
            check_state(state, like)
        except UserError as error:
            reason = reason or error
        else:
            return state
    raise reason


def _with_room_for(model: Module, steps: int | None) -> StreamState:
    """A fresh state with the room that streams of `steps` steps have; None for all."""
    made, mixer = stream_state(model, 1), as_mixer(model)
    if steps is None:
        return made
    return made._replace(model=mixer.with_room(mixer.compact(made.model, steps), steps))


def _check_seed(seed: int | Sequence[int], rows: int) -> np.ndarray:
    seeds = np.asarray(seed)
    if (
        seeds.dtype.kind not in "iu"
        or seeds.ndim > 1
        or (seeds.ndim == 1 and len(seeds) != rows)
        or (seeds < 0).any()
        or (seeds >= 2**32).any()
    ):
        raise UserError(
            f"seed must be one integer in [0, 2**32), or one for each of {rows} rows, got {seed!r}"
        )
    return seeds.astype(np.uint32)


def _rows(prompt: Any, tokenizer: Tokenizer, vocab_size: int, fresh: bool) -> list[np.ndarray]:
    """The prompts as token arrays, one a row, checked against the vocabulary."""
    one = (
        isinstance(prompt, str | bytes | np.ndarray)
        or not len(prompt)
        or isinstance(prompt[0], int | np.integer)
    )
    rows = []
    for i, item in enumerate([prompt] if one else prompt):
        if isinstance(item, str | bytes):
            ids = np.asarray(begin(tokenizer, item) if fresh else tokenizer.encode(item), np.int64)
        else:
            ids = np.asarray(item, np.int64).ravel()
        if fresh and not len(ids):
            raise UserError(f"prompt {i} is empty, and there is no state to continue from")
        bad = np.flatnonzero((ids < 0) | (ids >= vocab_size))
        if len(bad):
            raise UserError(
                f"prompt {i}: token {ids[bad[0]]} at place {bad[0]} is not in the model's vocabulary of "
                f"{vocab_size}"
            )
        rows.append(ids)
    return rows


def _room(model: Module, state: StreamState, rows: list[np.ndarray], max_tokens: int | None) -> np.ndarray:
    """How many tokens each row can still hold after its prompt, where a cache is bounded."""
    capacity = as_mixer(model).capacity
    if capacity is None:
        return np.full(len(rows), np.iinfo(np.int32).max, np.int64)
    used = np.asarray(state.length, np.int64) + [len(row) for row in rows]
    if (used + (max_tokens or 0) > capacity).any():
        row = int(np.argmax(used))
        raise UserError(
            f"row {row} needs {used[row]} steps for its prompt and {max_tokens or 0} for max_tokens, but "
            "the model's full cache "
            f"holds {capacity}: shorten them, or build the model with a larger Full(capacity) or with a "
            "Window"
        )
    return capacity - used
