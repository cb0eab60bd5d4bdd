"""Triton kernels on any CPU: interpreted they equal the reference, compiled for sm_90 they
fit."""

import dataclasses
import inspect
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

if sys.platform != "linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

import bench_gpu
import ml_dtypes
import test_kernels_attention
import test_kernels_conv
import test_kernels_linear_attention
import test_kernels_scan
import triton_cpu
from helpers import assert_close

from seqlab import bench, kernels
from seqlab.bench import cases, timing
from seqlab.kernels import triton as backend
from seqlab.kernels.attention import specs as attention_specs
from seqlab.kernels.conv import specs as conv_specs
from seqlab.kernels.decode_attention import specs as decode_specs
from seqlab.kernels.linear_attention import specs as linear_specs
from seqlab.kernels.scan import specs as scan_specs

SHARED = 227 * 1024  # bytes that a program may have on Hopper


@pytest.fixture
def interpreted(monkeypatch):
    """`implementation="triton_gpu"` runs here."""
    with triton_cpu.interpreted(monkeypatch):
        yield


def some(names, fast):
    """All names; those that are not among `fast` are for `make test-all`."""
    assert set(fast) <= set(names)
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


def check(results, truth, name, values=2e-5, gradients=1e-4):
    """Values and gradients are those of float64; bfloat16 rounds what is handed back once, by at most 2^-8 of
    itself."""
    for tolerance, actual, expected in zip((values, gradients), results, truth, strict=True):
        for (path, a), e in zip(
            jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
        ):
            rounding = 2.0**-8 if a.dtype == ml_dtypes.bfloat16 else 0.0
            assert_close(a, e, rounding + tolerance, f"{name} {jax.tree_util.keystr(path)}")


def differentiated(op, shapes, **options):
    """Every launch of an op and its gradient at arguments of such shapes, None for those that are absent."""
    floats = {
        name: x
        for name, x in shapes.items()
        if (x is not None and np.issubdtype(x.dtype, np.inexact)) or _is_bfloat16(x)
    }
    rest = {name: x for name, x in shapes.items() if name not in floats}

    def both(floats, rest):
        results, pull = jax.vjp(
            lambda floats: op(**floats, **rest, **options, implementation="triton_gpu"), floats
        )
        return pull(results)

    return triton_cpu.launches(both, floats, rest)


def _is_bfloat16(x):
    return x is not None and x.dtype == ml_dtypes.bfloat16


def fits(launches):
    """No kernel spills registers or needs more shared memory than there is; what they need is printed (pytest
    -s)."""
    for launch in launches:
        usage = triton_cpu.compiled(launch)
        what = f"{launch.kernel.__name__} {launch.types} {dict(launch.constants)} "
        what += f"warps={launch.warps} stages={launch.stages}"
        print(
            f"{usage.registers} registers, {usage.spills} bytes spilled, {usage.shared} bytes shared: {what}"
        )
        assert usage.spills == 0, f"{usage}"[:60] + what
        assert usage.shared <= SHARED, f"{usage}"[:60] + what


def abstract(arguments, **changes):
    return {
        name: None if x is None else jax.ShapeDtypeStruct(x.shape, x.dtype)
        for name, x in {**arguments, **changes}.items()
    }


# --- what is shared


@pytest.mark.parametrize("op", ["attention", "conv", "linear_attention", "scan", "decode_attention"])
def test_without_a_gpu_kernels_decline(op):
    specs = {
        "conv": conv_specs,
        "scan": scan_specs,
        "linear_attention": linear_specs,
        "decode_attention": decode_specs,
    }
    names = {
        "conv": "one_step",
        "scan": "one_step",
        "linear_attention": "one_step",
        "decode_attention": "one_head",
    }
    call = (
        specs[op].inputs(specs[op].SPECS[names[op]])
        if op in specs
        else attention_specs.make(attention_specs.SPECS["one"])
    )
    with pytest.raises(NotImplementedError, match="needs a GPU; JAX runs on cpu here"):
        getattr(kernels, op)(**call, implementation="triton_gpu")
    if op == "conv":
        kernels.conv(**call, implementation=("triton_gpu", "xla"))


def test_what_no_kernel_takes_is_declined(interpreted, x64):
    arguments = {
        name: x.astype("float64")
        for name, x in conv_specs.inputs(conv_specs.SPECS["one_step"]).items()
        if x is not None
    }
    with pytest.raises(NotImplementedError, match="not for float64"):
        kernels.conv(**arguments, implementation="triton_gpu")
    with pytest.raises(NotImplementedError, match="up to 8 taps exist, got 9"):
        kernels.conv(**conv_specs.inputs(conv_specs.Spec(1, 2, 4, 9)), implementation="triton_gpu")
    with pytest.raises(NotImplementedError, match="heads of up to 256 exist, got k=264 and v=8"):
        kernels.attention(
            **attention_specs.make(attention_specs.Spec(1, 2, 2, k=264)), implementation="triton_gpu"
        )


@pytest.mark.parametrize("name", ["out_type", "out_shape"])
def test_kernels_are_launched_by_every_jax_triton(name, monkeypatch):
    """Releases call the shapes of the results differently, and only newer ones take options of the
    compiler."""
    seen = {}

    def triton_call(*arrays, kernel, grid, num_warps, num_stages, **rest):
        seen.update(rest, kernel=kernel, grid=grid, num_warps=num_warps, num_stages=num_stages)
        return tuple(jax.numpy.full(x.shape, 7, x.dtype) for x in rest[name])

    parameters = ["kernel", "grid", name, *["backend_options"] * (name == "out_type")]
    kinds = [inspect.Parameter(each, inspect.Parameter.KEYWORD_ONLY) for each in parameters]
    triton_call.__signature__ = inspect.Signature(kinds)
    monkeypatch.setitem(sys.modules, "jax_triton", types.SimpleNamespace(triton_call=triton_call))
    (y,) = jax.jit(
        lambda x: backend.launch(
            "kernel", [x], [((2, 3), "bfloat16")], grid=(4,), constants={"N": 5}, warps=8
        )
    )(np.ones(3))
    assert y.shape == (2, 3) and y.dtype == "bfloat16" and y[0, 0] == 7
    expected = {"kernel": "kernel", "grid": (4,), "num_warps": 8, "num_stages": 2, "N": 5}
    assert {key: value for key, value in seen.items() if key not in (name, "backend_options")} == expected
    assert ("backend_options" in seen) == (name == "out_type")
    rows = jax.vmap(lambda x: backend.launch("kernel", [x], [((), "float32")], grid=(1,), constants={})[0])(
        np.ones((3, 2), np.float32)
    )
    assert rows.tolist() == [7, 7, 7]


# --- conv


@pytest.mark.parametrize("name", some(conv_specs.SPECS, ["resets_masked", "bfloat16"]))
def test_conv_is_that_of_float64(name, interpreted):
    arguments = conv_specs.inputs(conv_specs.SPECS[name])
    results = test_kernels_conv.run(
        arguments, test_kernels_conv.cotangents_of(arguments), implementation="triton_gpu"
    )
    assert {x.dtype for x in jax.tree.leaves(results)} == {arguments["x"].dtype}
    check(results, test_kernels_conv.truth(name), name)


@pytest.mark.slow
def test_conv_satisfies_the_contract(interpreted):
    test_kernels_conv.test_chunks_are_the_whole("triton_gpu", (1, 6, 1))
    test_kernels_conv.test_a_reset_separates_two_calls_whatever_came_before("triton_gpu")
    test_kernels_conv.test_invalid_steps_do_nothing("triton_gpu", 1)
    test_kernels_conv.test_invalid_steps_do_nothing("triton_gpu", 12)
    test_kernels_conv.test_no_steps_change_nothing("triton_gpu")


CONV_SHAPES = {
    "layer": conv_specs.Spec(1, 2048, 1536, 4, dtype="bfloat16"),
    "packed": conv_specs.Spec(2, 100, 64, 3, reset=True, valid=True),
    "rows": conv_specs.Spec(4, 2048, 512, 4),
    "masked": conv_specs.Spec(4, 2048, 512, 5, reset=True, valid=True),
    "decode": conv_specs.Spec(8, 1, 1536, 4, dtype="bfloat16"),
    "most_taps": conv_specs.Spec(2, 300, 256, 8, reset=True),
    "images": conv_specs.Spec(2, 196, 96, 7, dtype="bfloat16"),
}


@pytest.mark.parametrize("name", some(CONV_SHAPES, ["layer"]))
def test_conv_fits(name):
    fits(differentiated(kernels.conv, abstract(conv_specs.inputs(CONV_SHAPES[name]))))


def test_conv_counts_beyond_two_billion_elements():
    from seqlab.kernels.conv import triton_gpu, triton_kernels

    t, d, w = (1 << 21) + 17, 1 << 10, 2
    cut = triton_gpu.blocks(t, d, w, 2)
    # Untouched pages take no memory.
    x, y = (np.zeros((1, t, d), ml_dtypes.bfloat16), np.zeros((1, t, d), ml_dtypes.bfloat16))
    x[0, -2:, -3:] = [[1, 2, 3], [4, 5, 6]]
    weight, bias, state = (np.ones(shape, np.float32) for shape in ((w, d), (d,), (1, w - 1, d)))
    constants = {"T": t, "D": d, "W": w, "GIVEN": False, "BT": cut.steps, "BD": cut.channels}
    grid = (backend.blocks(t, cut.steps), d // cut.channels, 1)
    program = (grid[0] - 1, grid[1] - 1, 0)
    triton_cpu.interpret_in_place(
        triton_kernels.forward, [x, weight, bias, state, state, y], grid, constants, program
    )
    assert y[0, -1, -3:].tolist() == [6, 8, 10]

    dy, dx = y, np.zeros(x.shape, x.dtype)
    # An input gets something from its own output and from the next, or from the state in which it ends.
    dy[0, -2, -3:], weight[0] = (1, 10)
    stretches = backend.blocks(t + w - 1, cut.stretch)
    dstate, dweight, dbias = (
        np.zeros(shape, np.float32) for shape in ((1, w - 1, d), (1, stretches, w, d), (1, stretches, d))
    )
    constants |= {"WP": w, "ROWS": cut.stretch}
    arrays = [x, weight, state, state, dy, state, dx, dstate, dweight, dbias]
    program = (stretches - 1, grid[1] - 1, 0)
    triton_cpu.interpret_in_place(triton_kernels.backward, arrays, (stretches, *grid[1:]), constants, program)
    assert dx[0, -2:, -3:].tolist() == [[61, 81, 101], [7, 9, 11]]
    assert dweight[0, -1, :, -3:].tolist() == [[6, 16, 30], [25, 42, 63]] and dbias[0, -1, -3:].tolist() == [
        7,
        9,
        11,
    ]


# --- scan


@pytest.mark.parametrize("name", some(scan_specs.SPECS, ["resets_masked", "mixed"]))
def test_scan_is_that_of_float64(name, interpreted):
    spec = scan_specs.SPECS[name]
    arguments = scan_specs.inputs(spec)
    cotangents = test_kernels_scan.cotangents_of(arguments)
    results = test_kernels_scan.run(arguments, cotangents, implementation="triton_gpu", chunk=spec.chunk)
    assert {key: x.dtype for key, x in results[1].items()} == {
        key: arguments[key].dtype for key in test_kernels_scan.FLOATS
    }
    check(results, test_kernels_scan.truth(name), name)


@pytest.mark.slow
def test_scan_satisfies_the_contract(interpreted):
    test_kernels_scan.test_chunks_are_the_whole("triton_gpu", (1, 6, 1))
    test_kernels_scan.test_a_reset_separates_two_calls_whatever_the_state_held("triton_gpu")
    test_kernels_scan.test_invalid_steps_do_nothing("triton_gpu", 1)
    test_kernels_scan.test_invalid_steps_do_nothing("triton_gpu", 12)
    test_kernels_scan.test_no_steps_change_nothing("triton_gpu")


SCAN_SHAPES = {
    "layer": scan_specs.Spec(1, 2048, 1536, 16, reset=True, dtype="bfloat16"),
    "layer_float32": scan_specs.Spec(1, 2048, 1536, 16, reset=True, valid=True),
    "many_states": scan_specs.Spec(2, 512, 128, 256, dtype="bfloat16", wide="bfloat16"),
    "short": scan_specs.Spec(2, 21, 100, 16),
    "decode": scan_specs.Spec(8, 1, 1536, 16, dtype="bfloat16"),
}


@pytest.mark.parametrize("name", some(SCAN_SHAPES, ["layer"]))
def test_scan_fits(name):
    fits(differentiated(kernels.scan, abstract(scan_specs.inputs(SCAN_SHAPES[name]))))


def test_scan_counts_beyond_two_billion_elements():
    from seqlab.kernels.scan import triton_gpu, triton_kernels

    b, t, e, n = 1 << 15, 32, 1 << 12, 1
    cut = triton_gpu.blocks(t, e, 2, None)
    u, y = np.zeros((b, t, e), ml_dtypes.bfloat16), np.zeros((b, t, e), ml_dtypes.bfloat16)
    delta = u  # steps of length 0 keep the state
    state, states = np.zeros((b, n, e), np.float32), np.zeros((b, 2, n, e), np.float32)
    state[-1, 0, -1] = 7
    A, B = np.zeros((n, e), np.float32), np.ones((b, t, n), np.float32)
    constants = {"T": t, "E": e, "N": n, "RESET": False, "BT": cut.steps, "BE": cut.channels[0]}
    grid = (e // cut.channels[0], b, 1)
    arrays = [u, delta, A, B, B, state, B, y, states]
    triton_cpu.interpret_in_place(triton_kernels.forward, arrays, grid, constants, (grid[0] - 1, b - 1, 0))
    assert y[-1, :, -1].tolist() == [7] * t and states[-1, 1, 0, -1] == 7


def test_the_gradient_of_scan_counts_beyond_two_billion_elements():
    from seqlab.kernels.scan import triton_gpu, triton_kernels

    b, t, e, n = 1 << 14, 33, (1 << 12) + 16, 16
    cut = triton_gpu.blocks(t, e, 2, t)
    parts, tiles = e // cut.channels[1], backend.blocks(t, cut.steps)
    u, delta, dy, du, ddelta = (np.zeros((b, t, e), ml_dtypes.bfloat16) for _ in range(5))
    states, dA = np.zeros((b, tiles + 1, n, e), np.float32), np.zeros((b, tiles, n, e), np.float32)
    dB, dC = np.zeros((parts, b, t, n), np.float32), np.zeros((parts, b, t, n), np.float32)
    assert min(x.size for x in (u, states, dB)) > 2**31
    A, B, C = (
        np.full((n, e), -0.5, np.float32),
        np.zeros((b, t, n), np.float32),
        np.zeros((b, t, n), np.float32),
    )
    dend, carry = np.zeros((b, n, e), np.float32), np.zeros((b, 2, n, e), np.float32)
    # Steps of length 0 keep the last of the states, 7, which two gradients reach: 3 from its end and 1 from
    # the last output.
    (
        states[-1, :tiles, -1, -1],
        u[-1, -1, -1],
        B[-1, -1, -1],
        C[-1, -1, -1],
        dy[-1, -1, -1],
        dend[-1, -1, -1],
    ) = 7, 2, 1, 1, 1, 3
    constants = {"ROWS": b, "T": t, "E": e, "N": n, "RESET": False, "BT": cut.steps, "BE": cut.channels[1]}
    arrays = [u, delta, A, B, C, u, states, dy, dend, du, ddelta, dA, dB, dC, carry]
    triton_cpu.interpret_in_place(
        triton_kernels.backward, arrays, (parts, b, 1), constants, (parts - 1, b - 1, 0)
    )
    assert carry[-1, 0, -1, -1] == 4 and dC[-1, -1, -1, -1] == 7 and ddelta[-1, -1, -1] == 4 * 2 - 0.5 * 4 * 7
    assert ddelta[-1, -2, -1] == -0.5 * 4 * 7 and not dB[-1, -1].any() and not du[-1, :, -1].any()


# --- attention


@pytest.mark.parametrize(
    "name", some(attention_specs.SPECS, ["padded", "decode_window_sinks", "window_both"])
)
def test_attention_is_that_of_float64(name, interpreted):
    call = attention_specs.make(attention_specs.SPECS[name])
    value, gradients = test_kernels_attention.with_gradients(
        call, test_kernels_attention.cotangents_of(call), "triton_gpu"
    )
    expected, expected_gradients = test_kernels_attention.truth(name)
    test_kernels_attention.check(value, expected, 5e-6)
    assert_close(gradients, expected_gradients, 2e-5)


def in_float64(call, cotangents):
    with jax.enable_x64(True):
        wide = jax.tree.map(
            lambda x: np.asarray(x, np.float64) if np.asarray(x).dtype.kind not in "iub" else x,
            (call, cotangents),
        )
        wide = jax.tree.map(jax.numpy.asarray, parted(wide[0])), wide[1]
        return jax.tree.map(
            np.asarray,
            test_kernels_attention.with_gradients({**wide[0][0], **parted(call)[1]}, wide[1], "reference"),
        )


def parted(call):
    """The arrays of a call and its options."""
    arrays = {name: x for name, x in call.items() if hasattr(x, "dtype")}
    return arrays, {name: x for name, x in call.items() if name not in arrays}


@pytest.mark.slow
@pytest.mark.parametrize("width", [32, 80, 256])
def test_attention_in_bfloat16_is_as_good_as_its_numbers(width, interpreted):
    """Sums run in float32. What is rounded to 8 bits are the weights and their gradients before a product,
    and every result: a sum of n numbers that each err by 2^-9 of themselves at most errs by that of the sum
    of their magnitudes."""
    call = attention_specs.make(
        attention_specs.Spec(2, 70, 90, h=4, g=2, k=width, v=width, window=40, sinks=2),
        dtype=jax.numpy.bfloat16,
    )
    cotangents = test_kernels_attention.cotangents_of(call)
    value, gradients = test_kernels_attention.with_gradients(call, cotangents, "triton_gpu")
    assert {x.dtype for x in jax.tree.leaves(gradients)} == {jax.numpy.dtype("bfloat16")} and value[
        1
    ].dtype == jax.numpy.float32
    expected, expected_gradients = in_float64(call, cotangents)
    assert_close(value, expected, 2 * 2.0**-8)
    assert_close(gradients, expected_gradients, 3 * 2.0**-8)


@pytest.mark.slow
def test_the_gradient_of_a_part_of_the_keys(interpreted):
    from seqlab.kernels.attention import _gradient, reference

    spec = attention_specs.Spec(
        2, 20, 36, h=4, g=2, k=16, v=24, places="shuffled", window=30, sinks=1, softcap=3.0
    )
    arrays, options = parted(attention_specs.make(spec))
    places = {
        name: arrays.pop(name, None) for name in ("q_positions", "kv_positions", "q_segments", "kv_segments")
    }
    options = {"left": 29, "right": 0, "scale": 0.2} | {name: options[name] for name in ("sinks", "softcap")}
    alibi = jnp.linspace(0.05, 0.4, 8).reshape(2, 4)
    out, lse = reference.attention(**arrays, **places, **options, sink_logits=None, alibi=alibi)
    part = {name: arrays[name][:, :20] for name in "kv"} | {"q": arrays["q"]}
    cotangents = test_kernels_attention.cotangents_of({**part, "v": arrays["v"]})
    places["kv_positions"] = places["kv_positions"][:, :20]
    options = {**places, **options}
    found, expected = (
        _gradient(
            *(part[name] for name in "qkv"), alibi, out, lse, *cotangents, **options, implementation=name
        )
        for name in ("triton_gpu", "reference")
    )
    assert_close(found, expected, 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("places", ["default", "ring"])
def test_one_query_over_keys_that_are_split_among_programs(places, interpreted):
    call = attention_specs.make(
        attention_specs.Spec(
            1, 1, 1200, h=4, g=2, window=1100, sinks=3, places=places, seen=1500, sink_logits=True
        )
    )
    actual = test_kernels_attention.values(call, "triton_gpu")
    test_kernels_attention.check(actual, test_kernels_attention.oracle(call), 5e-6)


ATTENTION_SHAPES = {
    f"{width}_{dtype}_{places}": (width, dtype, places)
    for width in (32, 64, 80, 128, 256)
    for dtype in ("bfloat16", "float32")
    for places in ("default", "packed")
}


@pytest.mark.parametrize("name", some(ATTENTION_SHAPES, ["128_bfloat16_default"]))
def test_attention_fits(name):
    width, dtype, places = ATTENTION_SHAPES[name]
    options = {"window": 300, "sinks": 4, "softcap": 20.0, "sink_logits": True} if places == "packed" else {}
    call = attention_specs.make(
        attention_specs.Spec(1, 1024, 1024, h=8, g=2, k=width, v=width, places=places, **options), dtype=dtype
    )
    arrays, options = parted(call)
    fits(differentiated(kernels.attention, abstract(arrays), **options))


@pytest.mark.parametrize("name", some(("one", "few", "decode", "decode_float32", "narrow"), []))
def test_attention_of_few_rows_fits(name):
    spec, dtype = {
        "one": (attention_specs.Spec(1, 1, 1), "float32"),
        "few": (attention_specs.Spec(2, 7, 100, h=6, g=2, k=40, v=24), "float32"),
        "decode": (
            attention_specs.Spec(1, 1, 32768, h=32, g=8, k=128, v=128, places="ring", seen=32000),
            "bfloat16",
        ),
        "decode_float32": (attention_specs.Spec(1, 1, 4096, h=8, g=8, k=64, v=64), "float32"),
        "narrow": (attention_specs.Spec(1, 20, 20, h=2, g=2, k=16, v=16), "bfloat16"),
    }[name]
    arrays, options = parted(attention_specs.make(spec, dtype=dtype))
    fits(differentiated(kernels.attention, abstract(arrays), **options))


def test_attention_counts_beyond_two_billion_elements():
    from seqlab.kernels.attention import triton_gpu, triton_kernels

    s, g, width = 1 << 21, 16, 128
    k = np.zeros((1, s, g, width), ml_dtypes.bfloat16)
    q, out, lse = (
        np.ones((1, 1, g, width), ml_dtypes.bfloat16),
        np.zeros((1, 1, 1, g, width), ml_dtypes.bfloat16),
        np.zeros((1, 1, 1, g), np.float32),
    )
    k[0, -1, -1], k[0, -2, -1] = 1, 1
    places = triton_gpu.Places(None, None, None, None)
    cut = triton_gpu.blocks("forward", 1, s, width, 2)
    rule = triton_gpu.Rule(left=1, right=0, sinks=0, softcap=None, scale=1.0)
    constants = triton_gpu._constants(rule, q, k, k, places, cut)
    constants |= {"ROWS": 1, "SINK": False, "ALIBI": False, "SPLITS": 1, "KEY_STRIDE": g, "GROUP_STRIDE": 1}
    arrays = [q, k, k, *(q,) * 7, out, lse]
    triton_cpu.interpret_in_place(triton_kernels.forward, arrays, (1, g, 1), constants, (0, g - 1, 0))
    assert out[0, 0, 0, -1].tolist() == [1] * width
    np.testing.assert_allclose(lse[0, 0, 0, -1], width + np.log(2), rtol=1e-6)


def test_the_gradient_of_attention_counts_beyond_two_billion_elements():
    """Every query sees its own key and nothing else: P is 1, and dP that of the last is 2."""
    from seqlab.kernels.attention import triton_gpu, triton_kernels

    t, g, width = (1 << 21) + 17, 16, 64
    # q, k, v and dout are the same numbers.
    x, *results = (np.zeros((1, t, g, width), ml_dtypes.bfloat16) for _ in range(4))
    x[0, -1, -1] = 0.25
    lse, d = np.zeros((1, t, g), np.float32), np.zeros((1, t, g), np.float32)
    lse[0, -1, -1], d[0, -1, -1] = width / 16, width / 16 - 2
    rule = triton_gpu.Rule(left=0, right=0, sinks=0, softcap=None, scale=1.0)
    places = triton_gpu.Places(None, None, None, None)
    no_slopes = np.zeros((1, t, g), np.float32)  # of which the kernel of queries writes nothing
    for kernel, outputs in (
        (triton_kernels.backward_keys, results[:2]),
        (triton_kernels.backward_queries, [*results[2:], no_slopes]),
    ):
        cut = triton_gpu.blocks(kernel.fn.__name__, t, t, width, 2)
        of_keys = kernel is triton_kernels.backward_keys
        tiles = backend.blocks(t, cut.keys if of_keys else cut.rows)
        constants = triton_gpu._constants(rule, x, x, x, places, cut) | {"ALIBI": False}
        last = tiles - 1 if of_keys else 0  # rows are walked from the last
        triton_cpu.interpret_in_place(
            kernel, [x] * 4 + [lse, d, *[x] * 6, *outputs], (tiles, g, 1), constants, (last, g - 1, 0)
        )
    for result, expected in zip(results, (2 * 0.25, 0.25, 2 * 0.25), strict=True):
        assert result[0, -1, -1].tolist() == [expected] * width and not result[0, -2, -1].any()


# --- linear attention

PER_HEAD = [name for name, spec in linear_specs.SPECS.items() if spec.beta != "value"]


@pytest.mark.parametrize("name", some(PER_HEAD, ["resets_masked"]))
def test_linear_attention_is_that_of_float64(name, interpreted):
    spec = linear_specs.SPECS[name]
    arguments = linear_specs.inputs(spec)
    cotangents = test_kernels_linear_attention.cotangents_of(arguments)
    results = test_kernels_linear_attention.run(
        arguments, cotangents, implementation="triton_gpu", chunk=spec.chunk
    )
    check(results, test_kernels_linear_attention.truth(name), name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [("channel", None), ("head", "head")], ids=["plain", "delta"])
def test_linear_attention_satisfies_the_contract(kind, interpreted):
    theirs, name = test_kernels_linear_attention, {"implementation": "triton_gpu"}
    theirs.test_chunks_are_the_whole(kind=kind, splits=(1, 7, 1), **name)
    theirs.test_a_log_decay_of_minus_infinity_forgets(kind=kind[0], **name)
    theirs.test_a_reset_separates_two_calls_whatever_the_state_held(kind=kind, **name)
    theirs.test_invalid_steps_do_nothing(beta=kind[1], time=12, **name)
    theirs.test_no_steps_change_nothing(**name)


def test_linear_attention_declines_a_beta_of_every_value(interpreted):
    with pytest.raises(NotImplementedError, match="beta of every value"):
        kernels.linear_attention(
            **linear_specs.inputs(linear_specs.SPECS["value_delta"]), implementation="triton_gpu"
        )


LINEAR_SHAPES = {
    "linear": linear_specs.Spec(1, 300, 2, 64, 64, dtype="bfloat16"),
    "mamba2": linear_specs.Spec(1, 300, 4, 128, 64, g=1, decay="head", dtype="bfloat16", reset=True),
    "gated_delta": linear_specs.Spec(
        1, 300, 2, 128, 128, decay="head", beta="head", dtype="bfloat16", reset=True
    ),
    "wide": linear_specs.Spec(1, 300, 2, 256, 256, decay="head", beta="head", dtype="bfloat16", reset=True),
    "channels": linear_specs.Spec(1, 300, 2, 96, 80, decay="channel", beta="head", dtype="bfloat16"),
    "float32": linear_specs.Spec(1, 300, 2, 64, 64, decay="head", beta="head", reset=True),
    "wide_float32": linear_specs.Spec(1, 300, 2, 128, 128, decay="head", beta="head", reset=True),
    "narrow": linear_specs.Spec(1, 300, 2, 32, 32, decay="channel", dtype="bfloat16"),
}


@pytest.mark.parametrize("name", some(LINEAR_SHAPES, []))
def test_linear_attention_fits(name):
    fits(differentiated(kernels.linear_attention, abstract(linear_specs.inputs(LINEAR_SHAPES[name]))))


def test_linear_attention_counts_beyond_two_billion_elements():
    from seqlab.kernels.linear_attention import triton_kernels

    n, heads, size = 2, (1 << 15) + 1, 256
    state, final = np.zeros((heads, size, size), np.float32), np.zeros((heads, size, size), np.float32)
    # Shorter than they are, to be less than the memory of a small machine.
    states = np.zeros((n, heads, size, size), np.float16)
    U, write = np.zeros((n, heads, 1, size), np.float32), np.zeros((n, heads, 1, size), np.float32)
    state[-1, -1, -1], U[:, -1, 0, -1], write[:, -1, 0, -1] = 1, 2, 3
    constants = {
        "CHUNKS": n,
        "HEADS": heads,
        "C": 1,
        "K": size,
        "V": size,
        "SHARE": 1,
        "SHARE_KEEP": 1,
        "KEEP": 0,
        "DELTA": False,
    }
    constants |= {"RESET": False, "PRECISION": "tf32", "CP": 16, "KP": size, "BV": 16}
    arrays = [state, U, write, state, state, states, final, final]
    triton_cpu.interpret_in_place(
        triton_kernels.forward, arrays, (heads, 16, 1), constants, (heads - 1, 15, 0)
    )
    assert [*states[:, -1, -1, -1], final[-1, -1, -1]] == [1, 7, 13]


def test_the_gradient_of_linear_attention_counts_beyond_two_billion_elements():
    from seqlab.kernels.linear_attention import triton_kernels

    n, heads, size = 2, (1 << 15) + 1, 256
    states, after = np.zeros((n, heads, size, size), np.float16), np.zeros((n, heads, size, size), np.float16)
    write, du, dU = (np.zeros((n, heads, 1, size), np.float32) for _ in range(3))
    dfinal, dinitial = np.zeros((heads, size, size), np.float32), np.zeros((heads, size, size), np.float32)
    dfinal[-1, -1, -1], write[:, -1, 0, -1], states[:, -1, -1, -1] = 1, 3, [2, 4]
    constants = {
        "CHUNKS": n,
        "HEADS": heads,
        "C": 1,
        "K": size,
        "V": size,
        "SHARE": 1,
        "SHARE_KEEP": 1,
        "KEEP": 0,
        "DELTA": False,
    }
    constants |= {"RESET": False, "PRECISION": "tf32", "CP": 16, "KP": size, "BV": 16}
    # The states are their own gradients.
    arrays = [states, write, states, states, states, du, dfinal, after, dU, dinitial]
    triton_cpu.interpret_in_place(
        triton_kernels.backward, arrays, (heads, size // 16, 1), constants, (heads - 1, size // 16 - 1, 0)
    )
    assert (
        after[:, -1, -1, -1].tolist() == [5, 1]
        and dinitial[-1, -1, -1] == 7
        and dU[:, -1, 0, -1].tolist() == [15, 3]
    )


# --- decode_attention


@pytest.mark.parametrize("name", some(decode_specs.SPECS, ["int4_values2", "numbers"]))
def test_decode_attention_is_the_definition(name, interpreted):
    spec, arguments = decode_specs.SPECS[name], decode_specs.inputs(decode_specs.SPECS[name])
    out, lse = kernels.decode_attention(**arguments, implementation="triton_gpu")
    expected, expected_lse = kernels.decode_attention(**arguments, implementation="reference")
    dead = np.isneginf(expected_lse)
    assert out.dtype == spec.dtype and lse.dtype == np.float32 and np.array_equal(np.isneginf(lse), dead)
    # In bfloat16 the numbers are rounded, the weights, and the result.
    rounding = 2.0**-7 if spec.dtype == "bfloat16" else 5e-6
    assert_close((out, np.where(dead, 0, lse)), (expected, np.where(dead, 0, expected_lse)), rounding)


def of_shapes(spec):
    """The launch of `decode_attention` at a spec, whose arrays are not made."""
    return triton_cpu.launches(
        lambda: kernels.decode_attention(**decode_specs.inputs(spec), implementation="triton_gpu")
    )


@pytest.mark.parametrize("bits", some((2, 4, 8, None), [4]))
@pytest.mark.parametrize("dtype", some(("bfloat16", "float32"), ["bfloat16"]))
@pytest.mark.parametrize(
    "width_group", some(((64, 32), (128, 16), (128, 128), (256, 32)), [(128, 16)]), ids=str
)
def test_decode_attention_fits(width_group, bits, dtype):
    width, group = width_group
    fits(of_shapes(decode_specs.Spec(1, 1024, 32, 8, width, width, bits, group=group, dtype=dtype)))


@pytest.mark.slow
@pytest.mark.parametrize("v_bits", [2, 8])
def test_decode_attention_fits_where_values_have_other_bits(v_bits):
    options = {"dtype": "bfloat16", "v_bits": v_bits}
    for width in (64, 256):
        fits(of_shapes(decode_specs.Spec(1, 1024, 32, 8, width, width, 4, **options)))


def test_decode_attention_counts_beyond_two_billion_words():
    from seqlab.kernels.decode_attention import triton_kernels

    s, g, width = 1 << 22, 32, 128  # 16 words a slot
    words = np.zeros((1, g, width // 8, s), np.uint32)
    q = np.ones((1, g, width), np.float32)
    k_scale, v_scale = np.zeros((1, g, s // 128, width), np.float32), np.zeros((1, g, 1, s), np.float32)
    v_scale[0, -1, :, -1], words[0, -1, :, -1] = 1, 0x11111111
    visible = np.zeros((1, s), np.int8)
    visible[0, -1] = 1
    constants = {
        "ROWS": 1,
        "S": s,
        "H": g,
        "G": g,
        "K": width,
        "V": width,
        "K_BITS": 4,
        "V_BITS": 4,
        "BN": 128,
        "K_GROUP": 128,
        "V_GROUP": width,
    }
    constants |= {
        "SOFTCAP": 0.0,
        "SCALE": 1.0,
        "SPLITS": 1 << 14,
        "PRECISION": "ieee",
        "KP": width,
        "VP": width,
        "BM": 16,
    }
    out, lse = np.zeros((1 << 14, 1, g, width), np.float32), np.zeros((1 << 14, 1, g), np.float32)
    first, count = np.zeros(1, np.int32), np.full(1, s // 128, np.int32)
    arrays = [q, words, k_scale, k_scale, words, v_scale, v_scale, visible, first, count, out, lse]
    triton_cpu.interpret_in_place(
        triton_kernels.forward, arrays, (1 << 14, g, 1), constants, ((1 << 14) - 1, g - 1, 0)
    )
    assert out[-1, 0, -1].tolist() == [2] * width and lse[-1, 0, -1] == 0


# --- lengths

SHORT = {
    "attention": ["b=1", "h=2", "g=1", "k=16", "v=16"],
    "conv": ["b=2", "d=5"],
    "linear_attention": ["gated_delta", "b=1", "h=2", "k=8", "v=8"],
    "scan": ["b=1", "e=5", "n=2"],
}
LENGTHS = [
    pytest.param(op, t, marks=[] if t == 20 and op != "attention" else pytest.mark.slow)
    for op in SHORT
    for t in (20, 300)
]


@pytest.mark.parametrize(("op", "time"), LENGTHS)
def test_gradients_in_bfloat16_err_as_the_length_of_their_sums_allows(op, time, interpreted):
    words = [*SHORT[op], f"t={time}", *[f"s={time}"] * (op == "attention")]
    [(name, spec)] = cases.chosen_shapes(cases.op_named(op), words).items()
    case = cases.make(cases.op_named(op), name, spec, "bfloat16", gradients=True)
    found = jax.jit(case.timed("triton_gpu"))((case.arguments, case.cotangents()))
    error, wrong = bench.parity(case, found, bench.truth(case)[1])
    assert not wrong and 1e-4 < error < 0.02  # that of a number in bfloat16, and four of those in a row


# --- what is run on a GPU


@pytest.mark.slow
@pytest.mark.parametrize(
    ("op", "spec"),
    [("conv", "one_tap"), ("scan", "one_step"), ("attention", "window_one"), ("decode_attention", "int4")],
)
def test_the_benchmark_has_parity_before_figures(op, spec, interpreted, capsys, monkeypatch):
    monkeypatch.setattr(timing, "LEAST", 1e-6)
    monkeypatch.setattr(timing, "ceilings", lambda dtype, rounds: timing.Ceilings(1.0, 1.0))
    assert bench_gpu.parity(op, (spec,)) == []
    records, wrong = bench_gpu.compare(op, 1, bench_gpu.QUICK[op])
    printed = capsys.readouterr().out
    assert (
        wrong == 0
        and "WRONG" not in printed
        and all(record["contestants"][0]["ratio"] == 1.0 for record in records)
    )
    assert all(
        [row["name"] for row in record["contestants"][:2]] == ["triton_gpu", "xla"] for record in records
    )
    monkeypatch.setattr(cases.Case, "allowed", (-1.0, -1.0))
    records, wrong = bench_gpu.compare(op, 1, bench_gpu.QUICK[op])
    assert wrong == 2 * len(records) and "triton_gpu is WRONG, so it gets no time" in capsys.readouterr().out
    assert all(row.get("ratio") is None for record in records for row in record["contestants"])


def test_the_benchmark_judges_what_is_claimed():
    def record(op, name, gradients, **ratios):
        rows = [{"name": "triton_gpu", "seconds": 1.0, "copy_share": 0.7, "ratio": 1.0}]
        return {
            "op": op,
            "name": name,
            "gradients": gradients,
            "contestants": rows + [{"name": key, "ratio": x} for key, x in ratios.items()],
        }

    [claim] = bench_gpu.claims(record("attention", "train_2048_64", True, cuDNN=0.95, xla=4.0))
    assert (
        claim.held
        and str(claim)
        == "holds: attention train_2048_64, backward too: times as fast as cuDNN 0.95, claimed 0.9"
    )
    [claim] = bench_gpu.claims(record("attention", "decode_8k", False, cuDNN=0.5))
    assert (
        not claim.held
        and claim.what == "share of a copy's bytes/s"
        and (claim.found, claim.wanted) == (0.7, 0.8)
    )
    assert bench_gpu.claims(record("scan", "long", False, **{"mamba-ssm": None})) == []
    [claim] = bench_gpu.claims(record("scan", "long", False, **{"mamba-ssm": 0.99}))
    assert str(claim).startswith("FAILS: scan long: times as fast as mamba-ssm 0.99")
    assert bench_gpu.claims(record("decode_attention", "int8_8k", False, **{"a cache of numbers": 1.5})) == []
    [claim] = bench_gpu.claims(record("decode_attention", "int4_8k", False, **{"a cache of numbers": 1.5}))
    assert (claim.found, claim.wanted, claim.held) == (1.5, 2.0, False)


@pytest.mark.slow
@pytest.mark.parametrize("kind", bench_gpu.MODELS)
def test_the_benchmark_of_training(kind, interpreted, capsys):
    claim = bench_gpu.training(kind, 1, quick=True)
    assert isinstance(claim, bench_gpu.Claim) and claim.found > 0, claim
    assert f"training {kind}: triton_gpu" in capsys.readouterr().out


EXTENTS = {3: "b", 17: "t", 19: "s"}


@pytest.mark.slow
@pytest.mark.parametrize("op", ["attention", "conv", "linear_attention", "scan"])
def test_every_case_of_the_benchmark_fits(op):
    """Once more at the sizes that are timed, where numbers of tiles and strides differ; their arrays are not
    made."""
    for name, spec in cases.default_shapes(cases.op_named(op), large=True).items():
        small = {field: size for size, field in EXTENTS.items() if getattr(spec, field, 1) > 1}
        case = cases.make(
            cases.op_named(op),
            name,
            dataclasses.replace(spec, **small) if op == "attention" else spec._replace(**small),
        )
        sizes = {size: getattr(spec, field) for field, size in small.items()}

        def sized(x, sizes=sizes):
            return jax.ShapeDtypeStruct(
                [sizes.get(size, size) for size in x.shape], "bfloat16" if op == "attention" else x.dtype
            )

        fits(
            differentiated(
                getattr(kernels, op), {key: sized(x) for key, x in case.arguments.items()}, **case.options
            )
        )
