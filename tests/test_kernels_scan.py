"""The selective scan: every implementation equals the recurrence in float64 and satisfies the contract."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_identical, random

from seqlab.kernels.scan import reference, scan, xla
from seqlab.kernels.scan.specs import SPECS, Spec, inputs

IMPLEMENTATIONS = ("reference", "xla")
# The reference should have few ways to be wrong.
HEAVY = (pytest.param("reference", marks=pytest.mark.slow), "xla")
FLOATS = ("u", "delta", "A", "B", "C", "initial_state")


@functools.partial(jax.jit, static_argnames=("function", "options"))
def _run(function, floats, flags, cotangents, options):
    results, pull = jax.vjp(lambda floats: function(**floats, **flags, **dict(options)), floats)
    return results, pull(cotangents)[0]


def run(arguments, cotangents, function=scan, **options):
    """((y, state), gradients by name) of `function` at `arguments` for the cotangents of y and state."""
    floats = {name: arguments[name] for name in FLOATS}
    flags = {name: arguments[name] for name in ("reset", "valid")}
    return _run(function, floats, flags, cotangents, tuple(options.items()))


def cotangents_of(arguments, seed=100):
    u, state = arguments["u"], arguments["initial_state"]
    return random(seed, *u.shape, dtype=u.dtype), random(seed + 1, *state.shape, dtype=state.dtype)


@functools.cache
def truth(name):
    """The recurrence in float64 from the same numbers."""
    arguments = inputs(SPECS[name])
    cotangents = cotangents_of(arguments)
    with jax.enable_x64(True):
        arguments, cotangents = jax.tree.map(
            lambda x: np.asarray(x) if x.dtype == bool else np.asarray(x, np.float64), (arguments, cotangents)
        )
        return jax.tree.map(np.asarray, run(arguments, cotangents, implementation="reference"))


@pytest.mark.parametrize("implementation", HEAVY)
@pytest.mark.parametrize("name", SPECS)
def test_values_and_gradients_are_those_of_float64(name, implementation):
    arguments = inputs(SPECS[name])
    results = run(arguments, cotangents_of(arguments), implementation=implementation, chunk=SPECS[name].chunk)
    (y, state), grads = results
    assert y.dtype == arguments["u"].dtype and state.dtype == jnp.float32
    assert {key: x.dtype for key, x in grads.items()} == {key: arguments[key].dtype for key in FLOATS}
    # What is handed back in bfloat16 was rounded once, to 8 bits: by at most 2^-8 of itself.
    for tolerance, actual, expected in zip((2e-5, 1e-4), results, truth(name), strict=True):
        for (path, a), e in zip(
            jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
        ):
            rounding = 2.0**-8 if a.dtype == jnp.bfloat16 else 0.0
            assert_close(a, e, rounding + tolerance, f"{name} {jax.tree_util.keystr(path)}")


def test_float64_stays_float64(x64):
    arguments = inputs(SPECS["resets_masked"])
    arguments = {key: x.astype(jnp.float64) if key in FLOATS else x for key, x in arguments.items()}
    results = run(arguments, cotangents_of(arguments), implementation="xla", chunk=16)
    assert {x.dtype for x in jax.tree.leaves(results)} == {jnp.dtype("float64")}
    assert_close(results, run(arguments, cotangents_of(arguments), implementation="reference"), 1e-13)


def in_pieces(splits, *, u, delta, A, B, C, initial_state, reset, valid, **options):
    """`scan` called once a split, each from the state of the one before."""
    outs, state, start = [], initial_state, 0
    for length in splits:
        part = slice(start, start + length)
        cut = {name: None if x is None else x[:, part] for name, x in (("reset", reset), ("valid", valid))}
        y, state = scan(
            u[:, part], delta[:, part], A, B[:, part], C[:, part], initial_state=state, **cut, **options
        )
        outs.append(y)
        start += length
    assert start == u.shape[1]
    return jnp.concatenate(outs, axis=1), state


@pytest.mark.parametrize(
    ("implementation", "splits"),
    [
        ("xla", (1,) * 8),
        ("xla", (3, 5)),
        ("xla", (1, 6, 1)),
        ("xla", (0, 7, 1)),
        pytest.param("reference", (1, 5, 2), marks=pytest.mark.slow),
    ],
)
def test_chunks_are_the_whole(implementation, splits):
    arguments = inputs(Spec(3, 8, 5, 4, reset=True, valid=True))
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


@pytest.mark.parametrize("implementation", HEAVY)
def test_a_reset_separates_two_calls_whatever_the_state_held(implementation):
    arguments = inputs(Spec(2, 13, 4, 3))
    cotangents = cotangents_of(arguments)
    reset = jnp.zeros((2, 13), bool).at[:, 6].set(True)
    (y, state), grads = run({**arguments, "reset": reset}, cotangents, implementation=implementation, chunk=4)

    def half(part, initial_state, state_cotangent):
        cut = {key: x[:, part] if key in ("u", "delta", "B", "C") else x for key, x in arguments.items()}
        cut["initial_state"] = initial_state
        return run(cut, (cotangents[0][:, part], state_cotangent), implementation=implementation, chunk=4)

    zeros = jnp.zeros_like(state)
    (y1, _), grads1 = half(slice(0, 6), arguments["initial_state"], zeros)
    (y2, state2), grads2 = half(slice(6, 13), zeros, cotangents[1])
    assert_close((y, state), (jnp.concatenate([y1, y2], axis=1), state2), 2e-5)
    expected = {key: jnp.concatenate([grads1[key], grads2[key]], axis=1) for key in ("u", "delta", "B", "C")}
    expected |= {"A": grads1["A"] + grads2["A"], "initial_state": grads1["initial_state"]}
    assert_close(grads, expected, 1e-4)

    poisoned = {**arguments, "reset": reset, "u": arguments["u"].at[:, 2].set(jnp.nan)}
    (y_after, state_after), grads_after = run(poisoned, cotangents, implementation=implementation, chunk=4)
    assert np.isnan(y_after[:, 2:6]).all()
    assert_identical((y_after[:, 6:], state_after), (y[:, 6:], state), "NaN before the reset")
    for key in ("u", "delta", "B", "C"):
        assert_identical(
            grads_after[key][:, 6:], grads[key][:, 6:], f"gradient of {key}, NaN before the reset"
        )

    start = {**arguments, "reset": jnp.zeros((2, 13), bool).at[:, 0].set(True)}
    clean = run({**start, "initial_state": zeros}, cotangents, implementation=implementation, chunk=4)
    dirty = run(
        {**start, "initial_state": zeros + jnp.nan}, cotangents, implementation=implementation, chunk=4
    )
    assert_identical(dirty, clean)
    assert not dirty[1]["initial_state"].any()


@pytest.mark.parametrize("time", [1, 12])
@pytest.mark.parametrize("implementation", HEAVY)
def test_invalid_steps_do_nothing(implementation, time):
    arguments = inputs(Spec(4, time, 5, 3, reset=True, valid=True))
    valid = arguments["valid"].at[0].set(False).at[1].set(True)
    cotangents = cotangents_of(arguments)
    arguments["valid"] = valid
    steps = ("u", "delta", "B", "C")
    dirty = {
        key: jnp.where(valid[:, :, None], x, jnp.nan) if key in steps else x for key, x in arguments.items()
    }
    dirty["reset"] = arguments["reset"] | ~valid
    run_it = functools.partial(run, implementation=implementation, chunk=4)
    (y, state), grads = run_it(dirty, (jnp.where(valid[:, :, None], cotangents[0], jnp.nan), cotangents[1]))
    assert_identical(((y, state), grads), run_it(arguments, cotangents), "NaN at invalid steps")
    assert not np.asarray(y)[~np.asarray(valid)].any()
    assert all(not np.asarray(grads[key])[~np.asarray(valid)].any() for key in steps)
    assert_identical(state[0], arguments["initial_state"][0], "a row without a valid step")
    assert_identical(grads["initial_state"][0], cotangents[1][0])
    for row in range(1, 4):  # a row with its invalid steps taken out is a sequence of its own
        keep = np.flatnonzero(valid[row])
        if not len(keep):
            continue
        alone = {
            key: x[row : row + 1, keep] if key in (*steps, "reset") else x
            for key, x in arguments.items()
            if key != "valid"
        }
        alone["initial_state"] = arguments["initial_state"][row : row + 1]
        y_alone, state_alone = scan(**alone, implementation=implementation, chunk=4)
        assert_close(
            (y[row : row + 1, keep], state[row : row + 1]), (y_alone, state_alone), 2e-5, f"row {row}"
        )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_steps_change_nothing(implementation):
    arguments = inputs(Spec(2, 0, 4, 3, reset=True, valid=True))
    y, state = scan(**arguments, implementation=implementation)
    assert y.shape == (2, 0, 4)
    assert_identical(state, arguments["initial_state"])


@pytest.mark.parametrize("implementation", HEAVY)
def test_rows_on_several_devices_are_those_of_one(implementation):
    arguments = inputs(Spec(4, 7, 5, 3, reset=True))
    del arguments["initial_state"], arguments["valid"]
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    rows, everywhere = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    specs = {key: everywhere if key == "A" else rows for key in arguments}
    sharded = jax.shard_map(
        lambda a: scan(**a, implementation=implementation, chunk=4),
        mesh=mesh,
        in_specs=(specs,),
        out_specs=rows,
    )

    def gradients(function):
        flags = {"reset": arguments["reset"]}
        floats = {key: arguments[key] for key in arguments.keys() - flags.keys()}
        return jax.jit(jax.grad(lambda floats: sum(jnp.sum(x**2) for x in function({**floats, **flags}))))(
            floats
        )

    assert_close(gradients(sharded), gradients(lambda a: scan(**a, implementation="reference")), 1e-4)


def test_memory_in_time_is_that_of_the_inputs():
    def temporary(time):
        arguments = inputs(Spec(1, time, 32, 32))
        floats = {name: arguments[name] for name in FLOATS}
        compiled = _run.lower(scan, floats, {}, cotangents_of(arguments), ()).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    state = 32 * 32 * 4
    assert temporary(4096) - temporary(1024) < 3072 * state / 4


def test_decoding_has_no_loop():
    arguments = inputs(SPECS["one_step_masked"])
    text = jax.jit(scan).lower(**arguments).as_text()
    assert "while" not in text


def test_a_named_implementation_is_that_one_or_an_error(monkeypatch):
    arguments = inputs(SPECS["one_step"])
    with pytest.raises(ValueError, match=r"implementation of scan: got 'xIa'.*did you mean 'xla'"):
        scan(**arguments, implementation="xIa")

    def declines(*args, **kwargs):
        raise NotImplementedError("not today")

    monkeypatch.setattr(xla, "scan", declines)
    with pytest.raises(NotImplementedError, match="not today"):
        scan(**arguments, implementation="xla")
    monkeypatch.setattr(reference, "scan", declines)
    with pytest.raises(NotImplementedError, match="not today"):
        scan(**arguments, implementation="reference")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": jnp.ones((2, 5))}, r"u must be an array \[b, t, e\]"),
        ({"u": jnp.ones((2, 5, 4), int)}, "u must be a floating-point array"),
        (
            {"delta": jnp.ones((2, 4, 4))},
            r"delta must be .* \[b, t, e\] = \(2, 5, 4\), got float32\(2, 4, 4\)",
        ),
        ({"A": jnp.ones((3, 4))}, r"A must be \[e, n\] with e=4"),
        ({"B": jnp.ones((2, 5, 4))}, r"B must be .* \[b, t, n\] = \(2, 5, 3\)"),
        ({"C": jnp.ones((2, 5, 3), int)}, "C must be a floating-point array"),
        ({"initial_state": jnp.ones((2, 3, 4))}, r"initial_state must be .* \[b, e, n\] = \(2, 4, 3\)"),
        ({"reset": jnp.ones((2, 5))}, r"reset must be a boolean array \[b, t\] = \(2, 5\), got float32"),
        ({"valid": jnp.ones((2, 4), bool)}, r"valid must be a boolean array \[b, t\] = \(2, 5\)"),
        ({"chunk": 0}, "chunk must be a positive integer or None, got 0"),
        ({"chunk": 2.0}, r"chunk must be a positive integer or None, got 2\.0"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        scan(**{**inputs(Spec(2, 5, 4, 3)), **change})
