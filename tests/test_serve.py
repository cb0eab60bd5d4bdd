"""The HTTP server: OpenAI's dialect, errors, clients that leave."""

import asyncio
import contextlib
import itertools
import json
import pathlib
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import types

import httpx2
import numpy as np
import openai
import pytest
import uvicorn
from flax import nnx

from seqlab import Batcher, ByteTokenizer, cli, load, stream_generate
from seqlab.models import LanguageModel, Mamba
from seqlab.serving.server.app import Service, application


class Tokenizer(ByteTokenizer):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def render(messages):
    text = "".join(f"{message['role']}: {message['content']}\n" for message in messages)
    return np.frombuffer(text.encode(), np.uint8)


@pytest.fixture(scope="module")
def model():
    return LanguageModel(256, 16, 1, mixers=Mamba, rngs=nnx.Rngs(0))


@pytest.fixture
def service(model):
    batcher = Batcher(model, rows=4, tokenizer=Tokenizer(), top_logprobs=5, pieces=(16,), waiting=40)
    with batcher:
        yield Service(batcher, "tiny", render, body_limit=20_000, token_limit=200)


@pytest.fixture
def ask(service):
    """Ask a path with a body: the status and the JSON of the answer."""

    def post(path, body=None, **options):
        async def send():
            transport = httpx2.ASGITransport(application(service))
            async with httpx2.AsyncClient(transport=transport, base_url="http://here") as client:
                if body is None:
                    return await client.get(path, **options)
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                return await client.post(path, content=content, **options)

        return asyncio.run(send())

    return post


def text_of(model, prompt, **options):
    return "".join(token.text for token in stream_generate(model, prompt, include_stop=False, **options))


def test_completions_are_those_of_a_stream(ask, service, model):
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 12, "seed": 3, "temperature": 0.7, "n": 2}
    answer = ask("/v1/completions", body).json()
    options = {"max_tokens": 12, "temperature": 0.7}
    wanted = [text_of(model, "abc", seed=seed, **options) for seed in (3, 4)]
    assert [choice["text"] for choice in answer["choices"]] == wanted
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (
        4,
        24,
        28,
    )  # with bos
    two = ask("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 4, "seed": 1, "echo": True}).json()
    assert [choice["text"] for choice in two["choices"]] == [
        prompt + text_of(model, prompt, max_tokens=4, seed=1) for prompt in "ab"
    ]
    tokens = ask("/v1/completions", {"prompt": [97, 98], "max_tokens": 5, "seed": 2, "logprobs": 2}).json()
    stream = list(stream_generate(model, [97, 98], max_tokens=5, seed=2, top_logprobs=2))
    log = tokens["choices"][0]["logprobs"]
    np.testing.assert_allclose(log["token_logprobs"], [token.logprob for token in stream], atol=1e-4)
    assert [len(top) for top in log["top_logprobs"]] == [2] * 5
    assert service.batcher.requests() == []


def test_chat_streams_events(ask, model):
    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "seed": 5}
    body |= {"max_completion_tokens": 9, "stream": True, "stream_options": {"include_usage": True}}
    response = ask("/v1/chat/completions", body)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1])
    assert text == text_of(model, list(b"user: hi\n"), max_tokens=9, seed=5)
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["usage"]["completion_tokens"] == 9 and chunks[-1]["choices"] == []


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("completions", b"{", 400, None),
        ("completions", b"[]", 400, None),
        ("completions", b"[" * 15_000, 400, None),
        ("completions", b'{"seed": ' + b"9" * 5000 + b"}", 400, None),
        ("completions", b'{"temperature": NaN}', 400, None),
        ("completions", b"x" * 30_000, 413, None),
        ("completions", {}, 400, "prompt"),
        ("completions", {"prompt": "a", "temprature": 1}, 400, "temprature"),
        ("completions", {"prompt": "a", "temperature": -1}, 400, "temperature"),
        ("completions", {"prompt": "a", "temperature": True}, 400, "temperature"),
        ("completions", {"prompt": [1, 300]}, 400, "prompt"),
        ("completions", {"prompt": []}, 400, "prompt"),
        ("completions", {"prompt": "\ud800"}, 400, "prompt"),
        ("completions", {"prompt": "a", "logprobs": 9}, 400, "logprobs"),
        ("completions", {"prompt": "a", "suffix": "b"}, 400, "suffix"),
        ("completions", {"prompt": "a", "max_tokens": 201}, 400, "max_tokens"),
        ("completions", {"prompt": "a", "stop": ["a", ""]}, 400, "stop"),
        ("completions", {"prompt": "a", "logit_bias": {"-1": 1}}, 400, "logit_bias"),
        ("completions", {"prompt": "a", "logit_bias": {"256": 1}}, 400, "logit_bias"),
        ("completions", {"prompt": "a", "n": 100}, 429, None),
        ("completions", {"prompt": "a", "model": "gpt"}, 404, "model"),
        ("completions", {"prompt": "a", "stream_options": {}}, 400, "stream_options"),
        ("chat/completions", {"messages": []}, 400, "messages"),
        ("chat/completions", {"messages": [{"role": "user"}]}, 400, "messages[0]"),
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}], "tools": [{}]}, 400, "tools"),
        ("embeddings", {}, 404, None),
    ],
)
def test_bad_requests_are_refused_by_the_field(ask, service, path, body, status, param):
    response = ask(f"/v1/{path}", body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param), error
    assert service.batcher.drain(timeout=30)


def test_other_routes(ask, service):
    assert ask("/health").json() == {"status": "ok"}
    assert ask("/v1/models").json()["data"][0]["id"] == "tiny"
    assert ask("/v1/models/other").status_code == 404
    assert ask("/v1/completions").status_code == 405
    assert ask("/tokenize", {"prompt": "aé"}).json() == {"tokens": [97, 195, 169], "count": 3}
    assert ask("/detokenize", {"tokens": [97, 195, 169]}).json() == {"prompt": "aé"}
    assert ask("/detokenize", {"tokens": [2**40]}).status_code == 400
    ask("/v1/completions", {"prompt": "a", "max_tokens": 3, "seed": 1})
    metrics = ask("/metrics").text
    assert "seqlab_time_to_first_token_seconds_count 1\n" in metrics
    assert re.search(r"seqlab_tokens_total [123]\n", metrics)
    assert re.search(r'seqlab_responses_total\{status="200"\} [1-9]', metrics)
    service.key = "secret"
    assert ask("/v1/models").status_code == 401 and ask("/health").status_code == 200
    assert ask("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
    service.key, service.draining = None, True
    assert ask("/v1/completions", {"prompt": "a"}).status_code == 503 and ask("/health").status_code == 503


def test_the_page_needs_nothing_from_elsewhere(ask):
    page = ask("/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert not re.search(r"https?://|src=|@import|url\(|innerHTML", page.text)


@pytest.mark.slow
def test_random_bodies_leave_no_row(ask, service):
    rng = random.Random(0)
    values = [
        None,
        True,
        -1,
        0,
        1,
        3,
        2**70,
        0.5,
        "",
        "a",
        "\0",
        [],
        [1],
        ["a"],
        {},
        {"1": 2},
        [[1], [2]],
        [{}],
    ]
    names = [
        "prompt",
        "messages",
        "max_tokens",
        "n",
        "stop",
        "seed",
        "stream",
        "logprobs",
        "echo",
        "logit_bias",
    ]
    for _ in range(400):
        body = {"prompt": "a", "max_tokens": 2} | {rng.choice(names): rng.choice(values) for _ in range(3)}
        path = rng.choice(["completions", "completions", "chat/completions"])
        assert ask(f"/v1/{path}", body).status_code in (200, 400, 404, 429), body
    assert service.batcher.drain(timeout=30) and service.batcher.requests() == []


@contextlib.contextmanager
def running(service):
    """A server on loopback, in a thread."""
    server = uvicorn.Server(uvicorn.Config(application(service), port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield types.SimpleNamespace(url=f"http://127.0.0.1:{port}")
    server.should_exit = True
    thread.join()


@pytest.mark.slow
def test_the_official_client(service, model):
    service.key = "secret"
    with running(service) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0)
        assert [one.id for one in client.models.list()] == ["tiny"]
        options = {"model": "tiny", "max_tokens": 20, "seed": 3}
        chunks = client.completions.create(prompt="abc", stream=True, **options)
        wanted = text_of(model, "abc", max_tokens=20, seed=3)
        assert "".join(chunk.choices[0].text for chunk in chunks) == wanted
        stop = next(two for two in itertools.pairwise(wanted[4:]) if "".join(two).isascii())
        stop = "".join(stop)
        stopped = client.completions.create(prompt="abc", stop=stop, **options).choices[0]
        assert (stopped.text, stopped.finish_reason) == (wanted[: wanted.index(stop)], "stop")
        messages = [{"role": "user", "content": "hi"}]
        chat = client.chat.completions.create(messages=messages, logprobs=True, top_logprobs=3, **options)
        assert chat.choices[0].message.content == text_of(model, list(b"user: hi\n"), max_tokens=20, seed=3)
        content = chat.choices[0].logprobs.content
        assert len(content) == 20 and all(len(one.top_logprobs) == 3 for one in content)
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(prompt="abc", temperature=-1, model="tiny")
        assert caught.value.param == "temperature"
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="no").models.list()


@pytest.mark.slow
def test_clients_that_leave_leave_no_row(service):
    async def client(api, number):
        stream = await api.completions.create(
            prompt=f"{number} ", model="tiny", max_tokens=150, stream=True, seed=number
        )
        got = 0
        async for _ in stream:
            got += 1
            if number % 2 and got == 5:
                await stream.close()
                return -1
        return got

    async def all_of_them(url):
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=9) as api:
            return await asyncio.gather(*(client(api, number) for number in range(64)))

    with running(service) as server:
        got = asyncio.run(all_of_them(server.url))
        assert [count == -1 for count in got] == [number % 2 == 1 for number in range(64)]
        until = time.monotonic() + 30
        while service.batcher.requests() and time.monotonic() < until:
            time.sleep(0.05)
        assert service.batcher.requests() == [] and service.batcher.stats["running"] == 0


@pytest.mark.slow
def test_a_signal_drains_and_saves_what_is_unfinished(tmp_path):
    run, states = str(tmp_path / "run"), tmp_path / "states"
    assert cli.main(["train", "demo", "--fiddler", "tiny", "--set", "steps=2", "--workdir", run]) == 0
    options = ["--port", "0", "--rows", "2", "--steps", "256", "--prefix-bytes", "0", "--top-logprobs", "0"]
    options += ["--drain-seconds", "0.1", "--state-folder", str(states)]
    command = [sys.executable, "-m", "seqlab", "serve", run, *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        url = next(line.split()[1] for line in process.stderr if "http" in line)
        body = {"prompt": "def ", "max_tokens": 10_000, "seed": 1, "stream": True}
        with httpx2.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            begun = [next(lines) for _ in range(21)]
            process.send_signal(signal.SIGTERM)
            rest = list(lines)
        assert process.wait(60) == 128 + signal.SIGTERM
    assert "has saved this stream" in rest[-2]
    data = [line for line in [*begun, *rest] if line.startswith("data: ")][:-1]
    text = "".join(json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in data)
    trained = load(run)
    (saved,) = states.iterdir()
    batcher = Batcher(trained.model, rows=1, steps=256, tokenizer=trained.tokenizer)
    request = batcher.receive(saved.read_bytes())
    more = [next(iter(request)).text for _ in range(10)]
    wanted = stream_generate(trained.model, "def ", seed=1, tokenizer=trained.tokenizer, include_stop=False)
    whole = "".join(token.text for token in itertools.islice(wanted, request.tokens))
    assert whole.startswith(text + "".join(more))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_requests(service):
    async def many(client, count):
        async def one(number):
            body = {"prompt": f"{number}", "max_tokens": 4, "seed": number}
            return (await client.post("/v1/completions", content=json.dumps(body))).status_code

        for start in range(0, count, 32):
            assert set(await asyncio.gather(*(one(start + i) for i in range(32)))) == {200}

    async def measure():
        transport = httpx2.ASGITransport(application(service))
        async with httpx2.AsyncClient(transport=transport, base_url="http://here") as client:
            await many(client, 2016)
            before = resident_bytes()
            await many(client, 8000)
            return before, resident_bytes()

    before, after = asyncio.run(measure())
    assert after - before < 16 * 2**20, (before, after)
    assert service.batcher.requests() == []


def resident_bytes():
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()
