"""MambaMixer and TSM2 beyond the contract and the golden numbers: packed rows in both directions, the sums,
the two forms of TSM2."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_close, random

from seqlab import take_rows, verify_streaming
from seqlab.models import (
    TSM2,
    GroupedChannelMixer,
    LayerNorm,
    Mamba,
    MambaMixerStack,
    SelectiveChannelMixer,
    SelectiveMixer,
    StreamingTSM2,
)
from seqlab.models.state_space.mambamixer import ends
from seqlab.module import merge, split

SMALL = functools.partial(SelectiveMixer, state_size=2)


def documents(reset, valid):
    """The valid steps of one row, sequence by sequence."""
    steps = np.flatnonzero(valid)
    return [
        part
        for part in np.split(steps, [i for i, step in enumerate(steps) if i and reset[step]])
        if len(part)
    ]


def alone(run, x, steps):
    """The result of `run(x, valid)` for one sequence, at the front of a row padded with steps that are not
    valid (one shape, one compilation; that filling changes nothing is a clause of the contract)."""
    front = np.full_like(x, np.nan)
    front[: len(steps)] = x[steps]
    y, _ = run(front[None], np.arange(len(x))[None] < len(steps))
    return y[:, : len(steps)]


def ragged(seed, time, rate=0.25):
    rng = np.random.default_rng(seed)
    return rng.random((3, time)) < rate, np.stack(
        [rng.random(time) < 0.6, np.arange(time) < time - 4, np.arange(time) >= 3]
    )


def test_one_direction_is_mamba():
    mamba, mixer = Mamba(8, state_size=3, rngs=nnx.Rngs(0)), SelectiveMixer(8, state_size=3, rngs=nnx.Rngs(0))
    x = random(1, 2, 9, 8)
    assert_close(*(jax.jit(lambda x, m=m: m(x, m.init_state(2)))(x) for m in (mixer, mamba)), 0.0)


@pytest.mark.parametrize("seed", range(2))
def test_two_directions_keep_packed_documents_apart(seed):
    mixer = SelectiveMixer(8, bidirectional=True, state_size=4, rngs=nnx.Rngs(0))
    (reset, valid), x = ragged(seed, 17), np.asarray(random(seed, 3, 17, 8))
    y = np.asarray(
        jax.jit(lambda *flags: mixer(jnp.where(valid[..., None], x, jnp.nan), None, *flags)[0])(reset, valid)
    )
    run = jax.jit(lambda x, valid: mixer(x, None, None, valid))
    assert (y[~valid] == 0).all()
    for row in range(3):
        for steps in documents(reset[row], valid[row]):
            assert_close(y[row : row + 1, steps], alone(run, x[row], steps), 1e-5)


def test_two_directions_see_the_future_and_refuse_a_state():
    mixer = SelectiveMixer(8, bidirectional=True, state_size=4, rngs=nnx.Rngs(0))
    x, run = random(0, 1, 6, 8), jax.jit(lambda x: mixer(x)[0])
    assert np.abs(run(x)[:, 0] - run(x.at[:, -1].add(1.0))[:, 0]).max() > 1e-6
    assert verify_streaming(mixer, length=13).ok
    with pytest.raises(ValueError, match="state must be None"):
        mixer(x, mixer.init_state(1))


def test_a_sequence_ends_before_the_next_valid_reset():
    reset, valid = (np.asarray([[flag == "1" for flag in text]]) for text in ("0110010", "1101011"))
    assert np.asarray(ends(jnp.asarray(reset), None)).astype(int).tolist() == [[1, 1, 0, 0, 1, 0, 0]]
    # of valid steps 0, 1, 3, 5, 6 those at 1 and 5 begin a sequence
    assert np.flatnonzero(
        np.asarray(ends(jnp.asarray(reset), jnp.asarray(valid)))[0] & valid[0]
    ).tolist() == [0, 3]


def test_the_channel_mixer_is_the_mixer_of_the_transpose():
    channel = SelectiveChannelMixer(6, tokens=5, mixer=SMALL, rngs=nnx.Rngs(0))
    x, run = random(0, 2, 5, 6), jax.jit(lambda x, valid=None: channel(x, None, None, valid)[0])
    assert_close(run(x), jax.jit(lambda x: channel.mixer(x.swapaxes(1, 2))[0].swapaxes(1, 2))(x), 1e-6)
    valid = jnp.asarray([[True, False, True, True, True], [True] * 5])
    dirty = run(jnp.where(valid[..., None], x, jnp.nan), valid)
    assert_close(dirty[0], run(x.at[0, 1].set(0.0))[0].at[1].set(0.0), 1e-6)
    with pytest.raises(ValueError, match="tokens=5 steps"):
        channel(x[:, :4])
    with pytest.raises(ValueError, match="reset must be None"):
        channel(x, None, valid)


def test_at_first_the_sums_are_a_residual_network():
    stack = MambaMixerStack(
        8, 2, SMALL, functools.partial(GroupedChannelMixer, groups=2, mixer=SMALL), rngs=nnx.Rngs(0)
    )

    def residual(x):
        for i in range(2):
            x = x + stack.token_mixers[i](stack.token_norms[i](x))[0]
            x = x + stack.channel_mixers[i](stack.channel_norms[i](x))[0]
        return LayerNorm(8)(x)

    x = random(0, 2, 7, 8)
    assert_close(jax.jit(lambda x: stack(x)[0])(x), jax.jit(residual)(x), 1e-5)


def test_weights_beyond_a_sum_are_never_used():
    stack = MambaMixerStack(
        8,
        2,
        SMALL,
        functools.partial(GroupedChannelMixer, groups=2, mixer=SMALL),
        final_sum=False,
        rngs=nnx.Rngs(0),
    )
    static, params = split(stack)
    used = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(merge(static, p)(random(0, 2, 7, 8))[0]))))(params)
    mask = {
        "alpha": [[1, 0, 0], [1, 1, 0]],
        "beta": [[1, 0, 0], [1, 1, 0]],
        "theta": [[1, 1, 0], [1, 1, 1]],
        "gamma": [[1, 0, 0], [1, 1, 0]],
    }
    for name, expected in mask.items():
        assert ((np.asarray(used[name]) != 0) == np.asarray(expected)).all(), name


def streaming(variates=3, length=13, **options):
    options = {"patch": 4, "stride": 3, "dim": 4, "depth": 1, "mixer": SMALL} | options
    return StreamingTSM2(variates, length, 2, **options, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("options", "times"),
    [
        ({}, (12, 21)),
        ({"patch": 5, "stride": 5, "reversible": False}, (5,)),
        ({"patch": 1, "stride": 1, "length": 3}, (9,)),
    ],
)
def test_a_forecast_is_the_end_of_a_stream_of_any_length(options, times):
    model = streaming(**options)
    x = random(0, 2, 21, 3, scale=3.0) + 7
    for time in times:
        unread = (time - model.patch) % model.stride
        y = jax.jit(lambda x: model(x)[0][:, -1])(x[:, unread:time])
        assert_close(jax.jit(lambda x: model.forecast(x))(x[:, :time]), y, 1e-5)
        assert np.abs(y).min() > 0


def test_streaming_forecasts_of_ragged_packed_rows_are_those_of_their_documents():
    model = streaming()
    (reset, valid), x = ragged(0, 24, 0.1), np.asarray(random(0, 3, 24, 3))
    state, outputs, run = model.init_state(3), [], jax.jit(lambda *arguments: model(*arguments))
    for start in range(0, 24, 8):
        here = slice(start, start + 8)
        y, state = run(
            jnp.where(valid[:, here, None], x[:, here], jnp.nan), state, reset[:, here], valid[:, here]
        )
        outputs.append(y)
    y = np.asarray(jnp.concatenate(outputs, axis=1))
    assert (y[~valid] == 0).all()
    fresh = jax.jit(lambda x, valid: model(x, model.init_state(1), None, valid))
    for row in range(3):
        for steps in documents(reset[row], valid[row]):
            assert_close(y[row : row + 1, steps], alone(fresh, x[row], steps), 2e-5)
        front = np.concatenate([x[row][steps], np.zeros((24 - len(steps), 3), np.float32)])
        assert_close(take_rows(state, [row]), fresh(front[None], np.arange(24)[None] < len(steps))[1], 2e-5)


def test_steps_between_patches_keep_the_forecast_and_a_young_sequence_has_none():
    model = streaming()
    y = jax.jit(lambda x: model(x)[0])(random(0, 2, 9, 3))
    assert (np.asarray(y[:, :3]) == 0).all()
    assert_close(y[:, 4:6], jnp.repeat(y[:, 3:4], 2, axis=1), 0.0)
    assert np.abs(y[:, 6] - y[:, 5]).max() > 1e-4


def test_running_statistics_are_those_of_the_formula():
    from seqlab.models.state_space.tsm2_streaming import Scale, running_scale

    x = random(0, 1, 9, 2) + 1000.0  # far from 0, where sums of squares lose every digit
    zero = jnp.zeros((1, 2))
    scale = running_scale(x, Scale(zero[:, :1], zero, zero), None, None, 0.9)
    for t in range(9):
        weights, past = 0.9 ** np.arange(t, -1, -1.0)[:, None], np.asarray(x[0, : t + 1], np.float64)
        mean = (weights * past).sum(0) / weights.sum()
        np.testing.assert_allclose(scale.mean[0, t], mean, rtol=1e-6)
        np.testing.assert_allclose(
            scale.squares[0, t], (weights * (past - mean) ** 2).sum(0), rtol=2e-3, atol=1e-6
        )


def test_reversible_normalisation_moves_with_the_series():
    """Forecasts follow a change of level and of unit (RevIN): exactly so for the window, and for the past."""
    x = random(0, 2, 13, 3)
    for model in (
        TSM2(3, 13, 2, patch=4, stride=3, dim=4, depth=1, mixer=SMALL, rngs=nnx.Rngs(0)),
        streaming(),
    ):
        run = jax.jit(lambda x, model=model: model.forecast(x))
        assert_close(run(5 * x + 40), 5 * run(x) + 40, 1e-4)


def test_a_window_is_cut_from_its_end_or_from_its_start():
    for align, unread in (("end", slice(0, 2)), ("start", slice(12, 14))):
        model = TSM2(
            2,
            14,
            3,
            patch=4,
            stride=4,
            dim=4,
            depth=1,
            mixer=SMALL,
            reversible=False,
            align=align,
            rngs=nnx.Rngs(0),
        )
        x = random(0, 2, 14, 2)
        assert model.patches == 3
        run = jax.jit(lambda x, model=model: model(x))
        assert_close(run(x.at[:, unread].set(9.0)), run(x), 0.0)
        assert np.abs(run(x.at[:, 5].set(9.0)) - run(x)).max() > 1e-4


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: TSM2(0, 16, 4, rngs=nnx.Rngs(0)), "variates must be a positive integer, got 0"),
        (lambda: TSM2(2, 16, 0, rngs=nnx.Rngs(0)), "horizon must be a positive integer"),
        (lambda: TSM2(2, 15, 4, rngs=nnx.Rngs(0)), "patch must be at most length=15, got 16"),
        (lambda: TSM2(2, 15, 4, patch=4, rngs=nnx.Rngs(0)), "stride must be at most patch=4"),
        (lambda: TSM2(2, 16, 4, align="ends", rngs=nnx.Rngs(0)), "did you mean 'end'"),
        (lambda: TSM2(2, 16, 4, rngs=nnx.Rngs(0))(jnp.ones((1, 15, 2))), "length=16 steps, got 15"),
        (lambda: TSM2(2, 16, 4, rngs=nnx.Rngs(0))(jnp.ones((1, 16, 3))), "variates = 2"),
        (lambda: streaming().forecast(jnp.ones((1, 3, 3))), "at least patch=4 steps, got 3"),
        (lambda: GroupedChannelMixer(9, groups=2, rngs=nnx.Rngs(0)), "groups must divide dim=9, got 2"),
        (lambda: MambaMixerStack(8, 0, rngs=nnx.Rngs(0)), "depth must be a positive integer, got 0"),
        (lambda: SelectiveMixer(8, inner=0, rngs=nnx.Rngs(0)), "inner must be a positive integer"),
        (lambda: SelectiveMixer(8, dt_rank=0, rngs=nnx.Rngs(0)), "dt_rank must be a positive integer"),
    ],
)
def test_bad_arguments_are_named(build, words):
    with pytest.raises(ValueError, match=words):
        build()
