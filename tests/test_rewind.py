"""Steps taken back were never there, memory that grows was always there; what cannot be done says where and
why."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from flax import nnx
from helpers import assert_close

import seqlab
from seqlab import state_bytes
from seqlab.models import Attention, Full, LanguageModel, Window
from seqlab.models.cache import MoBA, Quantized, duo
from seqlab.streaming.generate import stream_state

CHUNK = 10
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 31, (4, 2, CHUNK)))
slow = pytest.mark.slow


def language_model(cache, **options):
    return LanguageModel(
        31, 16, 2, functools.partial(Attention, heads=2, head_dim=8, cache=cache), rngs=nnx.Rngs(0), **options
    )


def reader(model):
    return jax.jit(lambda tokens, state, valid: model(tokens, state, None, valid))


@pytest.mark.parametrize(
    "cache",
    [
        pytest.param(Full(64), marks=slow),
        pytest.param(Window(40, sinks=2), marks=slow),
        Window(40, sinks=2, positions="cache"),
        pytest.param(duo((True, False), capacity=64, sinks=2, window=40), marks=slow),
        pytest.param(MoBA(4, 3, 64), marks=slow),
        MoBA(4, 3, None, stored=9),
        Quantized(64, bits=4, group=4, residual=32),
    ],
    ids=str,
)
def test_what_is_taken_back_was_never_there(cache):
    """In a model of two layers, a row by ten steps and a row by seven."""
    model = language_model(cache, scan_layers=True)
    read, all_valid = reader(model), jnp.ones((2, CHUNK), bool)
    some = jnp.asarray([[False] * CHUNK, [True] * 3 + [False] * (CHUNK - 3)])
    _, early = read(TOKENS[0], model.init_state(2), all_valid)
    _, late = read(TOKENS[1], early, all_valid)
    _, kept = read(TOKENS[1], early, some)
    back = model.rewind(late, [CHUNK, CHUNK - 3])
    (expected, _), (actual, _) = (read(TOKENS[2], state, all_valid) for state in (kept, back))
    assert_close(actual, expected, 2e-5)
    assert model.rewind(late, 0) is not None and jax.tree.all(
        jax.tree.map(jnp.array_equal, model.rewind(late, 0), late)
    )


def after(steps, state):
    """A state whose lengths say that it has seen so many steps."""
    return jax.tree.map(
        lambda leaf: jnp.full_like(leaf, steps) if leaf.ndim == 1 and leaf.dtype == jnp.int32 else leaf, state
    )


@pytest.mark.parametrize(
    ("mixers", "error", "words"),
    [
        (
            ("attention", "mamba"),
            NotImplementedError,
            "layer 1: Mamba keeps a summary of all steps, from which none can be taken back",
        ),
        (
            ("attention", "window"),
            ValueError,
            r"layer 1: steps=4 cannot be taken back: window\(8\) has overwritten",
        ),
        (
            ("coded", "attention"),
            ValueError,
            r"layer 0: steps=4 cannot be taken back: full\(64\)\+int4\(.*\) has quantized the steps before "
            r"them",
        ),
        (
            ("moba_stored", "attention"),
            ValueError,
            "layer 0: steps=4 cannot be taken back: key_conv has forgotten",
        ),
    ],
)
def test_what_cannot_be_taken_back_says_where_and_why(mixers, error, words):
    model = LanguageModel(
        31, 16, 2, tuple(zoo.MIXERS[name] for name in mixers), channel_mixer=None, rngs=nnx.Rngs(0)
    )
    with pytest.raises(error, match=words):
        model.rewind(after(20, model.init_state(2)), 4)


def test_steps_are_counted_backwards():
    model = language_model(Full(64))
    with pytest.raises(
        ValueError, match=r"layer 0: steps must not exceed the steps seen, \[20, 20\] by row, got 21"
    ):
        model.rewind(after(20, model.init_state(2)), 21)
    with pytest.raises(ValueError, match="layer 0: steps must be 0 or more, got -1"):
        model.rewind(after(20, model.init_state(2)), -1)
    stream = after(20, stream_state(model, 2))
    with pytest.raises(ValueError, match=r"steps must leave a token of the \[20, 20\] in each row, got 20"):
        seqlab.rewind_stream(model, stream, 20, last=[1, 1])
    with pytest.raises(ValueError, match="last must name one token for each of 2 rows"):
        seqlab.rewind_stream(model, stream, 2, last=[1])


def test_blocks_that_were_overwritten_cannot_be_taken_back():
    mixer = Attention(16, heads=2, cache=MoBA(4, 2, None, stored=3), rngs=nnx.Rngs(0))
    state = after(23, mixer.init_state(1))
    assert mixer.rewind(state, 3).cache.length.tolist() == [20]
    with pytest.raises(
        ValueError, match=r"steps=4 cannot be taken back: window\(12\)\+moba\(4, 2\) has overwritten"
    ):
        mixer.rewind(state, 4)


def test_a_stream_goes_on_from_an_earlier_token():
    model = language_model(Full(64))
    model.embedding.weight[...] *= 20
    stream = seqlab.stream_generate(model, [[1, 2, 3], [4]], seed=[5, 6], block=4)
    taken = list(itertools.islice(stream, 24))
    rows = [[token.token for token in taken if token.row == row] for row in range(2)]
    back = seqlab.rewind_stream(model, stream.state, [5, 3], last=[rows[0][-6], rows[1][-4]])
    again = list(seqlab.stream_generate(model, state=back, max_tokens=5))
    assert [token.token for token in again if token.row == 0] == rows[0][-5:]
    assert [token.token for token in again if token.row == 1][:3] == rows[1][-3:]


@pytest.mark.parametrize(
    "cache", [Full(12, grows=True), pytest.param(MoBA(4, 3, 12, grows=True), marks=slow)], ids=str
)
def test_memory_that_grows_was_always_there(cache):
    """Doubled twice and more, in the middle of a stream; the tokens are those of a cache that was large
    enough from the start."""
    model, large = (
        language_model(cache),
        language_model(type(cache)(**{**vars(cache), "capacity": 48, "grows": False})),
    )
    for net in (model, large):
        net.embedding.weight[...] *= 20
    options = {"max_tokens": 30, "seed": 3, "block": 8, "prefill_chunks": (4,)}
    streams = [seqlab.stream_generate(net, list(range(10)), **options) for net in (model, large)]
    grown, expected = ([token.token for token in stream] for stream in streams)
    assert grown == expected
    assert model.capacity is None and large.capacity == 48
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(stream.state.model)) for stream in streams]
    assert sizes == [state_bytes(large)] * 2, "40 steps are 12, doubled twice"
    assert streams[0].stats["programs"] <= 2 * 3, "a program a chunk length for each of 12, 24 and 48 slots"


def test_a_saved_state_is_not_overwritten_unasked(tmp_path):
    path, state = tmp_path / "state.safetensors", {"seen": jnp.arange(3)}
    seqlab.save_state(state, path)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        seqlab.save_state({"seen": jnp.zeros(3, int)}, path)
    np.testing.assert_array_equal(seqlab.load_state(path, like=state)["seen"], [0, 1, 2])
    seqlab.save_state({"seen": jnp.ones(3, jnp.int32)}, path, overwrite=True)
    np.testing.assert_array_equal(seqlab.load_state(path, like=state)["seen"], [1, 1, 1])


@pytest.mark.parametrize(
    "cache",
    [
        *[
            pytest.param(cache, marks=slow)
            for cache in (Full(64), Window(8, sinks=2), Quantized(64, bits=4, group=4, residual=8))
        ],
        MoBA(4, 3, None, stored=4),
    ],
    ids=str,
)
def test_every_cache_is_saved_loaded_and_forked(cache, tmp_path):
    mixer = Attention(16, heads=2, head_dim=8, cache=cache, rngs=nnx.Rngs(0))
    call = jax.jit(lambda x, state: mixer(x, state))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 26, 16)), jnp.float32)
    _, state = call(x[:, :13], mixer.init_state(2))
    expected, _ = call(x[:, 13:], state)
    seqlab.save_state(state, tmp_path / "state")
    forked = seqlab.take_rows(seqlab.load_state(tmp_path / "state", like=mixer.init_state(2)), [1, 1])
    y, _ = call(jnp.stack([x[1, 13:], x[0, 13:]]), forked)
    np.testing.assert_array_equal(y[0], expected[1])
    assert float(jnp.abs(y[1] - expected[1]).max()) > 1e-3


@pytest.mark.parametrize(
    ("mixers", "draft"),
    [
        ((zoo.MIXERS["mamba"], zoo.MIXERS["window_sinks_softcap"]), None),
        pytest.param(zoo.MIXERS["gated_delta"], None, marks=slow),
        pytest.param(zoo.MIXERS["lmu"], None, marks=slow),
        pytest.param(zoo.MIXERS["mamba"], seqlab.NGram(n=2, tokens=3), marks=slow),
        pytest.param(zoo.MIXERS["mamba"], seqlab.NGram(n=2, tokens=3, rule="rejection"), marks=slow),
        pytest.param(zoo.MIXERS["mamba"], seqlab.Draft(zoo.model("lm_mamba"), tokens=3), marks=slow),
    ],
    ids=["hybrid", "gated_delta", "lmu", "ngram", "rejection", "draft"],
)
def test_a_stream_is_rewound_whatever_its_mixers(mixers, draft):
    """Continued from there, it gives the tokens that it gave, and goes on undisturbed."""
    model = LanguageModel(31, 16, 2, mixers=mixers, rngs=nnx.Rngs(0))
    rows, options = [list(range(9)), [3, 4]], {"seed": [1, 2], "temperature": 1.2}
    stream = seqlab.stream_generate(model, rows, max_tokens=60, draft=draft, **options)
    rejection = draft is not None and draft.rule == "rejection"
    given = [[], []]
    for token in itertools.islice(stream, 100):
        given[token.row].append(token.token)
    made = [len(row) for row in given]
    for steps in (0, 1, [5, 2]) if rejection else (0, 1, [20, 7], [made[0], 38]):
        back = stream.rewind(steps)
        each = np.broadcast_to(steps, 2).tolist()
        assert back.length.tolist() == [len(row) + m - n for row, m, n in zip(rows, made, each, strict=True)]
        again = seqlab.stream_generate(model, state=back, max_tokens=each, temperature=1.2)
        found = [[], []]
        for token in again:
            found[token.row].append(token.token)
        if not rejection:
            assert found == [row[len(row) - n :] for row, n in zip(given, each, strict=True)]
        assert back.past.tokens[0, -4:].tolist() == ([*rows[0], *given[0][: made[0] - each[0]]])[-4:]
    rest = [[], []]
    for token in stream:
        rest[token.row].append(token.token)
    whole = [[], []]
    for token in seqlab.stream_generate(model, rows, max_tokens=60, draft=draft, **options):
        whole[token.row].append(token.token)
    assert [a + b for a, b in zip(given, rest, strict=True)] == whole
    for wrong in (-1, 61, [1, 70], 0.5):
        with pytest.raises(ValueError, match="steps"):
            stream.rewind(wrong)
