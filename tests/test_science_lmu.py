"""The purpose of the LMU: a memory from which the window can be reconstructed, and accuracy that grows while
a sequence is still arriving."""

import functools

import figures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_close

from seqlab import merge, split
from seqlab.kernels.lmu import delay_decoder, legendre, lmu
from seqlab.models import LMUFormer
from seqlab.train.optim import adamw
from seqlab.train.step import init_state, next_token_loss, train_step

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # grain warns as it pleases

ORDER, THETA = 12, 64.0


def signal(steps):
    time = np.arange(steps)
    return np.sin(2 * np.pi * time / 60) + 0.5 * np.sin(2 * np.pi * time / 37 + 1)


def reading_error(delay, shift):
    """The largest error of the input `delay` steps ago as the memory has it, relative to the signal's size,
    once the window is full."""
    u = signal(600)
    m, _ = lmu(jnp.asarray(u, jnp.float32)[None, :, None], *legendre(ORDER, THETA))
    read = (
        np.asarray(m[0, :, 0], np.float64)
        @ delay_decoder(ORDER, THETA, np.array([min(delay + shift, THETA)]))[0]
    )
    return np.abs(read[200:] - u[200 - delay : 600 - delay]).max() / np.abs(u).max()


def test_a_delay_line_gives_back_its_window():
    """Twelve numbers hold 64 steps of two sinusoids to a few thousandths, if one knows that a zero-order hold
    comes half a step late."""
    inside = {delay: reading_error(delay, 0.5) for delay in range(8, 64, 5)}
    claim = (
        "Two sinusoids are fed to a Legendre memory of order 12 with a window of 64 steps; earlier inputs "
        "are reconstructed from its twelve coefficients. Largest error over 400 steps, relative to the "
        "signal's amplitude."
    )
    rows = [[delay, f"{error:.1e}"] for delay, error in {0: reading_error(0, 0.5), **inside}.items()]
    figures.keep("delay_line", "Reconstructing the window of an LMU", claim, ["steps ago", "error"], rows)
    assert max(inside.values()) < 3e-3, inside
    assert 0.05 < reading_error(32, 0.0) < 0.12  # without the half step
    # The newest input has the largest error: the polynomials end there.
    assert 0.01 < reading_error(0, 0.5) < 0.06


def test_a_longer_window_than_the_order_can_hold_loses_what_is_fast():
    """The same order over ten times the window: the slow is kept, sinusoids of some 50 steps are gone."""
    for frequency, bound in ((1, 2e-2), (12, None)):
        u = np.sin(2 * np.pi * frequency * np.arange(3000) / 600)
        m, _ = lmu(jnp.asarray(u, jnp.float32)[None, :, None], *legendre(ORDER, 10 * THETA))
        read = np.asarray(m[0, :, 0], np.float64) @ delay_decoder(ORDER, 10 * THETA, np.array([300.5]))[0]
        error = np.abs(read[1500:] - u[1200:2700]).max()
        assert error < bound if bound else error > 0.3, (frequency, error)


@functools.cache
def digits():
    pytest.importorskip("sklearn")
    from seqlab.train.tasks import Digits

    held_out = Digits().validation()
    examples = [held_out[i] for i in range(len(held_out))]
    return (
        Digits().train(0),
        np.stack([e["inputs"] for e in examples]),
        np.array([e["targets"][-1] for e in examples]),
    )


def trained(epochs, **options):
    """A small causal LMUFormer that has learnt to name a digit at the last of its 64 pixels, and the losses
    on the way."""
    from seqlab.train.data import Batches

    train, _, _ = digits()
    steps = epochs * len(train) // 64
    static, params = split(
        LMUFormer(1, 10, dim=32, theta=64.0, expand=2, centred=False, rngs=nnx.Rngs(0), **options)
    )
    optimizer = adamw(steps, peak=1e-2, warmup=10, weight_decay=0.01)
    state, losses = init_state(static, params, optimizer), []
    step = jax.jit(functools.partial(train_step, static, optimizer, next_token_loss, 1))
    for _, batch in zip(range(steps), Batches(train, 64, 0).iterate(0), strict=False):
        state, measured = step(state, {name: batch[name] for name in ("inputs", "targets", "valid")})
        losses.append(float(measured.loss))
    return merge(static, state.params), losses


def test_the_answer_to_a_digit_grows_better_with_every_row_that_has_arrived():
    model, _ = trained(8)
    _, images, labels = digits()
    static, params = split(model)
    run = jax.jit(lambda params, x, state: merge(static, params)(x, state))
    state, answers = model.init_state(len(images)), []
    for pixel in range(64):  # as they arrive
        logits, state = run(params, images[:, pixel : pixel + 1], state)
        answers.append(logits)
    answers = np.concatenate(answers, axis=1)
    assert_close(answers, run(params, images, None)[0], 2e-5, "streamed = parallel")
    right = (answers.argmax(-1) == labels[:, None]).mean(axis=0)
    seen = right[[15, 31, 47, 63]]  # a quarter of the image, half, three quarters, all of it

    def draw(ax):
        ax.plot(range(1, 65), right)
        ax.set(xlabel="pixels seen, of 64", ylabel="accuracy", ylim=(0, 1))

    claim = (
        "Handwritten digits are fed one pixel at a time to a causal LMUFormer (one block of width 32, "
        "eight passes over the training images); accuracy of its prediction at every step on 360 held-out "
        "images."
    )
    rows = [[n, f"{right[n - 1]:.3f}"] for n in (8, 16, 24, 32, 40, 48, 56, 64)]
    figures.keep(
        "digits_seen",
        "Accuracy while a sequence arrives",
        claim,
        ["pixels seen", "accuracy"],
        rows,
        draw,
    )
    assert right[-1] >= 0.93, right
    assert (np.diff(seen) > 0.08).all(), seen
    assert right[55] >= 0.85, "an eighth of the sequence need not be read"


def test_the_spiking_form_learns_through_its_spikes():
    _, losses = trained(12, spiking=True)
    assert losses[0] > 2.2 and np.mean(losses[-10:]) < 1.7, losses[::20]
