"""The iterator that `stream_generate` returns: tokens, their text, and the state after each of them."""

import dataclasses
import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seqlab.checks import UserError
from seqlab.mixer import as_mixer
from seqlab.models.attention import leaves_training
from seqlab.module import Module, split
from seqlab.streaming.drafts import Paired, Plan
from seqlab.streaming.programs import BLOCK_LIMIT, Drawn, LogitsFunction, programs, row_integers
from seqlab.streaming.prompts import Ends
from seqlab.streaming.sampling import Sampling
from seqlab.streaming.speculation import speculative
from seqlab.streaming.states import RECENT, Past, StreamState
from seqlab.streaming.text import CONTEXT, RowText
from seqlab.tokenizers import Tokenizer

_FIRST_BLOCK = 4
_SHORTEST_BLOCK = 4  # even for slow steps, since a dispatch has a cost
_BLOCK_SECONDS = (
    0.03  # blocks grow until they take this long: text keeps appearing, dispatch is a small share
)
_REPLAY = 32  # tokens after which a state is kept from which `Stream.state` can be made again


class BeyondTraining(UserWarning):
    """A stream has reached rotary positions beyond its model's training: later output may be useless."""


class Token(NamedTuple):
    """One generated token of a stream.

    `row`: of the batch. `index`: among the row's generated tokens. `text`: the text it completes (may be
    empty: characters are emitted complete). `logprob`: log-probability under the model. `finished`: None, or
    why the row ends: "stop", "length", "capacity" (no further step can be held), "nonfinite" (the model's
    logits are non-finite or forbid every token: nothing was sampled, and `token` is -1). `sampled_logprob`:
    under the sampling distribution, 0 for greedy rows. `top`: the likeliest tokens and their
    log-probabilities under the model, as many as `top_logprobs`.
    """

    row: int
    index: int
    token: int
    text: str
    logprob: float
    finished: str | None
    sampled_logprob: float = math.nan
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass
class Setup:
    """The checked inputs of a stream. Arrays have one row per row of the batch."""

    model: Module  # unrolled
    rows: list[np.ndarray]
    state: StreamState | None  # None: fresh
    seeds: np.ndarray
    sampling: Sampling
    limits: np.ndarray
    room: np.ndarray
    ends: Ends
    withhold: bool
    tokenizer: Tokenizer
    block: int | None
    chunks: tuple[int, ...]
    function: LogitsFunction | None
    values: Any
    top: int
    plan: Plan | None  # of speculation


class Stream(Iterator[Token]):
    """The iterator that `stream_generate` returns: `Token`s, the rows of a batch in turn.

    `state` is the state after exactly the tokens that were returned; `held` the withheld text of each row;
    `stats` reports speed and size.
    """

    def __init__(self, setup: Setup, start: Callable[[int], StreamState]):
        static, params = split(setup.model)
        self._setup, self._start, self._leaves = setup, start, tuple(params.values())
        self._programs = programs(static) if setup.plan is None else speculative(static, setup.plan)
        self._rows = len(setup.rows)
        self._padded = padded(self._rows)
        self._with_room = as_mixer(setup.model).with_room
        self._trained, self._warned = leaves_training(setup.model), False
        self._clock = {"prefill": _Clock(), "decode": _Clock()}
        # Of rejection, tokens depend on where blocks end: there these do not depend on the machine's speed.
        self._fixed = setup.block or (setup.plan and setup.plan.rule == "rejection" and _REPLAY) or None
        self._block = self._fixed or _FIRST_BLOCK
        self._begin_text()
        index = np.pad(np.arange(self._rows), (0, self._padded - self._rows))  # padding rows repeat the first
        self._settings = jax.tree.map(
            lambda leaf: jnp.asarray(leaf)[index], (setup.sampling, setup.ends.tokens, setup.values)
        )
        self._end_sets = [set(row.tolist()) - {-1} for row in setup.ends.tokens]
        # Lists, since per-token work must be cheap.
        self._most: list[int] = np.minimum(setup.limits, setup.room).tolist()
        self._done = [most < 1 for most in self._most]
        self._stopped = [False] * self._rows
        self._made = [0] * self._rows  # handed out
        self._drawn_until = [0] * self._rows  # of those, with the current block
        self._queue: Iterator[tuple[int, int]] = iter(())
        self._after: StreamState | None = self._begin_state(start, index)  # None: lost to an interruption
        self._base: StreamState | None = None
        self._since: list[list[int]] = [[] for _ in range(self._rows)]  # tokens of each row after it
        self._offered = self._accepted = 0
        self._base_made = np.zeros(self._rows, np.int64)  # tokens that led to it; `_after` follows from it
        self._shared = False  # whether `_after` is shared, so that its memory must not be reused
        self._read()

    def _begin_text(self) -> None:
        setup, past = self._setup, None if self._setup.state is None else self._setup.state.past
        self._texts, self._spoken = [], np.zeros(self._rows, np.int64)  # before the first token
        remembered = None if past is None else Past(*(np.asarray(part) for part in past))
        for row, prompt in enumerate(setup.rows):
            own = None if remembered is None else Past(*(part[row] for part in remembered))
            text, self._spoken[row] = begin_text(setup.tokenizer, setup.ends, setup.withhold, prompt, own)
            self._texts.append(text)

    def _begin_state(self, start: Callable[[int], StreamState], index: np.ndarray) -> StreamState:
        """An unshared state, padded to one of few numbers of rows."""
        setup = self._setup
        if setup.state is None:
            self._length = np.zeros(self._rows, np.int64)  # before the first token
            return self._programs.copy(start(self._padded))
        self._length = np.asarray(setup.state.length, np.int64)
        state = setup.state._replace(seed=jnp.asarray(setup.seeds))
        if self._padded == self._rows:
            return self._programs.copy(state)
        return self._programs.rows(state, jnp.asarray(index, jnp.int32))

    @property
    def state(self) -> StreamState:
        """The state after exactly the prompt and the tokens returned so far: a value to save, fork or
        continue from."""
        if self._made == self._drawn_until and self._after is not None:
            state = self._after
            self._shared = self._shared or self._padded == self._rows
        else:
            state = self._replayed()
        held = np.asarray([text.held for text in self._texts], np.int32)
        return self._as_value(state, np.where(self._stopped, 0, self._spoken + self._made), held)

    def _as_value(self, state: StreamState, spoken: np.ndarray, held: np.ndarray) -> StreamState:
        """`state` without padding rows and drafts, with the marks of the text of each row."""
        if self._padded != self._rows:
            state = self._programs.rows(state, jnp.arange(self._rows, dtype=jnp.int32))
        if isinstance(self._setup.model, Paired):
            state = state._replace(model=state.model.target)
        spoken = jnp.asarray(np.minimum(spoken, RECENT), jnp.int32)
        return state._replace(past=state.past._replace(spoken=spoken, held=jnp.asarray(held, jnp.int32)))

    def rewind(self, steps: Any = 1) -> StreamState:
        """The state `steps` tokens ago, one number for all rows or one per row: a value to continue from, for
        every mixer. The stream itself goes on as before.

        Recurrent states cannot be taken back, so the tokens since a kept state are read again: those of the
        last 32 at least, beyond that the whole stream with its prompt.

        Raises:
          ValueError: more steps than the stream has returned tokens; with a draft's `rule="rejection"`, whose
            tokens cannot be drawn again, more than are kept.
        """
        back, made = row_integers("steps", steps, self._rows), np.asarray(self._made, np.int64)
        until, plan = made - back, self._setup.plan
        if (back < 0).any() or (until < 0).any():
            raise UserError(
                f"steps must be from 0 to the {made.tolist()} tokens returned, got {back.tolist()}"
            )
        kept = self._base is not None and bool((until >= self._base_made).all())
        spoken, held = self._spoken + until, np.full(self._rows, -1)
        if plan is not None and plan.rule == "rejection":
            if not kept and back.any():
                raise UserError(f"steps: got {back.tolist()}, and the draft's rejection keeps fewer tokens")
            if not back.any():
                return self.state
            since = [row[:count] for row, count in zip(self._since, until - self._base_made, strict=True)]
            state = self._having_read(self._programs.copy(self._base), since, self._length + self._base_made)
            return self._as_value(state, spoken, held)
        if plan is None and kept:
            state = self._drawn_again(self._programs.copy(self._base), self._base_made, until)
            return self._as_value(state, spoken, held)
        again = self._begun_again()
        state = again._drawn_again(again._after, np.zeros(self._rows, np.int64), until)
        return again._as_value(state, spoken, held)

    def _begun_again(self) -> "Stream":
        """The stream after its prompt, without a draft."""
        setup = dataclasses.replace(self._setup, plan=None)
        if not isinstance(setup.model, Paired):
            return Stream(setup, self._start)

        def of_target(state: StreamState) -> StreamState:
            return state._replace(model=state.model.target)

        state = None if setup.state is None else of_target(setup.state)
        setup = dataclasses.replace(setup, model=setup.model.target, state=state)
        return Stream(setup, lambda batch: of_target(self._start(batch)))

    @property
    def held(self) -> list[str]:
        """The withheld text of each row: incomplete characters, and a possible beginning of a stop text. A
        stream continued from `state` continues with it."""
        return [text.rest for text in self._texts]

    @property
    def stats(self) -> dict[str, float]:
        """Tokens read and returned, speeds (without compilation), bytes of state, compiled programs, tokens
        per block. `beyond_training`: steps of the longest row at positions beyond the model's training. With
        a draft: `draft_tokens` that the model has read, of which it `accepted` the share `acceptance`."""
        prefill, decode = self._clock["prefill"], self._clock["decode"]
        return {
            "prompt_tokens": sum(map(len, self._setup.rows)),
            "prompt_tokens_per_second": prefill.speed,
            "tokens": sum(self._made),
            "tokens_per_second": decode.speed,
            "seconds": prefill.seconds + decode.seconds,
            "compile_seconds": prefill.compiling + decode.compiling,
            "state_bytes": sum(
                leaf.nbytes for leaf in jax.tree.leaves(self._base if self._after is None else self._after)
            )
            * self._rows
            // self._padded,
            "programs": self._programs.compiled(),
            "block": self._block,
            "beyond_training": 0
            if self._trained is None
            else max(0, int((self._length + self._made).max()) - self._trained),
            "draft_tokens": self._offered,
            "accepted": self._accepted,
            "acceptance": self._accepted / self._offered if self._offered else 0.0,
        }

    def __next__(self) -> Token:
        while True:
            for step, row in self._queue:
                if not self._done[row]:
                    return self._token(row, step)
            if all(self._done):
                raise StopIteration
            self._generate()

    def _token(self, row: int, step: int) -> Token:
        """Return the token of a row's `step` in the current block. A row that has ended returns no more."""
        index = self._made[row]
        if index == self._drawn_until[row]:  # the next token cannot be sampled
            self._done[row] = self._stopped[row] = True
            return Token(row, index, -1, self._texts[row].finish(), math.nan, "nonfinite")
        tokens, logprobs, sampled, top = self._drawn
        token = tokens[row][step]
        self._made[row] = index + 1
        self._since[row].append(token)
        text, ended = self._texts[row].push(token, token in self._end_sets[row])
        finished = None
        if ended:
            finished = "stop"
            self._stopped[row] = True
        elif index + 1 >= self._most[row]:
            finished = "capacity" if index + 1 >= self._setup.room[row] else "length"
            text += self._texts[row].finish() if finished == "capacity" else ""
        if finished:
            self._done[row] = True
        likeliest = ()
        if top:
            pairs = zip(top[0][row][step], top[1][row][step], strict=True)
            likeliest = tuple(itertools.islice(pairs, self._setup.top))
        return Token(row, index, token, text, logprobs[row][step], finished, sampled[row][step], likeliest)

    def _read(self) -> None:
        """Chunked prefill of the prompts."""
        self._after = self._having_read(self._after, self._setup.rows, self._length)
        self._length = self._length + np.asarray([len(ids) for ids in self._setup.rows])
        self._watch(self._length, stacklevel=5)

    def _having_read(self, state: StreamState, rows: list[Any], length: np.ndarray) -> StreamState:
        """`state` of `length` [b] tokens after ragged rows, read in chunks and right-padded with invalid
        steps."""
        start, longest, chunks = 0, max(map(len, rows)), self._setup.chunks
        while start < longest:
            fitting = [size for size in chunks if size <= longest - start]
            size = fitting[-1] if fitting else chunks[0]
            tokens = np.zeros((self._padded, size), np.int32)
            valid = np.zeros((self._padded, size), bool)
            for row, ids in enumerate(rows):
                piece = ids[start : start + size]
                tokens[row, : len(piece)] = piece
                valid[row, : len(piece)] = True
            count = valid.sum(1)[: self._rows]
            length = length + count
            state = self._run("prefill", int(count.sum()), self._grown(state, length), tokens, valid)
            start += size
        return state

    def _watch(self, length: np.ndarray, stacklevel: int) -> None:
        """Warn once if a row is beyond the model's training length. `length` [b]: of the rows."""
        if self._trained is None or self._warned or int(length.max()) <= self._trained:
            return
        self._warned = True
        warnings.warn(
            f"the stream has passed the {self._trained:,} positions that the model was trained on, and the "
            "positions of its cache keep growing: later output may be useless. A cache such as "
            '"sinks(4)+window(1020)" never leaves the trained positions',
            BeyondTraining,
            stacklevel=stacklevel,
        )

    def _run(self, program: str, tokens: int, *args: Any, **options: Any) -> Any:
        """Run a program and record its time; a call that compiled is recorded as compilation."""
        known, begin = self._programs.compiled(), time.perf_counter()
        result = jax.block_until_ready(getattr(self._programs, program)(self._leaves, *args, **options))
        self._clock[program].book(time.perf_counter() - begin, tokens, self._programs.compiled() > known)
        return result

    def _decode(self, state: StreamState, limits: np.ndarray) -> tuple[StreamState, Drawn]:
        wide = np.zeros((2, self._padded), np.int32)
        wide[:, : self._rows] = limits, np.minimum(self._left(), 2**31 - 1)
        options = {"top": slots_of(self._setup.top), "function": self._setup.function}
        if self._setup.plan is None:
            return self._run("decode", 0, state, wide[0], *self._settings, **options)
        state, block = self._run("decode", 0, state, wide, *self._settings, **options)
        self._offered += int(np.sum(block.offered[: self._rows]))
        self._accepted += int(np.sum(block.accepted[: self._rows]))
        return state, block.drawn

    def _left(self) -> np.ndarray:
        """The most tokens that each row can still have."""
        return np.where(self._done, 0, np.asarray(self._most) - self._made)

    def _generate(self) -> None:
        """Generate a block of tokens, to be returned one by one."""
        if self._made != self._drawn_until or self._after is None:
            self._after, self._shared = self._replayed(), False
        made = np.asarray(self._made, np.int64)
        if self._base is None or self._shared or (made - self._base_made).max() >= _REPLAY:
            self._base, self._after = self._after, self._programs.copy(self._after)
            self._base_made, self._shared = made, False
            self._since = [[] for _ in range(self._rows)]
        limits = np.minimum(self._left(), self._block)
        beyond = 0 if self._setup.plan is None else self._setup.plan.tokens
        coming = np.minimum(self._left(), limits + beyond)
        state, self._after = self._grown(self._after, self._length + made + coming), None  # taken over
        self._after, drawn = self._decode(state, limits)
        count, broken = (np.asarray(part)[: self._rows] for part in (drawn.count, drawn.broken))
        self._drawn_until = (made + count).tolist()
        self._watch(self._length + self._drawn_until, stacklevel=4)
        clock = self._clock["decode"]
        clock.tokens += 0 if clock.compiled else int(count.sum())
        longest = int(count.max())
        parts = [
            np.asarray(part)[:, :longest].tolist() for part in (drawn.tokens, drawn.logprobs, drawn.sampled)
        ]
        top = [np.asarray(part)[:, :longest].tolist() for part in drawn.top] if self._setup.top else None
        self._drawn = (*parts, top)
        handed = count + broken
        self._queue = (
            (step, row)
            for step in range(int(handed.max()))
            for row in range(self._rows)
            if step < handed[row]
        )
        if self._fixed is None and not clock.compiled and longest >= self._block:
            size = self._block * min(2.0, _BLOCK_SECONDS / clock.last)
            self._block = int(np.clip(size, _SHORTEST_BLOCK, BLOCK_LIMIT))

    def _replayed(self) -> StreamState:
        """The state after the returned tokens, recomputed from the last saved one."""
        state = self._programs.copy(self._base)
        if self._setup.plan is not None:  # whose rounds may not end here
            return self._having_read(state, self._since, self._length + self._base_made)
        return self._drawn_again(state, self._base_made, np.asarray(self._made, np.int64))

    def _drawn_again(self, state: StreamState, made: np.ndarray, until: np.ndarray) -> StreamState:
        """`state` after `made` [b] tokens, advanced to `until` [b] of them."""
        length, left = self._length + made, until - made
        while left.any():
            limits = np.minimum(left, BLOCK_LIMIT)
            state, _ = self._decode(self._grown(state, length + limits), limits)
            left -= limits
            length += limits
        return state

    def _grown(self, state: StreamState, length: np.ndarray) -> StreamState:
        """`state` with room for `length` [b] steps, if the model's caches grow."""
        return state._replace(model=self._with_room(state.model, int(length.max())))


def begin_text(
    tokenizer: Tokenizer, ends: Ends, withhold: bool, prompt: np.ndarray, past: Past | None
) -> tuple[RowText, int]:
    """The text of a row after `prompt` [t], and the number of tokens before it that can be part of a stop.

    Text continues where `past`, that of one row, ended; a prompt ends text that can be part of a stop.
    """
    if past is None:
        context = prompt[-CONTEXT:].tolist()
        return RowText(tokenizer, ends.texts, ends.sequences, withhold, context, [], 0), 0
    said = 0 if len(prompt) else int(past.spoken)
    before = past.tokens[RECENT - int(past.known) : RECENT - said].tolist()
    context = [*before[-CONTEXT:], *prompt[-CONTEXT:].tolist()]
    spoken, held = past.tokens[RECENT - said :].tolist(), int(past.held)
    if not (held or ends.texts or ends.sequences):  # then only its last tokens matter
        context, spoken = [*context, *spoken][-CONTEXT:], []
    return RowText(tokenizer, ends.texts, ends.sequences, withhold, context, spoken, held), said


def padded(rows: int) -> int:
    """The number of rows a program is compiled for: the next power of two."""
    return 1 << (rows - 1).bit_length()


def slots_of(top: int) -> int:
    """The number of likeliest tokens reported by a program for `top`: none, or a power of two of at least
    8."""
    return 0 if top == 0 else max(8, padded(top))


@dataclasses.dataclass
class _Clock:
    """Seconds of execution and compilation, tokens, and the duration of the last call."""

    seconds: float = 0.0
    compiling: float = 0.0
    tokens: int = 0
    last: float = 1.0
    compiled: bool = True

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def book(self, seconds: float, tokens: int, compiled: bool) -> None:
        self.last, self.compiled = seconds, compiled
        if compiled:
            self.compiling += seconds
        else:
            self.seconds, self.tokens = self.seconds + seconds, self.tokens + tokens
