"""Cache policies: each equals attention under its mask, written down in numpy; what can be taken back and
what cannot."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_close, assert_identical, random

from seqlab import explain, state_bytes, stream_generate, use_implementation
from seqlab.models import Attention, Full, LanguageModel, Window
from seqlab.models.attention import bytes_per_step, with_cache
from seqlab.models.cache import Blocks, Cache, Heads, Ints, MoBA, Quantized, duo, parse_cache
from seqlab.models.cache.quantize import dequantize, quantize
from seqlab.models.duo import duo_loss, fit_gates, retrieval_heads
from seqlab.module import params_of

LENGTH, W = 43, 8


def compiled(mixer):
    return jax.jit(lambda x, state=None: mixer(x, state))


def turned(x, position):
    """Half-split rotation in float64: x [h, k] at one position."""
    angle = position * 10_000.0 ** (-np.arange(0, x.shape[-1], 2) / x.shape[-1])
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate(
        [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)],
        axis=-1,
    )


def streaming_llm(mixer, x, sinks, window):
    """The definition (arXiv 2309.17453): every query numbers what it still sees from 0 on, keys turned
    afresh, itself last."""
    p = {name: np.asarray(value, np.float64) for name, value in params_of(mixer).items()}
    h, g, k = mixer.heads, mixer.kv_heads, mixer.head_dim
    q, key, v = np.split(
        (np.asarray(x, np.float64) @ p["qkv.weight"]).reshape(len(x), h + 2 * g, k), [h, h + g], axis=1
    )
    out = []
    for i in range(len(x)):
        seen = [j for j in range(i + 1) if j < sinks or i - j < window]
        keys = np.stack([turned(key[j], place) for place, j in enumerate(seen)])
        query = turned(q[i], len(seen) - 1)
        for head in range(h):
            weights = np.exp(keys[:, head * g // h] @ query[head] / np.sqrt(k))
            weights = weights / (weights.sum() + (mixer.sink is not None))
            out.append(weights @ v[seen, head * g // h])
    return np.stack(out).reshape(len(x), h * k) @ p["out.weight"]


@pytest.mark.parametrize("sinks, sink", [(0, None), (3, None), (1, "zero")])
def test_positions_in_the_cache_are_those_of_streaming_llm(sinks, sink):
    cache = Window(W, sinks, positions="cache")
    mixer = Attention(16, heads=4, kv_heads=2, cache=cache, sink=sink, rngs=nnx.Rngs(0))
    x = random(0, LENGTH, 16)  # the ring is wrapped five times
    expected = streaming_llm(mixer, x, sinks, W)
    call = compiled(mixer)
    assert_close(call(x[None])[0][0], expected, 2e-5, "whole")
    for chunk in (5, 13):
        state, outputs = mixer.init_state(1), []
        for begin in range(0, LENGTH, chunk):
            y, state = call(x[None, begin : begin + chunk], state)
            outputs.append(y[0])
        assert_close(jnp.concatenate(outputs), expected, 2e-5, f"chunks of {chunk}")


@pytest.mark.parametrize("cache", [Full(8192), Window(8188, 4), Window(8188, 4, positions="cache")], ids=str)
def test_a_decode_step_copies_no_cache(cache):
    """Rows that have ended are invalid steps: telling them apart must not touch the keys and values of all
    others."""
    mixer = Attention(32, heads=2, cache=cache, rngs=nnx.Rngs(0))
    state = jax.eval_shape(lambda: mixer.init_state(2))
    step = jax.jit(lambda x, state, valid: mixer(x, state, None, valid), donate_argnums=1)
    compiled_step = step.lower(
        jax.ShapeDtypeStruct((2, 1, 32), jnp.float32), state, jax.ShapeDtypeStruct((2, 1), bool)
    ).compile()
    assert compiled_step.memory_analysis().temp_size_in_bytes < state.k.size * state.k.dtype.itemsize


@pytest.mark.parametrize("cache", [Full(64), Window(40, sinks=2, positions="cache")], ids=str)
def test_what_is_taken_back_was_never_there(cache):
    mixer = Attention(16, heads=2, cache=cache, rngs=nnx.Rngs(0))
    x = random(1, 2, 30, 16)
    call = compiled(mixer)
    _, early = call(x[:, :20], mixer.init_state(2))
    _, late = call(x[:, 20:], early)
    back = mixer.rewind(late, jnp.asarray([10, 10]))
    for name, a, b in zip(early._fields, back, early, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
    uneven = mixer.rewind(late, jnp.asarray([0, 7]))
    assert uneven.length.tolist() == [30, 23]


def test_what_the_ring_has_overwritten_cannot_be_taken_back():
    mixer = Attention(16, heads=2, cache=Window(W, sinks=2), rngs=nnx.Rngs(0))
    _, state = compiled(mixer)(random(2, 1, 30, 16), mixer.init_state(1))
    with pytest.raises(
        ValueError, match=r"steps=3 cannot be taken back: sinks\(2\)\+window\(8\) has overwritten"
    ):
        mixer.rewind(state, 3)
    with pytest.raises(ValueError, match=r"steps must not exceed the steps seen, \[30\] by row, got 31"):
        mixer.rewind(state, 31)


def test_room_can_be_made_before_a_turn():
    """`evict` leaves the sinks and the last keys; places in the cache close up behind it."""
    mixer = Attention(
        16, heads=2, cache=Window(12, sinks=2, positions="cache", edge="call"), rngs=nnx.Rngs(0)
    )
    x = random(3, 1, 16, 16)
    call = compiled(mixer)
    _, state = call(x[:, :10], mixer.init_state(1))
    y, _ = call(x[:, 10:13], mixer.cache.evict(state, 4))
    kept = jnp.concatenate([x[:, :2], x[:, 6:13]], axis=1)  # as if the rest had never been
    assert_close(y, call(kept)[0][:, -3:], 2e-5)


def test_a_turn_drops_what_it_needs_and_no_more():
    """Row by row: some keys behind the sinks, or all of them for a turn longer than the window; then all that
    a turn brings stays."""
    cache = Window(6, sinks=2, turn=9)
    mixer = Attention(16, heads=2, cache=cache, rngs=nnx.Rngs(0))
    x, call = random(4, 2, 14, 16), jax.jit(lambda x, state=None, valid=None: mixer(x, state, None, valid))
    valid = jnp.arange(9) < jnp.asarray([[9], [4]])
    _, state = call(x[:, :9], mixer.init_state(2), valid)
    room = mixer.make_room(state, jnp.asarray([3, 8]))
    kept = [[p for p in row if p < 9] for row in np.sort(np.asarray(room.positions)).tolist()]
    assert kept == [[0, 1, 6, 7, 8], [0, 1]]
    y, later = call(x[:, 9:12], room)
    for row, stay in enumerate(([0, 1, 6, 7, 8, 9, 10, 11], [0, 1, 9, 10, 11])):
        alone, _ = call(x[row : row + 1, jnp.asarray(stay)])
        assert_close(y[row], alone[0, -3:], 2e-5)
    assert_identical(mixer.rewind(later, 3).positions, room.positions)
    assert_identical(mixer.make_room(room, 1), room)
    with pytest.raises(
        ValueError, match=r"steps=10 are more than the 9 of a turn of sinks\(2\)\+window\(6, turn=9\)"
    ):
        mixer.make_room(state, 10)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Window(8, positions="relative"), r"positions.*'relative'"),
        (lambda: Window(8, edge="stpe"), r"edge.*'stpe'.*did you mean 'step'"),
        (
            lambda: Attention(16, heads=2, sink="learnt", rngs=nnx.Rngs(0)),
            r"sink.*'learnt'.*did you mean 'learned'",
        ),
        (
            lambda: Attention(16, heads=2, rotary_width=10, rngs=nnx.Rngs(0)),
            r"rotary_width must not exceed head_dim=8, got 10",
        ),
    ],
)
def test_impossible_policies_are_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build()


def test_a_share_of_the_heads_streams():
    alpha = jnp.asarray([[0.1, 0.9], [0.5, 0.2]])
    assert retrieval_heads(alpha, 0.5) == [[False, True], [True, False]]
    assert retrieval_heads(alpha, 0.0) == [[True, True], [True, True]]
    assert retrieval_heads(alpha, 1) == [[False, False], [False, False]]
    assert sum(map(sum, retrieval_heads(jnp.ones((2, 4)), 0.75))) == 2, "equal gates are parted"
    caches = [duo(row, capacity=32, sinks=1, window=4) for row in retrieval_heads(alpha, 0.5)]
    model = LanguageModel(11, 16, 2, functools.partial(Attention, heads=4, kv_heads=2), rngs=nnx.Rngs(0))
    assert [block.mixer.cache for block in with_cache(model, caches).backbone.blocks] == caches
    assert model.backbone.blocks[0].mixer.cache == Full()
    with pytest.raises(ValueError, match="the model has 2 attention layers, got 3 caches"):
        with_cache(model, [*caches, Full()])
    with pytest.raises(ValueError, match="sparsity must be a share between 0 and 1, got 2"):
        retrieval_heads(alpha, 2)


def test_gates_fall_where_heads_need_no_past_and_stay_where_they_do():
    """Window as long as the sequence: streaming costs nothing and the gates fall; a window of one step costs,
    and they stay higher."""
    model = LanguageModel(11, 16, 2, functools.partial(Attention, heads=2), rngs=nnx.Rngs(1))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 24)))
    labels = jnp.arange(24)[None] >= 12
    labels = jnp.broadcast_to(labels, tokens.shape)
    free, history = fit_gates(model, lambda _: (tokens, labels), steps=40, sinks=1, window=24, rate=0.05)
    dear, _ = fit_gates(
        model, lambda _: (tokens, labels), steps=40, sinks=1, window=1, rate=0.05, weight=1e-4
    )
    assert float(history[0].distill) < 1e-10 and float(free.max()) < 0.3
    assert float(dear.mean()) > 0.8


@pytest.mark.parametrize("bound, inside", [(0.0, 1e-5), (1.0, 1 - 1e-5)])
def test_a_gate_on_its_bound_has_the_whole_gradient(bound, inside):
    """As torch.clamp, and as a gate a little inside of it; one beyond the bound has only the
    regularizer's."""
    model = LanguageModel(11, 16, 1, functools.partial(Attention, heads=2), rngs=nnx.Rngs(1))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (1, 12)))
    keep = jnp.ones(tokens.shape, bool)

    def gradient(gate):
        alpha = jnp.array([[gate, 0.5]])
        return jax.grad(lambda a: duo_loss(model, a, tokens, keep, sinks=1, window=2, weight=0.0).total)(
            alpha
        )[0, 0]

    assert abs(float(gradient(0.5))) > 1e-6
    assert_close(gradient(bound), gradient(inside), 1e-3)
    assert gradient(2 * bound - 0.5) == 0


@pytest.mark.parametrize("bits, bound", [(2, 0.9), (4, 0.25), (8, 0.02)])
def test_a_coded_cache_stays_near_the_exact_one(bits, bound):
    """A code is off by half a step of its group at most: the error of the output falls with 1 / (2^bits -
    1)."""
    x = random(4, 2, LENGTH, 32)
    exact = Attention(32, heads=2, cache=Full(64), rngs=nnx.Rngs(0))
    coded = with_cache(exact, Quantized(64, bits=bits, group=16, residual=16))
    error = float(jnp.max(jnp.abs(compiled(coded)(x)[0] - compiled(exact)(x)[0])))
    scale = float(jnp.max(jnp.abs(compiled(exact)(x)[0])))
    assert 0 < error < bound * scale


def test_one_step_reads_codes_where_an_implementation_can():
    """Many steps are attended to at once; one goes through `kernels.decode_attention`, whichever
    implementation that takes."""
    mixer = Attention(
        32, heads=4, kv_heads=2, cache=Quantized(None, 40, 2, bits=4, group=8, residual=8), rngs=nnx.Rngs(0)
    )
    x, call = random(7, 2, 30, 32), compiled(mixer)
    _, state = call(x[:, :29], mixer.init_state(2))
    choices = explain(lambda x, state: mixer(x, state), x[:, 29:], state)
    assert [str(choice) for choice in choices] == ["decode_attention: xla"]
    choices = explain(lambda x, state: mixer(x, state), x[:, 28:], state)
    assert [str(choice) for choice in choices] == ["attention: xla"]
    with use_implementation("reference"):
        by_reference = call(x[:, 29:], state)
    by_default = call(x[:, 29:], state)
    assert_close(by_default[0], by_reference[0], 1e-5)
    assert_identical(by_default[1], by_reference[1])


def test_two_bits_are_a_fifth_of_sixteen():
    attention = Attention(256, heads=2, rngs=nnx.Rngs(0))
    exact = with_cache(attention, Full(8192))
    coded = with_cache(attention, Quantized(8192, bits=2, group=32, residual=128, half_groups=True))
    assert state_bytes(coded, dtype=jnp.float16) <= 0.21 * state_bytes(exact, dtype=jnp.float16)


def test_groups_of_equal_numbers_come_back_exactly():
    x = jnp.full((3, 8), 0.3)
    codes, groups = quantize(x, 4, 2)
    np.testing.assert_array_equal(dequantize(codes, groups), x)
    y = random(5, 3, 64)
    codes, groups = quantize(y, 16, 4)
    assert float(jnp.max(jnp.abs(dequantize(codes, groups) - y))) <= 0.5001 * float(groups.scale.max())


def test_what_is_coded_cannot_be_taken_back():
    mixer = Attention(16, heads=2, cache=Quantized(32, bits=4, group=8, residual=8), rngs=nnx.Rngs(0))
    x = random(6, 1, 40, 16)
    y, state = compiled(mixer)(x, mixer.init_state(1))
    with pytest.raises(
        ValueError,
        match=r"steps=1 cannot be taken back: full\(32\)\+int4\(group=8, residual=8\) has quantized the "
        "steps",
    ):
        mixer.rewind(state, 1)
    assert np.isfinite(np.asarray(y[:, :32])).all() and np.isnan(np.asarray(y[:, 32:])).all(), (
        "never a wrong number"
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"capacity": None}, "give capacity or window"),
        ({"window": 8}, "give capacity or window"),
        ({"bits": 3}, r"bits must be one of \(2, 4, 8\), got 3"),
        ({"residual": 48, "group": 32}, "residual must be a multiple of group=32, got 48"),
        ({"sinks": -1}, "sinks must be an integer of at least 0, got -1"),
    ],
)
def test_impossible_codings_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Quantized(**options)


@pytest.mark.parametrize(
    ("spec", "policy"),
    [
        ("full(64)", Full(64)),
        ("sinks(4)+window(60)", Window(60, 4)),
        ("sinks(2)+window(8) + in_place", Window(8, 2)),
        ("sinks(2)+window(8)+absolute", Window(8, 2, positions="absolute")),
        ("sinks(2)+window(8)+int8+absolute", Quantized(None, 8, 2, bits=8, positions="absolute")),
        ("full(8)+grows+int4", Quantized(8, bits=4, grows=True)),
        ("full(8)+int4(values=2)", Quantized(8, bits=4, value_bits=2)),
        ("window(8, edge=call)", Window(8, edge="call")),
        ("sinks(2)+window(8, turn=20)", Window(8, 2, turn=20)),
        ("full(8)+int2(half_groups=1, edge=call)", Quantized(8, bits=2, half_groups=True, edge="call")),
        ("heads(0 1 0 | full(64) | sinks(2)+window(8))", Heads((Full(64), Window(8, 2)), (0, 1, 0))),
        ("seqlab.models:Window(8, sinks=2)", Window(8, 2)),
        ("full(256)+int2(group=16, residual=32)", Quantized(256, bits=2, group=16, residual=32)),
        ("sinks(4)+window(1020)+int4", Quantized(None, 1020, 4, bits=4)),
        ("full(4096) + moba(512, 3)", MoBA(512, 3)),
        ("full(512)+grows", Full(512, grows=True)),
        ("moba(64, 2)+window(256)", MoBA(64, 2, None, stored=4)),
        ("moba(4, 2)+window(8)+int4+sinks(2)", Cache(Window(8, 2), Ints(4), Blocks(4, 2))),
    ],
)
def test_caches_are_words(spec, policy):
    assert parse_cache(spec) == policy
    assert parse_cache(str(policy)) == policy


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("windw(8)", r"cache term.*'windw'.*did you mean 'window'"),
        ("sinks(4)", "must hold one of full.n. and window.n."),
        ("full(8)+window(4)", "must hold one of full.n. and window.n."),
        ("sinks(4)+full(8)", "sinks add nothing"),
        ("window(8)+int2+int4", "asks for int2 and int4 at once"),
        ("sinks(2)+window(8)+in_place+absolute", "absolute positions and for those in the cache at once"),
        ("window(8)+absolute", "absolute changes nothing in 'window.8..absolute', which has no sinks"),
        ("window", r"window takes one number, window\(n\)"),
        ("window(8)+window(9)", "window is given twice"),
        ("window(eight)", "cannot read 'eight'"),
        ("window(8)+int4(bits=2)", "int4 takes group and residual and values and .*, got bits"),
        ("full(64)+int4(8)", "int4 takes group and .*, got 8"),
        ("full(64)+moba(8)", r"moba takes two numbers, moba\(block, top_k\)"),
        ("moba(8, 2)", "must hold one of full.n. and window.n."),
        ("window(20)+moba(8, 2)", r"window must hold whole blocks of moba\(8, 2\), got window\(20\)"),
        ("sinks(2)+full(16)+moba(8, 2)", r"capacity - 2 sinks must hold whole blocks of moba\(8, 2\)"),
        ("full(16)+moba(8, 2)+moba(8, 2)", "moba is given twice"),
        ("window(16, edge=call)+moba(8, 2)", r"window\(16, edge=call\) and moba\(8, 2\) do not go together"),
        ("window(16, turn=4)+moba(8, 2)", r"window\(16, turn=4\) and moba\(8, 2\) do not go together"),
        ("window(16, turn=4)+int4", "turn and int4 do not go together in 'window.16, turn=4.*'"),
        ("window(16, turn=0)", "turn must be a positive integer, got 0"),
        ("window(8)+grows", "grows and window do not go together"),
        ("window(0)", "window must be a positive integer, got 0"),
    ],
)
def test_impossible_products_are_refused_with_a_reason(spec, words):
    with pytest.raises(ValueError, match=words):
        parse_cache(spec)


def test_a_stream_takes_a_cache_by_name():
    model = LanguageModel(64, 32, 2, functools.partial(Attention, heads=2), rngs=nnx.Rngs(0))
    options = {"temperature": 0, "max_tokens": 24}
    prompt = [list(range(20))]

    def tokens(cache):
        return [token.token for token in stream_generate(model, prompt, cache=cache, **options)]

    assert (
        tokens("full(64)")
        == tokens(None)
        == tokens("window(64)")
        == tokens(with_cache(model, Full(64)).backbone.blocks[0].mixer.cache)
    )
    assert tokens("sinks(1)+window(4)") != tokens(None)
    assert bytes_per_step(with_cache(model, "full(64)")) == pytest.approx(2 * (2 * 32 * 4 + 4) + 2 * 4 / 64)
    with pytest.raises(ValueError, match="did you mean 'window'"):
        tokens("windwo(8)")
