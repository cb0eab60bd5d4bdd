"""The linear memory: every implementation equals the recurrence in float64 and satisfies the contract;
matrices are those of the equations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_identical, random

from seqlab.kernels.lmu import delay_decoder, legendre, lmu
from seqlab.kernels.lmu.specs import SPECS, Spec, inputs

IMPLEMENTATIONS = ("reference", "xla")


@functools.partial(jax.jit, static_argnames=("spec", "function", "options"))
def _run(spec, function, floats, flags, cotangents, options):
    matrices = dict(zip("AB", legendre(spec.d, spec.theta), strict=True))
    results, pull = jax.vjp(lambda floats: function(**floats, **matrices, **flags, **dict(options)), floats)
    return results, pull(cotangents)[0]


def run(spec, arguments, cotangents, function=lmu, **options):
    """((m, state), gradients of u and initial_state) of `function` at `arguments` for the cotangents of m and
    state."""
    floats, flags = (
        {name: arguments[name] for name in names} for names in (("u", "initial_state"), ("reset", "valid"))
    )
    return _run(spec, function, floats, flags, cotangents, tuple(options.items()))


def cotangents_of(spec, seed=100):
    shape = (spec.b, spec.t, spec.q, spec.d)
    return random(seed, *shape, dtype=spec.dtype), random(seed + 1, *shape[:1], *shape[2:])


@functools.cache
def truth(spec):
    """The recurrence in float64 from the same numbers."""
    with jax.enable_x64(True):
        wide = jax.tree.map(
            lambda x: np.asarray(x) if x.dtype == bool else np.asarray(x, np.float64),
            (inputs(spec), cotangents_of(spec)),
        )
        return jax.tree.map(np.asarray, run(spec, *wide, implementation="reference"))


def check(spec, implementation):
    arguments = inputs(spec)
    results = run(spec, arguments, cotangents_of(spec), implementation=implementation, chunk=spec.chunk)
    (m, state), grads = results
    assert (m.dtype, state.dtype) == (arguments["u"].dtype, jnp.float32)
    assert {key: x.dtype for key, x in grads.items()} == {key: arguments[key].dtype for key in grads}
    for actual, expected in zip(jax.tree.leaves(results), jax.tree.leaves(truth(spec)), strict=True):
        rounding = 2.0**-8 if actual.dtype == jnp.bfloat16 else 0.0  # handed back in bfloat16, rounded once
        assert_close(actual, expected, rounding + 2e-5, str(spec))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", SPECS)
def test_values_and_gradients_are_those_of_float64(name, implementation):
    check(SPECS[name], implementation)


@pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if not (spec.reset or spec.valid)])
def test_one_convolution_is_the_recurrence(name):
    check(SPECS[name], "fft")


@pytest.mark.parametrize("flag", ["reset", "valid"])
def test_the_convolution_declines_flags(flag):
    arguments = inputs(Spec(2, 5, 1, 4, 8.0, **{flag: True}))
    with pytest.raises(NotImplementedError, match="resets or pass over invalid steps"):
        lmu(**arguments, implementation="fft")


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "fft"])
def test_float64_stays_float64(implementation, x64):
    spec = SPECS["odd"]
    # Traced matrices work as well.
    arguments = {key: jnp.asarray(x) if key in "AB" else x for key, x in inputs(spec).items()}
    arguments["u"] = arguments["u"].astype(jnp.float64)
    m, state = jax.jit(functools.partial(lmu, implementation=implementation))(**arguments)
    assert m.dtype == state.dtype == jnp.float64
    assert_close((m, state), truth(spec)[0], 1e-13)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_window_can_be_learnt(implementation):
    """Gradients reach A and B, through all chunks."""
    spec = Spec(2, 21, 2, 4, 9.0, chunk=4)
    arguments = {key: x for key, x in inputs(spec).items() if x is not None}
    cotangent, _ = cotangents_of(spec)

    def loss(matrices, name):
        m, _ = lmu(**arguments | matrices, chunk=4, implementation=name)
        return jnp.sum(m * cotangent)

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    matrices = {name: jnp.asarray(arguments[name], jnp.float32) for name in "AB"}
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(arguments[name]) for name in "AB"}
        arguments = {key: jnp.asarray(x, jnp.float64) for key, x in arguments.items()}
        expected = jax.grad(loss)(wide, "reference")
    arguments = {key: jnp.asarray(x, jnp.float32) for key, x in arguments.items()}
    assert_close(gradient(matrices, implementation), expected, 1e-4)


def in_pieces(splits, *, u, A, B, initial_state, reset, valid, **options):
    """`lmu` called once a split, each from the state of the one before."""
    outs, state, start = [], initial_state, 0
    for length in splits:
        here = slice(start, start + length)
        flags = {name: None if x is None else x[:, here] for name, x in (("reset", reset), ("valid", valid))}
        m, state = lmu(u[:, here], A, B, initial_state=state, **flags, **options)
        outs.append(m)
        start += length
    assert start == u.shape[1]
    return jnp.concatenate(outs, axis=1), state


@pytest.mark.parametrize(
    ("implementation", "splits", "flags"),
    [
        ("xla", (1,) * 8, True),
        ("xla", (3, 5), True),
        ("xla", (1, 0, 6, 1), False),
        ("fft", (3, 5), False),
        ("reference", (1, 5, 2), True),
    ],
)
def test_chunks_are_the_whole(implementation, splits, flags):
    spec = Spec(3, 8, 2, 5, 12.0, reset=flags, valid=flags)
    whole = run(spec, inputs(spec), cotangents_of(spec), implementation=implementation, chunk=4)
    pieces = run(
        spec,
        inputs(spec),
        cotangents_of(spec),
        functools.partial(in_pieces, splits),
        implementation=implementation,
        chunk=4,
    )
    assert_close(pieces, whole, 2e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_reset_separates_two_calls_whatever_the_state_held(implementation):
    spec = Spec(2, 13, 2, 4, 9.0, reset=True)
    arguments, cotangents = inputs(spec), cotangents_of(spec)
    arguments["reset"] = jnp.zeros((2, 13), bool).at[:, 6].set(True)
    options = {"implementation": implementation, "chunk": 4}
    (m, state), grads = run(spec, arguments, cotangents, **options)
    (second, last), _ = run(
        spec, {**arguments, "u": arguments["u"][:, 6:], "reset": None, "initial_state": jnp.zeros((2, 2, 4))},
        (cotangents[0][:, 6:], cotangents[1]), **options,
    )  # fmt: skip
    assert_close((m[:, 6:], state), (second, last), 2e-5)

    poisoned = {
        **arguments,
        "u": arguments["u"].at[:, 2].set(jnp.nan),
        "initial_state": arguments["initial_state"] + jnp.nan,
    }
    (m_after, state_after), grads_after = run(spec, poisoned, cotangents, **options)
    assert np.isnan(m_after[:, 2:6]).all()
    assert_identical(
        (m_after[:, 6:], state_after, grads_after), (m[:, 6:], state, grads), "NaN before the reset"
    )


@pytest.mark.parametrize("time", [1, 14])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_invalid_steps_do_nothing(implementation, time):
    spec = Spec(4, time, 2, 5, 12.0, reset=True, valid=True)
    arguments, cotangents = inputs(spec), cotangents_of(spec)
    valid = arguments["valid"] = arguments["valid"].at[0].set(False).at[1].set(True)
    options = {"implementation": implementation, "chunk": 4}
    dirty = {
        **arguments,
        "u": jnp.where(valid[..., None], arguments["u"], jnp.nan),
        "reset": arguments["reset"] | ~valid,
    }
    (m, state), grads = run(
        spec, dirty, (jnp.where(valid[..., None, None], cotangents[0], jnp.nan), cotangents[1]), **options
    )
    assert_identical(((m, state), grads), run(spec, arguments, cotangents, **options), "NaN at invalid steps")
    assert (
        not np.asarray(m)[~np.asarray(valid)].any() and not np.asarray(grads["u"])[~np.asarray(valid)].any()
    )
    assert_identical(state[0], arguments["initial_state"][0], "a row without a valid step")
    assert_identical(grads["initial_state"][0], cotangents[1][0])
    for row in range(1, 4):  # a row with its invalid steps taken out is a sequence of its own
        keep = np.flatnonzero(valid[row])
        if len(keep):
            alone = {name: arguments[name][row : row + 1, keep] for name in ("u", "reset")}
            alone |= {
                "initial_state": arguments["initial_state"][row : row + 1],
                "A": arguments["A"],
                "B": arguments["B"],
            }
            assert_close(
                (m[row : row + 1, keep], state[row : row + 1]), lmu(**alone, **options), 2e-5, f"row {row}"
            )


def test_a_memory_that_waits_does_not_fade():
    spec = Spec(1, 1000, 1, 4, 9.0)
    arguments = inputs(spec) | {"valid": jnp.zeros((1, 1000), bool)}
    _, state = lmu(**arguments)
    assert_identical(state, arguments["initial_state"])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_on_several_devices_are_those_of_one(implementation):
    spec = Spec(4, 7, 2, 3, 8.0, reset=True)
    arguments = {name: inputs(spec)[name] for name in ("u", "reset")}
    A, B = legendre(3, 8.0)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    rows = jax.sharding.PartitionSpec("data")
    sharded = jax.shard_map(
        lambda u, reset: lmu(u, A, B, reset=reset, implementation=implementation, chunk=4),
        mesh=mesh,
        in_specs=rows,
        out_specs=rows,
    )

    def gradient(function):
        return jax.jit(jax.grad(lambda u: sum(jnp.sum(x**2) for x in function(u, arguments["reset"]))))(
            arguments["u"]
        )

    assert_close(
        gradient(sharded),
        gradient(lambda u, reset: lmu(u, A, B, reset=reset, implementation="reference")),
        1e-5,
    )


def test_decoding_has_no_loop():
    floats = {
        name: inputs(SPECS["one_step_masked"])[name] for name in ("u", "initial_state", "reset", "valid")
    }
    A, B = legendre(6, 16.0)
    assert "while" not in jax.jit(lambda floats: lmu(A=A, B=B, **floats)).lower(floats).as_text()


def test_matrices_of_a_memory_of_two():
    """By hand: A = [[-1, -1], [3, -3]] / θ, B = [1, -3] / θ; the exact step solves m' = A m + B u for one
    time unit."""
    A, B = legendre(2, 4.0, "euler")
    np.testing.assert_allclose(A, [[0.75, -0.25], [0.75, 0.25]], rtol=1e-15)
    np.testing.assert_allclose(B, [0.25, -0.75], rtol=1e-15)
    A, B = legendre(2, 4.0)
    small = 2**-12  # many short Euler steps
    continuous, drive = np.array([[-1, -1], [3, -3]]) / 4, np.array([1, -3]) / 4
    # From nothing under u = 1, and from the two unit vectors.
    m = np.concatenate([np.zeros((2, 1)), np.eye(2)], axis=1)
    for _ in range(2**12):
        m = m + small * (continuous @ m + np.stack([drive, 0 * drive, 0 * drive], axis=1))
    np.testing.assert_allclose(m[:, 0], B, atol=1e-3)
    np.testing.assert_allclose(m[:, 1:], A, atol=1e-3)
    assert legendre(2, 4.0) is legendre(2, 4.0) and not A.flags.writeable


def test_the_memory_of_a_constant_is_the_constant():
    """Its expansion in Legendre polynomials is P_0 alone, and every delay reads it."""
    m, _ = lmu(jnp.ones((1, 200, 1)), *legendre(8, 40.0))
    np.testing.assert_allclose(m[0, -1, 0], [1, *[0] * 7], atol=1e-4)
    np.testing.assert_allclose(delay_decoder(8, 40.0, np.arange(41)) @ np.asarray(m[0, -1, 0]), 1, atol=1e-3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda u, A, B: lmu(u[0], A, B), r"u must be an array \[b, t, q\]"),
        (lambda u, A, B: lmu(u, A[:2], B), r"A must be a square matrix"),
        (lambda u, A, B: lmu(u, A, B[:2]), r"B must be \[d\] = \(3,\)"),
        (
            lambda u, A, B: lmu(u, A, B, initial_state=jnp.zeros((1, 3))),
            r"initial_state must be \[b, q, d\] = \(1, 2, 3\)",
        ),
        (lambda u, A, B: lmu(u, A, B, reset=jnp.zeros((1, 4))), r"reset must be a boolean array \[b, t\]"),
        (lambda u, A, B: lmu(u, A, B, chunk=0), "chunk must be a positive integer"),
        (lambda u, A, B: lmu(u, A, B, implementation="ftt"), "did you mean 'fft'"),
        (lambda u, A, B: lmu(u.astype(int), A, B), "u must hold floating-point numbers"),
        (lambda u, A, B: legendre(0, 4.0), "order must be a positive integer, got 0"),
        (lambda u, A, B: legendre(4, 0.0), "theta must be a positive number"),
        (lambda u, A, B: legendre(4, 4.0, "eulr"), "did you mean 'euler'"),
        (
            lambda u, A, B: delay_decoder(4, 4.0, [5.0]),
            "delays must be a list of numbers between 0 and theta",
        ),
    ],
)
def test_bad_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call(jnp.ones((1, 4, 2)), *legendre(3, 8.0))
