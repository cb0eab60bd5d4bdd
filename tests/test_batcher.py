"""Continuous batching: each request gives the tokens it has alone, whatever runs beside it."""

import functools
import json
import pathlib

import jax
import numpy as np
import pytest
import zoo
from flax import nnx

from seqlab import Batcher, stream_generate
from seqlab.models import Attention, Full, GatedDeltaNet, LanguageModel
from seqlab.serving.schedule import Job, Schedule

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


QUICK = ("attention", "hybrid")


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
