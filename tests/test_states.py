"""Mixers of mixers keep the bounds of their parts; what enters as a state fits or is refused."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import seqlab
from seqlab.mixer import CannotRewind, Composite, as_mixer, width_of
from seqlab.models import Attention, Full, LanguageModel, Linear, Mamba, MambaMixerStack, SwiGLU, Window
from seqlab.module import Module
from seqlab.state import mask_steps


class Pointwise(Module):
    """The members of the protocol and no others."""

    causal, lookahead, exact = True, 0, True

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.out = Linear(dim, dim, rngs=rngs)

    def init_state(self, batch, dtype=jnp.float32):
        return ()

    def __call__(self, x, state=None, reset=None, valid=None):
        return self.out(mask_steps(x, valid)), state


class Both(Composite, Module):
    """The sum of two mixers."""

    def __init__(self, dim: int, *factories, rngs: nnx.Rngs):
        self.parts = nnx.List([factory(dim, rngs=rngs) for factory in factories])

    def children(self):
        return list(self.parts)

    def init_state(self, batch, dtype=jnp.float32):
        return tuple(part.init_state(batch, dtype) for part in self.parts)

    def __call__(self, x, state=None, reset=None, valid=None):
        old = (None,) * len(self.parts) if state is None else state
        pairs = [part(x, own, reset, valid) for part, own in zip(self.parts, old, strict=True)]
        return sum(y for y, _ in pairs), None if state is None else tuple(own for _, own in pairs)


def attention(steps: int = 16, **options):
    return partial(Attention, heads=2, cache=Full(steps, **options))


def test_the_protocol_alone_passes_the_checker():
    mixer = Pointwise(8, rngs=nnx.Rngs(0))
    assert isinstance(mixer, seqlab.Mixer) and width_of(mixer) == 8
    seqlab.verify_streaming(mixer, gradients=False).raise_for_failure()
    assert as_mixer(mixer).capacity is None and as_mixer(mixer).with_room((), 9) == ()
    with pytest.raises(CannotRewind, match="Pointwise keeps a summary"):
        as_mixer(mixer).rewind((), 1)


def nested(*mixers):
    """`Both` in a stack in a language model."""
    stack = partial(
        MambaMixerStack,
        depth=1,
        token_mixer=lambda dim, rngs: Both(dim, *mixers, rngs=rngs),
        channel_mixer=SwiGLU,
    )
    return LanguageModel(31, 16, 1, stack, channel_mixer=None, rngs=nnx.Rngs(0))


def test_a_composite_keeps_the_bound_of_its_parts():
    model = nested(attention(16), attention(12), Pointwise)
    assert model.capacity == 12
    with pytest.raises(ValueError, match="holds 12"):
        seqlab.stream_generate(model, [1, 2, 3], max_tokens=40)
    assert nested(Mamba, Pointwise).capacity is None


def test_a_composite_rewinds_and_grows():
    model = nested(attention(4, grows=True), attention(64))
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 31)
    state = model.with_room(model.init_state(2), 12)
    call = jax.jit(lambda tokens, state: model(tokens, state))
    _, early = call(tokens[:, :7], state)
    _, late = call(tokens[:, 7:], early)
    jax.tree.map(np.testing.assert_array_equal, model.rewind(late, jnp.asarray([5, 5])), early)
    mixed = nested(attention(64), Mamba)
    _, state = jax.jit(lambda tokens, state: mixed(tokens, state))(tokens, mixed.init_state(2))
    with pytest.raises(CannotRewind, match="layer 0: Mamba keeps a summary"):
        mixed.rewind(state, 1)


def used(cache, rows: int = 3):
    """A layer with `cache` and its state after five steps."""
    layer = Attention(16, heads=2, cache=cache, rngs=nnx.Rngs(0))
    return layer, layer(jax.random.normal(jax.random.key(0), (rows, 5, 16)), layer.init_state(rows))[1]


@pytest.mark.parametrize("rows", [[3], [-1], [True], [0.5], 1, [[0]]])
def test_rows_that_are_not_there_are_refused(rows):
    _, state = used(Window(8))
    with pytest.raises(ValueError, match="rows must be"):
        seqlab.take_rows(state, rows)
    with pytest.raises(ValueError, match="rows must be"):
        seqlab.put_rows(state, rows, seqlab.take_rows(state, [0]))


def test_put_rows_takes_one_fitting_row_per_name():
    _, state = used(Window(8))
    two = seqlab.take_rows(state, [0, 2])
    with pytest.raises(ValueError, match="once"):
        seqlab.put_rows(state, [1, 1], two)
    with pytest.raises(ValueError, match="each of the 2"):
        seqlab.put_rows(state, [1], two)
    with pytest.raises(ValueError, match="values: k is"):
        seqlab.put_rows(state, [0], used(Window(2), 1)[1])
    put = jax.jit(seqlab.put_rows)(state, jnp.asarray([1, 0]), two)
    jax.tree.map(
        np.testing.assert_array_equal, seqlab.take_rows(put, [1, 0, 2]), seqlab.take_rows(state, [0, 2, 2])
    )


def test_load_state_lets_only_the_rows_differ(tmp_path):
    layer, state = used(Window(8))
    seqlab.save_state(state, tmp_path / "state")
    jax.tree.map(
        np.testing.assert_array_equal, seqlab.load_state(tmp_path / "state", layer.init_state(1)), state
    )
    with pytest.raises(ValueError, match="k is float32"):
        seqlab.load_state(tmp_path / "state", used(Window(16))[1])


def test_a_stream_continues_only_its_own_state():
    def model(cache, dim=16):
        return LanguageModel(31, dim, 1, partial(Attention, heads=2, cache=cache), rngs=nnx.Rngs(0))

    grows = model(Full(4, grows=True))
    state = jax.block_until_ready(stream(grows, 9).state)
    assert len(list(seqlab.stream_generate(grows, state=state, max_tokens=2))) == 2
    for other in (model(Full(4)), model(Window(5)), model(Full(4, grows=True), 32)):
        with pytest.raises(ValueError, match="made by another"):
            seqlab.stream_generate(other, state=state, max_tokens=2)


def stream(model, tokens: int):
    made = seqlab.stream_generate(model, [1, 2], max_tokens=tokens)
    list(made)
    return made
