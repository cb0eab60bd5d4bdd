"""The streaming contract, for every mixer and every whole model."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from flax import nnx
from helpers import assert_close

from seqlab import merge, split, take_rows, verify_streaming
from seqlab.models import Attention, Full, Window
from seqlab.models.layers import rotary_phases, rotate
from seqlab.models.video_positions import video_positions

LENGTH = 3 * zoo.WINDOW + 5


# Gradients cost half of the compilations: for one of each kind here, for all of them in the slow tests.
WITH_GRADIENTS = (*zoo.names("gradients"), "lm_hybrid")
JUMPS = ("coded", "moba")
SLOW = pytest.mark.slow
MIXERS = [name if name in zoo.names("quick") else pytest.param(name, marks=SLOW) for name in zoo.MIXERS]
MODELS = [name if name == "lm_hybrid" else pytest.param(name, marks=SLOW) for name in zoo.MODELS]


@pytest.mark.parametrize("name", MIXERS)
def test_mixer_satisfies_the_contract(name):
    # Codes and choices jump where a number lies between two: float32's own rounding may tip one over, on one
    # machine or another. float64's does not.
    dtype = "float64" if name.startswith(JUMPS) else "float32"
    verify_streaming(
        zoo.mixer(name), length=LENGTH, dtype=dtype, gradients=name in WITH_GRADIENTS
    ).raise_for_failure()


@pytest.mark.parametrize("name", MODELS)
def test_model_satisfies_the_contract(name):
    verify_streaming(zoo.model(name), length=LENGTH, gradients=name in WITH_GRADIENTS).raise_for_failure()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mamba"])
def test_mixer_satisfies_the_contract_in_float64(name):
    report = verify_streaming(
        zoo.mixer(name), length=LENGTH, dtype="float64", gradients=name == "mamba"
    ).raise_for_failure()
    assert max(check.bound for check in report.checks) <= 5e-10


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*zoo.MIXERS, *zoo.MODELS} - set(WITH_GRADIENTS)))
def test_the_other_gradients_satisfy_the_contract(name):
    verify_streaming(
        zoo.mixer(name) if name in zoo.MIXERS else zoo.model(name), length=LENGTH
    ).raise_for_failure()


@pytest.mark.parametrize("name", ["mamba"])
def test_mixer_satisfies_the_contract_in_bfloat16(name):
    verify_streaming(zoo.mixer(name), length=LENGTH, dtype="bfloat16", gradients=False).raise_for_failure()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("name", [name for name in zoo.MIXERS if not name.startswith(JUMPS)])
def test_every_mixer_satisfies_the_contract_in_other_dtypes(name, dtype):
    verify_streaming(zoo.mixer(name), length=LENGTH, dtype=dtype).raise_for_failure()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("name", zoo.MODELS)
def test_model_satisfies_the_contract_in_other_dtypes(name, dtype):
    verify_streaming(zoo.model(name, dtype), length=LENGTH).raise_for_failure()


@pytest.mark.parametrize(
    "length", [zoo.WINDOW - 1, zoo.WINDOW, zoo.WINDOW + 1, 2 * zoo.WINDOW, 3 * zoo.WINDOW + 5]
)
@pytest.mark.parametrize("sinks", [0, 3])
def test_window_is_the_mask(length, sinks):
    """Streaming by chunks of every size, longer than the window included, equals dense attention under the
    mask."""
    mixer = Attention(16, heads=2, cache=Window(zoo.WINDOW, sinks, positions="absolute"), rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(length).normal(size=(2, length, 16)), jnp.float32)
    expected = dense_attention(mixer, x, zoo.WINDOW, sinks)
    call = windowed(sinks)
    for chunk in (1, zoo.WINDOW, zoo.WINDOW + 1, length):
        assert_close(
            run(mixer, x, [chunk] * (length // chunk) + [length % chunk], call),
            expected,
            2e-5,
            f"chunks of {chunk}",
        )


@functools.cache
def windowed(sinks):
    """One compiled mixer for all lengths: whole chunks of the same size are the same program."""
    static, params = split(
        Attention(16, heads=2, cache=Window(zoo.WINDOW, sinks, positions="absolute"), rngs=nnx.Rngs(0))
    )
    call = jax.jit(lambda params, x, state: merge(static, params)(x, state))
    return functools.partial(call, params)


def dense_attention(mixer, x, window, sinks):
    """The definition, in numpy and float64: window W is the query and the W-1 keys before it."""
    p = {name: np.asarray(leaf, np.float64) for name, leaf in split(mixer)[1].items()}
    b, t, _ = x.shape
    h, k = mixer.heads, mixer.head_dim
    q, key, v = np.split((np.asarray(x, np.float64) @ p["qkv.weight"]).reshape(b, t, 3 * h, k), 3, axis=2)
    turns = np.arange(t)[:, None] * 10_000.0 ** (-np.arange(0, k, 2) / k)
    cos, sin = np.cos(turns)[:, None], np.sin(turns)[:, None]

    def turn(y):
        first, second = y[..., : k // 2], y[..., k // 2 :]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    scores = np.einsum("bihk,bjhk->bhij", turn(q), turn(key)) / np.sqrt(k)
    i, j = np.arange(t)[:, None], np.arange(t)[None]
    scores = np.where((j <= i) & ((i - j < window) | (j < sinks)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhij,bjhk->bihk", weights, v).reshape(b, t, h * k) @ p["out.weight"]


def run(mixer, x, lengths, call):
    state, outputs, start = mixer.init_state(x.shape[0]), [], 0
    for length in filter(None, lengths):
        y, state = call(x[:, start : start + length], state)
        outputs.append(y)
        start += length
    return jnp.concatenate(outputs, axis=1)


@functools.cache
def stepper(name):
    static, params = split(zoo.mixer(name))
    return params, jax.jit(lambda params, *args: merge(static, params)(*args)), zoo.mixer(name)


@st.composite
def cases(draw):
    """A split into few distinct lengths, documents that begin anywhere, rows padded on either side or holed
    in the middle, and a step that is not finite."""
    lengths, left = [], LENGTH
    while left:
        lengths.append(draw(st.sampled_from([n for n in (0, 1, 4, 11, LENGTH) if n <= left])))
        left -= lengths[-1]
    flags = st.lists(st.booleans(), min_size=LENGTH, max_size=LENGTH)
    reset = [draw(st.lists(st.integers(0, LENGTH - 1), max_size=3)) for _ in range(2)]
    first, last = draw(st.integers(0, LENGTH)), draw(st.integers(0, LENGTH))
    valid = np.stack(
        [
            np.arange(LENGTH) >= first,
            np.asarray(draw(flags)) if draw(st.booleans()) else np.arange(LENGTH) < last,
        ]
    )
    x = np.random.default_rng(draw(st.integers(0, 99))).normal(size=(2, LENGTH, 16)).astype(np.float32)
    x[0, draw(st.integers(0, LENGTH - 1)), :3] = draw(st.sampled_from([0.0, np.nan, np.inf]))
    return lengths, np.stack([np.isin(np.arange(LENGTH), r) for r in reset]), valid, x


WITHOUT_DELAY = [
    name
    for name in zoo.MIXERS
    if not name.startswith(JUMPS) and name not in ("lmuformer", "lmuformer_spiking")
]


@pytest.mark.parametrize(
    "name",
    [name if name == "window_sinks_softcap" else pytest.param(name, marks=SLOW) for name in WITHOUT_DELAY],
)
@hypothesis.settings(
    max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
)
@hypothesis.given(case=cases())
def test_any_split_of_any_ragged_packed_batch_is_its_documents_one_by_one(name, case):
    lengths, reset, valid, x = case
    params, apply, mixer = stepper(name)
    dirty = jnp.asarray(np.where(valid[..., None], x, np.nan))
    state, outputs, start = mixer.init_state(2), [], 0
    for length in lengths:
        here = slice(start, start + length)
        y, state = apply(
            params, dirty[:, here], state, jnp.asarray(reset[:, here]), jnp.asarray(valid[:, here])
        )
        outputs.append(y)
        start += length
    streamed = np.asarray(jnp.concatenate(outputs, axis=1))
    parallel = np.asarray(apply(params, dirty, None, jnp.asarray(reset), jnp.asarray(valid))[0])
    finite = np.isfinite(streamed)
    flags, atol = jnp.zeros((1, 1), bool), 2e-5 * max(1, np.abs(streamed[finite]).max(initial=0))
    for row in range(2):
        alone, steps = mixer.init_state(1), np.flatnonzero(valid[row])
        for step in steps:
            alone = mixer.init_state(1) if reset[row, step] else alone
            y, alone = apply(params, jnp.asarray(x[row : row + 1, step : step + 1]), alone, flags, ~flags)
            known = np.isfinite(y)[0, 0]  # what of a broken document is NaN is not promised
            for name_, got in (("streamed", streamed), ("parallel", parallel)):
                np.testing.assert_allclose(
                    got[row, step][known], np.asarray(y)[0, 0][known], rtol=2e-5, atol=atol, err_msg=name_
                )
        if all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(alone)):
            assert_close(take_rows(state, [row]), alone, 2e-5, "state")


def test_a_full_cache_gives_nan_beyond_its_capacity_and_never_a_wrong_number():
    mixer = Attention(16, heads=2, cache=Full(6), rngs=nnx.Rngs(0))
    x = jnp.ones((1, 9, 16))
    y, _ = mixer(x, mixer.init_state(1))
    exact, _ = mixer(x)
    assert_close(y[:, :6], exact[:, :6], 2e-5)
    assert np.isnan(np.asarray(y[:, 6:])).all()


def test_rotary_positions_depend_on_distance_alone_after_a_billion_steps():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 64)), jnp.float32) for _ in range(2))

    def score(at):
        turned = [rotate(y, jnp.full((1, 1), p, jnp.int32), 10_000.0) for y, p in ((q, at + 3), (k, at))]
        return float(jnp.sum(turned[0] * turned[1]))

    assert max(abs(score(at) - score(0)) for at in (1_000_003, 999_999_937)) < 2e-5


def test_rotary_phases_are_those_of_the_formula():
    positions = np.asarray([[0, 1, 7, 4095, 131_071]])
    cos, sin = rotary_phases(jnp.asarray(positions), 64, 1e6)
    angle = positions[..., None] * 1e6 ** (-np.arange(0, 64, 2) / 64.0)
    np.testing.assert_allclose(cos, np.cos(angle), atol=2e-6)
    np.testing.assert_allclose(sin, np.sin(angle), atol=2e-6)


def test_sections_of_the_frequencies_turn_each_by_its_own_axis():
    """By the formula; at equal positions on all axes it is the plain rotation; a video's half seconds are no
    rounding."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(1, 5, 2, 16)), jnp.float32)
    positions = jnp.asarray(rng.integers(0, 9, (1, 5, 3)) / 2, jnp.float32)
    first, second = np.split(np.asarray(x, np.float64), 2, axis=-1)
    axis = np.repeat([0, 1, 2], [2, 3, 3])
    angle = (np.asarray(positions)[..., axis] * 1e4 ** (-np.arange(0, 16, 2) / 16.0))[:, :, None]
    expected = np.concatenate(
        [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)],
        axis=-1,
    )
    assert_close(rotate(x, positions, 1e4, sections=(2, 3, 3)), expected, 2e-6)
    steps = jnp.arange(5)[None]
    same = jnp.broadcast_to(steps[..., None], (1, 5, 3))
    np.testing.assert_array_equal(rotate(x, same, 1e4, sections=(2, 3, 3)), rotate(x, steps, 1e4))
    with pytest.raises(
        ValueError, match=r"sections must give each of 3 axes its part of 8 frequencies, got \(2, 3\)"
    ):
        rotate(x, same, 1e4, sections=(2, 3))


@pytest.mark.parametrize(
    ("tokens", "grids", "words"),
    [
        ([1, 9, 9, 9, 2], [[1, 4, 4]], "must account for the video tokens from place 1 of row 0 on"),
        ([1, 9, 9, 9, 9], [[1, 4, 4], [1, 2, 2]], "more of them than videos"),
    ],
)
def test_videos_must_be_as_large_as_their_grids(tokens, grids, words):
    with pytest.raises(ValueError, match=words):
        video_positions([tokens], grids, video_token=9)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Window(0), "window must be a positive integer, got 0"),
        (lambda: Full(-1), "capacity"),
        (lambda: Attention(16, heads=3, rngs=nnx.Rngs(0)), "heads must divide dim=16"),
        (lambda: Attention(16, heads=4, kv_heads=3, rngs=nnx.Rngs(0)), "kv_heads must divide heads=4"),
        (lambda: Attention(15, heads=5, rngs=nnx.Rngs(0)), "head_dim must be even"),
        (lambda: zoo.model("lm_mamba", dtype="float23"), "dtype must be"),
        (lambda: verify_streaming(zoo.mixer("mlp"), dtype="float16"), "dtype must be one of"),
    ],
)
def test_bad_arguments_are_named(build, words):
    with pytest.raises(ValueError, match=words):
        build()
