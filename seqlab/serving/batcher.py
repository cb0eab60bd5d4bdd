"""Continuous batching: streams join and leave a batch at any step, each with the tokens it has alone.

A stream is a row of one state (clause C6 of the contract): it can be taken out, put in, or forked without
touching its neighbours. So a stream's tokens depend neither on the streams beside it nor on when it was
displaced, and everything here is bookkeeping about rows.
"""

import collections
import dataclasses
import inspect
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from seqlab.checks import UserError, check_at_least, check_positive
from seqlab.module import Module
from seqlab.serving.parcel import pack, unpack
from seqlab.serving.prefixes import PrefixStore
from seqlab.serving.request import Busy, Request
from seqlab.serving.rooms import Rooms
from seqlab.serving.schedule import Job, Plan, Schedule
from seqlab.serving.settings import Checks
from seqlab.serving.slots import Piece, Slots
from seqlab.serving.worker import Worker
from seqlab.streaming.generate import LogitsFunction, Prompt, check_values, streamable
from seqlab.streaming.programs import BLOCK_LIMIT, Drawn
from seqlab.streaming.prompts import (
    check_function,
    check_number,
    check_tokenizer,
)
from seqlab.streaming.states import StreamState
from seqlab.tokenizers import ByteTokenizer, Tokenizer

PIECES = (64,)  # sizes in which prompts are read; each is compiled once
_STEP_SECONDS = 0.03  # steps without prompts draw as many tokens per stream as take this long


class Batcher:
    """Serves many streams of one model in one batch.

        batcher = seqlab.Batcher(model, rows=8)
        request = batcher.submit("def ", max_tokens=100)
        for token in request:
            print(token.text, end="", flush=True)

    Requests join and leave at any step. A step reads pieces of prompts and draws a token for every other
    stream, at most `token_budget` tokens in all: long prompts do not delay streams that are being answered.
    Nothing is compiled after `warm_up`. A request gives the tokens of `stream_generate` with the same
    settings, whatever runs beside it. Without `start`, the batcher works when a request is iterated or `step`
    is called; with it, or as a context manager, in a thread of its own.

    Args:
      model: a language model.
      rows: streams that run at once; others wait.
      cache: the cache policy of attention layers, as in `stream_generate`.
      tokenizer: bytes by default.
      token_budget: tokens read in a step at most; at least `rows`.
      policy: "sarathi", "prefill-first" or "decode-first" (`seqlab.serving.schedule.Schedule`).
      steps: of the longest stream, prompt included, where caches grow with their streams; streams of constant
        memory are not bounded by it.
      waiting: requests that wait at most; more are refused with `Busy`.
      prefixes: a `PrefixStore` or its size in bytes: states by prefixes of prompts, shared by later requests.
        0 for none.
      top_logprobs: the largest number of likeliest tokens that a request may ask for.
      logits, logits_values: a function as in `stream_generate`, and an example of its values for one row
        [1, ...].
      pieces: the sizes in which prompts are read, each compiled once.
    Raises:
      ValueError: an argument out of range, by its name.
    """

    def __init__(
        self,
        model: Module,
        rows: int = 8,
        *,
        cache: Any = None,
        tokenizer: Tokenizer | None = None,
        token_budget: int = 256,
        policy: str = "sarathi",
        steps: int = 4096,
        waiting: int = 1024,
        prefixes: "PrefixStore | int" = 0,
        top_logprobs: int = 0,
        logits: LogitsFunction | None = None,
        logits_values: Any = None,
        pieces: Sequence[int] = PIECES,
    ):
        self.model = streamable(model, cache)
        self.tokenizer = check_tokenizer(ByteTokenizer() if tokenizer is None else tokenizer)
        self._schedule = Schedule(rows, token_budget, policy)
        check_at_least("token_budget", token_budget, rows, "a token for each of the rows")
        check_at_least("waiting", waiting, 0)
        sizes = sorted(check_number("pieces", size, 1, 2**16) for size in pieces)
        if not sizes:
            raise UserError("pieces must have at least one size, got none")
        check_positive("steps", steps)
        self._most_waiting = waiting
        vocabulary = self.model.vocab_size
        self._top = check_number("top_logprobs", top_logprobs, 0, vocabulary)
        self._function = check_function("logits", logits)
        self._values = check_values(logits, logits_values, 1, vocabulary)
        self._rooms = Rooms(self.model, steps)
        self._slots = Slots(
            self.model,
            rows,
            self._rooms,
            pieces=sizes,
            budget=token_budget,
            top=self._top,
            function=self._function,
            values=self._values,
        )
        self._checks = Checks(
            self.model, self.tokenizer, self._rooms, steps, self._top, self._function, self._values
        )
        self._blocks = collections.Counter()  # tokens per call that the pace allows, by the shape of the work
        self._inbox: collections.deque[Job] = collections.deque()
        self._lock, self._accepting = threading.RLock(), True
        self._worker = Worker("seqlab.Batcher", self.step, self._has_work)
        self._store = prefixes if isinstance(prefixes, PrefixStore) else PrefixStore(prefixes)
        self._store.bind(self.model)
        self._counts = collections.Counter()

    # Requests.

    def submit(
        self,
        prompt: Prompt = (),
        *,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: Any = (),
        priority: int = 0,
        deadline: float | None = None,
        state: StreamState | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        stop_tokens: Any = None,
        include_stop: bool = True,
        top_logprobs: int = 0,
        logits_values: Any = None,
    ) -> Request:
        """A stream after `prompt`, which begins at one of the next steps. Thread-safe.

        Args:
          priority: requests of higher priority start first, and displace running ones of lower priority,
            whose states wait outside the batch.
          deadline: seconds after which the request ends unfinished; None for no end.
          state: of a stream of one row to continue, as `Stream.state`.
          logits_values: for the batcher's `logits` function, [1, ...]; None for the example's.
          prompt, max_tokens, temperature, top_k, top_p, seed, stop: as in `stream_generate`, for one row.
          min_p, repetition_penalty, presence_penalty, frequency_penalty, logit_bias, stop_tokens,
            include_stop, top_logprobs: likewise.
        Raises:
          ValueError: an option out of range, by its name. Busy: too many requests wait.
        """
        self._check_open()
        options = {
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "seed": seed,
            "stop": stop,
            "priority": priority,
            "deadline": deadline,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "presence_penalty": presence_penalty,
            "frequency_penalty": frequency_penalty,
            "logit_bias": logit_bias,
            "stop_tokens": stop_tokens,
            "include_stop": include_stop,
            "top_logprobs": top_logprobs,
            "logits_values": logits_values,
        }
        own = None if state is None else self._checks.state(state)
        settings = self._checks.settings(prompt, options, own)
        text, spoken = self._checks.text(settings, settings.prompt, own)
        if own is not None:
            own = self._checks.with_room(own, settings)
        return self._enqueue(Request(settings, text, spoken, self, own))

    def hand_over(self, request: Request) -> bytes:
        """Take a request out of this batcher, as bytes with which `receive` goes on in another one of the
        same model and options, in this process or elsewhere. Here it ends as "handed over".

        Raises ValueError for a request that has ended, or of another batcher.
        """
        with self._lock:
            self._take_in()
            jobs = [*self._schedule.running, *self._schedule.waiting]
            job = next((job for job in jobs if job.owner is request), None)
            if job is None:
                raise UserError(f"request: it has ended ({request.finished}), or belongs to another batcher")
            state = request._parked
            if job in self._schedule.running and (job.read or request._settings.continued):
                state = self._slots.take(job)
            data = pack(request._parcel(job.read, state))
            self._release(job)
            request._end("handed over")
        return data

    def receive(self, data: bytes) -> Request:
        """Go on with a request that another batcher has handed over; its next token is the next one there.

        Raises ValueError if `data` is not such a request, or of another model; Busy as `submit`.
        """
        self._check_open()
        names = inspect.signature(self.submit).parameters.keys() - {"prompt", "state"}
        parcel = unpack(data, names, self._rooms.fresh(0), self._values)
        state = None if parcel.state is None else self._checks.state(parcel.state)
        began = state if parcel.continued else None
        settings = self._checks.settings(parcel.prompt, parcel.options, began, parcel.before)
        read, drawn = parcel.read, parcel.drawn
        steps = 0 if state is None else int(state.length[0])
        if not 0 <= read <= len(settings.prompt) or drawn < 0 or steps != parcel.before + read + drawn:
            raise UserError(f"data: {read} tokens read and {drawn} drawn do not lead to {steps} steps")
        rest = settings.prompt if not drawn else settings.prompt[:0]
        text, spoken = self._checks.text(settings, rest, state if drawn else began)
        # Its answer so far is unknown here, so its states are of no prefix.
        settings = dataclasses.replace(settings, continued=parcel.continued or drawn > 0)
        request = Request(settings, text, spoken - drawn, self, state)
        request.tokens = drawn
        return self._enqueue(request, read)

    def _check_open(self) -> None:
        if not self._accepting:
            raise Busy("the batcher is closed")
        if len(self._inbox) + len(self._schedule.waiting) > self._most_waiting + self._schedule.rows:
            raise Busy(f"{self._most_waiting} requests wait already")

    def _enqueue(self, request: Request, read: int = 0) -> Request:
        prompt = len(request._settings.prompt)
        job = Job(prompt=prompt, read=read, priority=request.priority, owner=request)
        self._inbox.append(job)
        self._worker.wake()
        return request

    def warm_up(self) -> dict[str, float]:
        """Compile everything that requests can need; they compile nothing afterwards.

        Returns:
          `programs`, the number of compiled functions, and `seconds`, the time taken.
        """
        begin = time.perf_counter()
        with self._lock:
            programs, states = self._slots.warm()
            for state in states:
                self._store.warm(state)
        return {"programs": programs, "seconds": time.perf_counter() - begin}

    # Work.

    def step(self) -> list[Request]:
        """Do the work of one step, if there is any: the requests that drew tokens or ended."""
        with self._lock:
            ended = self._take_in()
            self._find_prefixes()
            plan = self._schedule.plan(self._held_back)
            if not (plan.decode or plan.pieces or plan.admitted):
                return ended
            try:
                return ended + self._advance(plan)
            except BaseException as error:
                self._fail(error)
                raise

    def _take_in(self) -> list[Request]:
        """Let submitted requests wait; end cancelled and late ones, and those that want no token."""
        while self._inbox:
            self._schedule.add(self._inbox.popleft())
        now, ended = time.monotonic(), []
        for job in [*self._schedule.running, *self._schedule.waiting]:
            request, reason = job.owner, None
            if request._cancelled:
                reason = "cancelled"
            elif request.deadline is not None and now > request.submitted + request.deadline:
                reason = "deadline"
            elif job.decoding and request._left < 1:
                reason = "length"
            if reason:
                self._release(job)
                request._end(reason)
                ended.append(request)
        return ended

    def _advance(self, plan: Plan) -> list[Request]:
        """Do the planned work, and hand out what was drawn."""
        slots = self._slots
        for job in plan.displaced:
            job.owner._parked = jax.device_get(slots.take(job))
            job.owner.displaced += 1
            self._counts["displaced"] += 1
            slots.release(job)
        for job in plan.admitted:
            self._admit(job)
        planned = [(job, self._stop(job, count)) for job, count in plan.pieces]
        shape = slots.shape(plan.decode)
        block = 1 if planned else max(1, self._blocks[shape])
        # A prompt whose end is kept draws its first token one step later: the state is of the prompt only.
        last = [job for job, count in planned if job.read + count == job.prompt]
        decode = [*plan.decode, *(job for job in last if not self._keeps(job, job.prompt))]
        limits = {job: min(block, job.owner._left) for job in decode}
        begin = time.perf_counter()
        top = any(job.owner._settings.top for job in decode)
        drawn = slots.run([self._piece(job, count) for job, count in planned], limits, top)
        seconds = time.perf_counter() - begin
        for job, count in planned:
            job.read += count
            self._counts["prompt_tokens"] += count
            if self._keeps(job, job.read):
                prefix = job.owner._settings.prompt[: job.read]
                self._store.put(prefix, slots.take(job))
        self._counts["steps"] += 1
        self._counts["seconds"] += seconds
        if not planned and max(limits.values(), default=0) == block:
            self._blocks[shape] = int(np.clip(block * min(2.0, _STEP_SECONDS / seconds), 1, BLOCK_LIMIT))
        for tokens, owners in drawn:
            self._hand_out([(job, row) for row, job in enumerate(owners) if job in limits], tokens)
        return [job.owner for job in decode]

    def _piece(self, job: Job, count: int) -> Piece:
        settings = job.owner._settings
        tokens = settings.prompt[job.read : job.read + count]
        begins = job.read == 0 and not settings.continued
        return Piece(job, tokens, begins, settings.seed)

    def _hand_out(self, jobs: list[tuple[Job, int]], drawn: Drawn) -> None:
        """Give the tokens of rows to their requests, and free the rows of those that end."""
        counts, broken = np.asarray(drawn.count), np.asarray(drawn.broken)
        longest = max(1, int(counts.max()))
        tokens, logprobs, sampled = (
            np.asarray(part)[:, :longest].tolist() for part in (drawn.tokens, drawn.logprobs, drawn.sampled)
        )
        top = [np.asarray(part)[:, :longest].tolist() for part in drawn.top]
        for job, row in jobs:
            request = job.owner
            count = int(counts[row])
            for i in range(count):
                likeliest = ()
                if request._settings.top:
                    likeliest = tuple(zip(top[0][row][i], top[1][row][i], strict=True))
                request._draw(tokens[row][i], logprobs[row][i], sampled[row][i], likeliest)
                if request.finished:
                    break
            self._counts["tokens"] += count
            if self._shares(job):
                job.answer.extend(tokens[row][:count])
            if broken[row] and not request.finished:
                request._break()
            elif request.finished:
                self._keep_whole(job)
            if request.finished:
                self._release(job)

    def _admit(self, job: Job) -> None:
        """Give a stream a row, with the state that it has, if any."""
        request, settings = job.owner, job.owner._settings
        steps = len(settings.prompt) + 1
        self._slots.claim(job, steps, settings.sampling, settings.ends.tokens, settings.values)
        if self._shares(job) and not request.displaced:
            self._store.saw(settings.prompt)
            if request.cached_tokens:
                self._store.hit(job.read)
        if request._parked is not None:
            self._slots.place(job, request._parked, settings.seed)
            request._parked = None

    def _release(self, job: Job) -> None:
        self._schedule.remove(job)
        self._slots.release(job)

    # Shared prefixes.

    def _find_prefixes(self) -> None:
        """Look the beginnings of waiting prompts up, as many as could start now."""
        if not self._store:
            return
        for job in sorted(self._schedule.waiting, key=lambda job: job.rank)[: self._schedule.rows]:
            request = job.owner
            if self._shares(job) and not request.displaced:
                found = self._store.find(request._settings.prompt, beyond=job.read)
                if found is not None:
                    job.read, request._parked = found
                    request.cached_tokens = job.read

    def _held_back(self, job: Job, running: Iterable[Job]) -> bool:
        """Whether a stream should wait until another one has read a prefix that both share."""
        if not self._shares(job):
            return False
        prompt = job.owner._settings.prompt
        return any(
            self._store.pending(prompt, job.read, other.owner._settings.prompt, other.read)
            for other in running
            if not other.decoding and self._shares(other)
        )

    def _shares(self, job: Job) -> bool:
        """Whether a stream began with its prompt, so that its states belong to prefixes of that."""
        return bool(self._store) and not job.owner._settings.continued

    def _stop(self, job: Job, count: int) -> int:
        return self._store.stop(job.owner._settings.prompt, job.read, count) if self._shares(job) else count

    def _keeps(self, job: Job, read: int) -> bool:
        """Whether the state after `read` tokens of the prompt is to be kept."""
        return self._shares(job) and self._store.wants(job.owner._settings.prompt, read)

    def _keep_whole(self, job: Job) -> None:
        """Keep the state of a stream that has ended, for prompts that go on from its answer."""
        if self._shares(job):
            whole = np.concatenate([job.owner._settings.prompt, np.asarray(job.answer, np.int64)])
            if self._store.wants(whole, len(whole)):
                self._store.put(whole, self._slots.take(job))

    # Running in a thread.

    @property
    def started(self) -> bool:
        """Whether a thread does the work."""
        return self._worker.started

    def start(self) -> "Batcher":
        """Work in a thread until `close`; nothing if one does already, or if it is closed."""
        self._worker.start()
        return self

    def close(self) -> None:
        """End the thread and all requests, as cancelled; nothing is accepted any more."""
        self._accepting = False
        self._worker.stop()
        for request in self.requests():
            request.cancel()
        self.requests()

    def drain(self, timeout: float | None = None) -> bool:
        """Accept no more requests, and finish those there are; whether all are finished after `timeout`
        seconds."""
        self._accepting = False
        until = None if timeout is None else time.monotonic() + timeout
        while self.requests():
            if until is not None and time.monotonic() > until:
                return False
            if not self.started:
                self.step()
            else:
                time.sleep(0.005)
        return True

    def __enter__(self) -> "Batcher":
        return self.start()

    def __exit__(self, *_: Any) -> None:
        self.close()

    def requests(self) -> list[Request]:
        """The requests that have not ended, running ones first."""
        with self._lock:
            self._take_in()
            return [job.owner for job in [*self._schedule.running, *self._schedule.waiting]]

    def _has_work(self) -> bool:
        return bool(self._inbox or self._schedule.waiting or self._schedule.running)

    def _fail(self, error: BaseException) -> None:
        """End all running streams: their states are lost."""
        self._slots.lose()
        for job in list(self._schedule.running):
            self._release(job)
            job.owner._end("error")

    @property
    def stats(self) -> dict[str, float]:
        """Requests `running` and `waiting`; since the beginning: `steps`, `seconds` of them, `tokens` drawn,
        `prompt_tokens` read, streams `displaced`; `state_bytes` of the batch; `prefix_hits`, `prefix_tokens`
        that were not read, and `prefix_bytes`."""
        counts = {name: self._counts[name] for name in ("steps", "tokens", "prompt_tokens", "displaced")}
        return {
            "running": len(self._schedule.running),
            "waiting": len(self._schedule.waiting) + len(self._inbox),
            "seconds": float(self._counts["seconds"]),
            **counts,
            "state_bytes": self._slots.bytes,
            "prefix_hits": self._store.hits,
            "prefix_tokens": self._store.tokens,
            "prefix_bytes": self._store.bytes,
        }
