"""The short convolution: every implementation equals the sliding window in float64 and satisfies the
contract."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_identical, random

from seqlab.kernels.conv import conv, reference, xla
from seqlab.kernels.conv.specs import SPECS, Spec, inputs

IMPLEMENTATIONS = ("reference", "xla")
FLOATS = ("x", "weight", "bias", "initial_state")


@functools.partial(jax.jit, static_argnames=("function", "options"))
def _run(function, floats, flags, cotangents, options):
    results, pull = jax.vjp(lambda floats: function(**floats, **flags, **dict(options)), floats)
    return results, pull(cotangents)[0]


def run(arguments, cotangents, function=conv, **options):
    """((y, state), gradients by name) of `function` at `arguments` for the cotangents of y and state."""
    floats = {name: arguments[name] for name in FLOATS if arguments[name] is not None}
    flags = {name: arguments[name] for name in ("reset", "valid")}
    return _run(function, floats, flags, cotangents, tuple(options.items()))


def cotangents_of(arguments, seed=100):
    return tuple(
        random(seed + i, *arguments[key].shape, dtype=arguments[key].dtype)
        for i, key in enumerate(("x", "initial_state"))
    )


def by_hand(x, weight, bias, initial_state, reset, valid):
    """Row by row with lists, in float64."""
    b, t, d = x.shape
    w, y, states = weight.shape[0], np.zeros((b, t, d)), []
    for row in range(b):
        past = list(np.asarray(initial_state[row], np.float64))
        for i in range(t):
            if valid is not None and not valid[row, i]:
                continue
            if reset is not None and reset[row, i]:
                past = [np.zeros(d)] * (w - 1)
            past = [*past, np.asarray(x[row, i], np.float64)]
            y[row, i] = sum(
                tap * value for tap, value in zip(np.asarray(weight, np.float64), past, strict=True)
            )
            y[row, i] += 0 if bias is None else np.asarray(bias, np.float64)
            past = past[1:]
        states.append(np.reshape(past, (w - 1, d)))
    return y, np.stack(states)


@functools.cache
def truth(name):
    """The sliding window in float64 from the same numbers."""
    arguments = inputs(SPECS[name])
    with jax.enable_x64(True):
        arguments, cotangents = jax.tree.map(
            lambda x: np.asarray(x) if x.dtype == bool else np.asarray(x, np.float64),
            (arguments, cotangents_of(arguments)),
        )
        return jax.tree.map(np.asarray, run(arguments, cotangents, implementation="reference"))


@pytest.mark.parametrize("name", SPECS)
def test_the_truth_is_the_definition(name):
    assert_close(truth(name)[0], by_hand(**inputs(SPECS[name])), 1e-13)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", SPECS)
def test_values_and_gradients_are_those_of_float64(name, implementation):
    arguments = inputs(SPECS[name])
    results = run(arguments, cotangents_of(arguments), implementation=implementation)
    dtype = arguments["x"].dtype
    assert {x.dtype for x in jax.tree.leaves(results)} == {dtype}
    # bfloat16 rounds what is handed back once, to 8 bits: by at most 2^-8 of itself.
    rounding = 2.0**-8 if dtype == jnp.bfloat16 else 0.0
    assert_close(results[0], truth(name)[0], rounding + 2e-5, f"{name} values")
    assert_close(results[1], truth(name)[1], rounding + 1e-4, f"{name} gradients")
    if SPECS[name].w > 1 and not (SPECS[name].reset or SPECS[name].valid):
        kept = jnp.concatenate([arguments["initial_state"], arguments["x"]], axis=1)[:, 1 - SPECS[name].w :]
        assert_identical(results[0][1], kept, "the state holds inputs")


@pytest.mark.parametrize("flags", [{}, {"reset": True}])
def test_both_weight_gradients_agree(flags):
    """Platforms differ in how they compute it; only one of them is the platform of the tests."""
    arguments = inputs(Spec(2, 19, 5, 4, **flags))
    past = None if arguments["reset"] is None else xla._past(arguments["reset"], 3)
    residuals = (*(arguments[key] for key in FLOATS), past, random(9, 2, 19, 5))
    assert_close(xla._dweight_by_steps(*residuals), xla._dweight_by_taps(*residuals), 2e-6)


def in_pieces(splits, *, x, weight, bias, initial_state, reset, valid, **options):
    """`conv` called once a split, each from the state of the one before."""
    outs, state, start = [], initial_state, 0
    for length in splits:
        part = slice(start, start + length)
        cut = {
            name: None if flags is None else flags[:, part]
            for name, flags in (("reset", reset), ("valid", valid))
        }
        y, state = conv(x[:, part], weight, bias, initial_state=state, **cut, **options)
        outs.append(y)
        start += length
    assert start == x.shape[1]
    return jnp.concatenate(outs, axis=1), state


@pytest.mark.parametrize(
    ("implementation", "splits"),
    [("xla", (1,) * 8), ("xla", (3, 5)), ("xla", (1, 6, 1)), ("xla", (0, 7, 1)), ("reference", (1, 5, 2))],
)
def test_chunks_are_the_whole(implementation, splits):
    arguments = inputs(Spec(3, 8, 5, 4, reset=True, valid=True))
    cotangents = cotangents_of(arguments)
    whole = run(arguments, cotangents, implementation=implementation)
    pieces = run(
        arguments, cotangents, function=functools.partial(in_pieces, splits), implementation=implementation
    )
    assert_identical(pieces[0][1], whole[0][1], "the state holds inputs")
    assert_close(pieces[0], whole[0], 2e-5, "values")
    assert_close(pieces[1], whole[1], 1e-4, "gradients")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_reset_separates_two_calls_whatever_came_before(implementation):
    arguments = inputs(Spec(2, 11, 4, 4))
    cotangents = cotangents_of(arguments)
    reset = jnp.zeros((2, 11), bool).at[:, 6].set(True)
    (y, state), grads = run({**arguments, "reset": reset}, cotangents, implementation=implementation)

    def half(part, initial_state, state_cotangent):
        cut = {**arguments, "x": arguments["x"][:, part], "initial_state": initial_state}
        return run(cut, (cotangents[0][:, part], state_cotangent), implementation=implementation)

    zeros = jnp.zeros_like(state)
    (y1, _), grads1 = half(slice(0, 6), arguments["initial_state"], zeros)
    (y2, state2), grads2 = half(slice(6, 11), zeros, cotangents[1])
    assert_close((y, state), (jnp.concatenate([y1, y2], axis=1), state2), 2e-5)
    expected = {
        "x": jnp.concatenate([grads1["x"], grads2["x"]], axis=1),
        "initial_state": grads1["initial_state"],
    }
    expected |= {key: grads1[key] + grads2[key] for key in ("weight", "bias")}
    assert_close(grads, expected, 1e-4)

    # Two steps after the reset the window still reaches over it, into a NaN.
    poisoned = {
        **arguments,
        "reset": reset,
        "x": arguments["x"].at[:, 5].set(jnp.nan),
        "initial_state": zeros + jnp.nan,
    }
    (y_after, state_after), grads_after = run(poisoned, cotangents, implementation=implementation)
    assert_identical((y_after[:, 6:], state_after), (y[:, 6:], state), "NaN before the reset")
    assert_identical(grads_after["x"], grads["x"], "NaN before the reset")


@pytest.mark.parametrize("time", [1, 12])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_invalid_steps_do_nothing(implementation, time):
    arguments = inputs(Spec(4, time, 5, 4, reset=True, valid=True))
    valid = arguments["valid"] = arguments["valid"].at[0].set(False).at[1].set(True)
    cotangents = cotangents_of(arguments)
    run_it = functools.partial(run, implementation=implementation)
    dirty = {
        **arguments,
        "x": jnp.where(valid[:, :, None], arguments["x"], jnp.nan),
        "reset": arguments["reset"] | ~valid,
    }
    (y, state), grads = run_it(dirty, (jnp.where(valid[:, :, None], cotangents[0], jnp.nan), cotangents[1]))
    assert_identical(((y, state), grads), run_it(arguments, cotangents), "NaN at invalid steps")
    assert not np.asarray(y)[~np.asarray(valid)].any()
    assert not np.asarray(grads["x"])[~np.asarray(valid)].any()
    assert_identical(state[0], arguments["initial_state"][0], "a row without a valid step")
    assert_identical(grads["initial_state"][0], cotangents[1][0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_steps_change_nothing(implementation):
    arguments = inputs(Spec(2, 0, 4, 3, reset=True, valid=True))
    y, state = conv(**arguments, implementation=implementation)
    assert y.shape == (2, 0, 4)
    assert_identical(state, arguments["initial_state"])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_on_several_devices_are_those_of_one(implementation):
    arguments = inputs(Spec(4, 7, 5, 3, reset=True, valid=True))
    del arguments["initial_state"]
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    rows, everywhere = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    specs = {key: everywhere if key in ("weight", "bias") else rows for key in arguments}
    sharded = jax.shard_map(
        lambda a: conv(**a, implementation=implementation), mesh=mesh, in_specs=(specs,), out_specs=rows
    )

    def gradients(function):
        flags = {key: arguments[key] for key in ("reset", "valid")}
        floats = {key: arguments[key] for key in arguments.keys() - flags.keys()}
        return jax.jit(jax.grad(lambda floats: sum(jnp.sum(x**2) for x in function({**floats, **flags}))))(
            floats
        )

    assert_close(gradients(sharded), gradients(lambda a: conv(**a, implementation="reference")), 1e-4)


def test_decoding_has_no_loop():
    text = jax.jit(conv).lower(**inputs(SPECS["one_step"])).as_text()
    assert "while" not in text and "gather" not in text


def test_a_named_implementation_is_that_one_or_an_error(monkeypatch):
    arguments = inputs(SPECS["one_step"])
    with pytest.raises(
        ValueError, match=r"implementation of conv: got 'referense'.*did you mean 'reference'"
    ):
        conv(**arguments, implementation="referense")

    def declines(*args, **kwargs):
        raise NotImplementedError("not today")

    monkeypatch.setattr(xla, "conv", declines)
    with pytest.raises(NotImplementedError, match="not today"):
        conv(**arguments, implementation="xla")
    monkeypatch.setattr(reference, "conv", declines)
    with pytest.raises(NotImplementedError, match="not today"):
        conv(**arguments, implementation="reference")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.ones((2, 5))}, r"x must be an array \[b, t, d\]"),
        ({"x": jnp.ones((2, 5, 4), int)}, "x must hold floating-point numbers, got int32"),
        ({"weight": jnp.ones((3, 5))}, r"weight must be \[w, d\] with w >= 1 and d=4"),
        ({"weight": jnp.ones((0, 4))}, r"weight must be \[w, d\] with w >= 1"),
        ({"bias": jnp.ones((3,))}, r"bias must be \[d\] = \(4,\), got \(3,\)"),
        (
            {"initial_state": jnp.ones((2, 3, 4))},
            r"initial_state must be \[b, w-1, d\] = \(2, 2, 4\), got \(2, 3, 4\)",
        ),
        ({"reset": jnp.ones((2, 5))}, r"reset must be a boolean array \[b, t\] = \(2, 5\), got float32"),
        ({"valid": jnp.ones((2, 4), bool)}, r"valid must be a boolean array \[b, t\] = \(2, 5\)"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        conv(**{**inputs(Spec(2, 5, 4, 3)), **change})
