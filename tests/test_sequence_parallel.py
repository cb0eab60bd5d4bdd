"""Clause C5: a sequence split over 2, 4 and 8 devices equals one, in value and gradient, with messages
between neighbours alone."""

import functools
import re

import bench_ring
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from helpers import assert_close, random
from jax.sharding import NamedSharding, PartitionSpec

from seqlab import kernels, merge, split, verify_devices
from seqlab.kernels.attention.ring import LAYOUTS, permutation, use_layout
from seqlab.kernels.lmu import legendre
from seqlab.module import Module
from seqlab.parallel.sharding import compiler_options, make_mesh
from seqlab.state import segments

B, TIME = 2, 29  # which no number of devices divides


def on(devices):
    return jax.set_mesh(make_mesh(data=1, sequence=devices, devices=jax.devices()[:devices]))


def flags(time=TIME):
    rng = np.random.default_rng(0)
    return {
        "reset": jnp.asarray(rng.random((B, time)) < 0.1),
        "valid": jnp.asarray(rng.random((B, time)) < 0.8),
    }


def gradients_and_values(function, **fixed):
    """A compiled function of a dictionary of arrays: the gradients of a projection of all results, and
    these."""

    def loss(arrays):
        results = function(**arrays, **fixed)
        # The lse of a query that sees nothing is -inf.
        finite = [jnp.where(jnp.isfinite(x), x, 0) for x in results]
        return sum(jnp.sum(x * random(i, *x.shape, dtype=x.dtype)) for i, x in enumerate(finite)), finite

    return jax.jit(jax.grad(loss, has_aux=True), compiler_options=compiler_options(make_mesh()))


# --- operations


def linear_operations():
    k = random(3, B, TIME, 2, 3)
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    attend = {
        "q": random(1, B, TIME, 2, 3),
        "k": k,
        "v": random(2, B, TIME, 4, 5),
        "initial_state": random(7, B, 4, 3, 5),
    }
    channels, heads = (-jax.nn.softplus(random(4, B, TIME, 4, *more)) for more in ((3,), ()))
    beta = jax.nn.sigmoid(random(5, B, TIME, 4))
    scan = {
        "u": random(1, B, TIME, 3),
        "delta": jax.nn.softplus(random(2, B, TIME, 3)),
        "A": -jnp.exp(random(3, 3, 2)),
    }
    scan |= {"B": random(4, B, TIME, 2), "C": random(5, B, TIME, 2), "initial_state": random(6, B, 3, 2)}
    conv = {
        "x": random(1, B, TIME, 3),
        "weight": random(2, 6, 3),
        "bias": random(3, 3),
        "initial_state": random(4, B, 5, 3),
    }
    memory = functools.partial(kernels.lmu, A=legendre(5, 9.0)[0], B=legendre(5, 9.0)[1])
    return {
        "conv": (kernels.conv, conv),
        "scan": (kernels.scan, scan),
        "lmu": (memory, {"u": random(1, B, TIME, 2), "initial_state": random(2, B, 2, 5)}),
        "decay": (kernels.linear_attention, attend | {"decay": channels}),
        "delta rule": (kernels.linear_attention, attend | {"decay": heads, "beta": beta}),
        "a delta rule a value": (
            kernels.linear_attention,
            attend | {"beta": jnp.repeat(beta[..., None], 5, -1)},
        ),
    }


SLOW = [pytest.mark.slow]


@pytest.mark.parametrize("devices", [pytest.param(2, marks=SLOW), pytest.param(4, marks=SLOW), 8])
@pytest.mark.parametrize("packed", [pytest.param(False, marks=SLOW), True])
@pytest.mark.parametrize(
    "name", ["conv", "scan", "lmu", "decay", "delta rule", pytest.param("a delta rule a value", marks=SLOW)]
)
def test_linear_recurrences(name, packed, devices):
    operation, arrays = linear_operations()[name]
    run = gradients_and_values(operation, **(flags() if packed else {}))
    expected = run(arrays)
    with on(devices):
        assert_close(run(arrays), expected, 2e-5)


ATTENTION = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": 6},
    "window with sinks": {"window": 5, "sinks": 2, "softcap": 3.0},
    "two sides and slopes": {"causal": False, "window": (7, 4), "sinks": 1},
    "packed": {},
}


@pytest.mark.parametrize("devices", [pytest.param(2, marks=SLOW), pytest.param(4, marks=SLOW), 8])
@pytest.mark.parametrize("kind", ATTENTION)
@pytest.mark.parametrize(
    "layout", ["contiguous", pytest.param("zigzag", marks=SLOW), pytest.param("striped", marks=SLOW)]
)
def test_ring_attention(layout, kind, devices):
    run, arrays = attention(kind)
    expected = run(arrays)
    with on(devices), use_layout(layout):
        assert_close(run(arrays), expected, 2e-5)


@pytest.mark.parametrize("layout, devices", [("zigzag", 4), ("striped", 2)])
def test_ring_attention_in_other_layouts(layout, devices):
    run, arrays = attention("packed")
    expected = run(arrays)
    with on(devices), use_layout(layout):
        assert_close(run(arrays), expected, 2e-5)


def attention(kind):
    """Grouped heads, a sink, slopes where asked for, and for "packed" documents of any length and padding."""
    arrays = {
        "q": random(1, B, TIME, 4, 3),
        "k": random(2, B, TIME, 2, 3),
        "v": random(3, B, TIME, 2, 5),
        "sink_logits": random(4, 4),
    }
    options = ATTENTION[kind]
    if "slopes" in kind:
        arrays["alibi"] = jnp.abs(random(5, B, 4))
    if kind == "packed":
        where = segments((B, TIME), 0, **flags())
        places = {"q_positions": where.positions, "kv_positions": where.positions}
        options = options | places | {"q_segments": where.ids, "kv_segments": where.ids}
    return gradients_and_values(kernels.attention, **options), arrays


def test_layouts_hold_every_position_once_and_balance_causal_work():
    work = {}
    for layout in LAYOUTS:
        order = permutation(layout, 4, 64)
        assert sorted(order) == list(range(64))
        work[layout] = [int((stretch + 1).sum()) for stretch in order.reshape(4, -1)]
    assert work["contiguous"] == [136, 392, 648, 904]
    assert set(work["zigzag"]) == {520} and max(work["striped"]) - min(work["striped"]) <= 48
    with pytest.raises(ValueError, match="zigzag"), use_layout("zig-zag"):
        pass
    with pytest.raises(ValueError, match="multiple of 8 for zigzag over 4 devices"):
        permutation("zigzag", 4, 12)


def test_running_counts():
    for length in (24, TIME):
        where = jax.jit(functools.partial(segments, (B, length)))
        arguments = (jnp.asarray([3, 5]), *flags(length).values())
        expected = where(*arguments)
        with on(8):
            assert_close(where(*arguments), expected, 0)


# --- mixers and models

COUNTS = (2, 4, 8)
# Of every kind of exchange one, on these numbers in turn: all mixers on all of them are slow tests.
QUICK = {name: COUNTS[i % 3] for i, name in enumerate(zoo.names("devices"))}


def checked(name, devices, **options):
    """Raise where devices differ. What chooses blocks, or rounds to codes, does so otherwise now and then in
    float32 after other sums."""
    dtype = "float64" if name.startswith(("coded", "moba")) else None
    verify_devices(
        zoo.mixer(name) if name in zoo.MIXERS else zoo.model(name), devices, dtype=dtype, **options
    ).raise_for_failure()


@pytest.mark.parametrize("name", QUICK)
def test_every_kind_of_exchange_over_devices(name):
    checked(name, QUICK[name], thorough=False)


@pytest.mark.slow
def test_a_hybrid_over_devices_in_training_and_chunked_prefill():
    checked("lm_hybrid", 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*zoo.MIXERS, *zoo.MODELS])
def test_every_mixer_and_model_over_devices_thoroughly(name):
    checked(name, COUNTS)


def test_a_mixer_of_ones_own_that_is_wrong_is_found():
    class Forgetful(Module):
        """Begins anew where another device begins."""

        causal, lookahead, exact = True, 0, True
        dim = 4

        def init_state(self, batch, dtype=jnp.float32):
            return ()

        def __call__(self, x, state=None, reset=None, valid=None):
            if not jax.sharding.get_abstract_mesh().empty:
                x = x.at[:, 8].set(0)
            return jnp.cumsum(x, axis=1), state

    report = verify_devices(Forgetful(), 2, gradients=False)
    assert not report and "FAIL" in str(report)
    with pytest.raises(ValueError, match="at least 2"):
        verify_devices(Forgetful(), 1)


def compiled_gradient(net, time, devices=8, batch=1, packed=False):
    """A compiled training gradient of `net` whose inputs lie in stretches, `packed` with the flags of where
    sequences begin."""
    static, params = split(net)
    place = NamedSharding(make_mesh(data=1, sequence=devices), PartitionSpec(None, "sequence"))
    x = jax.ShapeDtypeStruct((batch, time, 16), jnp.float32, sharding=place)
    reset = jax.ShapeDtypeStruct((batch, time), bool, sharding=place) if packed else None

    def loss(params, x, reset):
        return jnp.sum(jnp.square(merge(static, params)(x, reset=reset)[0]))

    with on(devices):
        return jax.jit(jax.grad(loss)).lower(params, x, reset).compile()


@pytest.mark.parametrize("name, packed", [("attention", True), ("window", False), ("gated_delta", True)])
def test_stretches_stay_where_they_are(name, packed):
    """Devices send only to neighbours and sum gradients: nothing gathers the sequence."""
    text = compiled_gradient(zoo.mixer(name), 64, packed=packed).as_text()
    sent = re.findall(
        r" (all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter)(?:-start)?\(", text
    )
    assert set(sent) == {"collective-permute", "all-reduce"}, sorted(set(sent))


@pytest.mark.slow
def test_memory_of_a_device_falls_as_one_over_their_number():
    one, eight = (bench_ring.bytes_needed("attention", devices, 32768) for devices in (1, 8))
    assert one / eight > 6  # parameters and the workspace of a tile of attention are what every device has
