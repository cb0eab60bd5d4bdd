"""The LMU family beyond the streaming contract: published sizes, streams that are late, packed and padded
batches of the centred form, spikes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from flax import nnx
from helpers import assert_close, assert_identical, random

from seqlab import merge, split, state_bytes, verify_streaming
from seqlab.models import LMU, LMUFormer, RecurrentLMU
from seqlab.models.layers import Linear
from seqlab.models.legendre import spiking
from seqlab.models.legendre.in_turn import TimeConv
from seqlab.models.legendre.lmuformer import RunningMean
from seqlab.models.legendre.spiking import lif
from seqlab.module import count_params
from seqlab.train.optim import adamw
from seqlab.train.step import init_state, train_step


def size(build):
    return count_params(nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0))))


def test_sizes_are_the_published_ones():
    """psMNIST: 166 092 and 102 027 parameters with their linear heads; Speech Commands: 1.622 and 1.690
    million."""
    head = size(functools.partial(Linear, 346, 10, bias=True))
    assert size(functools.partial(LMU, 1, hidden=346, order=468, theta=784.0)) + head == 166_092
    head = size(functools.partial(Linear, 212, 10, bias=True))
    assert size(functools.partial(RecurrentLMU, 1, hidden=212, order=256, theta=784.0)) + head == 102_027
    assert round(size(functools.partial(LMUFormer, 128, 35)) / 1e6, 3) == 1.622
    assert round(size(functools.partial(LMUFormer, 128, 35, spiking=True)) / 1e6, 3) == 1.690


def test_the_state_is_small_and_known():
    """Two inputs for each of five convolutions and what waits beside the last, one memory of `dim`, ten sums
    and three counters."""
    model = nnx.eval_shape(lambda: LMUFormer(1, 10, dim=32, rngs=nnx.Rngs(0)))
    assert state_bytes(model) == 4 * (2 * (1 + 4 * 32) + 32 + 32 + 10 + 3)
    assert (model.causal, model.lookahead) == (True, 5)
    assert nnx.eval_shape(lambda: LMUFormer(1, 10, dim=32, centred=False, rngs=nnx.Rngs(0))).lookahead == 0


def test_a_centred_convolution_is_that_with_zeros_on_both_sides():
    conv, x = TimeConv(3, 4, width=5, centred=True, rngs=nnx.Rngs(0)), random(0, 2, 9, 3)
    expected = jax.lax.conv_general_dilated(
        x, conv.weight[...], (1,), [(2, 2)], dimension_numbers=("NWC", "WIO", "NWC")
    )
    assert_close(conv(x)[0], expected, 1e-6)
    causal = TimeConv(3, 4, width=5, rngs=nnx.Rngs(0))
    assert_close(causal(x)[0][:, 2:], expected[:, :-2], 1e-6)
    with pytest.raises(ValueError, match="width must be odd where the convolution is centred, got 4"):
        TimeConv(3, 4, width=4, centred=True, rngs=nnx.Rngs(0))


@functools.cache
def runner(name):
    static, params = split(zoo.mixer(name))
    return params, jax.jit(lambda params, *arguments: merge(static, params)(*arguments)), zoo.mixer(name)


def documents(seed, time=40):
    """Rows of documents of ten or of three steps among padding: inputs full of NaN where invalid, flags, and
    the steps of each document."""
    rng = np.random.default_rng(seed)
    x, valid, reset = (
        rng.normal(size=(2, time, 16)).astype(np.float32),
        np.zeros((2, time), bool),
        np.zeros((2, time), bool),
    )
    found = []
    for row, first, last, count in (
        (0, 0, 13, 10),
        (0, 13, 16, 3),
        (0, 16, 40, 10),
        (1, 2, 22, 10),
        (1, 22, 39, 10),
    ):
        steps = np.sort(rng.permutation(np.arange(first, last))[:count])
        valid[row, steps], reset[row, steps[0]] = True, True
        found.append((row, steps))
    reset |= (rng.random((2, time)) < 0.2) & ~valid  # ignored
    return np.where(valid[..., None], x, np.nan), reset, valid, found


@pytest.mark.parametrize("name", ["lmuformer", "lmuformer_causal", "lmuformer_spiking"])
def test_packed_and_padded_documents_are_separate_documents(name):
    """Also where the convolutions look ahead: over padding to the next step, not beyond the end of a
    document."""
    params, run, mixer = runner(name)
    x, reset, valid, found = documents(0)
    parallel, _ = run(params, x, None, reset, valid)
    late, state, streamed = mixer.lookahead, mixer.init_state(2), []
    for cut in (slice(0, 13), slice(13, 14), slice(14, 27), slice(27, 40)):
        y, state = run(params, x[:, cut], state, reset[:, cut], valid[:, cut])
        streamed.append(y)
    streamed = np.concatenate(streamed, axis=1)
    for row, steps in found:
        alone, _ = run(params, x[row : row + 1, steps], None, None, None)
        assert_close(parallel[row, steps], alone[0], 2e-5, f"parallel, row {row}")
        if len(steps) > late:
            assert_close(
                streamed[row, steps[late:]], alone[0, : len(steps) - late], 2e-5, f"streamed, row {row}"
            )


@pytest.mark.parametrize("name", ["lmu", "lmu_cell", "lmuformer", "lmuformer_spiking"])
def test_no_steps_change_nothing(name):
    mixer = zoo.mixer(name)
    state = jax.tree.map(lambda leaf: leaf + 1, mixer.init_state(2))
    y, after = mixer(jnp.zeros((2, 0, 16)), state, jnp.zeros((2, 0), bool), jnp.zeros((2, 0), bool))
    assert y.shape[:2] == mixer(jnp.zeros((2, 0, 16)))[0].shape[:2] == (2, 0)
    assert_identical(after, state)


def test_a_stream_that_is_late_does_not_count_for_ever():
    """After two thousand steps the counter that tells the first steps from the others still holds a small
    number."""
    params, run, mixer = runner("lmuformer")
    _, state = run(params, random(0, 1, 2000, 16), mixer.init_state(1), None, None)
    assert int(state[0][0]) == mixer.lookahead + 1


def test_lif_by_hand():
    """tau = 2, threshold 1: v = 0, 0.75 (no spike), 1.375 (spike); hard reset to 0, soft reset to 0.375."""
    x = jnp.asarray([1.5, 2.0, 0.5])[None, :, None]
    spikes, v = lif(x)
    np.testing.assert_allclose(spikes[0, :, 0], [0, 1, 0])
    np.testing.assert_allclose(v[0, :, 0], [0.75, 0.0, 0.25])
    spikes, v = lif(x, rest=None)
    np.testing.assert_allclose(spikes[0, :, 0], [0, 1, 0])
    np.testing.assert_allclose(v[0, :, 0], [0.75, 0.375, 0.4375])
    spikes, v = lif(x, decay_input=False)  # whole inputs
    np.testing.assert_allclose(spikes[0, :, 0], [1, 1, 0])
    np.testing.assert_allclose(v[0, :, 0], [0, 0, 0.5])
    # It decays from its initial value; 0.5 + 1.5 / 2 is at the threshold and fires.
    spikes, v = lif(x, rest=0.5, threshold=1.25)
    np.testing.assert_allclose(spikes[0, :, 0], [1, 1, 0])
    np.testing.assert_allclose(v[0, :, 0], [0.5, 0.5, 0.75])
    with pytest.raises(ValueError, match=r"tau must be a number of steps >= 1, got 0\.5"):
        lif(x, tau=0.5)


@pytest.mark.parametrize("detach_reset", [True, False])
@pytest.mark.parametrize("rest", [0.0, None])
def test_the_surrogate_gradient_is_that_of_the_equations(rest, detach_reset, x64):
    """By hand, backwards in time: dL/dv' collects the spike's surrogate and what the reset lets through."""
    rng = np.random.default_rng(0)
    x, weight = rng.normal(0.8, 1.5, size=(1, 9, 3)), rng.normal(size=(1, 9, 3))
    options = {"rest": rest, "detach_reset": detach_reset, "tau": 3.0, "alpha": 2.0}
    gradient = jax.grad(lambda x: jnp.sum(lif(x, **options)[0] * weight))(jnp.asarray(x))
    spikes, after = (np.asarray(y)[0] for y in lif(jnp.asarray(x), **options))
    before = np.concatenate([np.zeros((1, 3)), after[:-1]])
    charged = before + (x[0] - before) / 3.0
    s = 1 / (1 + np.exp(-2.0 * (charged - 1.0)))
    slope = 2.0 * s * (1 - s)
    expected, back = np.zeros((9, 3)), np.zeros(3)
    for t in reversed(range(9)):
        through = 1.0 if rest is None else 1 - spikes[t]
        jump = 0.0 if detach_reset else -(1.0 if rest is None else charged[t]) * slope[t]
        g = weight[0, t] * slope[t] + back * (through + jump)
        expected[t], back = g / 3.0, g * (1 - 1 / 3.0)
    assert spikes.any()
    assert_close(gradient[0], expected, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in zoo.MIXERS if "spiking" in name])
def test_rounding_decides_no_spike_of_the_contract(name, monkeypatch):
    """The contract's tests of the spiking forms are stable because in none of their runs a membrane comes
    near its threshold. And spikes there are."""
    margins, rates = [], []

    def watched(z):
        margins.append(np.abs(z).min(initial=1.0))
        rates.append(np.mean(z >= 0))
        return (z >= 0).astype(z.dtype)

    monkeypatch.setattr(spiking, "fire", lambda z, alpha: jax.pure_callback(watched, z, z))
    verify_streaming(zoo.mixer(name), length=3 * zoo.WINDOW + 5, gradients=False).raise_for_failure()
    assert min(margins) > 5e-5
    assert 0.05 < np.mean(rates) < 0.6


@pytest.mark.parametrize("spiking", [False, True])
def test_every_parameter_learns_and_every_statistic_moves(spiking):
    static, params = split(
        LMUFormer(3, 4, dim=8, theta=12.0, expand=2, order=6, spiking=spiking, rngs=nnx.Rngs(1))
    )
    params = {
        name: random(i, *leaf.shape) if "W_u" in name else leaf
        for i, (name, leaf) in enumerate(params.items())
    }

    def loss(model, batch):
        logits, _ = model(batch["x"], None, None, batch["valid"])
        return -jnp.sum(jax.nn.log_softmax(logits)[:, -1, 1]), jnp.asarray(4.0)

    optimizer = adamw(10, peak=1e-2, warmup=0)
    state = init_state(static, params, optimizer)
    valid = np.arange(14)[None] >= np.array([[0], [3], [0], [5]])
    batch = {
        "x": np.where(valid[..., None], np.asarray(random(0, 4, 14, 3, scale=3.0)), np.nan),
        "valid": valid,
    }
    new, measured = jax.jit(functools.partial(train_step, static, optimizer, loss, 1))(state, batch)
    assert measured.finite
    still = [name for name, leaf in params.items() if np.array_equal(new.params[name], leaf)]
    # A bias in front of a BatchNorm is taken away by it: what reaches it is rounding, if anything.
    assert all(re.search(r"\.(proj|up|down|W_u|W_h)\.bias$", name) for name in still), still


def test_the_running_mean_is_the_mean():
    mean = RunningMean(Linear(6, 4, bias=True, rngs=nnx.Rngs(0)), 4)
    x = random(0, 2, 11, 6)
    expected = jnp.cumsum(mean.head(x), axis=1) / jnp.arange(1, 12)[None, :, None]
    assert_close(mean(x)[0], expected, 1e-6)


def test_options_of_the_cell():
    build = functools.partial(RecurrentLMU, 4, order=3, theta=6.0, channels=2, rngs=nnx.Rngs(0))
    assert build(cell="none").outputs == 10 and build(cell="none", input_to_hidden=False).outputs == 6
    assert build(cell="none", hidden_to_memory=False).init_state(1).hidden == ()
    x = random(0, 1, 5, 4)
    open_loop = build(cell="none", hidden_to_memory=False, memory_to_memory=False)
    parallel = LMU(4, order=3, theta=6.0, channels=2, rngs=nnx.Rngs(0))
    m, _ = parallel.memory(x @ open_loop.e_x[...])
    assert_close(open_loop(x)[0], jnp.concatenate([m, x], axis=-1), 1e-5)
    with pytest.raises(
        ValueError, match="hidden must be 10, the width of what is read, where cell='none', got 7"
    ):
        build(cell="none", hidden=7)
    with pytest.raises(ValueError, match="did you mean 'dense'"):
        build(cell="dens")
    with pytest.raises(ValueError, match="theta must be a positive number of steps, got -1"):
        LMU(4, theta=-1, rngs=nnx.Rngs(0))
    assert_identical(parallel.init_state(2), jnp.zeros((2, 2, 3)))
