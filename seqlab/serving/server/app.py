"""The routes of the server."""

import asyncio
import dataclasses
import hmac
import importlib.resources
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from seqlab.serving.batcher import Batcher
from seqlab.serving.server.answers import Answer, submit
from seqlab.serving.server.fields import CHAT, COMPLETION, DETOKENIZE, TOKENIZE, ApiError, parse
from seqlab.serving.server.metrics import Metrics

_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"
_PAGE_HEADERS = {
    "Content-Security-Policy": f"{_POLICY}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


@dataclasses.dataclass
class Service:
    """A model that is served.

    Attributes:
      batcher: runs its streams.
      name: of the model.
      chat: renders messages as tokens; None without a chat template.
      key: that clients must give; None for none.
      body_limit: bytes of a body at most. token_limit: tokens of an answer at most; None for no bound.
      draining: whether new requests are refused.
    """

    batcher: Batcher
    name: str
    chat: Callable[[list[dict[str, Any]]], Any] | None = None
    key: str | None = None
    body_limit: int = 2**20
    token_limit: int | None = None
    draining: bool = False
    metrics: Metrics = dataclasses.field(default_factory=Metrics)
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))


def application(service: Service) -> Starlette:
    """The server of `service`, an ASGI application."""
    own = _Handlers(service)
    routes = [
        Route("/", own.page),
        Route("/health", own.health),
        Route("/metrics", own.guarded(own.metrics)),
        Route("/v1/models", own.guarded(own.models)),
        Route("/v1/models/{name:path}", own.guarded(own.model)),
        Route("/v1/completions", own.guarded(own.completions), methods=["POST"]),
        Route("/v1/chat/completions", own.guarded(own.chat), methods=["POST"]),
        Route("/tokenize", own.guarded(own.tokenize), methods=["POST"]),
        Route("/detokenize", own.guarded(own.detokenize), methods=["POST"]),
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: own.not_found})


Handler = Callable[[Request], Awaitable[Response]]


class _Handlers:
    def __init__(self, service: Service):
        self._service = service

    def guarded(self, handler: Handler) -> Handler:
        """`handler` for clients with the key, with its errors as JSON, counted."""

        async def handle(request: Request) -> Response:
            try:
                self._check_key(request)
                response = await handler(request)
            except ApiError as error:
                headers = {"Retry-After": "1"} if error.status in (429, 503) else {}
                headers |= {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
                response = JSONResponse(error.body, error.status, headers)
            except ClientDisconnect:
                response = Response(status_code=499)
            self._service.metrics.answers[response.status_code] += 1
            return response

        return handle

    async def not_found(self, request: Request, error: Exception) -> Response:
        """Unknown paths and methods."""
        assert isinstance(error, HTTPException)
        where = f"{request.method} {request.url.path}"[:200]
        told = ApiError(error.status_code, f"{where}: {error.detail}")
        self._service.metrics.answers[error.status_code] += 1
        return JSONResponse(told.body, error.status_code, error.headers)

    async def page(self, request: Request) -> Response:
        """A page to talk to the model."""
        page = importlib.resources.files(__package__).joinpath("page.html").read_text()
        return HTMLResponse(page, headers=_PAGE_HEADERS)

    async def health(self, request: Request) -> Response:
        """Whether the server takes requests."""
        told = "draining" if self._service.draining else "ok"
        return JSONResponse({"status": told}, 503 if self._service.draining else 200)

    async def metrics(self, request: Request) -> Response:
        """Prometheus' text."""
        told = self._service.metrics.text(self._service.batcher.stats)
        return PlainTextResponse(told, media_type="text/plain; version=0.0.4")

    async def models(self, request: Request) -> Response:
        """The model that is served."""
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        """The model, if it is the one that is served."""
        self._check_model(request.path_params["name"])
        return JSONResponse(self._card())

    async def tokenize(self, request: Request) -> Response:
        """Text to tokens."""
        asked = parse(await self._body(request), TOKENIZE)
        if asked["prompt"] is None:
            raise ApiError(400, "prompt is missing", "prompt")
        tokens = [int(token) for token in self._service.batcher.tokenizer.encode(asked["prompt"])]
        return JSONResponse({"tokens": tokens, "count": len(tokens)})

    async def detokenize(self, request: Request) -> Response:
        """Tokens to text."""
        asked = parse(await self._body(request), DETOKENIZE)
        try:
            text = self._service.batcher.tokenizer.decode(asked["tokens"] or [])
        except (ValueError, KeyError, IndexError, OverflowError) as error:
            raise ApiError(400, f"tokens: {error}"[:300], "tokens") from error
        return JSONResponse({"prompt": text})

    async def completions(self, request: Request) -> Response:
        """Continuations of prompts."""
        asked = parse(await self._body(request), COMPLETION)
        if asked["prompt"] is None:
            raise ApiError(400, "prompt is missing", "prompt")
        logs, most = asked["logprobs"], 16 if asked["max_tokens"] is None else asked["max_tokens"]
        if asked["echo"] and logs is not None:
            raise ApiError(400, "echo with logprobs is not supported: prompts have no logprobs", "echo")
        made = self._submitted(asked, asked["prompt"], most, logs or 0, "logprobs")
        echoes = []
        if asked["echo"]:
            texts = [one if isinstance(one, str) else self._text(one) for one in asked["prompt"]]
            echoes = [text for text in texts for _ in range(asked["n"] or 1)]
        n = asked["n"] or 1
        answer = self._answer(made, chat=False, echoes=echoes, logprobs=logs is not None, per_prompt=n)
        return await self._respond(request, answer, asked)

    async def chat(self, request: Request) -> Response:
        """Answers to conversations."""
        asked = parse(await self._body(request), CHAT)
        if asked["messages"] is None:
            raise ApiError(400, "messages is missing", "messages")
        if self._service.chat is None:
            raise ApiError(400, "this model has no chat template: use /v1/completions", "messages")
        try:
            prompt = [int(token) for token in self._service.chat(asked["messages"])]
        except ValueError as error:
            raise ApiError(400, str(error)[:300], "messages") from error
        most = (
            asked["max_tokens"] if asked["max_completion_tokens"] is None else asked["max_completion_tokens"]
        )
        if asked["top_logprobs"] and not asked["logprobs"]:
            raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
        made = self._submitted(asked, [prompt], most, asked["top_logprobs"] or 0, "top_logprobs")
        n = asked["n"] or 1
        answer = self._answer(made, chat=True, logprobs=bool(asked["logprobs"]), per_prompt=n)
        return await self._respond(request, answer, asked)

    def _submitted(
        self, asked: dict[str, Any], prompts: list[Any], most: int | None, top: int, name: str
    ) -> list[Any]:
        service = self._service
        if service.draining:
            raise ApiError(503, "the server is shutting down", kind="server_error")
        if asked["model"] is not None:
            self._check_model(asked["model"])
        if asked["stream_options"] is not None and not asked["stream"]:
            raise ApiError(400, "stream_options needs stream: true", "stream_options")
        if service.token_limit is not None:
            if most is not None and most > service.token_limit:
                raise ApiError(
                    400, f"max_tokens must be at most {service.token_limit}, got {most}", "max_tokens"
                )
            most = service.token_limit if most is None else most
        try:
            return submit(service.batcher, prompts, asked, most, top)
        except ApiError as error:
            if error.message.startswith("top_logprobs"):
                error.param = name
            raise

    def _answer(self, requests: list[Any], **options: Any) -> Answer:
        return Answer(requests, self._service.batcher.tokenizer, self._service.name, **options)

    async def _respond(self, request: Request, answer: Answer, asked: dict[str, Any]) -> Response:
        if asked["stream"]:
            usage = bool((asked["stream_options"] or {}).get("include_usage"))
            events = self._events(answer, usage)
            return StreamingResponse(
                events, media_type="text/event-stream", headers={"Cache-Control": "no-store"}
            )
        work = asyncio.create_task(answer.whole(self._service.metrics))
        gone = asyncio.create_task(_left(request))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ClientDisconnect
            return JSONResponse(work.result())
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def _events(self, answer: Answer, usage: bool) -> AsyncIterator[str]:
        try:
            async for event in answer.events(self._service.metrics, usage):
                yield f"data: {json.dumps(event)}\n\n"
            yield "data: [DONE]\n\n"
        except ApiError as error:  # the status has been sent already
            yield f"data: {json.dumps(error.body)}\n\n"

    async def _body(self, request: Request) -> bytes:
        limit, body = self._service.body_limit, b""
        async for part in request.stream():
            body += part
            if len(body) > limit:
                raise ApiError(413, f"the body has more than {limit} bytes")
        return body

    def _check_key(self, request: Request) -> None:
        key = self._service.key
        if key is None:
            return
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
            raise ApiError(401, "the API key is missing or wrong", kind="authentication_error")

    def _check_model(self, name: str) -> None:
        if name != self._service.name:
            told = f"model {name[:80]!r} is not served here; {self._service.name!r} is"
            raise ApiError(404, told, "model", "not_found_error")

    def _card(self) -> dict[str, Any]:
        service = self._service
        own = {"created": service.created, "owned_by": "seqlab", "chat": service.chat is not None}
        return {"id": service.name, "object": "model", **own}

    def _text(self, tokens: list[int]) -> str:
        return self._service.batcher.tokenizer.decode(tokens)


async def _left(request: Request) -> None:
    """Until the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
