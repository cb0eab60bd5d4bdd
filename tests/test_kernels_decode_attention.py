"""Attention over a cache in few bits: both implementations that run here against numbers and softmax written
out in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_close, assert_identical, random

from seqlab import use_implementation
from seqlab.kernels import pallas
from seqlab.kernels.decode_attention import Coded, codes_of, decode_attention, words_of
from seqlab.kernels.decode_attention.specs import SPECS, Spec, inputs
from seqlab.models import Attention
from seqlab.models.cache import parse_cache
from seqlab.models.cache.quantize import dequantize, quantize

# Other kinds take the same paths.
SOME = (
    "int8",
    "int2",
    "int4_values2",
    "int2_values8",
    "odd_widths",
    "nothing_seen",
    "bfloat16",
    "numbers",
    "numbers_bfloat16",
)


def numbers(x, bits, over_steps):
    """The numbers [b, g, s, width] of codes, one after the other."""
    if not isinstance(x, Coded):
        return np.asarray(x, np.float64)
    words, scale, least = (
        np.asarray(y).astype(np.uint64 if y.dtype == jnp.uint32 else np.float64) for y in x
    )
    b, g, _, s = words.shape
    codes = np.stack([words >> np.uint64(bits * i) & np.uint64(2**bits - 1) for i in range(32 // bits)], 2)
    codes = codes.reshape(b, g, -1, s).swapaxes(2, 3).astype(np.float64)
    scale, least = (y if over_steps else y.swapaxes(2, 3) for y in (scale, least))
    rows = np.repeat(np.arange(scale.shape[2]), s // scale.shape[2])
    columns = np.repeat(np.arange(scale.shape[3]), codes.shape[3] // scale.shape[3])
    index = np.ix_(rows, columns)
    return codes * scale[:, :, *index] + least[:, :, *index]


def by_hand(spec, q, k, v, visible, softcap=None):
    keys, values = numbers(k, spec.bits, True), numbers(v, spec.v_bits or spec.bits, False)
    out, lse = np.zeros((spec.b, spec.h, spec.v)), np.full((spec.b, spec.h), -np.inf)
    for row, head in np.ndindex(spec.b, spec.h):
        seen, group = np.asarray(visible[row]), head * spec.g // spec.h
        if seen.any():
            x = keys[row, group, seen] @ np.asarray(q[row, head], np.float64) / np.sqrt(spec.k)
            x = x if softcap is None else softcap * np.tanh(x / softcap)
            lse[row, head] = np.logaddexp.reduce(x)
            out[row, head] = np.exp(x - lse[row, head]) @ values[row, group, seen]
    return out, lse


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize(
    "name", [name if name in SOME else pytest.param(name, marks=pytest.mark.slow) for name in SPECS]
)
def test_values_are_those_of_the_definition(name, implementation):
    arguments = inputs(SPECS[name])
    options = {name: arguments.pop(name, None) for name in ("softcap", "v_bits")}
    options["implementation"] = implementation
    out, lse = jax.jit(lambda a: decode_attention(**a, **options))(arguments)
    expected, expected_lse = by_hand(SPECS[name], **arguments, softcap=options["softcap"])
    assert out.dtype == SPECS[name].dtype and lse.dtype == jnp.float32
    dead = np.isneginf(expected_lse)
    np.testing.assert_array_equal(np.isneginf(lse), dead)
    rounding = 2.0**-8 if SPECS[name].dtype == "bfloat16" else 0.0
    assert_close((out, np.where(dead, 0, lse)), (expected, np.where(dead, 0, expected_lse)), rounding + 5e-6)


def test_codes_are_those_of_the_quantized_cache():
    """KIVI's keys are coded over steps and its values over channels, as `seqlab.models.cache` does."""

    @functools.partial(jax.jit, static_argnums=1)
    def coded(x, group):
        codes, groups = quantize(x, group, 4)
        return codes, groups, dequantize(codes, groups)

    x = random(0, 1, 2, 64, 32)
    codes, groups, values = coded(x, 16)
    turned, k_groups, keys = coded(x.swapaxes(2, 3), 32)
    v = Coded(words_of(codes.swapaxes(2, 3), 4), *(y.swapaxes(2, 3) for y in groups))
    k = Coded(words_of(turned, 4), *(y.swapaxes(2, 3) for y in k_groups))
    np.testing.assert_array_equal(codes_of(k.words, 4), turned)
    assert_close(numbers(k, 4, True), keys.swapaxes(2, 3), 1e-6)
    assert_close(numbers(v, 4, False), values, 1e-6)


def test_hidden_slots_do_nothing():
    arguments = inputs(Spec(2, 64, 4, 2, 32, 32, 4, seen=0.5))
    hidden = ~arguments["visible"]
    dirty = arguments["v"]._replace(scale=jnp.where(hidden[:, None, None, :], jnp.nan, arguments["v"].scale))
    run = jax.jit(lambda arguments: decode_attention(**arguments))
    assert_identical(run({**arguments, "v": dirty}), run(arguments))


OTHERS = (
    "full(64)+int8(group=16, residual=32)",
    "full(64)+int2(group=16, residual=16)",
    "full(64)+int4(group=16, residual=16, values=2)",
    "sinks(1)+window(33)+int2(group=16, residual=32, values=8)",
    "full(64)",
    "sinks(2)+window(30)+in_place",
)


@pytest.mark.parametrize("name", ["pallas_tpu", "triton_gpu"])
@pytest.mark.parametrize(
    "cache",
    [
        "sinks(2)+window(40)+int4(group=16, residual=16)",
        *(pytest.param(cache, marks=pytest.mark.slow) for cache in OTHERS),
    ],
)
def test_a_stream_goes_through_the_kernels(cache, name, monkeypatch):
    """Rows of uneven lengths, one of them so short that none of it is coded, one that has ended: as by XLA,
    outputs and state."""
    if name == "triton_gpu":
        triton_cpu = pytest.importorskip("triton_cpu")
    mixer = Attention(64, heads=4, kv_heads=2, cache=parse_cache(cache), rngs=nnx.Rngs(0))
    x, valid = random(3, 4, 55, 64), jnp.arange(55) < jnp.asarray([[54], [9], [37], [0]])
    _, state = jax.jit(mixer)(x, mixer.init_state(4), None, valid)
    going = jnp.asarray([[True], [True], [True], [False]])
    step = jax.jit(lambda x, state: mixer(x, state, None, going))
    expected = step(x[:, 54:], state)
    with (
        triton_cpu.interpreted(monkeypatch) if name == "triton_gpu" else pallas.interpreted(),
        use_implementation(name),
    ):
        found = step(x[:, 54:], state)
    assert_close(found[0], expected[0], 1e-5)
    assert_identical(found[1], expected[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": jnp.ones((2, 4))}, r"q must be a floating-point array \[b, h, k\]"),
        ({"q": jnp.ones((3, 4, 32))}, r"k.words must be an array .* of uint32 with b=3"),
        ({"q": jnp.ones((2, 3, 32))}, "divides the 3 heads of q, got g=2"),
        ({"q": jnp.ones((2, 4, 30))}, "k.words must hold 30 numbers of 2, 4, 8 bits, got 4 words"),
        ({"k": jnp.ones((2, 2, 64, 32))}, "k and v must both be Coded or both arrays, got .* and Coded"),
        ({"v_bits": 3}, r"v_bits must be one of \(2, 4, 8\) or None, .* got 3 with Coded"),
        ({"k": jnp.ones((2, 2, 64, 32)), "v": jnp.ones((2, 2, 64, 32)), "v_bits": 4}, "got 4 with "),
        ({"softcap": 0}, "softcap must be a number above 0 or None, got 0"),
        (
            {"visible": jnp.ones((2, 64))},
            r"visible must be a boolean array \[b, s\] = \(2, 64\), got float32",
        ),
        ({"implementation": "xIa"}, "did you mean 'xla'"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        decode_attention(**{**inputs(Spec(2, 64, 4, 2, 32, 32, 4)), **change})
    wrong = inputs(Spec(2, 64, 4, 2, 32, 32, 4))
    with pytest.raises(
        ValueError, match=r"v.scale must be \[b, g, groups, s\] .* divide 32 values, got \(2, 2, 3, 64\)"
    ):
        decode_attention(**{**wrong, "v": wrong["v"]._replace(scale=jnp.ones((2, 2, 3, 64)))})
