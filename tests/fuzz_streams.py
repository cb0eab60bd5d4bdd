"""Options of streams at random, right and wrong: a refusal names the option, and what begins keeps its
promises."""

import contextlib
import itertools
import math
import random
import re
import time
import traceback

import jax
import jax.numpy as jnp
import numpy as np
from draws import VOCABULARY, Markov, check
from fuzz import Hang, Report, limited

import seqlab
from seqlab.streaming.generate import stream_state
from seqlab.streaming.prompts import read_prompts
from seqlab.tokenizers import ByteTokenizer

TAKEN = 40  # tokens of a stream that are looked at
ROW_SETTINGS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


class Odd:
    """Something that is nothing that anybody expects."""

    def __repr__(self):
        return "<odd>"


class Angry:
    """An array that cannot be read."""

    def __array__(self, *arguments, **options):
        raise RuntimeError("no")


def zeroed(logits, context):
    return jnp.zeros_like(logits)


def nothing(logits, context):
    return jnp.full_like(logits, -jnp.inf)


def wide(logits, context):
    return jnp.concatenate([logits, logits], axis=1)


def failing(logits, context):
    raise KeyError("mine")


ODD = [
    None,
    True,
    False,
    "",
    "x",
    b"x",
    [],
    (),
    {},
    {1},
    Odd(),
    Angry(),
    1j,
    float("nan"),
    float("inf"),
    -1,
    0,
    10**40,
    [None],
]
ODD += [
    np.float32("nan"),
    np.zeros(0),
    np.zeros((2, 2)),
    np.asarray("x"),
    [[1], [1, 2]],
    range(3),
    "\udce9",
    object,
    2.5,
    -(2**63),
]
NUMBERS = [
    0,
    0.0,
    0.3,
    0.7,
    1,
    1.0,
    2.5,
    1e-9,
    1e-40,
    1e30,
    np.float64(0.5),
    np.float32(1.5),
    np.int8(1),
    jnp.float32(0.9),
]
PROMPTS = [
    "abc",
    "~é"[:1],
    b"\x00\x01",
    [1, 2, 3],
    (5,),
    [7] * 30,
    np.asarray([3, 4]),
    np.asarray([[1, 2], [3, 4]]),
    jnp.asarray([9]),
]
PROMPTS += [
    ["ab", "c"],
    ["ab", [1, 2], b"z"],
    [[1], [2, 3]],
    ["a", "b", "c", "d"],
    [np.asarray([1]), "xy"],
    bytearray(b"hi"),
]
BAD_PROMPTS = [
    "",
    [],
    [[]],
    ["a", ""],
    [VOCABULARY],
    [-1],
    [1.5],
    [True],
    "\udce9",
    np.zeros((1, 1, 1), int),
    {"a": 1},
    {1, 2},
]
BAD_PROMPTS += [
    [1, "a"],
    [[1, [2]]],
    np.asarray([1.0]),
    5,
    Odd(),
    Angry(),
    [None],
    "é" * 3 + "ÿ",
    [[1], 2],
    [10**30],
    "\U0010ffff",
]
STOPS = [
    "b",
    b"\x01",
    ["a", "xyz"],
    [1],
    [[1, 2]],
    5,
    [[3], "q"],
    np.asarray([4, 5]),
    (),
    None,
    "é",
    [b"\xff\xfe"],
    bytearray(b"k"),
]
BAD_STOPS = [
    "",
    [""],
    "a" * 300,
    [VOCABULARY],
    [-1],
    [[1] * 300],
    [1.5],
    {"a"},
    Odd(),
    [[]],
    True,
    1.5,
    "\udce9",
    [None],
    [[[1]]],
]
BIASES = [
    None,
    {},
    {1: 2.0},
    {0: -math.inf, 5: 3},
    {np.int64(4): np.float32(1)},
    dict.fromkeys(range(20), -2.0),
]
BAD_BIASES = [
    {-1: 1},
    {VOCABULARY: 1},
    {1: math.nan},
    {1: math.inf},
    {"a": 1},
    {1: "x"},
    [1],
    "x",
    {1.5: 1},
    {True: 1},
    {1: 10**400},
]
CACHES = [None, "window(4)", "full(8)", "x", Odd(), 5, "window(4)+int4", ["full(8)"], ""]


class Draw:
    """Calls of `stream_generate`."""

    def __init__(self, rng: random.Random, prompts: list):
        self.rng, self.prompts = rng, prompts
        self.model = Markov(0, step=1.0)
        other = seqlab.stream_generate(self.model, [[4], [5, 6]], max_tokens=3, seed=[1, 2])
        list(other)
        one = seqlab.stream_generate(self.model, [8], max_tokens=2)
        list(one)
        fresh = stream_state(self.model, 2)
        self.states = [other.state, one.state, fresh]
        wrong = one.state._replace(logits=jnp.zeros((1, 3)))
        self.bad_states = [
            wrong,
            one.state._replace(model=()),
            Odd(),
            {},
            "x",
            (1, 2),
            one.state._replace(length=jnp.zeros(3, int)),
        ]
        self.bad_states += [
            one.state._replace(seed=jnp.zeros((1,), jnp.int32)),
            one.state._replace(past=None),
        ]

    def pick(self, good: list, bad: list, share: float = 0.12):
        rng = self.rng
        if rng.random() < share:
            return rng.choice(rng.choice([bad, ODD]))
        return rng.choice(good)

    def number(self, name: str, rows: int):
        """One value, or one per row, of a setting."""
        rng = self.rng
        ranges = {
            "temperature": [0, 0, 0.3, 1.0, 1, 5.0, np.float32(0.7), 1e-9, None],
            "top_k": [1, 3, 20, 150, VOCABULARY, 10**12, None, np.int32(5)],
            "top_p": [0.2, 0.9, 1.0, 1, None, 1e-9, np.float64(0.5)],
            "min_p": [0.0, 0.05, 0.5, 1.0, None, 0],
            "repetition_penalty": [1.0, 1.3, 0.7, 2, None],
            "presence_penalty": [0.0, 0.5, -1.5, 2, None],
            "frequency_penalty": [0.0, 0.25, -0.3, 1, None],
            "max_tokens": [0, 1, 5, 12, 30, None, 10**30, np.int64(4)],
            "seed": [0, 1, 2**32 - 1, 77, np.uint32(5)],
        }
        value = self.pick(ranges[name], [-1, math.nan, "x", 1e400, 2**33, True, -math.inf, 1.5], 0.04)
        if rng.random() < 0.25:
            count = rng.choice([rows] * 9 + [1, 2, 3])
            value = [self.pick(ranges[name], NUMBERS, 0.03) for _ in range(count)]
            value = rng.choice([value, tuple(value)])
        return value

    def options(self) -> dict:
        rng = self.rng
        state = self.pick([None, None, None, None, *self.states], self.bad_states, 0.06)
        prompts = self.prompts if state is None else [*self.prompts, "", (), []]
        found = {"prompt": self.pick(prompts, BAD_PROMPTS, 0.06)}
        if state is not None:
            found["state"] = state
        rows = 1 if state is None else len(state.length) if hasattr(state, "length") else 1
        with contextlib.suppress(Exception):
            rows = len(read_prompts(found["prompt"], ByteTokenizer(), VOCABULARY, state is None))
        for name in (*ROW_SETTINGS, "max_tokens", "seed"):
            if rng.random() < (0.7 if name == "max_tokens" else 0.25):
                found[name] = self.number(name, rows)
        choices = {
            "stop": (STOPS, BAD_STOPS, 0.3),
            "stop_tokens": (
                [None, 5, [1, 2], {7}, np.asarray([3]), [[1], [2]], []],
                [[VOCABULARY], "x", -1, [[1]] * 3, 1.5],
                0.2,
            ),
            "include_stop": ([True, False, np.bool_(True)], [1, "x", None], 0.3),
            "logit_bias": ([*BIASES, [{1: 1.0}, None]], BAD_BIASES, 0.3),
            "top_logprobs": ([0, 1, 7], [-1, VOCABULARY + 1, 1.5, None, "x", True], 0.2),
            "block": ([None, 1, 3, 128], [0, -1, 129, 1.5, "x", True], 0.15),
            "prefill_chunks": ([(8,), (4, 16)], [(), (0,), 5, "x", (1,) * 9, (1.5,), None, (-1,)], 0.1),
            "tokenizer": ([None, ByteTokenizer()], [Odd(), "x", 5], 0.1),
            "cache": ([None], CACHES, 0.06),
            "logits": ([None, zeroed], [nothing, wide, failing, "x", 5, Odd(), []], 0.08),
            "logits_values": (
                [None, np.zeros((1, 2))],
                [Odd(), np.zeros(3), "x", {"a": np.zeros((1,))}],
                0.05,
            ),
        }
        for name, (good, bad, share) in choices.items():
            if rng.random() < share:
                found[name] = self.pick(good, bad, 0.12)
        return found


def checked(draw: Draw, options: dict) -> str:
    """Begin a stream and hold its tokens to what was promised; returns how it went."""
    given = dict(options)
    prompt = given.pop("prompt")
    before = [np.asarray(leaf) for leaf in jax.tree.leaves(given.get("state"))] if _is_state(given) else None
    try:
        stream = seqlab.stream_generate(draw.model, prompt, **given)
    except ValueError as error:
        named = [name for name in ("row", "model", *options) if re.search(rf"\b{name}\b", str(error))]
        assert named, f"names no option: {error}"
        assert str(error).count("\n") == 0 and len(str(error)) < 900, f"too long: {error}"
        return "refused"
    made = list(itertools.islice(stream, TAKEN))
    rows = len(stream.held)
    each = [[token for token in made if token.row == row] for row in range(rows)]
    limits = _per_row(given.get("max_tokens"), rows, None)
    for row, tokens in enumerate(each):
        assert [token.index for token in tokens] == list(range(len(tokens)))
        assert limits[row] is None or len(tokens) <= limits[row]
        assert all(token.finished is None for token in tokens[:-1])
        for token in tokens:
            assert (token.token == -1) == (token.finished == "nonfinite")
            assert -1 <= token.token < VOCABULARY and isinstance(token.text, str)
            if token.token >= 0:
                assert token.logprob <= 1e-5 and token.sampled_logprob <= 1e-5
                assert len(token.top) == given.get("top_logprobs", 0)
    after = stream.state
    assert all(np.asarray(leaf) is not None for leaf in jax.tree.leaves(after))
    if before is not None:
        for old, leaf in zip(before, jax.tree.leaves(given["state"]), strict=True):
            np.testing.assert_array_equal(old, np.asarray(leaf))
    if "state" not in given and given.get("logits") is None:
        _check_draws(draw, prompt, given, each)
    again = list(itertools.islice(seqlab.stream_generate(draw.model, prompt, **given), TAKEN))
    assert repr(again) == repr(made), "an equal call gave other tokens"
    return "streamed"


def _is_state(given: dict) -> bool:
    return type(given.get("state")).__name__ == "StreamState"


def _per_row(value, rows: int, default) -> list:
    if hasattr(value, "__array__"):
        value = np.asarray(value).tolist()
    values = list(value) if isinstance(value, list | tuple) else [value] * rows
    return [default if one is None else one for one in values]


def _check_draws(draw: Draw, prompt, given: dict, each: list) -> None:
    prompts = read_prompts(prompt, ByteTokenizer(), VOCABULARY, True)
    defaults = dict.fromkeys(ROW_SETTINGS) | {"temperature": 1.0, "repetition_penalty": 1.0, "seed": 0}
    defaults |= {"presence_penalty": 0.0, "frequency_penalty": 0.0, "logit_bias": None}
    values = {name: _per_row(given.get(name), len(prompts), default) for name, default in defaults.items()}
    for row, (ids, tokens) in enumerate(zip(prompts, each, strict=True)):
        own = {name: value[row] for name, value in values.items()}
        own["temperature"] = 0 if own["temperature"] < 1e-6 else own["temperature"]
        check(draw.model, ids.tolist(), own, [token for token in tokens if token.token >= 0])


def streams(count: int, seed: int, verbose: bool = False, prompts: list = PROMPTS) -> Report:
    """Draw `count` calls with these `prompts` and some that are none."""
    rng, report = random.Random(seed), Report()
    draw = Draw(rng, prompts)
    for number in range(count):
        options, begin = draw.options(), time.perf_counter()
        text = ", ".join(f"{name}={value!r:.80}" for name, value in options.items() if name != "state")
        call = f"seed {seed}, number {number}: {text}"
        try:
            with limited(60.0):
                outcome = checked(draw, options)
        except Hang:
            report.add(call, "more than 60 s")
            continue
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            report.add(
                call, f"{type(error).__name__}: {str(error)[:300]} (at {place.filename[-30:]}:{place.lineno})"
            )
            outcome = "FAULT"
        else:
            report.outcomes[outcome] += 1
        if verbose:
            print(f"{number} {time.perf_counter() - begin:.1f}s {outcome} {text:.300}", flush=True)
    return report
