"""A stream that a `Batcher` serves: its settings, and its tokens as they come."""

import asyncio
import collections
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import numpy as np

from seqlab.serving.parcel import Parcel
from seqlab.serving.settings import Settings
from seqlab.streaming.states import RECENT, StreamState
from seqlab.streaming.stream import Token
from seqlab.streaming.text import RowText


class Busy(RuntimeError):
    """As many requests wait as the batcher allows: try again later."""


class Request:
    """A stream of a `Batcher`, made by `Batcher.submit`.

    Iterating, `for token in request` or `async for token in request`, gives its `Token`s as they are drawn.
    Without a thread (`Batcher.start`) the batcher works meanwhile. Each token is handed out once.

    Attributes:
      prompt_tokens: the length of its prompt.
      tokens: the number of tokens drawn so far.
      finished: None while it runs, then why it ended: the reasons of `Token.finished`, or "cancelled",
        "deadline" (not finished in time), "handed over" (to another batcher), or "error" (the step failed).
      cached_tokens: those of the prompt that were not read, because a shared prefix was known.
      displaced: how often it gave its row to a stream of higher priority.
      submitted, first, last: times (`time.monotonic`) of its submission, its first token and its latest;
        None before.
    """

    def __init__(
        self, settings: Settings, text: RowText, spoken: int, batcher: Any, state: StreamState | None
    ):
        self._settings, self._text, self._spoken, self._batcher = settings, text, spoken, batcher
        self.priority, self.deadline = settings.priority, settings.deadline
        self.prompt_tokens, self.tokens, self.cached_tokens, self.displaced = len(settings.prompt), 0, 0, 0
        self.finished: str | None = None
        self.submitted, self.first, self.last = time.monotonic(), None, None
        self._parked = state  # of a stream without a row
        self._stop_set = set(settings.ends.tokens[0].tolist()) - {-1}
        self._queue: collections.deque[Token] = collections.deque()
        self._changed = threading.Condition()
        self._listeners: list[Callable[[], None]] = []
        self._cancelled = False

    def cancel(self) -> None:
        """End the stream at the next step; its row goes to another one. Tokens already drawn stay."""
        self._cancelled = True
        self._batcher._worker.wake()

    @property
    def held(self) -> str:
        """Text that was not handed out: incomplete characters, and a possible beginning of a stop text."""
        return self._text.rest

    def result(self, timeout: float | None = None) -> list[Token]:
        """Wait for the end, and return all tokens that were not handed out.

        Raises TimeoutError after `timeout` seconds; None waits for ever.
        """
        until = None if timeout is None else time.monotonic() + timeout
        while self.finished is None:
            self._wait(until)
        return list(self._drained())

    def __iter__(self) -> Iterator[Token]:
        while True:
            yield from self._drained()
            if self.finished is not None:
                yield from self._drained()
                return
            self._wait(None)

    async def __aiter__(self) -> AsyncIterator[Token]:
        loop, ready = asyncio.get_running_loop(), asyncio.Event()

        def notify() -> None:
            loop.call_soon_threadsafe(ready.set)

        self._batcher.start()
        self._listeners.append(notify)
        try:
            while True:
                ready.clear()
                ended = self.finished is not None  # before the queue is emptied: its tokens come first
                for token in self._drained():
                    yield token
                if ended:
                    return
                await ready.wait()
        finally:
            self._listeners.remove(notify)

    def _drained(self) -> Iterator[Token]:
        while self._queue:
            yield self._queue.popleft()

    def _wait(self, until: float | None) -> None:
        """Until something has changed, or work for the batcher's step if no thread runs it."""
        if not self._batcher.started:
            self._batcher.step()
        else:
            with self._changed:
                if self.finished is None:
                    self._changed.wait(0.1)  # a change may have come before: look again
        if until is not None and time.monotonic() > until and self.finished is None:
            raise TimeoutError(f"request is not finished after {self.tokens} tokens")

    # Called by the batcher only.

    def _parcel(self, read: int, state: StreamState | None) -> Parcel:
        """The request for another batcher to go on with, after `read` tokens of the prompt."""
        settings, before, late = self._settings, 0, None
        if self.deadline is not None:
            late = max(1e-3, self.submitted + self.deadline - time.monotonic())
        if state is not None:
            before = int(state.length[0]) - read - self.tokens
            spoken = min(self._spoken + self.tokens, RECENT) if read == self.prompt_tokens else 0
            marks = {"spoken": spoken, "held": self._text.held}
            past = state.past._replace(**{name: np.full(1, n, np.int32) for name, n in marks.items()})
            state = state._replace(past=past)
        options = settings.options | {"deadline": late}
        return Parcel(settings.prompt, options, read, self.tokens, before, settings.continued, state)

    def _draw(self, token: int, logprob: float, sampled: float, top: tuple[tuple[int, float], ...]) -> None:
        """Hand out a drawn token, and end where it ends the stream."""
        settings, index = self._settings, self.tokens
        self.tokens = index + 1
        text, ended = self._text.push(token, token in self._stop_set)
        finished = None
        if ended:
            finished = "stop"
        elif index + 1 >= min(settings.limit, settings.room):
            finished = "capacity" if index + 1 >= settings.room else "length"
            text += self._text.finish() if finished == "capacity" else ""
        self._hand(Token(0, index, token, text, logprob, finished, sampled, top[: settings.top]))

    def _break(self) -> None:
        """End because no token can be drawn: the model's logits are not finite."""
        self._hand(Token(0, self.tokens, -1, self._text.finish(), math.nan, "nonfinite"))

    def _hand(self, token: Token) -> None:
        self.last = time.monotonic()
        self.first = self.first or self.last
        self._queue.append(token)
        self._end(token.finished)

    def _end(self, reason: str | None) -> None:
        """Note the end, if there is a reason, and tell whoever waits."""
        self.finished = self.finished or reason
        with self._changed:
            self._changed.notify_all()
        for notify in list(self._listeners):
            notify()

    @property
    def _left(self) -> int:
        """The tokens it may still draw."""
        return min(self._settings.limit, self._settings.room) - self.tokens
