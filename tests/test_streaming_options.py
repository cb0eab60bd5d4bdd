"""Options of streams by their values: every draw is made again from its definition, in NumPy, row by row."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import VOCABULARY, Markov, check
from helpers import assert_identical

import seqlab
from seqlab.streaming.generate import stream_state, warm_up

# The last is longer than what is penalised.
PROMPTS = [[3, 5, 3], [7], list(range(40)), [5] * 520 + [9] * 100]


@functools.cache
def model(step=None):
    return Markov(0, step=step)


def rows_of(stream, rows):
    made = list(stream)
    return [[token for token in made if token.row == row] for row in range(rows)]


SETTINGS = [
    {},
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 5.0, "logit_bias": {11: 4.0}},
    {"min_p": 0.2},
    {"min_p": 1.0, "temperature": 3.0},
    {"min_p": 0.02, "top_k": 7, "top_p": 0.8},
    {"temperature": 30.0, "top_p": 0.97},  # keeps more than the candidates that are sorted first
    {"temperature": 30.0, "top_k": 150},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6, "temperature": 0.7},
    {"presence_penalty": 2.5},
    {"presence_penalty": -1.5, "top_k": 20},
    {"frequency_penalty": 0.8},
    {"frequency_penalty": -0.4, "presence_penalty": 1.0, "repetition_penalty": 1.2},
    {"logit_bias": {3: 6.0, 199: -3.0, 0: -math.inf}},
    {"logit_bias": dict.fromkeys(range(0, 200, 2), -math.inf), "min_p": 0.1},
]
DEFAULTS = {
    "temperature": 1.0,
    "top_k": None,
    "top_p": None,
    "min_p": None,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "logit_bias": None,
}


@pytest.mark.parametrize(
    "step", [pytest.param(None, marks=pytest.mark.slow, id="distinct"), pytest.param(1.0, id="ties")]
)
def test_every_setting_is_its_definition_and_a_row_is_what_it_is_alone(step):
    count = len(SETTINGS)
    prompts = [PROMPTS[row % len(PROMPTS)] for row in range(count)]
    seeds = [2**32 - 1 - row if row % 3 == 0 else row for row in range(count)]
    each = {name: [setting.get(name, default) for setting in SETTINGS] for name, default in DEFAULTS.items()}
    together = rows_of(seqlab.stream_generate(model(step), prompts, max_tokens=24, seed=seeds, **each), count)
    for row, (prompt, setting) in enumerate(zip(prompts, SETTINGS, strict=True)):
        assert len(together[row]) == 24
        check(model(step), prompt, setting | {"seed": seeds[row]}, together[row])
        alone = list(seqlab.stream_generate(model(step), prompt, max_tokens=24, seed=seeds[row], **setting))
        assert alone == [token._replace(row=0) for token in together[row]]


def test_settings_that_change_nothing_are_the_defaults():
    plain = list(seqlab.stream_generate(model(), [5], max_tokens=20, seed=4))
    neutral = {
        "top_k": VOCABULARY,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1,
        "presence_penalty": 0,
    }
    for options in (neutral, {"logit_bias": {}}, {"logit_bias": {3: 0.0}}, {"top_k": 10**12}, {"block": 3}):
        assert list(seqlab.stream_generate(model(), [5], max_tokens=20, seed=4, **options)) == plain
    colder = list(seqlab.stream_generate(model(), [5], max_tokens=20, seed=4, temperature=1e-7))
    assert colder == list(seqlab.stream_generate(model(), [5], max_tokens=20, temperature=0))


def test_top_logprobs_are_those_of_the_model():
    rows = rows_of(seqlab.stream_generate(model(), [[1], [2, 4], [6]], max_tokens=9, top_logprobs=11), 3)
    for made, last in zip(rows, (1, 4, 6), strict=True):
        for token in made:
            logits = np.asarray(model().table[...])[last].astype(np.float64)
            logprobs = logits - np.log(np.exp(logits).sum())
            likeliest = np.argsort(-logits, kind="stable")[:11]
            assert [one for one, _ in token.top] == likeliest.tolist()
            np.testing.assert_allclose([value for _, value in token.top], logprobs[likeliest], atol=2e-5)
            last = token.token
    stream = seqlab.stream_generate(model(), [1], max_tokens=2, top_logprobs=VOCABULARY)
    assert [len(token.top) for token in stream] == [VOCABULARY] * 2
    assert all(token.top == () for token in seqlab.stream_generate(model(), [1], max_tokens=2))


def even_after_odd(logits, context):
    """A grammar: even tokens after odd ones and the other way round, but for rows whose value says 0."""
    last = context.recent[:, -1:]
    forbidden = (jnp.arange(logits.shape[1]) + last) % 2 == 0
    return jnp.where(forbidden & (context.values["on"][:, None] == 1), -jnp.inf, logits)


def test_a_logits_function_is_obeyed_row_by_row():
    prompts, on = [[1], [8, 8], [9], [4, 5, 6]], np.asarray([1, 1, 0, 1])
    options = {"logits": even_after_odd, "seed": [1, 2, 3, 4], "temperature": [1.0, 0, 1.0, 9.0]}
    stream = seqlab.stream_generate(model(), prompts, max_tokens=24, logits_values={"on": on}, **options)
    rows = rows_of(stream, 4)
    for row, made in enumerate(rows):
        past = [prompts[row][-1], *(token.token for token in made)]
        alternates = [(a + b) % 2 for a, b in itertools.pairwise(past)]
        assert (alternates == [1] * 24) == bool(on[row])
    plain = list(seqlab.stream_generate(model(), prompts[2], max_tokens=24, seed=3))
    assert [token.token for token in rows[2]] == [token.token for token in plain]

    def nothing(logits, context):
        return jnp.where(context.length[:, None] < 4, logits, -jnp.inf)

    made = list(seqlab.stream_generate(model(), [1, 2], max_tokens=9, logits=nothing))
    assert [token.finished for token in made] == [None, None, "nonfinite"]
    assert made[-1].token == -1 and math.isnan(made[-1].logprob)


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_a_state_that_was_handed_over_stays_valid_and_gives_equal_results(rows):
    begun = seqlab.stream_generate(model(), PROMPTS[:rows], max_tokens=8, seed=range(rows), block=4)
    list(itertools.islice(begun, 3 * rows))
    state = begun.state
    kept = jax.tree.map(np.array, state)
    first = [token.token for token in seqlab.stream_generate(model(), state=state, max_tokens=6, block=4)]
    again = seqlab.stream_generate(model(), state=state, max_tokens=6)
    assert [token.token for token in again] == first
    list(begun)  # the stream that made it goes on, too
    taken = [begun.state, again.state]
    list(seqlab.stream_generate(model(), [[1]] * rows, state=state, max_tokens=2))
    assert_identical(jax.tree.map(np.array, state), kept)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((state, taken)))
    assert [token.token for token in seqlab.stream_generate(model(), state=state, max_tokens=6)] == first


def test_every_state_of_a_stream_stays_valid_as_it_goes_on():
    stream = seqlab.stream_generate(model(), [[1], [2]], max_tokens=10, block=4, stop_tokens=[[], [77]])
    states, made = [stream.state], []
    for token in stream:
        made.append(token)
        states.append(stream.state)
    for taken, state in enumerate(states):
        if taken % 5 == 0:
            assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
            lengths = [1 + sum(token.row == row for token in made[:taken]) for row in range(2)]
            assert state.length.tolist() == lengths
            past = [
                [row + 1] + [token.token for token in made[:taken] if token.row == row] for row in range(2)
            ]
            for row in range(2):
                assert np.asarray(state.past.tokens)[row, -lengths[row] :].tolist() == past[row]
            np.testing.assert_array_equal(
                state.logits, np.asarray(model().table[...])[[tokens[-1] for tokens in past]]
            )


def test_penalties_and_stops_go_on_with_a_state():
    options = {"seed": 6, "repetition_penalty": 1.4, "frequency_penalty": 0.3, "top_logprobs": 2}
    whole = list(seqlab.stream_generate(model(), PROMPTS[2], max_tokens=30, **options))
    check(model(), PROMPTS[2], options, whole)
    for cut in (1, 13, 29):
        head = seqlab.stream_generate(model(), PROMPTS[2], max_tokens=cut, **options)
        tokens = list(head)
        tokens += seqlab.stream_generate(model(), state=head.state, max_tokens=30 - cut, **options)
        assert [token._replace(index=0, finished=None) for token in tokens] == [
            token._replace(index=0, finished=None) for token in whole
        ]


def test_stop_tokens_end_each_row_by_its_own_set():
    free = [token.token for token in seqlab.stream_generate(model(), [1], max_tokens=40, seed=2)]
    ends = [{free[9]}, None, free[4], np.asarray([free[20], free[12]])]
    for include in (True, False):
        options = {"max_tokens": 40, "seed": 2, "include_stop": include}
        stream = seqlab.stream_generate(model(), [[1]] * 4, stop_tokens=ends, **options)
        rows = rows_of(stream, 4)
        sizes = [
            min(free.index(end) for end in group) + 1
            for group in ([free[9]], [free[4]], [free[20], free[12]])
        ]
        assert [len(row) for row in rows] == [sizes[0], 40, sizes[1], sizes[2]]
        assert [row[-1].finished for row in rows] == ["stop", "length", "stop", "stop"]
        for row, held in zip(rows, stream.held, strict=True):
            said = bytes(
                token.token for token in row[: len(row) - (not include and row[-1].finished == "stop")]
            )
            assert "".join(token.text for token in row) + held == said.decode(errors="replace")


def test_an_interruption_while_tokens_are_drawn_loses_none():
    whole = [token.token for token in seqlab.stream_generate(model(), [[1], [2], [3], [4]], max_tokens=12)]
    stream = seqlab.stream_generate(model(), [[1], [2], [3], [4]], max_tokens=12, block=4)
    first = [next(stream).token for _ in range(16)]
    decode = stream._programs.decode

    def interrupted(*arguments, **options):
        decode(*arguments, **options)  # its state is gone
        raise KeyboardInterrupt

    stream._programs = stream._programs._replace(decode=interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    stream._programs = stream._programs._replace(decode=decode)
    assert stream.state.length.tolist() == [5] * 4 and stream.stats["state_bytes"] > 0
    assert sorted(first + [token.token for token in stream]) == sorted(whole)


def test_after_a_warm_up_nothing_is_compiled():
    net = Markov(5)
    done = warm_up(net, [1, 3], steps=60, prefill_chunks=(8,), top_logprobs=3)
    assert done["programs"] == 4 and done["seconds"] > 0  # reading and decoding, of one row and of four
    options = {"prefill_chunks": (8,), "top_logprobs": 2, "max_tokens": 5, "min_p": 0.1, "seed": 9}
    for prompt in ([1] * 50, [[3], [4], [5]], [[2] * 9] * 4):
        stream = seqlab.stream_generate(net, prompt, logit_bias={4: 1.0}, stop_tokens=[6], **options)
        list(stream)
        assert stream.stats["programs"] == 4 and stream.stats["compile_seconds"] == 0
    with pytest.raises(ValueError, match=r"rows must be an integer from 1"):
        warm_up(net, 0)
    with pytest.raises(ValueError, match=r"steps must be an integer from 1"):
        warm_up(net, 1, steps=-3)


def test_equal_calls_give_equal_results_and_touch_nothing():
    net, fresh = model(), stream_state(model(), 2, seed=[1, 2])
    before = jax.tree.map(np.array, (seqlab.split(net)[1], fresh))
    calls = [seqlab.stream_generate(net, [[4], [5]], state=fresh, max_tokens=12) for _ in range(2)]
    for one, other in zip(*calls, strict=True):
        assert one == other
    assert_identical(jax.tree.map(np.array, (seqlab.split(net)[1], fresh)), before)
