"""Attention: every implementation against a float64 oracle written independently of them, gradients against
the float64 reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, random
from jax.sharding import PartitionSpec as P

from seqlab.kernels.attention import attention, merge, xla
from seqlab.kernels.attention.specs import SPECS, make
from seqlab.shapes import accumulator

IMPLEMENTATIONS = ("reference", "xla")
ARRAYS = ("q", "k", "v", "sink_logits", "alibi")


def oracle(call):
    """Row by row in float64: the keys that a query may see are picked out, nothing is masked."""
    q, k, v = (np.asarray(call[name], np.float64) for name in "qkv")
    (b, t, h, width), (s, g) = q.shape, k.shape[1:3]
    q_positions = np.asarray(call.get("q_positions", np.tile(np.arange(t) + s - t, (b, 1))))
    kv_positions = np.asarray(call.get("kv_positions", np.tile(np.arange(s), (b, 1))))
    q_segments, kv_segments = (
        np.asarray(call.get("q_segments", np.ones((b, t)))),
        np.asarray(call.get("kv_segments", np.ones((b, s)))),
    )
    scale = width**-0.5 if call.get("scale") is None else call["scale"]
    out, lse = np.zeros((b, t, h, v.shape[3])), np.full((b, t, h), -np.inf)
    for row, i, head in np.ndindex(b, t, h):
        if q_segments[row, i] == 0:
            continue
        group, position = head // (h // g), q_positions[row, i]
        seen = kv_segments[row] == q_segments[row, i]
        left, right = call["window"] if isinstance(call["window"], tuple) else (call["window"], None)
        if isinstance(call["window"], int):
            left = call["window"] - 1
        if call["causal"] or right is not None:
            seen &= kv_positions[row] <= position + (0 if call["causal"] else right)
        if left is not None:
            seen &= (kv_positions[row] >= position - left) | (kv_positions[row] < call["sinks"])
        x = scale * k[row, seen, group] @ q[row, i, head]
        if call["softcap"] is not None:
            x = call["softcap"] * np.tanh(x / call["softcap"])
        if "alibi" in call:
            slope = np.broadcast_to(np.asarray(call["alibi"], np.float64), (b, h))[row, head]
            x = x - slope * np.abs(position - kv_positions[row, seen])
        extra = [float(call["sink_logits"][head])] if "sink_logits" in call else []
        if len(x) + len(extra):
            lse[row, i, head] = np.logaddexp.reduce([*x, *extra])
            out[row, i, head] = np.exp(x - lse[row, i, head]) @ v[row, seen, group]
    return out, lse


def jitted(function, implementation):
    # The reference is only run once a shape: it compiles in half the time unoptimised.
    return jax.jit(
        function,
        compiler_options={"xla_backend_optimization_level": 0} if implementation == "reference" else None,
    )


def parted(call):
    """The arrays of a call and its options."""
    arrays = {name: x for name, x in call.items() if isinstance(x, jax.Array)}
    return arrays, {name: x for name, x in call.items() if name not in arrays}


def values(call, implementation="xla"):
    """(out, lse) of a call, compiled as a whole."""
    arrays, options = parted(call)
    return jitted(
        lambda arrays: attention(**arrays, **options, implementation=implementation), implementation
    )(arrays)


def with_gradients(call, cotangents, implementation):
    """(out, lse) and the gradients of the floating-point arguments of a call."""
    arrays, options = parted(call)
    floats = {name: arrays.pop(name) for name in ARRAYS if name in arrays}

    def run(floats, places, cotangents):
        result, back = jax.vjp(
            lambda floats: attention(**floats, **places, **options, implementation=implementation), floats
        )
        return result, back(cotangents)[0]

    return jitted(run, implementation)(floats, arrays, cotangents)


def cotangents_of(call, seed=7):
    b, t, h = call["q"].shape[:3]
    return random(seed, b, t, h, call["v"].shape[3], dtype=call["q"].dtype), random(
        seed + 1, b, t, h, dtype=accumulator(call["q"].dtype)
    )


@functools.cache
def truth(name):
    """Oracle values and float64 gradients of the call of a spec, computed once."""
    with jax.enable_x64(True):
        call = make(SPECS[name])
        call = {key: x.astype(jnp.float64) if key in ARRAYS else x for key, x in call.items()}
        out, lse = cotangents_of(call)
        (value, gradients) = with_gradients(
            call, (out.astype(jnp.float64), lse.astype(jnp.float64)), "reference"
        )
        expected = oracle(call)
        check(value, expected, 1e-12)
    return expected, jax.tree.map(np.asarray, gradients)


def check(actual, expected, tolerance):
    """Dead rows are dead in both, and all else is close."""
    dead = np.isneginf(expected[1])
    np.testing.assert_array_equal(np.isneginf(actual[1]), dead)
    assert_close(
        (actual[0], np.where(dead, 0, actual[1])), (expected[0], np.where(dead, 0, expected[1])), tolerance
    )


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (i % 2)) for i, name in enumerate(SPECS)]
)
def test_xla_values_and_gradients(name):
    call = make(SPECS[name])
    value, gradients = with_gradients(call, cotangents_of(call), "xla")
    expected, expected_gradients = truth(name)
    assert value[0].dtype == value[1].dtype == jnp.float32
    check(value, expected, 5e-6)
    assert_close(gradients, expected_gradients, 2e-5)


@pytest.mark.parametrize("name", ["grouped_odd", "decode_window_sinks", "softcap_scale", "padded", "ring"])
def test_reference_in_float32(name):
    call = make(SPECS[name])
    value, gradients = with_gradients(call, cotangents_of(call), "reference")
    expected, expected_gradients = truth(name)
    check(value, expected, 5e-6)
    assert_close(gradients, expected_gradients, 2e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["grouped_odd", "decode", "window_sinks_tiled", "padded"])
def test_bfloat16(name, implementation):
    call = make(SPECS[name], dtype=jnp.bfloat16)
    value, gradients = with_gradients(call, cotangents_of(call), implementation)
    assert value[0].dtype == jnp.bfloat16 and value[1].dtype == jnp.float32
    assert all(x.dtype == jnp.bfloat16 for x in gradients.values())
    with jax.enable_x64(True):
        rounded = {key: x.astype(jnp.float64) if key in ARRAYS else x for key, x in call.items()}
        out, lse = (x.astype(jnp.float64) for x in cotangents_of(call))
        expected, expected_gradients = with_gradients(rounded, (out, lse), "reference")
    check(value, expected, 2e-2)
    assert_close(gradients, expected_gradients, 2e-2)


def test_float64_stays_float64(x64):
    call = {
        key: x.astype(jnp.float64) if key in ARRAYS else x
        for key, x in make(SPECS["window_sinks_tiled"]).items()
    }
    value, _ = with_gradients(call, cotangents_of(call), "xla")
    assert value[0].dtype == value[1].dtype == jnp.float64
    check(value, oracle(call), 1e-13)


def test_gradients_of_the_reference_are_those_of_the_oracle(x64):
    """The last link: autodiff of the reference against central differences of the oracle, in a random
    direction."""
    call = {
        key: x.astype(jnp.float64) if key in ARRAYS else x for key, x in make(SPECS["window_sinks"]).items()
    }
    call |= {"softcap": 1.5, "sink_logits": random(3, 4, dtype=jnp.float64)}
    call |= {"alibi": 0.1 + random(4, 2, 4, dtype=jnp.float64) ** 2}
    cotangents = cotangents_of(call)
    _, gradients = with_gradients(call, cotangents, "reference")
    for seed, name in enumerate(ARRAYS):
        direction = np.random.default_rng(seed).normal(size=call[name].shape)
        ends = [oracle({**call, name: call[name] + step * direction}) for step in (1e-5, -1e-5)]
        slope = sum((np.asarray(c) * (a - b)).sum() for c, a, b in zip(cotangents, *ends, strict=True)) / 2e-5
        assert_close((gradients[name] * direction).sum(), slope, 1e-7, name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dead_rows_pass_no_gradient_whatever_comes_in(implementation):
    call = make(SPECS["padded"])
    out, lse = cotangents_of(call)
    padding = call["q_segments"] == 0
    clean = with_gradients(call, (out, lse), implementation)
    if implementation == "xla":  # the cotangents of log(0) downstream
        out, lse = (
            jnp.where(padding[..., None, None], jnp.nan, out),
            jnp.where(padding[..., None], jnp.nan, lse),
        )
    value, gradients = with_gradients(call, (out, lse), implementation)
    assert (value[0][padding] == 0).all() and jnp.isneginf(value[1][padding]).all()
    assert (gradients["q"][padding] == 0).all()
    assert all((gradients[name][call["kv_segments"] == 0] == 0).all() for name in "kv")
    assert_close(gradients, clean[1], 0)


def test_a_query_that_sees_only_the_sink_logit():
    call = make(SPECS["more_queries_than_keys"]) | {"sink_logits": jnp.array([0.5, -2.0])}
    out, lse = values(call)  # the first five of nine queries stand before the four keys
    assert (out[:, :5] == 0).all()
    np.testing.assert_array_equal(lse[:, :5], np.broadcast_to(call["sink_logits"], (2, 5, 2)))


@pytest.mark.parametrize("name", ["tiled_offset", "window_sinks_tiled", "decode"])
def test_positions_spelt_out_are_the_default(name):
    call, spec = make(SPECS[name]), SPECS[name]
    positions = jnp.tile(jnp.arange(spec.s, dtype=jnp.int32), (spec.b, 1))
    spelt = call | {"q_positions": positions[:, spec.s - spec.t :], "kv_positions": positions}
    expected = values(call)
    assert_close(values(spelt), expected, 1e-6)
    for one in ("q_positions", "kv_positions"):
        assert_close(values(call | {one: spelt[one]}), expected, 1e-6)


@pytest.mark.parametrize("one", ["q_segments", "kv_segments"])
def test_segments_of_one_side_default_to_one(one):
    call = make(SPECS["padded_cross"])
    other = {"q_segments": "kv_segments", "kv_segments": "q_segments"}[one]
    call[one] = jnp.where(call[one] == 0, 2, call[one])
    call = {name: jnp.nan_to_num(x) if name in ARRAYS else x for name, x in call.items()}
    expected = oracle({**call, other: np.ones(call[other].shape)})
    del call[other]
    check(values(call), expected, 5e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_to_do(implementation):
    q, k, v = random(0, 2, 3, 4, 8), random(1, 2, 6, 2, 8), random(2, 2, 6, 2, 5)
    for t in (1, 3):
        out, lse = values({"q": q[:, :t], "k": k[:, :0], "v": v[:, :0]}, implementation)
        assert out.shape == (2, t, 4, 5) and (out == 0).all() and jnp.isneginf(lse).all()
    out, lse = values({"q": q[:, :0], "k": k, "v": v}, implementation)
    assert out.shape == (2, 0, 4, 5) and lse.shape == (2, 0, 4)


def test_a_cache_of_another_dtype():
    call = make(SPECS["decode"])
    call |= {name: call[name].astype(jnp.bfloat16) for name in "kv"}
    value, gradients = with_gradients(call, cotangents_of(call), "xla")
    expected, _ = with_gradients(call, cotangents_of(call), "reference")
    assert value[0].dtype == gradients["q"].dtype == jnp.float32 and gradients["k"].dtype == jnp.bfloat16
    check(value, expected, 5e-3)


# Merging.


def parts(call, count):
    """The attentions over `count` disjoint sets of the keys, every `count`-th key in each."""
    s = call["k"].shape[1]
    places = {"q_positions": jnp.tile(jnp.arange(s - call["q"].shape[1], s), (call["q"].shape[0], 1))}
    positions = jnp.tile(jnp.arange(s), (call["q"].shape[0], 1))
    options = {name: call[name] for name in ("causal", "window", "sinks", "softcap", "scale")}
    for n in range(count):
        part = {name: call[name][:, n::count] for name in "kv"}
        yield attention(call["q"], **part, **places, kv_positions=positions[:, n::count], **options)


@pytest.mark.parametrize("name", ["window_sinks", "softcap_scale", "decode", "cross"])
def test_merged_parts_are_the_whole(name):
    call = make(SPECS[name])
    cotangents = cotangents_of(call)

    @functools.partial(jax.jit, static_argnums=0)
    def run(function, floats):
        result, back = jax.vjp(lambda floats: function({**call, **floats}), floats)
        return result, back(cotangents)[0]

    def merged(call):
        a, b, c = parts(call, 3)
        return merge(*merge(*a, *b), *c)

    floats = {name: call[name] for name in "qkv"}
    value, gradients = run(merged, floats)
    expected, expected_gradients = run(lambda call: attention(**call), floats)
    check(value, expected, 5e-6)
    assert_close(gradients, expected_gradients, 2e-5)


def test_merge_is_associative_and_commutative():
    a, b, c = ((random(n, 2, 3, 4, 5), 9 * random(n + 10, 2, 3, 4)) for n in range(3))
    check(merge(*merge(*a, *b), *c), merge(*a, *merge(*b, *c)), 1e-6)
    check(merge(*a, *b), merge(*b, *a), 0)


def test_the_identity_of_merge_in_value_and_gradient():
    out, lse = random(0, 2, 3, 4, 5), random(1, 2, 3, 4)
    lse = lse.at[:, 0].set(-jnp.inf)  # these rows meet nothing on either side
    out = out.at[:, 0].set(0)
    nothing = jnp.zeros_like(out), jnp.full_like(lse, -jnp.inf)
    value, back = jax.vjp(merge, out, lse, *nothing)
    np.testing.assert_array_equal(value[0], out)
    assert_close(value[1][:, 1:], lse[:, 1:], 1e-7)
    assert jnp.isneginf(value[1][:, 0]).all()
    cotangents = random(2, *out.shape), random(3, *lse.shape)
    gradients = back(cotangents)
    assert all(jnp.isfinite(x).all() for x in gradients)
    assert_close(gradients[:2], (cotangents[0].at[:, 0].set(0), cotangents[1].at[:, 0].set(0)), 1e-6)
    assert (gradients[3] == 0).all()


def test_merge_computes_in_the_dtype_of_lse():
    out, lse = random(0, 1, 2, 3, 4, dtype=jnp.bfloat16), random(1, 1, 2, 3)
    value = merge(out, lse, out, lse)
    assert value[0].dtype == jnp.bfloat16 and value[1].dtype == jnp.float32
    np.testing.assert_array_equal(value[0], out)
    assert_close(value[1], lse + np.log(2), 1e-6)


def test_merge_refuses_shapes_that_do_not_fit():
    out, lse = random(0, 1, 2, 3, 4), random(1, 1, 2, 3)
    with pytest.raises(ValueError, match=r"out_b must have the shape of out_a"):
        merge(out, lse, out[:, :1], lse)
    with pytest.raises(
        ValueError,
        match=r"lse_b must have the shape of out_a without its last axis, \(1, 2, 3\); got \(1, 2\)",
    ):
        merge(out, lse, out, lse[..., 0])


# What the tiles cost.


def plan(t, places=(None,) * 4, window=None, sinks=0, heads=64):
    left = None if window is None else window - 1
    rule = xla.Rule(left=left, right=0, sinks=sinks, softcap=None, scale=1.0)
    return xla._plan(rule, xla.Places(*places), heads, t, t)


def test_tiles_that_nobody_sees_are_skipped():
    for options, count in (
        ({}, 16 * 17 // 2),
        ({"window": 128}, 2 * 16 - 1),  # the 127 keys before a tile reach into one tile
        ({"window": 130}, 3 * 16 - 3),
        ({"window": 128, "sinks": 4}, 2 * 16 - 1 + 14),
    ):
        made = plan(2048, **options)
        assert (made.rows, made.keys, made.count) == (128, 128, count), options
    positions = jnp.arange(1024)[None]
    segments = 1 + positions // 256
    assert plan(1024, (positions % 256, segments, positions % 256, segments)).count == 4 * 3
    assert plan(1024, (positions, None, positions[:, ::-1], None)).count == 8 * 9 // 2


def test_tiles_are_longer_where_heads_are_few_and_never_longer_than_a_window():
    assert plan(4096, heads=16).rows == 256
    assert plan(4096, heads=2).rows == 512
    assert plan(4096, heads=2, window=300).rows == 256
    assert plan(512, heads=2).rows == 128
    made = plan(999, heads=2)
    assert (made.rows, made.t) == (128, 1024)
    made = plan(2**20, heads=1, window=128)
    assert made.t // made.rows <= 512


def compiled(function, *args):
    return jax.jit(function).lower(*args).compile()


def test_memory_is_linear_in_time():
    def gradient(q, k, v):
        return jax.grad(lambda *x: attention(*x, implementation="xla")[0].sum(), (0, 1, 2))(q, k, v)

    short, long = (
        compiled(gradient, *(jax.ShapeDtypeStruct((1, t, 2, 16), jnp.float32),) * 3)
        .memory_analysis()
        .temp_size_in_bytes
        for t in (4096, 8192)
    )
    assert long < 2.1 * short
    assert long < 8192 * 8192  # a byte a logit of one of the two heads


def test_decoding_is_a_few_fused_operations_without_a_copy_of_the_cache():
    cache = jax.ShapeDtypeStruct((2, 2, 4096, 32), jnp.float32)  # stored with heads first

    def decode(q, k, v):
        return attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), window=4000, sinks=4)

    step = compiled(decode, jax.ShapeDtypeStruct((2, 1, 4, 32), jnp.float32), cache, cache)
    text = step.as_text()
    assert "while(" not in text and "sort(" not in text
    assert step.memory_analysis().temp_size_in_bytes < 4096 * 2 * 32 * 4


# Transformations.


@pytest.mark.parametrize("name", ["tiled_offset", "packed_tiled"])
def test_inside_shard_map(name):
    spec = SPECS[name]
    calls = [parted(make(spec, seed)) for seed in range(8 // spec.b)]
    arrays, options = [call[0] for call in calls], calls[0][1]
    batch = jax.tree.map(lambda *x: jnp.concatenate(x), *arrays)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def loss(q, rest):
        out, lse = attention(q=q, **rest, **options, implementation="xla")
        return jnp.where(jnp.isneginf(lse), 0, lse).sum() + (out * jnp.cos(out)).sum()

    def local(q, rest):
        return jax.grad(loss)(q, rest)

    rest = {key: x for key, x in batch.items() if key != "q"}
    sharded = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P("data"), P("data")), out_specs=P("data")))
    assert_close(sharded(batch["q"], rest), jax.jit(local)(batch["q"], rest), 1e-5)


def test_under_vmap():
    calls = [make(SPECS["packed_tiled"], seed) for seed in range(2)]
    arrays, options = (
        jax.tree.map(lambda *x: jnp.stack(x), *(parted(call)[0] for call in calls)),
        parted(calls[0])[1],
    )
    value = jax.jit(jax.vmap(lambda x: attention(**x, **options, implementation="xla")))(arrays)
    assert_close(value, jax.tree.map(lambda *x: jnp.stack(x), *(values(call) for call in calls)), 1e-6)


def test_windows_have_one_meaning_in_either_spelling():
    call = make(SPECS["window_sinks"])
    expected = values(call)
    assert_close(values(call | {"window": (call["window"] - 1, None)}), expected, 0)
    assert_close(values(call | {"window": (call["window"] - 1, 0), "causal": False}), expected, 0)
    assert_close(values(call | {"window": (None, None)}), values(call | {"window": None}), 0)


def test_one_slope_for_all_rows_gets_the_gradient_of_all():
    call = make(SPECS["alibi_cross"])
    one = call | {"alibi": call["alibi"][0]}
    each = call | {"alibi": jnp.tile(call["alibi"][:1], (2, 1))}
    cotangents = cotangents_of(call)
    (value, gradient), (by_row, gradients) = (with_gradients(x, cotangents, "xla") for x in (one, each))
    assert_close(value, by_row, 1e-6)
    assert_close(gradient["alibi"], gradients["alibi"].sum(0), 1e-5)


# What is refused.

GOOD = {"q": (2, 5, 4, 8), "k": (2, 7, 2, 8), "v": (2, 7, 2, 6)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 0}, r"window must be an integer of at least 1 .*, got 0"),
        ({"window": -3}, r"window must be an integer of at least 1 .*, got -3"),
        ({"window": 2.0}, r"window must be an integer of at least 1 .*, got 2\.0"),
        ({"window": True}, r"window must be an integer of at least 1 .*, got True"),
        (
            {"window": 4, "causal": False},
            r"window needs causal=True or a pair .*, got window=4 with causal=False",
        ),
        ({"window": [4]}, r"window must be an integer or a pair \(left, right\) .*, got \[4\]"),
        ({"window": [4, -1], "causal": False}, r"window must be .* at least 0 or None, got \[4, -1\]"),
        ({"alibi": (2,)}, r"alibi must be .* \[h\] = \(4,\) or \[b, h\] = \(2, 4\), got float32\(2,\)"),
        ({"sinks": -1}, r"sinks must be an integer of at least 0, got -1"),
        ({"sinks": 1.5}, r"sinks must be an integer of at least 0, got 1\.5"),
        ({"softcap": 0.0}, r"softcap must be a number above 0 or None, got 0\.0"),
        ({"softcap": -2}, r"softcap must be a number above 0 or None, got -2"),
        ({"softcap": float("nan")}, r"softcap must be a number above 0 or None, got nan"),
        ({"scale": float("inf")}, r"scale must be a finite number or None .*, got inf"),
        ({"implementation": "xls"}, r"implementation of attention: got 'xls', .* did you mean 'xla'\?"),
        ({"q": (2, 5, 32)}, r"q must be a floating-point array \[b, t, h, k\], got float32\(2, 5, 32\)"),
        (
            {"v": jnp.zeros((2, 7, 2, 6), jnp.int32)},
            r"v must be a floating-point array \[b, s, g, v\], got int32\(2, 7, 2, 6\)",
        ),
        (
            {"k": (3, 7, 2, 8)},
            r"k must be \[b, s, g, k\] with b=2 rows and width k=8 > 0 as q \(2, 5, 4, 8\), got \(3, 7, 2, "
            r"8\)",
        ),
        ({"k": (2, 7, 2, 6)}, r"k must be .* got \(2, 7, 2, 6\)"),
        (
            {"v": (2, 6, 2, 6)},
            r"v must begin with the axes of k, \[b, s, g\] = \(2, 7, 2\), got \(2, 6, 2, 6\)",
        ),
        (
            {"k": (2, 7, 3, 8), "v": (2, 7, 3, 6)},
            r"k must have a number of heads that divides the 4 heads of q, got g=3",
        ),
        (
            {"sink_logits": (2,)},
            r"sink_logits must be a floating-point array \[h\] = \(4,\), got float32\(2,\)",
        ),
        (
            {"q_positions": jnp.zeros((2, 7), jnp.int32)},
            r"q_positions must be an integer array of shape \(2, 5\), got int32\(2, 7\)",
        ),
        (
            {"kv_positions": (2, 7)},
            r"kv_positions must be an integer array of shape \(2, 7\), got float32\(2, 7\)",
        ),
        (
            {"q_segments": jnp.zeros((1, 5), jnp.int32)},
            r"q_segments must be an integer array of shape \(2, 5\), got int32\(1, 5\)",
        ),
        (
            {"kv_segments": jnp.ones((2, 7), bool)},
            r"kv_segments must be an integer array of shape \(2, 7\), got bool\(2, 7\)",
        ),
    ],
)
def test_refusals_name_the_argument_and_its_value(change, message):
    call = {name: jnp.zeros(x) if isinstance(x, tuple) else x for name, x in (GOOD | change).items()}
    with pytest.raises(ValueError, match=message):
        attention(**call)
