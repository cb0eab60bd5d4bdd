"""Linear attention: every implementation equals the recurrence in float64 and satisfies the contract."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_identical, random

from seqlab.kernels.linear_attention import linear_attention, reference, xla
from seqlab.kernels.linear_attention.specs import SPECS, Spec, inputs

IMPLEMENTATIONS = ("reference", "xla")
# The reference should have few ways to be wrong.
HEAVY = (pytest.param("reference", marks=pytest.mark.slow), "xla")
FLOATS = ("q", "k", "v", "decay", "beta", "initial_state")
STEPS = ("q", "k", "v", "decay", "beta", "reset", "valid")  # arguments with an axis of time


@functools.partial(jax.jit, static_argnames=("function", "options"))
def _run(function, floats, flags, cotangents, options):
    results, pull = jax.vjp(lambda floats: function(**floats, **flags, **dict(options)), floats)
    return results, pull(cotangents)[0]


def run(arguments, cotangents, function=linear_attention, **options):
    """((out, state), gradients by name) of `function` at `arguments` for the cotangents of out and state."""
    floats = {name: arguments[name] for name in FLOATS if arguments.get(name) is not None}
    flags = {name: arguments.get(name) for name in ("reset", "valid")}
    return _run(function, floats, flags, cotangents, tuple(options.items()))


def cotangents_of(arguments, seed=100):
    v, state = arguments["v"], arguments["initial_state"]
    return random(seed, *v.shape, dtype=v.dtype), random(seed + 1, *state.shape, dtype=state.dtype)


def steps_of(arguments, part):
    """`arguments` at some steps of time; a decay without an axis of time stays."""
    return {
        name: x[:, part] if name in STEPS and x is not None and x.ndim > 1 else x
        for name, x in arguments.items()
    }


def widened(tree):
    return jax.tree.map(lambda x: np.asarray(x) if x.dtype == bool else np.asarray(x, np.float64), tree)


@functools.cache
def truth(name):
    """The recurrence in float64 from the same numbers."""
    arguments = inputs(SPECS[name])
    cotangents = cotangents_of(arguments)
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, run(*widened((arguments, cotangents)), implementation="reference"))


@pytest.mark.parametrize("implementation", HEAVY)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (i % 2)) for i, name in enumerate(SPECS)]
)
def test_values_and_gradients_are_those_of_float64(name, implementation):
    arguments = inputs(SPECS[name])
    results = run(arguments, cotangents_of(arguments), implementation=implementation, chunk=SPECS[name].chunk)
    (out, state), grads = results
    assert out.dtype == arguments["v"].dtype and state.dtype == jnp.float32
    assert {key: x.dtype for key, x in grads.items()} == {
        key: arguments[key].dtype for key in FLOATS if arguments[key] is not None
    }
    # What is handed back in bfloat16 was rounded once, to 8 bits: by at most 2^-8 of itself.
    for tolerance, actual, expected in zip((2e-5, 1e-4), results, truth(name), strict=True):
        for (path, a), e in zip(
            jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
        ):
            rounding = 2.0**-8 if a.dtype == jnp.bfloat16 else 0.0
            assert_close(a, e, rounding + tolerance, f"{name} {jax.tree_util.keystr(path)}")


@pytest.mark.parametrize("name", ["one_group", "resets_masked_value", "abrupt_channel"])
def test_float64_is_exact_to_its_own_rounding(name):
    arguments = inputs(SPECS[name])
    cotangents = cotangents_of(arguments)
    with jax.enable_x64(True):
        results = run(*widened((arguments, cotangents)), implementation="xla", chunk=SPECS[name].chunk)
        assert {x.dtype for x in jax.tree.leaves(results)} == {jnp.dtype("float64")}
        assert_close(results, jax.tree.map(jnp.asarray, truth(name)), 1e-10)


def test_keys_that_repeat_and_a_strong_delta_rule_lose_no_digits():
    arguments = inputs(Spec(1, 32, 1, 16, 8, beta="head", chunk=32))
    arguments |= {
        "k": jnp.broadcast_to(arguments["k"][:, :1], (1, 32, 1, 16)),
        "beta": jnp.full((1, 32, 1), 1.99),
    }
    cotangents = cotangents_of(arguments)
    results = run(arguments, cotangents, implementation="xla", chunk=32)
    with jax.enable_x64(True):
        expected = jax.tree.map(
            np.asarray, run(*widened((arguments, cotangents)), implementation="reference")
        )
    assert_close(results[0], expected[0], 2e-5)
    assert_close(results[1], expected[1], 1e-4)


def test_decays_that_are_just_mild_keep_their_digits():
    arguments = inputs(Spec(2, 64, 1, 8, 6, decay="channel", chunk=32))
    # One great step amid many small ones.
    arguments["decay"] = jnp.full((2, 64, 1, 8), -1e-4).at[:, 5::16].set(-29.0)
    cotangents = cotangents_of(arguments)
    results = run(arguments, cotangents, implementation="xla", chunk=32)
    with jax.enable_x64(True):
        expected = jax.tree.map(
            np.asarray, run(*widened((arguments, cotangents)), implementation="reference")
        )
    assert_close(results, expected, 5e-6)


@pytest.mark.parametrize("implementation", HEAVY)
@pytest.mark.parametrize("kind", ["head", "channel"])
def test_a_log_decay_of_minus_infinity_forgets(kind, implementation):
    arguments = inputs(Spec(2, 13, 2, 4, 3, decay=kind, beta="head"))
    cotangents = cotangents_of(arguments)
    reset = jnp.zeros((2, 13), bool).at[:, 5].set(True)
    expected, _ = run({**arguments, "reset": reset}, cotangents, implementation="reference")
    arguments["decay"] = arguments["decay"].at[:, 5].set(-jnp.inf)
    results, grads = run(arguments, cotangents, implementation=implementation, chunk=8)
    assert_close(results, expected, 2e-5)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))


def in_pieces(splits, *, initial_state, **arguments):
    """`linear_attention` called once a split, each from the state of the one before."""
    options = {name: arguments.pop(name) for name in ("implementation", "chunk")}
    outs, state, start = [], initial_state, 0
    for length in splits:
        part = steps_of(arguments, slice(start, start + length))
        out, state = linear_attention(**part, initial_state=state, **options)
        outs.append(out)
        start += length
    assert start == arguments["v"].shape[1]
    return jnp.concatenate(outs, axis=1), state


@pytest.mark.parametrize(
    ("implementation", "splits"),
    [("xla", (1,) * 9), ("xla", (0, 3, 6)), pytest.param("reference", (1, 5, 3), marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("kind", [("channel", None), ("head", "head")], ids=["plain", "delta"])
def test_chunks_are_the_whole(kind, implementation, splits):
    decay, beta = kind
    arguments = inputs(Spec(2, 9, 2, 5, 4, decay=decay, beta=beta, reset=True, valid=True))
    cotangents = cotangents_of(arguments)
    whole = run(arguments, cotangents, implementation=implementation, chunk=4)
    pieces = run(
        arguments,
        cotangents,
        function=functools.partial(in_pieces, splits),
        implementation=implementation,
        chunk=4,
    )
    assert_close(pieces[0], whole[0], 2e-5, "values")
    assert_close(pieces[1], whole[1], 1e-4, "gradients")


@pytest.mark.parametrize("name", ["channel_decay", "resets_masked", "resets_masked_value"])
def test_blocks_are_the_whole(name, monkeypatch):
    spec = SPECS[name]
    arguments = inputs(spec)
    cotangents = cotangents_of(arguments)
    monkeypatch.setattr(xla, "_BLOCK", {"cpu": 2 * spec.chunk * spec.b * spec.h * spec.k})  # two chunks each
    jaxpr = jax.make_jaxpr(functools.partial(linear_attention, chunk=spec.chunk))(**arguments)
    assert "length=2" in str(jaxpr)
    function = functools.partial(linear_attention)  # another function: nothing compiled before is used
    results = run(arguments, cotangents, function=function, implementation="xla", chunk=spec.chunk)
    assert_close(results[0], truth(name)[0], 2e-5)
    assert_close(results[1], truth(name)[1], 1e-4)


@pytest.mark.parametrize(
    "kind", [("channel", None), ("head", "head"), ("head", "value")], ids=["plain", "delta", "value"]
)
@pytest.mark.parametrize("implementation", HEAVY)
def test_a_reset_separates_two_calls_whatever_the_state_held(implementation, kind):
    decay, beta = kind
    arguments = inputs(Spec(2, 13, 2, 4, 3, decay=decay, beta=beta))
    cotangents = cotangents_of(arguments)
    call = functools.partial(run, implementation=implementation, chunk=4)
    reset = jnp.zeros((2, 13), bool).at[:, 6].set(True)
    (out, state), grads = call({**arguments, "reset": reset}, cotangents)

    def half(part, initial_state, state_cotangent):
        cut = {**steps_of(arguments, part), "initial_state": initial_state}
        return run(cut, (cotangents[0][:, part], state_cotangent), implementation="reference")

    zeros = jnp.zeros_like(state)
    (out1, _), grads1 = half(slice(0, 6), arguments["initial_state"], zeros)
    (out2, state2), grads2 = half(slice(6, 13), zeros, cotangents[1])
    assert_close((out, state), (jnp.concatenate([out1, out2], axis=1), state2), 2e-5)
    expected = {
        key: jnp.concatenate([grads1[key], grads2[key]], axis=1) for key in grads if key != "initial_state"
    }
    assert_close(grads, {**expected, "initial_state": grads1["initial_state"]}, 1e-4)

    broken = {
        **arguments,
        "reset": reset,
        "initial_state": arguments["initial_state"].at[:, :, 1].set(jnp.nan),
    }
    (out_after, state_after), grads_after = call(broken, cotangents)
    assert np.isnan(out_after[:, :6]).all()
    assert_identical((out_after[:, 6:], state_after), (out[:, 6:], state), "a broken state before the reset")
    for key in expected:
        assert_identical(
            grads_after[key][:, 6:], grads[key][:, 6:], f"gradient of {key}, a broken state before the reset"
        )

    start = {**arguments, "reset": jnp.zeros((2, 13), bool).at[:, 0].set(True)}
    clean, dirty = (call({**start, "initial_state": zeros + value}, cotangents) for value in (0.0, jnp.nan))
    assert_identical(dirty, clean)
    assert not dirty[1]["initial_state"].any()


def test_a_broken_state_stays_broken_without_a_reset():
    arguments = inputs(Spec(2, 9, 1, 4, 3, decay="head", beta="head"))
    arguments["initial_state"] = arguments["initial_state"].at[0, 0, 1, 2].set(jnp.nan)
    out, state = linear_attention(**{**arguments, "reset": jnp.zeros((2, 9), bool)}, chunk=4)
    expected = linear_attention(**{**arguments, "reset": None}, implementation="reference")
    np.testing.assert_array_equal(np.isnan(out), np.isnan(expected[0]))
    np.testing.assert_array_equal(np.isnan(state), np.isnan(expected[1]))


@pytest.mark.parametrize("time", [1, 12])
@pytest.mark.parametrize("beta", [None, "head"])
@pytest.mark.parametrize("implementation", HEAVY)
def test_invalid_steps_do_nothing(implementation, beta, time):
    arguments = inputs(Spec(4, time, 2, 5, 3, decay="channel", beta=beta, reset=True, valid=True))
    valid = arguments["valid"].at[0].set(False).at[1].set(True)
    cotangents = cotangents_of(arguments)
    arguments["valid"] = valid
    steps = [key for key in FLOATS[:5] if arguments[key] is not None]

    def spoil(x):
        return jnp.where(valid.reshape(valid.shape + (1,) * (x.ndim - 2)), x, jnp.nan)

    dirty = {
        **arguments,
        **{key: spoil(arguments[key]) for key in steps},
        "reset": arguments["reset"] | ~valid,
    }
    call = functools.partial(run, implementation=implementation, chunk=4)
    (out, state), grads = call(dirty, (spoil(cotangents[0]), cotangents[1]))
    assert_identical(((out, state), grads), call(arguments, cotangents), "NaN at invalid steps")
    assert not np.asarray(out)[~np.asarray(valid)].any()
    assert all(not np.asarray(grads[key])[~np.asarray(valid)].any() for key in steps)
    assert_identical(state[0], arguments["initial_state"][0], "a row without a valid step")
    assert_identical(grads["initial_state"][0], cotangents[1][0])
    for row in range(1, 4):  # a row with its invalid steps taken out is a sequence of its own
        keep = np.flatnonzero(valid[row])
        if not len(keep):
            continue
        alone = {
            key: None if x is None else x[row : row + 1] for key, x in arguments.items() if key != "valid"
        }
        alone = linear_attention(**steps_of(alone, keep), implementation="reference")
        assert_close((out[row : row + 1, keep], state[row : row + 1]), alone, 2e-5, f"row {row}")


@pytest.mark.parametrize("name", ["linear", "channel_delta"])
def test_trailing_invalid_steps_leave_the_state_bit_identical(name):
    arguments = inputs(SPECS[name])
    _, state = linear_attention(**steps_of(arguments, slice(0, 5)))
    padded = steps_of(arguments, slice(0, 7))
    padded["valid"] = jnp.ones((2, 7), bool).at[:, 5:].set(False)
    assert_identical(linear_attention(**padded)[1], state)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_steps_change_nothing(implementation):
    arguments = inputs(Spec(2, 0, 2, 4, 3, decay="head", beta="head", reset=True, valid=True))
    out, state = linear_attention(**arguments, implementation=implementation)
    assert out.shape == (2, 0, 2, 3)
    assert_identical(state, arguments["initial_state"])


def test_defaults_are_a_state_of_zeros_and_the_usual_scale():
    arguments = {key: x for key, x in inputs(SPECS["linear"]).items() if key in ("q", "k", "v")}
    zeros = jnp.zeros((2, 3, 8, 6))
    assert_identical(
        linear_attention(**arguments), linear_attention(**arguments, initial_state=zeros, scale=8**-0.5)
    )
    assert_close(linear_attention(**arguments, scale=1.0)[0], 8**0.5 * linear_attention(**arguments)[0], 1e-6)


@pytest.mark.parametrize("implementation", HEAVY)
def test_rows_on_several_devices_are_those_of_one(implementation):
    arguments = inputs(Spec(4, 7, 2, 5, 3, decay="channel", beta="head", reset=True))
    del arguments["initial_state"], arguments["valid"]
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    rows = jax.sharding.PartitionSpec("data")
    call = functools.partial(linear_attention, implementation=implementation, chunk=4)
    sharded = jax.shard_map(
        lambda a: call(**a), mesh=mesh, in_specs=(dict.fromkeys(arguments, rows),), out_specs=rows
    )

    def gradients(function):
        floats = {key: arguments[key] for key in arguments.keys() - {"reset"}}
        return jax.jit(
            jax.grad(
                lambda floats: sum(jnp.sum(x**2) for x in function({**floats, "reset": arguments["reset"]}))
            )
        )(floats)

    assert_close(
        gradients(sharded), gradients(lambda a: linear_attention(**a, implementation="reference")), 1e-4
    )


def test_vmap_is_a_loop_over_calls():
    arguments = [
        inputs(Spec(1, 21, 2, 4, 3, decay="channel", strength=strength), 7) for strength in (0.1, 30.0)
    ]
    # One of mild decays, one of strong ones.
    arguments = [{key: x for key, x in one.items() if x is not None} for one in arguments]

    def loss(floats):
        return sum(jnp.sum(x**2) for x in linear_attention(**floats, chunk=16))

    together = jax.jit(jax.vmap(jax.value_and_grad(loss)))(jax.tree.map(lambda *x: jnp.stack(x), *arguments))
    for index, one in enumerate(arguments):
        alone = jax.jit(jax.value_and_grad(loss))(one)
        assert_close(jax.tree.map(lambda x, index=index: x[index], together), alone, 1e-5)


def test_memory_in_time_is_that_of_the_inputs():
    def temporary(time):
        arguments = inputs(Spec(1, time, 1, 64, 64, decay="head", beta="head"))
        floats = {name: x for name, x in arguments.items() if x is not None}
        return (
            _run.lower(linear_attention, floats, {}, cotangents_of(arguments), ())
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
        )

    small, large = temporary(8192), temporary(16384)  # both of more than one block
    # Less than two more arguments; one state per step would be 64.
    assert large - small < 8192 * 64 * 4 * 2


def test_decoding_has_no_loop():
    arguments = inputs(SPECS["one_step"])
    assert "while" not in jax.jit(linear_attention).lower(**arguments).as_text()


def test_a_named_implementation_is_that_one_or_an_error(monkeypatch):
    arguments = inputs(SPECS["one_step"])
    with pytest.raises(
        ValueError, match=r"implementation of linear_attention: got 'xIa'.*did you mean 'xla'"
    ):
        linear_attention(**arguments, implementation="xIa")

    def declines(*args, **kwargs):
        raise NotImplementedError("not today")

    for module, name in ((xla, "xla"), (reference, "reference")):
        monkeypatch.setattr(module, "linear_attention", declines)
        with pytest.raises(NotImplementedError, match="not today"):
            linear_attention(**arguments, implementation=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": jnp.ones((2, 5, 4))}, r"q must be an array \[b, t, g, k\]"),
        ({"q": jnp.ones((2, 5, 4, 8), int)}, "q must be a floating-point array"),
        (
            {"k": jnp.ones((2, 5, 1, 8))},
            r"k must be .* \[b, t, g, k\] = \(2, 5, 2, 8\), got float32\(2, 5, 1, 8\)",
        ),
        ({"v": jnp.ones((2, 5, 3, 6))}, "v has 3 heads, which the 2 heads of q must divide"),
        ({"v": jnp.ones((2, 5, 4, 0))}, "v must be an array .* of one row, head and channel at least"),
        ({"v": jnp.ones((2, 4, 4, 6))}, r"q must be .* \[b, t, g, k\] = \(2, 4, 2, 8\)"),
        (
            {"decay": jnp.ones((2, 5, 2))},
            r"decay must be .* = \(2, 5, 4\) or \[b, t, h, k\] = \(2, 5, 4, 8\) or \[h\] = \(4,\)",
        ),
        (
            {"beta": jnp.ones((2, 5, 4, 8))},
            r"beta must be .* \[b, t, h\] = \(2, 5, 4\) or \[b, t, h, v\] = \(2, 5, 4, 6\)",
        ),
        (
            {"initial_state": jnp.ones((2, 4, 6, 8))},
            r"initial_state must be .* \[b, h, k, v\] = \(2, 4, 8, 6\)",
        ),
        ({"reset": jnp.ones((2, 5))}, r"reset must be a boolean array \[b, t\] = \(2, 5\), got float32"),
        ({"valid": jnp.ones((2, 4), bool)}, r"valid must be a boolean array \[b, t\] = \(2, 5\)"),
        ({"chunk": 0}, "chunk must be a power of two or None, got 0"),
        ({"chunk": 24}, "chunk must be a power of two or None, got 24"),
        ({"chunk": 2.0}, r"chunk must be a power of two or None, got 2\.0"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        linear_attention(**{**inputs(Spec(2, 5, 4, 8, 6, g=2)), **change})
