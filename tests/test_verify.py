"""The checker: a mixer that breaks one thing on purpose fails in that check, and says what usually causes
it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqlab import count_params, params_of, verify_streaming
from seqlab.models import LanguageModel
from seqlab.models.layers import Linear
from seqlab.module import Module, in_evaluation, merge, split


class RunningMean(Module):
    """The mean of all steps so far; `breaks` names what it does wrong."""

    causal, lookahead, exact = True, 0, True

    def __init__(self, dim, *, breaks=None, rngs):
        self.dim, self.breaks = dim, breaks
        self.scale = Linear(dim, dim, rngs=rngs)
        self.calls = 0
        self.kept = nnx.Variable(jnp.zeros(()))

    def init_state(self, batch, dtype=jnp.float32):
        if self.breaks == "shares":
            zeros = jnp.zeros((batch, self.dim), dtype)
            return {"sum": zeros, "count": zeros}
        return {"sum": jnp.zeros((batch, self.dim), dtype), "count": jnp.zeros((batch, self.dim), dtype)}

    def __call__(self, x, state=None, reset=None, valid=None):
        b, t, _ = x.shape
        if self.breaks == "empty":
            x = x + 0 * x.max(axis=1, keepdims=True)
        keep = jnp.ones((b, t), bool) if valid is None or self.breaks == "valid" else valid
        fresh = jnp.zeros((b, t), bool) if reset is None or self.breaks == "reset" else reset & keep
        carry = self.init_state(b, x.dtype) if state is None or (self.breaks == "chunks" and t > 1) else state

        def step(carry, now):
            x, keep, fresh = now
            wide = fresh[:, None]
            old = {
                name: leaf * ~wide if self.breaks == "times 0" else jnp.where(wide, 0, leaf)
                for name, leaf in carry.items()
            }
            new = {"sum": old["sum"] + x, "count": old["count"] + 1}
            if self.breaks == "decays":
                new = jax.tree.map(lambda a, c: jnp.where(keep[:, None], a, c * 0.9), new, carry)
            else:
                new = jax.tree.map(lambda a, c: jnp.where(keep[:, None], a, c), new, carry)
            mean = new["sum"] / jnp.maximum(new["count"], 1)
            return new, mean + (jnp.roll(mean, 1, axis=0) if self.breaks == "rows" else 0)

        x = x if self.breaks == "valid" else jnp.where(keep[..., None], x, 0)
        carry, y = jax.lax.scan(step, carry, (x.swapaxes(0, 1), keep.T, fresh.T))
        y = self.scale(y.swapaxes(0, 1))
        if self.breaks == "dtype" and state is not None:
            carry = carry | {"sum": carry["sum"].astype(jnp.bfloat16)}
        if self.breaks == "counts":
            self.calls += 1
        if self.breaks == "keeps":
            self.kept = y
        if self.breaks == "writes":
            self.kept[...] = y.mean()
        if self.breaks != "shown":
            y = jnp.where(keep[..., None], y, 0)
        return y, None if state is None else carry


BROKEN = {
    "chunks": ("C1", "two chunks = whole: outputs"),
    "empty": ("C1", "a chunk of no steps changes nothing"),
    "valid": ("C2", "ragged rows padded with NaN on the left: outputs"),
    "shown": ("C2", "outputs at padding are 0"),
    "decays": ("C2", "a chunk of padding leaves the state bit-identical"),
    "reset": ("C3", "packed documents = separate documents: outputs"),
    "times 0": ("C3", "reset of a broken (NaN) state = a fresh state"),
    "dtype": ("C4", "the state keeps its shapes and dtypes"),
    "rows": ("C6", "a row taken out = the row in its batch"),
    "counts": ("C7", "a call changes nothing on the module"),
    "keeps": ("C7", "a call changes nothing on the module"),
    "writes": ("C7", "a call changes nothing on the module"),
    "shares": ("C7", "leaves of a fresh state share no memory"),
}


def test_an_honest_mixer_passes_every_check():
    report = verify_streaming(RunningMean(6, rngs=nnx.Rngs(0)), length=12)
    assert report.ok, str(report)
    assert {what for _, what in BROKEN.values()} <= {check.what for check in report.checks}


@pytest.mark.parametrize("breaks", BROKEN)
def test_what_is_broken_fails_where_it_breaks(breaks):
    mixer = RunningMean(6, breaks=breaks, rngs=nnx.Rngs(0))
    report = verify_streaming(mixer, length=12, gradients=False)
    failed = {(check.clause, check.what): check for check in report.checks if check.passed is False}
    assert BROKEN[breaks] in failed, str(report)
    assert "usually because" in str(failed[BROKEN[breaks]])
    assert mixer.calls == 0 and not np.asarray(mixer.kept[...]).any()  # the user's module is left alone
    with pytest.raises(AssertionError, match=BROKEN[breaks][0]):
        report.raise_for_failure()


class Dropped(RunningMean):
    """With NNX's own dropout, which is born in training mode and brings a key and a count."""

    def __init__(self, dim, *, rngs):
        super().__init__(dim, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, state=None, reset=None, valid=None):
        y, state = super().__call__(x, state, reset, valid)
        return self.dropout(y), state


def test_dropout_of_nnx_is_no_parameter_and_is_verified_in_evaluation():
    mixer = Dropped(6, rngs=nnx.Rngs(0))
    assert list(params_of(mixer)) == ["scale.weight"] and count_params(mixer) == 36
    assert not mixer.dropout.deterministic
    assert verify_streaming(mixer, length=12).ok
    assert not mixer.dropout.deterministic


@pytest.mark.parametrize("options", [{}, {"remat": "block"}, {"scan_layers": True}], ids=str)
def test_dropout_of_nnx_draws_anew_in_every_training_call(options):
    model = LanguageModel(7, 6, 2, mixers=Dropped, channel_mixer=None, rngs=nnx.Rngs(0), **options)
    static, params = split(model)
    tokens = jnp.ones((1, 3), jnp.int32)

    @jax.jit
    def train(params):
        model = merge(static, params)
        model.train()
        return model(tokens)[0], split(model)[1]

    first, moved = train(params)
    second, _ = train(moved)
    assert not np.allclose(first, second)
    np.testing.assert_array_equal(train(params)[0], first)
    counts = [value for name, value in moved.items() if name.endswith("count")]
    assert all((np.asarray(count) == 1).all() for count in counts) and counts
    still = in_evaluation(model)
    np.testing.assert_array_equal(still(tokens)[0], still(tokens)[0])
