"""Continuous batching: each request gives the tokens it has alone, whatever runs beside it."""

import asyncio
import functools
import json
import pathlib

import jax
import numpy as np
import pytest
import zoo
from flax import nnx

from seqlab import Batcher, stream_generate
from seqlab.cli import main
from seqlab.models import Attention, Full, GatedDeltaNet, LanguageModel
from seqlab.serving.prefixes import PrefixStore
from seqlab.serving.request import Busy
from seqlab.serving.schedule import Job, Schedule
from seqlab.studies import serve_bench

VOCABULARY = 31
MIXERS = {
    "attention": functools.partial(Attention, heads=2, cache=Full(512)),
    "mamba": zoo.MIXERS["mamba"],
    "gated_delta": functools.partial(GatedDeltaNet, heads=2),
    "hybrid": (zoo.MIXERS["mamba"], zoo.MIXERS["window_sinks_softcap"]),
}


@functools.cache
def model(kind="hybrid"):
    return LanguageModel(VOCABULARY, 16, 2, mixers=MIXERS[kind], rngs=nnx.Rngs(0))


def random_request(rng, longest=70, shared=()):
    """A prompt and settings of any kind."""
    prompt = [*shared, *rng.integers(0, VOCABULARY, int(rng.integers(1, longest))).tolist()]
    settings = {
        "max_tokens": int(rng.integers(1, 30)),
        "temperature": float(rng.choice([0.0, 0.7, 1.3])),
        "top_k": rng.choice([None, 3, 12]),
        "top_p": rng.choice([None, 0.8]),
        "seed": int(rng.integers(0, 2**32)),
        "repetition_penalty": float(rng.choice([1.0, 1.2])),
        "logit_bias": {int(rng.integers(0, VOCABULARY)): 1.5} if rng.random() < 0.3 else None,
        "stop_tokens": [int(rng.integers(0, VOCABULARY))] if rng.random() < 0.3 else None,
    }
    return prompt, settings


def expected(kind, prompt, settings):
    return list(stream_generate(model(kind), prompt, **settings))


def same(got, wanted):
    assert [(t.token, t.index, t.text, t.finished) for t in got] == [
        (t.token, t.index, t.text, t.finished) for t in wanted
    ]
    np.testing.assert_allclose([t.logprob for t in got], [t.logprob for t in wanted], rtol=1e-4, atol=1e-4)


QUICK = ("hybrid",)


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in MIXERS]
)
def test_requests_join_leave_and_displace_each_other_and_keep_their_tokens(kind):
    rng = np.random.default_rng(0)
    batcher = Batcher(model(kind), rows=4, token_budget=24, pieces=(8,), steps=256, prefixes=2**20)
    shared = rng.integers(0, VOCABULARY, 40).tolist()
    compiled = count_compilations()
    batcher.warm_up()
    before = len(compiled)
    asked, cancelled = [], []
    for _ in range(24):
        prompt, settings = random_request(rng, shared=shared if rng.random() < 0.4 else ())
        asked.append((prompt, settings, batcher.submit(prompt, priority=int(rng.integers(0, 3)), **settings)))
        for _ in range(int(rng.integers(0, 5))):
            batcher.step()
        if rng.random() < 0.15:
            asked[-1][2].cancel()
            cancelled.append(asked[-1][2])
    results = [(prompt, settings, request, request.result()) for prompt, settings, request in asked]
    assert len(compiled) == before
    assert batcher.stats["displaced"] > 0 and batcher.stats["prefix_hits"] > 0
    assert batcher.stats["running"] == batcher.stats["waiting"] == 0
    for prompt, settings, request, tokens in results:
        wanted = expected(kind, prompt, settings)
        if request.finished == "cancelled":
            same(tokens, wanted[: len(tokens)])
        else:
            same(tokens, wanted)


def count_compilations():
    """A list that grows by one with every program that is compiled."""
    compiled = []

    def note(event, seconds, **_):
        if event.endswith("backend_compile_duration"):
            compiled.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(note)
    return compiled


GOLDEN = pathlib.Path(__file__).parent / "golden" / "sarathi"


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.json")), ids=lambda path: path.stem)
def test_the_schedule_is_that_of_sarathi(path):
    trace = json.loads(path.read_text())
    schedule = Schedule(trace["max_seqs"], trace["token_budget"])
    jobs = [Job(request["prompt"], owner=i) for i, request in enumerate(trace["requests"])]
    drawn = [0] * len(jobs)
    for now, wanted in enumerate(trace["iterations"]):
        for job, request in zip(jobs, trace["requests"], strict=True):
            if request["arrival_iteration"] == now:
                schedule.add(job)
        plan = schedule.plan()
        got = [{"request": job.owner, "kind": "decode", "tokens": 1} for job in plan.decode]
        got += [{"request": job.owner, "kind": "prefill", "tokens": count} for job, count in plan.pieces]
        assert got == wanted, now
        for job, count in plan.pieces:
            job.read += count
        done = [job for job, _ in plan.pieces if job.decoding]
        for job in [*plan.decode, *done]:
            drawn[job.owner] += 1
            if drawn[job.owner] == trace["requests"][job.owner]["output"]:
                schedule.remove(job)
    assert not schedule.running and not schedule.waiting


def drawn(request):
    return [token.token for token in request.result()]


def test_a_request_goes_on_in_another_batcher():
    first, second = (Batcher(model("hybrid"), rows=2, token_budget=8, pieces=(8,)) for _ in range(2))
    prompt, settings = (
        list(range(20)),
        {"max_tokens": 60, "seed": 3, "stop": ["never", b"\xff"], "stop_tokens": 2},
    )
    settings |= {"logit_bias": {2: -np.inf}, "repetition_penalty": 1.3, "include_stop": False}
    wanted = expected("hybrid", prompt, settings)
    for steps in (0, 1, 2, 3, 5):  # waiting, in its prompt, and decoding
        request = first.submit(prompt, deadline=100, **settings)
        for _ in range(steps):
            first.step()
        begun = list(request._drained())
        data = first.hand_over(request)
        assert request.finished == "handed over" and request.result() == []
        same(begun + second.receive(data).result(), wanted)
    assert first.stats["running"] == first.stats["waiting"] == 0
    with pytest.raises(ValueError, match="request: it has ended"):
        first.hand_over(request)
    for damaged in (b"", data[:100], data[:-9], b"\0" * 64, data.replace(b"max_tokens", b"min_tokens")):
        with pytest.raises(ValueError, match="data"):
            second.receive(damaged)
    with pytest.raises(ValueError, match="not a state of this model"):
        Batcher(model("mamba")).receive(data)


def test_a_state_goes_on_in_a_batcher():
    stream = stream_generate(model("hybrid"), [1, 2, 3], seed=5, max_tokens=4)
    list(stream)
    wanted = list(stream_generate(model("hybrid"), [4], state=stream.state, max_tokens=6))
    request = Batcher(model("hybrid"), rows=2).submit([4], state=stream.state, max_tokens=6)
    same(request.result(), wanted)


def test_requests_are_read_in_threads_and_event_loops():
    async def gather(batcher):
        async def read(request):
            return [token.token async for token in request]

        return await asyncio.gather(*(read(batcher.submit([i], seed=i, max_tokens=9)) for i in range(5)))

    with Batcher(model("hybrid"), rows=2) as batcher:
        got = asyncio.run(gather(batcher))
        assert got[3] == [t.token for t in batcher.submit([3], seed=3, max_tokens=9)]
        assert batcher.drain(timeout=60)
        with pytest.raises(Busy, match="closed"):
            batcher.submit([1])
    assert got[4] == [t.token for t in stream_generate(model("hybrid"), [4], seed=4, max_tokens=9)]


def test_requests_end_by_deadline_cancellation_and_without_a_token():
    batcher = Batcher(model("hybrid"), rows=1, waiting=2)
    late, kept = batcher.submit([1], deadline=1e-6), batcher.submit([2])
    next(iter(kept))
    assert late.finished == "deadline" and late.result() == []
    assert batcher.submit([1, 2, 3], max_tokens=0, priority=1).result() == []
    batcher.submit([3])
    waiting = batcher.submit([4])
    with pytest.raises(Busy, match="2 requests wait"):
        for _ in range(9):
            batcher.submit([5])
    kept.cancel()
    waiting.cancel()
    list(kept)
    assert (kept.finished, waiting.result()) == ("cancelled", [])
    batcher.close()
    assert batcher.stats["running"] == batcher.stats["waiting"] == 0


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"policy": "sarathy"}, "policy: got 'sarathy'.*did you mean 'sarathi'"),
        ({"rows": 0}, "rows must be a positive integer, got 0"),
        ({"token_budget": 3, "rows": 4}, "token_budget must be an integer of at least 4"),
        ({"pieces": ()}, "pieces must have at least one size"),
        ({"prefixes": -1}, "prefixes must be an integer of at least 0"),
    ],
)
def test_a_batcher_refuses_wrong_options(options, error):
    with pytest.raises(ValueError, match=error):
        Batcher(model("hybrid"), **options)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"prompt": [[1], [2]]}, "prompt must be one prompt per request, got 2"),
        ({"temperature": -1}, "temperature must be"),
        ({"top_logprobs": 3}, "top_logprobs must be an integer from 0 to 0"),
        ({"priority": 0.5}, "priority must be an integer, got 0.5"),
        ({"deadline": 0}, "deadline must be a positive number of seconds"),
        ({"max_tokens": 500}, "max_tokens, but the model's full cache holds 512|need 512 steps"),
        ({"logit_bias": {31: 1.0}}, "logit_bias must be"),
    ],
)
def test_a_batcher_refuses_wrong_requests(options, error):
    batcher = Batcher(model("attention"), steps=256)
    with pytest.raises(ValueError, match=error):
        batcher.submit(**{"prompt": list(range(12)) * 2, **options})
    assert batcher.stats["waiting"] == 0


@pytest.mark.parametrize("policy", ["prefill-first", "decode-first"])
def test_other_policies_delay_streams_or_prompts(policy):
    schedule = Schedule(4, 10, policy)
    answered, prompt = schedule.add(Job(2, owner="answered")), None
    schedule.plan()
    answered.read = 2
    prompt = schedule.add(Job(25, owner="prompt"))
    plans = []
    for _ in range(3):
        plan = schedule.plan()
        plans.append(([job.owner for job in plan.decode], [count for _, count in plan.pieces]))
        for job, count in plan.pieces:
            job.read += count
    if policy == "prefill-first":
        assert plans == [([], [10]), ([], [10]), ([], [5])] and prompt.decoding
    else:
        assert plans == [(["answered"], [])] * 3
        schedule.remove(answered)
        assert [count for _, count in schedule.plan().pieces] == [10]


def test_prefixes_are_found_where_prompts_part_and_forgotten_by_age():
    batcher = Batcher(model("mamba"), rows=2, token_budget=64, prefixes=PrefixStore(2**20, stride=64))
    shared = np.random.default_rng(1).integers(0, VOCABULARY, 100).tolist()
    read = []
    for i in range(4):
        request = batcher.submit([*shared, i, i, i], max_tokens=2, seed=i)
        same(request.result(), expected("mamba", [*shared, i, i, i], {"max_tokens": 2, "seed": i}))
        read.append(request.cached_tokens)
    assert read == [0, 64, 100, 100]
    small = batcher._store.bytes // 3
    store = PrefixStore(small)
    store.bind(batcher.model)
    state = batcher._rooms.fresh(0)
    for i in range(50):
        store.put(np.full(70, i), state)
        assert store.bytes <= small
    assert store.find(np.full(71, 49))[0] == 70 and store.find(np.full(71, 0)) is None


def test_full_caches_are_rewound_to_any_prefix():
    batcher = Batcher(model("attention"), rows=2, token_budget=64, prefixes=2**20)
    shared = np.random.default_rng(1).integers(0, VOCABULARY, 100).tolist()
    for i, cached in enumerate([0, 83, 83]):
        prompt = [*shared[:83], i, *range(9)]
        request = batcher.submit(prompt, max_tokens=3, seed=i)
        same(request.result(), expected("attention", prompt, {"max_tokens": 3, "seed": i}))
        assert request.cached_tokens == cached


def test_a_load_test_replays_the_same_arrivals_under_each_policy(tmp_path, capsys, monkeypatch):
    load = {"requests": 5, "rate": 0, "prompt_tokens": 8, "max_tokens": 4, "long_share": 0.4}
    load["long_tokens"] = 90
    trace = serve_bench.Trace(**load)
    sizes = [len(arrival.prompt) for arrival in trace.arrivals(VOCABULARY)]
    assert sizes == [len(arrival.prompt) for arrival in trace.arrivals(VOCABULARY)] and 90 in sizes
    monkeypatch.setattr(serve_bench, "untrained", model)
    words = [f"--{name.replace('_', '-')}={value}" for name, value in load.items()]
    policies = "sarathi,prefill-first"
    words += ["--policies", policies, "--rows", "2", "--out", str(tmp_path), "--json"]
    code = main(["serve-bench", *words])
    result = json.loads(capsys.readouterr().out)
    assert code == 0 and [row["policy"] for row in result["measured"]] == policies.split(",")
    for row in result["measured"]:
        assert (row["stats"]["tokens"], row["stats"]["prompt_tokens"]) == (20, sum(sizes))
        assert len(row["first"]) == 5 and 0 < row["fairness"] <= 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"serve_bench.{kind}" for kind in ("json", "md", "png")
    ]
    with pytest.raises(ValueError, match="long_share must be from 0 to 1"):
        serve_bench.Trace(long_share=2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MIXERS)
def test_a_thousand_random_requests_compile_nothing_and_keep_their_tokens(kind):
    rng, compiled = np.random.default_rng(5), count_compilations()
    batcher = Batcher(model(kind), rows=8, token_budget=48, pieces=(16,), steps=300, prefixes=2**20)
    batcher.warm_up()
    before, asked = len(compiled), []
    shared = rng.integers(0, VOCABULARY, 90).tolist()
    for _ in range(1000):
        prompt, settings = random_request(rng, shared=shared[: rng.integers(0, 90)])
        asked.append((prompt, settings, batcher.submit(prompt, priority=int(rng.integers(0, 3)), **settings)))
        while batcher.stats["waiting"] > 12:
            batcher.step()
        if rng.random() < 0.1:
            asked[int(rng.integers(0, len(asked)))][2].cancel()
    got = [request.result() for _, _, request in asked]
    assert len(compiled) == before and not any(batcher.stats[name] for name in ("running", "waiting"))
    for i in rng.choice(1000, 60, replace=False):
        prompt, settings, request = asked[i]
        wanted = expected(kind, prompt, settings)
        same(got[i], wanted[: len(got[i])] if request.finished == "cancelled" else wanted)
