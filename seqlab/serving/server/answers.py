"""Answers: requests of a batcher as objects and events of OpenAI's dialect."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np

from seqlab.serving.batcher import Batcher
from seqlab.serving.request import Busy, Request
from seqlab.serving.server.fields import ApiError
from seqlab.serving.server.metrics import Metrics
from seqlab.streaming.stream import Token

_REASONS = {"stop": "stop", "length": "length", "capacity": "length"}
_SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "stop",
    "priority",
)


def submit(
    batcher: Batcher, prompts: Sequence[Any], asked: dict[str, Any], max_tokens: int | None, top: int
) -> list[Request]:
    """One request per prompt and choice, prompts first; all of them or none.

    Raises:
      ApiError: 400 for what the batcher refuses, by the field's name; 429 if too many wait.
    """
    options = {name: asked[name] for name in _SAMPLING if asked[name] is not None}
    seed = secrets.randbits(32) if asked["seed"] is None else asked["seed"]
    made: list[Request] = []
    try:
        for prompt in prompts:
            for i in range(asked["n"] or 1):
                own = {"seed": (seed + i) % 2**32, "max_tokens": max_tokens, "include_stop": False}
                prompt = np.asarray(prompt, np.int64) if isinstance(prompt, list) else prompt
                made.append(batcher.submit(prompt, top_logprobs=top, **own, **options))
    except Busy as error:
        _cancel(made)
        raise ApiError(429, str(error), kind="rate_limit_error") from error
    except ValueError as error:
        _cancel(made)
        words = str(error).replace(":", " ").split()
        param = words[0] if words and words[0] in asked else "prompt"
        raise ApiError(400, str(error), param if param in asked else "messages") from error
    return made


def _cancel(requests: Sequence[Request]) -> None:
    for request in requests:
        if request.finished is None:
            request.cancel()


class Answer:
    """The choices of a request of a client, in the form of one endpoint.

    Args:
      requests: one per choice.
      tokenizer: for the texts of single tokens.
      model: its name.
      chat: whether in the form of chat completions.
      echoes: texts that the choices begin with.
      logprobs: whether to report log-probabilities.
      per_prompt: choices per prompt.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        tokenizer: Any,
        model: str,
        *,
        chat: bool,
        echoes: Sequence[str] = (),
        logprobs: bool = False,
        per_prompt: int = 1,
    ):
        self._per_prompt = per_prompt
        self.requests, self._tokenizer, self._chat, self._logprobs = requests, tokenizer, chat, logprobs
        self._echoes = echoes or [""] * len(requests)
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens read and drawn."""
        firsts = self.requests[:: self._per_prompt]  # a prompt counts once
        read = sum(request.prompt_tokens for request in firsts)
        cached = sum(request.cached_tokens for request in firsts)
        drawn = sum(request.tokens for request in self.requests)
        return {
            "prompt_tokens": read,
            "completion_tokens": drawn,
            "total_tokens": read + drawn,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    async def whole(self, metrics: Metrics) -> dict[str, Any]:
        """The answer as one object."""
        try:
            parts = await asyncio.gather(*(self._gather(i, metrics) for i in range(len(self.requests))))
        finally:
            _cancel(self.requests)
        name = "chat.completion" if self._chat else "text_completion"
        return {**self._head, "object": name, "choices": parts, "usage": self.usage}

    async def _gather(self, index: int, metrics: Metrics) -> dict[str, Any]:
        tokens = [token async for token in _timed(self.requests[index], metrics)]
        text = self._echoes[index] + "".join(token.text for token in tokens)
        body = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        reason = _reason(self.requests[index])
        return {"index": index, **body, "logprobs": self._log(tokens), "finish_reason": reason}

    async def events(self, metrics: Metrics, usage: bool) -> AsyncIterator[dict[str, Any]]:
        """The answer as chunks, of all choices as they come."""
        queue: asyncio.Queue[tuple[int, Token | BaseException | None]] = asyncio.Queue()

        async def feed(index: int) -> None:
            try:
                async for token in _timed(self.requests[index], metrics):
                    queue.put_nowait((index, token))
                queue.put_nowait((index, None))
            except BaseException as error:
                queue.put_nowait((index, error))
                raise

        tasks = [asyncio.create_task(feed(i)) for i in range(len(self.requests))]
        try:
            for i, echo in enumerate(self._echoes):
                if self._chat:
                    yield self._chunk(i, {"role": "assistant", "content": ""}, None, None)
                elif echo:
                    yield self._chunk(i, echo, None, None)
            left = len(tasks)
            while left:
                index, token = await queue.get()
                if isinstance(token, BaseException):
                    raise token
                if token is None:
                    left -= 1
                    yield self._chunk(index, "", None, _reason(self.requests[index]))
                elif token.text or self._logprobs:
                    yield self._chunk(index, token.text, self._log([token]), None)
            if usage:
                name = "chat.completion.chunk" if self._chat else "text_completion"
                yield {**self._head, "object": name, "choices": [], "usage": self.usage}
        finally:
            for task in tasks:
                task.cancel()
            _cancel(self.requests)
            await asyncio.gather(*tasks, return_exceptions=True)

    def _chunk(self, index: int, text: Any, logprobs: Any, reason: str | None) -> dict[str, Any]:
        if self._chat:
            delta = text if isinstance(text, dict) else {"content": text} if text else {}
            choice, name = {"delta": delta}, "chat.completion.chunk"
        else:
            choice, name = {"text": text}, "text_completion"
        choice |= {"index": index, "logprobs": logprobs, "finish_reason": reason}
        return {**self._head, "object": name, "choices": [choice]}

    def _log(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        drawn = [token for token in tokens if token.token >= 0]
        if self._chat:
            return {"content": [self._detail(token.token, token.logprob, token.top) for token in drawn]}
        texts = [self._written(token.token) for token in drawn]
        ends = np.cumsum([0, *map(len, texts)]).tolist()
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in drawn],
            "top_logprobs": [{self._written(one): value for one, value in token.top} for token in drawn],
            "text_offset": ends[:-1],
        }

    def _detail(self, token: int, logprob: float, top: Sequence[tuple[int, float]]) -> dict[str, Any]:
        written = self._written(token)
        made = {"token": written, "logprob": logprob, "bytes": list(written.encode())}
        if top:
            made["top_logprobs"] = [self._detail(one, value, ()) for one, value in top]
        else:
            made["top_logprobs"] = []
        return made

    def _written(self, token: int) -> str:
        """The text of a token by itself; U+FFFD for parts of characters."""
        return self._tokenizer.decode([token])


def _reason(request: Request) -> str:
    """OpenAI's name for the end of a request; an error for one that has not ended well."""
    if request.finished in _REASONS:
        return _REASONS[request.finished]
    reasons = {
        "handed over": "the server is shutting down, and has saved this stream",
        "cancelled": "the server is shutting down",
        "nonfinite": "the model's logits are not finite",
    }
    told = reasons.get(request.finished or "", f"the request has ended: {request.finished}")
    raise ApiError(503 if "shutting" in told else 500, told, kind="server_error")


async def _timed(request: Request, metrics: Metrics) -> AsyncIterator[Token]:
    """The tokens of a request, measured."""
    last = None
    async for token in request:
        now = time.monotonic()
        if last is None:
            metrics.first.observe(now - request.submitted)
        else:
            metrics.between.observe(now - last)
        last = now
        yield token
    metrics.whole.observe(time.monotonic() - request.submitted)
