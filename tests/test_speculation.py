"""Speculative decoding: the tokens, states and distributions of plain decoding, whatever the draft."""

import functools
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from flax import nnx
from helpers import assert_close

import seqlab
from seqlab.models import Attention, Full, GatedDeltaNet, LanguageModel, Window
from seqlab.streaming.generate import draw
from seqlab.streaming.rejection import agreement, inverse_cdf, judge
from seqlab.streaming.sampling import Sampling

slow = pytest.mark.slow
VOCABULARY = 13
MIXERS = {
    "attention": functools.partial(Attention, heads=2, cache=Full(128)),
    "window": functools.partial(Attention, heads=2, cache=Window(16, sinks=2)),
    "mamba": zoo.MIXERS["mamba"],
    "gated_delta": functools.partial(GatedDeltaNet, heads=2),
    "hybrid": (zoo.MIXERS["mamba"], functools.partial(Attention, heads=2, cache=Window(16))),
}
PROMPTS = [[1, 2, 3, 1, 2, 3, 1, 2], [4, 5, 6, 7, 4, 5]]


@functools.cache
def model(kind="hybrid", depth=2, seed=0):
    net = LanguageModel(VOCABULARY, 16, depth, MIXERS[kind], rngs=nnx.Rngs(seed))
    net.embedding.weight[...] *= 10  # sharper than at initialisation, so that draws depend on what was read
    return net


@functools.cache
def tiny():
    mixer = functools.partial(Attention, heads=1, cache=Full(64))
    net = LanguageModel(VOCABULARY, 8, 2, mixer, channel_mixer=None, rngs=nnx.Rngs(0))
    net.embedding.weight[...] *= 20
    return net


def drafts(kind, rule="coupled"):
    return {
        "ngram": seqlab.NGram(2, 5, rule),
        "exit": seqlab.EarlyExit(1, 3, rule),
        "layer": seqlab.EarlyExit((1,), 3, rule),
        "draft": seqlab.Draft(model("gated_delta", 1, 5), 3, rule),
        "itself": seqlab.Draft(model(kind), 3, rule),
    }


def rows_of(stream):
    rows = [[], []]
    for token in stream:
        rows[token.row].append(token)
    return rows


def same(stream, expected):
    """Tokens, texts, reasons and log-probabilities are those of plain decoding."""
    for got, wanted in zip(rows_of(stream), expected, strict=True):
        assert [(t.token, t.text, t.finished) for t in got] == [(t.token, t.text, t.finished) for t in wanted]
        for name in ("logprob", "sampled_logprob"):
            values = [[getattr(t, name) for t in row] for row in (got, wanted)]
            np.testing.assert_allclose(*values, atol=1e-4)


def test_a_draft_changes_no_token_and_new_settings_compile_nothing():
    net = tiny()
    compiled = None
    for temperature, seed in (([0, 1.0], 3), ([0.7, 0], 4)):
        stream = seqlab.stream_generate(
            net, PROMPTS, max_tokens=[30, 17], temperature=temperature, seed=seed, draft=seqlab.NGram(2, 4)
        )
        rows = rows_of(stream)
        assert compiled in (None, stream.stats["programs"])
        compiled = stream.stats["programs"]
        assert stream.stats["draft_tokens"] >= stream.stats["accepted"] > 0
        for row, prompt in enumerate(PROMPTS):
            tokens = [token.token for token in rows[row]]
            assert len(tokens) == [30, 17][row]
            whole, places = [*prompt, *tokens], np.arange(len(prompt), len(prompt) + len(tokens))
            padded = jnp.asarray([whole + [0] * (40 - len(whole))])
            logits = net(padded)[0][0, places - 1]
            drawn = draw(
                logits, np.full(len(tokens), seed, np.uint32), places, Sampling(temperature=temperature[row])
            )
            assert tokens == drawn.tolist()


def test_bad_drafts_are_refused_by_name():
    with pytest.raises(ValueError, match="draft: tokens must be an integer from 1 to 64, got 0"):
        seqlab.NGram(tokens=0)
    with pytest.raises(ValueError, match="draft: rule"):
        seqlab.EarlyExit(1, rule="coupling")
    net = tiny()
    other = nnx.eval_shape(lambda: LanguageModel(7, 8, 1, MIXERS["window"], rngs=nnx.Rngs(0)))
    for draft, words in (
        (seqlab.EarlyExit(2), "draft: layers must be an integer from 1 to 1, got 2"),
        (seqlab.EarlyExit((1, 0)), "draft: layers must be ascending"),
        (seqlab.Draft(other), "draft must have the vocabulary of the model, 13 tokens, got 7"),
        ("ngram", "draft must be seqlab.NGram, seqlab.Draft, seqlab.EarlyExit or None"),
    ):
        with pytest.raises(ValueError, match=words):
            seqlab.stream_generate(net, [1], draft=draft)


def test_the_rule_keeps_the_distribution_of_the_target():
    """In closed form: the expectation over drafted tokens of accepted and corrected ones is p. Where p is q
    nothing is left to correct with, and p is used."""
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(6), (1, 3)), rng.dirichlet(np.ones(6), (1, 2))
    each = np.arange(6)
    tokens = np.stack([each, np.zeros(6, int)], axis=1)
    many = [jnp.asarray(np.repeat(x, 6, axis=0), jnp.float32) for x in (p, q)]
    verdict = judge(*many, tokens, jnp.full((6, 2), 1.0 - 1e-7))
    alpha = q[0, 0] * np.asarray(verdict.probability)[:, 0]
    np.testing.assert_allclose(alpha.sum(), agreement(*many)[0, 0], rtol=1e-5)
    rejected = judge(*many, tokens, jnp.full((6, 2), 0.9999999)).following[
        np.argmin(verdict.probability[:, 0])
    ]
    np.testing.assert_allclose(alpha + (1 - alpha.sum()) * np.asarray(rejected), p[0, 0], atol=1e-5)
    equal = judge(many[0], many[0][:, :2], tokens, jnp.full((6, 2), 1.0))
    np.testing.assert_array_equal(equal.following, many[0][:, 0])
    impossible = judge(
        jnp.asarray([[[0.0, 1.0]] * 2]), jnp.asarray([[[1.0, 0.0]]]), np.array([[0]]), jnp.zeros((1, 1))
    )
    assert impossible.accepted.tolist() == [0], "u = 0 does not accept what p excludes"
    assert inverse_cdf(jnp.asarray([[0.5, 0.5, 0.0]]), jnp.asarray([1.0])).tolist() == [1]


@slow
@pytest.mark.parametrize("kind", MIXERS)
def test_every_draft_gives_the_tokens_of_plain_decoding(kind):
    options = {
        "max_tokens": [50, 33],
        "temperature": [0, 0.8],
        "top_k": [None, 8],
        "seed": 3,
        "repetition_penalty": [1.0, 1.1],
        "logit_bias": {2: 0.5},
        "stop_tokens": [[], [12]],
        "stop": bytes([3, 3]),
        "include_stop": False,
    }
    expected = rows_of(seqlab.stream_generate(model(kind), PROMPTS, **options))
    for draft in drafts(kind).values():
        for block in (None, 1):
            same(seqlab.stream_generate(model(kind), PROMPTS, draft=draft, block=block, **options), expected)


@slow
@pytest.mark.parametrize("name", ["ngram", "exit", "draft"])
def test_the_state_is_that_of_the_tokens_returned(name):
    net, options = model(), {"max_tokens": 40, "temperature": [0, 0.9], "seed": 2}
    draft = drafts("hybrid")[name]
    whole = rows_of(seqlab.stream_generate(net, PROMPTS, **options))
    stream = seqlab.stream_generate(net, PROMPTS, draft=draft, **options)
    taken = [0, 0]
    for token in itertools.islice(stream, 31):
        assert token[:3] == whole[token.row][token.index][:3]
        taken[token.row] += 1
    plain = seqlab.stream_generate(net, PROMPTS, **options | {"max_tokens": taken})
    assert len(list(plain)) == 31
    state, expected = stream.state, plain.state
    assert_close(state.model, expected.model, 1e-4)
    assert_close(state.logits, expected.logits, 1e-4)
    assert state.length.tolist() == expected.length.tolist()
    np.testing.assert_array_equal(state.past.tokens, expected.past.tokens)
    rest = [row[count:] for row, count in zip(whole, taken, strict=True)]
    for again in (None, draft):
        most = [len(row) for row in rest]
        same(seqlab.stream_generate(net, state=state, draft=again, **options | {"max_tokens": most}), rest)
    same(stream, rest)


@slow
@pytest.mark.parametrize("name", ["ngram", "exit", "draft"])
def test_rejection_samples_the_distribution_of_the_target(name):
    """Chi-square of pairs of tokens, over 4096 rows with seeds of their own."""
    net, rows, temperature = model("window"), 4096, 6.0
    draft = drafts("window", "rejection")[name] if name != "ngram" else seqlab.NGram(1, 5, "rejection")
    prompt, counts = [1, 2, 3, 4, 1, 2, 3], np.zeros((VOCABULARY, VOCABULARY))
    stream = seqlab.stream_generate(
        net, [prompt] * rows, max_tokens=3, temperature=temperature, top_k=8, seed=range(rows), draft=draft
    )
    made = np.zeros((rows, 3), int)
    for token in stream:
        made[token.row, token.index] = token.token
    assert 0 < stream.stats["acceptance"] < 1
    np.add.at(counts, (made[:, 1], made[:, 2]), 1)
    expected = np.zeros_like(counts)
    first = probabilities_after(net, [prompt], temperature)[0]
    second = probabilities_after(net, [[*prompt, a] for a in range(VOCABULARY)], temperature)
    both = [[*prompt, a, b] for a in range(VOCABULARY) for b in range(VOCABULARY)]
    third = probabilities_after(net, both, temperature).reshape(VOCABULARY, VOCABULARY, -1)
    expected = rows * np.einsum("a,ab,abc->bc", first, second, third)
    assert counts[expected == 0].sum() == 0
    often = expected > 5
    statistic = ((counts - expected)[often] ** 2 / expected[often]).sum()
    freedom = often.sum() - 1
    assert abs(statistic - freedom) < 4.5 * np.sqrt(2 * freedom), (statistic, freedom)


def probabilities_after(net, prompts, temperature):
    logits = np.asarray(net(jnp.asarray(prompts))[0][:, -1], np.float64) / temperature
    least = np.sort(logits, axis=1)[:, -8:-7]
    weights = np.where(logits >= least, np.exp(logits - logits.max(1, keepdims=True)), 0.0)
    return weights / weights.sum(1, keepdims=True)


@slow
def test_a_function_of_the_logits_applies_to_every_token():
    def alternating(logits, context):
        odd = (context.length[:, None] + context.values[:, None] + jnp.arange(VOCABULARY)) % 2
        return jnp.where(odd == 0, logits, -jnp.inf)

    options = {"max_tokens": 20, "logits": alternating, "logits_values": np.array([0, 1]), "seed": 1}
    expected = rows_of(seqlab.stream_generate(model(), PROMPTS, **options))
    for draft in drafts("hybrid").values():
        same(seqlab.stream_generate(model(), PROMPTS, draft=draft, **options), expected)
    for row in expected:
        assert len({token.token % 2 for token in row[::2]}) == 1
