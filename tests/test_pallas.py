"""The Pallas kernels without a TPU: interpreted step by step against the float64 reference, and lowered for a
TPU from here.

Interpretation is stricter than a TPU: memory that nobody wrote holds NaN, reads out of bounds raise, races
are found. Blocks are made small, so that tiny arrays have many of them and the last are incomplete. Lowering
finds blocks and operations that no TPU takes; where libtpu is installed, which needs no TPU either, its
compiler has the last word.
"""

import dataclasses
import functools
import importlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, random
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu

from seqlab.kernels import blocks, pallas
from seqlab.kernels.attention.specs import Spec as Attention
from seqlab.kernels.conv.specs import Spec as Conv
from seqlab.kernels.decode_attention import Coded
from seqlab.kernels.decode_attention.specs import Spec as Decode
from seqlab.kernels.linear_attention.specs import Spec as Linear
from seqlab.kernels.scan.specs import Spec as Scan


@dataclasses.dataclass(frozen=True)
class Case:
    """An op's kernels: block sizes for its tests, what else bounds its blocks from below, the specs of `make
    test`, and a call of more
    elements than an int32 counts: a spec, and what its extents are to be replaced by."""

    blocks: dict[str, int]
    bounds: dict[str, int]
    quick: tuple[str, ...]
    huge: tuple[Any, dict[int, int]]
    also: dict[str, Any] = dataclasses.field(default_factory=dict)  # specs beside those of the op
    forward_only: bool = False


CASES = {
    "conv": Case(
        {"steps": 16, "channels": 4},
        {},
        ("tiny",),
        (Conv(2, 17, 5, 4, reset=True), {2: 3, 17: 2**20, 5: 1024}),
        {
            "tiny": Conv(2, 21, 5, 3, reset=True, valid=True),
            "wide": Conv(1, 40, 12, 4, reset=True, dtype="bfloat16"),
            "window_longer_than_a_block": Conv(2, 37, 3, 19, reset=True),
        },
    ),
    "scan": Case(
        {"channels": 2},
        {"_STEPS": 8, "_UNIT": 2, "_STATES": 4},
        ("tiny",),
        (Scan(2, 17, 640, 4, reset=True), {2: 3, 17: 2**20, 640: 1024}),
        {
            "tiny": Scan(1, 13, 4, 3, reset=True, valid=True),
            "wide": Scan(1, 12, 10, 3, dtype="bfloat16"),
            "states": Scan(1, 12, 2, 9),
        },
    ),
    "attention": Case(
        {"tile": 16},
        {"_UNIT": 8},
        ("tiny", "tiny_packed"),
        (Attention(2, 17, 19, h=8, g=4, k=128, v=128), {2: 3, 17: 2**20, 19: 2**20}),
        {
            "tiny": Attention(
                1, 40, 45, h=1, k=5, v=3, window=9, sinks=2, softcap=2.0, sink_logits=True, alibi=True
            ),
            "bfloat16": (Attention(2, 37, 37, h=4, g=2, k=64, v=32, window=9, sink_logits=True), "bfloat16"),
            "heads_of_256": Attention(1, 20, 20, h=2, k=256, v=256),
            "tiny_packed": Attention(1, 27, 27, h=2, places="packed"),
        },
    ),
    "decode_attention": Case(
        {"tile": 16},
        {"_UNIT": 8},
        ("tiny", "tiny_numbers"),
        (Decode(2, 640, 8, 8, 128, 128, 8), {2: 64, 640: 2**20, 20: 2**15}),
        {
            "tiny": Decode(1, 112, 3, 1, 16, 8, 4, group=2, channels=4, filled=(91,), softcap=2.0),
            "tiny_numbers": Decode(3, 45, 4, 2, 5, 3, None, group=4, filled=(45, 0, 12)),
            "cores_share_a_row": Decode(1, 144, 2, 1, 32, 32, 2, group=2),
            "int8_bfloat16": Decode(2, 256, 4, 2, 64, 128, 8, group=16, dtype="bfloat16"),
            "int2_bfloat16": Decode(2, 256, 4, 2, 128, 64, 2, group=16, dtype="bfloat16"),
        },
        forward_only=True,
    ),
    "linear_attention": Case(
        {"steps": 8},
        {"_LEAST": 4},
        ("tiny",),
        (Linear(2, 17, 9, 128, 64, g=3, decay="head", beta="head"), {2: 32, 17: 2**20}),
        {
            "tiny": Linear(
                1, 13, 2, 5, 3, g=1, decay="channel", beta="head", chunk=4, reset=True, valid=True
            ),
            "tiny_plain": Linear(1, 13, 1, 4, 3, decay="head", chunk=4),
            "heads_of_256": Linear(
                1, 20, 2, 256, 256, g=1, decay="channel", beta="head", chunk=8, dtype="bfloat16"
            ),
        },
    ),
}
ALONE = {  # what libtpu wants to know of a machine without a TPU
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
STATIC = ("chunk", "causal", "window", "sinks", "softcap", "scale", "v_bits")


def specs(op):
    return {**importlib.import_module(f"seqlab.kernels.{op}.specs").SPECS, **CASES[op].also}


NAMED = [
    pytest.param(op, name, marks=[] if name in case.quick else pytest.mark.slow)
    for op, case in CASES.items()
    for name in specs(op)
]


def public(op):
    """The function that users call."""
    return getattr(importlib.import_module(f"seqlab.kernels.{op}"), op)


def shrink(op, name, monkeypatch):
    """Small blocks for a test, less small ones for a call of many tiles."""
    module, times = importlib.import_module(f"seqlab.kernels.{op}.pallas_tpu"), 4 if "tiled" in name else 1
    for key, value in CASES[op].bounds.items():
        monkeypatch.setattr(module, key, times * value)
    for kernel, table in blocks.tables().items():
        if kernel.startswith(f"{op}/pallas_tpu/"):
            small = {key: times * value for key, value in CASES[op].blocks.items()}
            monkeypatch.setitem(
                blocks.table(kernel.partition("/")[0]),
                kernel,
                {blocks.ANY: {blocks.WIDEST: table[blocks.ANY][blocks.WIDEST] | small}},
            )


def make(op, spec):
    """The arguments of a call: floating-point arrays, other arrays, and the rest."""
    module = importlib.import_module(f"seqlab.kernels.{op}.specs")
    if op == "attention":
        call = module.make(spec[0], dtype=jnp.bfloat16) if isinstance(spec, tuple) else module.make(spec)
    else:
        call = module.inputs(spec)
    call = {name: x for name, x in call.items() if x is not None}
    if hasattr(spec, "chunk"):
        call["chunk"] = spec.chunk
    options = {name: x for name, x in call.items() if name in STATIC}
    arrays = {name: x for name, x in call.items() if name not in options and not isinstance(x, Coded)}
    floats = {name: x for name, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    return (
        floats,
        {name: x for name, x in call.items() if name not in floats and name not in options},
        options,
    )


def spoilt(floats, others):
    """NaN where it must reach nothing: at invalid steps, and in the state of a row whose first step is a
    reset."""
    reset, valid = others.get("reset"), others.get("valid")
    if valid is not None:
        valid = others["valid"] = valid.at[0, 0].set(True)
        lined = {
            name: valid.reshape(*valid.shape, *[1] * (x.ndim - 2))
            for name, x in floats.items()
            if x.shape[:2] == valid.shape
        }
        floats = {
            name: jnp.where(lined[name], x, jnp.nan) if name in lined else x for name, x in floats.items()
        }
    if reset is not None:
        others["reset"] = reset.at[0, 0].set(True)
        floats["initial_state"] = floats["initial_state"].at[0].set(jnp.nan)
    return floats, others


def program(op, options, implementation):
    """The results of a call, and its gradients by name for the given cotangents."""

    def forward_and_backward(floats, others, cotangents):
        function = functools.partial(public(op), **others, **options, implementation=implementation)
        if CASES[op].forward_only:
            return function(**floats), {}
        results, pull = jax.vjp(lambda floats: function(**floats), floats)
        return results, pull(cotangents)[0]

    return forward_and_backward


def cotangents_of(op, floats, others, options):
    results = jax.eval_shape(
        lambda floats: public(op)(**floats, **others, **options, implementation="xla"), floats
    )
    return tuple(random(100 + i, *x.shape, dtype=x.dtype) for i, x in enumerate(results))


def truth(op, floats, others, options, cotangents):
    """The reference in float64, from the same numbers."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), (floats, cotangents))
        return jax.tree.map(np.asarray, jax.jit(program(op, options, "reference"))(wide[0], others, wide[1]))


def check(actual, expected, name, keys, coded=False):
    """As near as the dtypes allow. float32: sums of some hundred terms. bfloat16, which rounds by 2**-8: one
    rounding of the result, and in attention, whose products have rounded factors, sums over `keys` of
    independent errors, which grow with the root. Keys that are
    `coded` become bfloat16 before their product: logits err by a rounding, and their log-sum-exp, in float32,
    by no more."""
    for tolerance, kind, a, e in zip((2e-5, 1e-4), ("value", "gradient"), actual, expected, strict=False):
        for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(e), strict=True):
            dead = np.isneginf(y)  # the log-sum-exp of no keys
            np.testing.assert_array_equal(np.isneginf(x), dead)
            rounding = 2.0**-8 * (1 + keys**0.5) if x.dtype == jnp.bfloat16 else 2.0**-8 * coded
            x, y = (np.where(dead, 0, np.asarray(z, np.float64)) for z in (x, y))
            assert_close(x, y, rounding + tolerance, f"{name} {kind} {jax.tree_util.keystr(path)}")


@pytest.mark.parametrize(("op", "name"), NAMED)
def test_interpreted_values_gradients_and_states_are_those_of_float64(op, name, monkeypatch, capfd):
    shrink(op, name, monkeypatch)
    floats, others, options = make(op, specs(op)[name])
    floats, others = spoilt(floats, others)
    cotangents = cotangents_of(op, floats, others, options)
    # The interpreter shares the parallel axes of a grid among threads, which takes six times as long.
    cores = 2 if name in CASES[op].quick else 1
    with pallas.interpreted(pltpu.InterpretParams(detect_races=True, num_cores_or_threads=cores)):
        results = jax.block_until_ready(
            jax.jit(program(op, options, "pallas_tpu"))(floats, others, cotangents)
        )
    assert "RACE" not in capfd.readouterr().out  # an error in newer versions of JAX
    assert {key: x.dtype for key, x in results[1].items()} == {
        name: x.dtype for name, x in floats.items() if not CASES[op].forward_only
    }
    keys = {
        "attention": lambda: floats["k"].shape[1],
        "decode_attention": lambda: others["visible"].shape[1],
    }.get(op, lambda: 0)()
    coded = isinstance(others.get("k"), Coded) and floats["q"].dtype == jnp.bfloat16
    check(results, truth(op, floats, others, options, cotangents), f"{op} {name}", keys, coded)


def lowered(op, spec, extents=None, device=None):
    """Forward and backward of a call, lowered for a TPU from shapes alone."""
    floats, others, options = make(op, spec)
    cotangents = cotangents_of(op, floats, others, options)
    sharding = None if device is None else jax.sharding.SingleDeviceSharding(device)

    def abstract(x):
        return jax.ShapeDtypeStruct(
            [(extents or {}).get(size, size) for size in x.shape], x.dtype, sharding=sharding
        )

    arguments = jax.tree.map(abstract, (floats, others, cotangents))
    with pallas.lowering():
        return (
            jax.jit(program(op, options, "pallas_tpu")).trace(*arguments).lower(lowering_platforms=("tpu",))
        )


@pytest.mark.parametrize(("op", "name"), NAMED)
def test_kernels_lower_for_a_tpu(op, name):
    assert "tpu_custom_call" in lowered(op, specs(op)[name]).as_text()


@pytest.mark.parametrize("op", CASES)
def test_arrays_may_have_more_elements_than_an_int32_counts(op):
    text = lowered(op, *CASES[op].huge).as_text()
    shapes = [
        [int(size) for size in shape.split("x")[:-1]]
        for shape in re.findall(r"tensor<([\dx]+x)(?:f32|bf16|ui32)>", text)
    ]
    assert max(np.prod(shape, dtype=np.int64) for shape in shapes) > 2**31
    assert "tpu_custom_call" in text


@pytest.fixture
def unsaved():
    """Programs for a machine that is not here can be saved, and never be loaded again."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 1e9)
    yield
    jax.config.update(name, before)


@pytest.mark.slow
@pytest.mark.parametrize(("op", "name"), NAMED)
def test_the_compiler_for_tpus_takes_them(op, name, monkeypatch, unsaved):
    pytest.importorskip("libtpu")  # of seqlab[tpu]; it compiles without a TPU
    for key, value in ALONE.items():
        monkeypatch.setenv(key, value)
    device = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices[0]
    assert lowered(op, specs(op)[name], device=device).compile().memory_analysis() is not None


def test_elsewhere_a_kernel_declines_and_says_why():
    for op, case in CASES.items():
        floats, others, options = make(op, specs(op)[case.quick[0]])
        function = public(op)
        with pytest.raises(NotImplementedError, match="compiled for TPUs, and the platform here is cpu"):
            function(**floats, **others, **options, implementation="pallas_tpu")
        with pallas.lowering(), jax.enable_x64(True), pytest.raises(NotImplementedError, match="not float64"):
            wide = {name: jnp.asarray(np.asarray(x), jnp.float64) for name, x in floats.items()}
            function(**wide, **others, **options, implementation="pallas_tpu")


@pytest.mark.parametrize(
    "op", [pytest.param(op, marks=[pytest.mark.slow] * (op != "attention")) for op in CASES]
)
def test_rows_may_lie_on_several_devices(op):
    """Lowered inside of shard_map, parameters on every device, differentiated where there are gradients."""
    floats, others, options = make(op, specs(op)["tiny"])
    everywhere, rows = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("data")
    places = {
        name: everywhere if name in ("weight", "bias", "A", "sink_logits") else rows
        for name in (*floats, *others)
    }
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    function = functools.partial(public(op), **options, implementation="pallas_tpu")
    sharded = jax.shard_map(lambda call: function(**call), mesh=mesh, in_specs=(places,), out_specs=rows)

    def total(floats):
        return sum(jnp.sum(x) for x in sharded({**floats, **others}))

    run = jax.jit(total if CASES[op].forward_only else jax.grad(total))
    with pallas.lowering():
        assert "tpu_custom_call" in run.trace(floats).lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.slow
@pytest.mark.parametrize("op", ["scan", "linear_attention"])
def test_values_alone_are_those_beside_gradients(op, monkeypatch):
    """Without a gradient no states are saved."""
    shrink(op, "tiny", monkeypatch)
    floats, others, options = make(op, specs(op)["tiny"])
    with pallas.interpreted():
        results = jax.jit(
            lambda floats: public(op)(**floats, **others, **options, implementation="pallas_tpu")
        )(floats)
    check([results], [public(op)(**floats, **others, **options, implementation="reference")], op, 0)


@pytest.mark.slow
def test_vmap_is_a_loop_over_calls(monkeypatch):
    """Of attention, whose grid reads tables; the interpreter takes no other grid that vmap has made
    longer."""
    op, spec = "attention", specs("attention")["tiny_packed"]
    shrink(op, "tiny_packed", monkeypatch)
    calls = [make(op, spec), make(op, spec)]
    calls[1][0].update(jax.tree.map(lambda x: x * 1.5, calls[1][0]))
    run = program(op, calls[0][2], "pallas_tpu")
    arguments = [(*call[:2], cotangents_of(op, *call)) for call in calls]
    with pallas.interpreted():
        together = jax.jit(jax.vmap(run))(*jax.tree.map(lambda *x: jnp.stack(x), *arguments))
        for i, one in enumerate(arguments):
            alone = jax.jit(run)(*one)
            assert_close(
                jax.tree.map(lambda x, i=i: jnp.nan_to_num(x[i]), together),
                jax.tree.map(jnp.nan_to_num, alone),
                1e-6,
            )


@pytest.mark.slow
def test_the_gradient_of_a_part_of_the_keys(monkeypatch):
    """The calls made by a ring of devices."""
    shrink("attention", "", monkeypatch)
    attention_op = importlib.import_module("seqlab.kernels.attention")
    q, k, v, dout = (random(seed, 2, 21, 2, 8) for seed in range(4))
    dlse, positions = random(4, 2, 21, 2), jnp.tile(jnp.arange(21), (2, 1))
    alibi, places = jnp.array([[0.1, 0.3], [0.0, 0.2]]), {"q_positions": positions, "kv_positions": positions}
    options = {"sinks": 2, "softcap": None, "scale": 0.3}
    out, lse = attention_op.attention(q, k, v, **places, window=9, alibi=alibi, **options)
    part = {
        "q_positions": positions,
        "kv_positions": positions[:, :13],
        "q_segments": None,
        "kv_segments": None,
        **options,
        "left": 8,
        "right": 0,
    }

    def gradient(implementation):
        return jax.jit(
            lambda: attention_op._gradient(
                q, k[:, :13], v[:, :13], alibi, out, lse, dout, dlse, **part, implementation=implementation
            )
        )()

    with pallas.interpreted():
        actual = gradient("pallas_tpu")
    assert_close(actual, gradient("reference"), 2e-5)
