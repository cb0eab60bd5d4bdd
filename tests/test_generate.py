"""Streaming generation: the same tokens whatever the block, the chunks or the row; a state that can be kept;
honest errors."""

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
from seqlab.models import Attention, Full, LanguageModel, Mamba, Window
from seqlab.models.attention import with_cache
from seqlab.module import Module
from seqlab.streaming.generate import Sampling, draw, stream_state

PROMPT = "whole = any split into chunks"


@functools.cache
def model(vocab_size=256):
    mixers = (
        functools.partial(Mamba, state_size=4),
        functools.partial(Attention, heads=2, cache=Window(16, sinks=2)),
    )
    net = LanguageModel(vocab_size, 16, 2, mixers, rngs=nnx.Rngs(0))
    net.embedding.weight[...] *= 20  # sharper than at initialisation, so that draws depend on what was read
    return net


def tokens(stream):
    return [token.token for token in stream]


@functools.cache
def expected(temperature):
    return tokens(seqlab.stream_generate(model(), PROMPT, max_tokens=40, temperature=temperature, seed=3))


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize(
    "options",
    [{"block": 1}, {"block": 7}, {"block": 64}, {"prefill_chunks": (4,)}, {"prefill_chunks": (5, 64)}],
    ids=str,
)
def test_tokens_do_not_depend_on_blocks_or_chunks(temperature, options):
    stream = seqlab.stream_generate(
        model(), PROMPT, max_tokens=40, temperature=temperature, seed=3, **options
    )
    assert tokens(stream) == expected(temperature)


@pytest.mark.slow
def test_a_cache_of_turns_makes_room_for_prompt_and_answer():
    """Before a state goes on; rows of their own lengths; as the model does with room made by hand."""
    words = "sinks(2)+window(12, turn=30)"
    first = seqlab.stream_generate(model(), ["def f(x):", "x"], max_tokens=6, temperature=0, cache=words)
    tokens(first)
    prompts, most = [[7, 8, 9], [1] * 12], [3, 5]
    options = {"max_tokens": most, "temperature": 0, "cache": words}
    second = seqlab.stream_generate(model(), prompts, state=first.state, **options)
    found = [[], []]
    for token in second:
        found[token.row].append(token.token)
    served = with_cache(model(), words)
    for row, (prompt, count) in enumerate(zip(prompts, most, strict=True)):
        state = served.make_room(seqlab.take_rows(first.state, [row]).model, len(prompt) + count)
        text = list(prompt)
        for _ in range(count):
            logits, state = served(jnp.asarray([text if len(text) == len(prompt) else text[-1:]]), state)
            text.append(int(jnp.argmax(logits[0, -1])))
        assert found[row] == text[len(prompt) :]
    with pytest.raises(ValueError, match=r"steps=\[40, 22\] are more than the 30 of a turn"):
        seqlab.stream_generate(model(), ["x" * 20, "xx"], state=first.state, max_tokens=20, cache=words)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_tokens_do_not_depend_on_the_row_or_its_neighbours(temperature):
    prompts = ["x", PROMPT * 9, PROMPT, "def f(x):\n"]
    stream = seqlab.stream_generate(
        model(), prompts, max_tokens=40, temperature=temperature, seed=[1, 2, 3, 4]
    )
    rows = [[token.token for token in group] for group in by_row(stream, 4)]
    assert rows[2] == expected(temperature)


def by_row(stream, rows):
    made = list(stream)
    return [[token for token in made if token.row == row] for row in range(rows)]


def test_greedy_tokens_are_those_of_the_whole_forward_pass():
    made = expected(0)
    text = [0, *PROMPT.encode(), *made]
    logits, _ = model()(jnp.asarray([text]))
    assert made == np.argmax(np.asarray(logits)[0, len(PROMPT) : -1], axis=-1).tolist()


def test_logprobs_are_those_of_the_model():
    stream = list(seqlab.stream_generate(model(), PROMPT, max_tokens=12, seed=5, temperature=0.5))
    logits, _ = model()(jnp.asarray([[0, *PROMPT.encode(), *[token.token for token in stream]]]))
    logprobs = np.asarray(jax.nn.log_softmax(logits))[0, len(PROMPT) :]
    np.testing.assert_allclose(
        [t.logprob for t in stream], [logprobs[i, t.token] for i, t in enumerate(stream)], atol=1e-4
    )


@pytest.mark.parametrize("taken", [1, 5, 8, 11])
def test_the_state_is_that_after_the_tokens_handed_out(taken):
    """In the middle of a block too: going on from it gives the tokens of the uninterrupted stream."""
    stream = seqlab.stream_generate(model(), PROMPT, seed=3, block=8)
    first = [token.token for token in itertools.islice(stream, taken)]
    rest = seqlab.stream_generate(model(), state=stream.state, max_tokens=40 - taken)
    assert first + tokens(rest) == expected(1.0)


def test_a_state_can_be_saved_loaded_and_forked(tmp_path):
    stream = seqlab.stream_generate(model(), PROMPT, seed=3)
    first = [token.token for token in itertools.islice(stream, 10)]
    seqlab.save_state(stream.state, tmp_path / "state.safetensors")
    loaded = seqlab.load_state(tmp_path / "state.safetensors", like=stream_state(model()))
    forked = seqlab.take_rows(loaded, [0, 0])._replace(seed=jnp.asarray([3, 4], jnp.uint32))
    same, other = by_row(seqlab.stream_generate(model(), state=forked, max_tokens=30), 2)
    assert first + [token.token for token in same] == expected(1.0)
    assert [token.token for token in other] != [token.token for token in same]
    with pytest.raises(ValueError, match="not a state of this model"):
        seqlab.load_state(tmp_path / "state.safetensors", like={"model": jnp.zeros(())})


def test_reading_more_of_a_prompt_later_is_reading_it_at_once():
    at_once = seqlab.stream_generate(model(), PROMPT, seed=3).state
    begun = seqlab.stream_generate(model(), PROMPT[:11], seed=3).state
    assert_close(seqlab.stream_generate(model(), PROMPT[11:], state=begun).state, at_once, 2e-5)


def test_rows_end_each_in_its_own_way():
    stream = seqlab.stream_generate(model(), ["a", "b"], max_tokens=30, seed=[3, 4], stop="e", block=8)
    rows = by_row(stream, 2)
    for row in rows:
        texts = "".join(token.text for token in row)
        assert row[-1].finished == ("stop" if "e" in texts else "length")
        assert [token.finished for token in row[:-1]] == [None] * (len(row) - 1)
        assert "e" not in texts[:-1]
    assert stream.state.length.tolist() == [2 + len(row) for row in rows]


def test_text_is_given_in_whole_characters():
    class Copy(Module):
        """Predicts the bytes of a text in turn, whatever it reads."""

        vocab_size, causal, lookahead, exact = 256, True, 0, True
        data = "né→🙂x".encode()

        def init_state(self, batch, dtype=jnp.float32):
            return jnp.zeros((batch,), jnp.int32)

        def features(self, inputs, state=None, reset=None, valid=None):
            places = state[:, None] + jnp.cumsum(valid, axis=1)
            return jax.nn.one_hot(
                jnp.asarray(list(self.data))[(places - 1) % len(self.data)], 256
            ) * 50, places[:, -1]

        def __call__(self, inputs, state=None, reset=None, valid=None):
            return self.features(inputs, state, reset, valid)

        def read_out(self, x):
            return x

    made = list(seqlab.stream_generate(Copy(), b"?", max_tokens=len(Copy.data) - 1, temperature=0))
    assert "".join(token.text for token in made) == "né→🙂x"[1:] and "�" not in "".join(t.text for t in made)
    stream = seqlab.stream_generate(Copy(), b"?", max_tokens=3, temperature=0)
    assert [token.text for token in stream] == ["", "é", ""]
    assert stream.held == ["�"]  # the stream may go on, and then the character is whole
    rest = list(seqlab.stream_generate(Copy(), state=stream.state, max_tokens=2, temperature=0))
    assert [token.text for token in rest] == ["", "→"]


def test_two_prompts_of_any_length_cost_a_bounded_number_of_programs():
    net = LanguageModel(256, 16, 1, zoo.MIXERS["mamba"], rngs=nnx.Rngs(1))
    for length in (1, 3, 17, 100, 200, 601):
        stream = seqlab.stream_generate(net, b"a" * length, max_tokens=20)
        assert len(tokens(stream)) == 20
    assert stream.stats["programs"] == len(seqlab.streaming.generate.PREFILL_CHUNKS) + 1
    assert stream.stats["state_bytes"] == sum(leaf.nbytes for leaf in jax.tree.leaves(stream.state))


def test_a_full_cache_bounds_the_stream_and_says_so():
    net = LanguageModel(256, 16, 1, functools.partial(Attention, heads=2, cache=Full(32)), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"needs 11 steps for its prompt and 30 for max_tokens.*holds 32"):
        seqlab.stream_generate(net, b"x" * 10, max_tokens=30)
    made = list(seqlab.stream_generate(net, b"x" * 10))
    assert len(made) == 32 - 11 and made[-1].finished == "capacity"
    assert np.isfinite([token.logprob for token in made]).all()


def test_draws_follow_the_filtered_distribution():
    logits = jnp.log(jnp.asarray([[0.5, 0.2, 0.15, 0.1, 0.05]]))
    index = jnp.arange(4000)

    def frequencies(**options):
        seed = jnp.zeros(4000, jnp.uint32)
        return (
            np.bincount(
                np.asarray(draw(jnp.tile(logits, (4000, 1)), seed, index, Sampling(**options))), minlength=5
            )
            / 4000
        )

    np.testing.assert_allclose(frequencies(), [0.5, 0.2, 0.15, 0.1, 0.05], atol=0.03)
    np.testing.assert_allclose(frequencies(top_k=2), [5 / 7, 2 / 7, 0, 0, 0], atol=0.03)
    np.testing.assert_allclose(frequencies(top_p=0.6), [5 / 7, 2 / 7, 0, 0, 0], atol=0.03)
    np.testing.assert_allclose(frequencies(top_p=0.3), [1, 0, 0, 0, 0])
    np.testing.assert_allclose(
        frequencies(temperature=0.5)[:2],
        np.square([0.5, 0.2]) / np.square([0.5, 0.2, 0.15, 0.1, 0.05]).sum(),
        atol=0.03,
    )
    np.testing.assert_allclose(frequencies(temperature=0), [1, 0, 0, 0, 0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt": ""}, None),
        ({"prompt": []}, "empty"),
        ({"prompt": [b"a", []]}, "prompt 1 is empty"),
        (
            {"prompt": "abc\xff", "vocab_size": 128},
            "token 195 at place 4 is not in the model's vocabulary of 128",
        ),
        ({"prompt": [1, -2]}, "token -2 at place 1"),
        ({"max_tokens": -1}, "max_tokens must be an integer of at least 0"),
        ({"max_tokens": True}, "max_tokens"),
        ({"block": 1000}, "block must be an integer from 1 to 128"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 1.5}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"seed": [1, 2]}, "seed"),
        ({"stop": ["a", ""]}, "stop"),
        ({"prefill_chunks": ()}, "prefill_chunks"),
    ],
    ids=str,
)
def test_bad_options_are_refused_before_any_work(options, words):
    options = {"prompt": "abc"} | options
    net = model(options.pop("vocab_size", 256))
    if words is None:
        assert len(tokens(seqlab.stream_generate(net, max_tokens=3, **options))) == 3
        return
    with pytest.raises(ValueError, match=words):
        seqlab.stream_generate(net, **options)
