"""Shapes for tests and benchmarks, as plain data."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from seqlab.kernels.blocks import Table, everywhere
from seqlab.kernels.decode_attention import Coded
from seqlab.kernels.facts import BATCH, HEADS, TIME, WIDTH, Facts, Sample, normal


class Spec(NamedTuple):
    """One call of `decode_attention`: keys in groups of `group` steps, values in groups of `channels`; plain
    numbers if `bits` is None, values in `v_bits` (default: as keys).

    A share `seen` of the slots is visible, or the first `filled` of each row."""

    b: int
    s: int
    h: int
    g: int
    k: int
    v: int
    bits: int | None
    group: int = 32
    channels: int = 32
    seen: float = 0.7
    filled: tuple[int, ...] | None = None
    softcap: float | None = None
    dtype: str = "float32"
    v_bits: int | None = None


SPECS = {
    "int8": Spec(2, 96, 4, 2, 32, 32, 8),
    "int4": Spec(2, 96, 4, 2, 32, 64, 4),
    "int2": Spec(2, 96, 4, 2, 64, 32, 2, softcap=1.5),
    "int4_values2": Spec(2, 96, 4, 2, 32, 64, 4, v_bits=2),
    "int2_values8": Spec(2, 64, 6, 2, 48, 24, 2, group=16, channels=8, v_bits=8, softcap=2.0),
    "int8_values4_bfloat16": Spec(2, 96, 4, 2, 64, 32, 8, dtype="bfloat16", v_bits=4),
    "one_head": Spec(1, 32, 1, 1, 32, 32, 4),
    "odd_widths": Spec(2, 64, 6, 2, 40, 24, 4, group=16, channels=8),
    "many_heads": Spec(1, 64, 40, 2, 32, 32, 4),
    "split": Spec(1, 1088, 4, 2, 32, 32, 4),
    "ragged": Spec(3, 1088, 4, 2, 32, 32, 4, filled=(1088, 0, 40)),
    "nothing_seen": Spec(2, 64, 4, 2, 32, 32, 4, seen=0.0),
    "bfloat16": Spec(2, 96, 4, 2, 64, 64, 4, dtype="bfloat16"),
    "heads_of_256": Spec(1, 64, 2, 1, 256, 256, 8, dtype="bfloat16"),
    "numbers": Spec(2, 77, 6, 2, 40, 24, None, softcap=2.0),
    "numbers_ragged": Spec(3, 1100, 4, 2, 32, 32, None, filled=(1100, 0, 37)),
    "numbers_bfloat16": Spec(2, 61, 4, 1, 256, 64, None, dtype="bfloat16"),
}

BENCHMARKS = {
    "int8_4096": Spec(1, 4096, 8, 2, 64, 64, 8),
    "int4_4096": Spec(1, 4096, 8, 2, 64, 64, 4),
    "int2_4096": Spec(1, 4096, 8, 2, 64, 64, 2),
    "numbers_4096": Spec(1, 4096, 8, 2, 64, 64, None),
}

LARGE = {
    f"{name}_{s // 1024}k": Spec(b, s, 32, 8, 128, 128, bits, seen=1.0, dtype="bfloat16")
    for b, s in ((1, 8192), (8, 32768), (1, 131072))
    for name, bits in (("int8", 8), ("int4", 4), ("int2", 2), ("numbers", None))
}


def inputs(spec: Spec, seed: int = 0) -> dict[str, Any]:
    """Random arguments of `decode_attention` by name; the first group of the first row is hidden, and it or
    its scales are NaN."""
    random, (b, s, h, g, k, v) = np.random.default_rng(seed), spec[:6]
    visible = (
        random.random((b, s)) < spec.seen
        if spec.filled is None
        else np.arange(s) < np.asarray(spec.filled)[:, None]
    )
    visible[0, : spec.group] = False

    def coded(width, bits, shape):
        words = random.integers(0, 2**32, size=(b, g, width * bits // 32, s), dtype=np.uint32)
        scale = random.uniform(0.5, 2.0, size=shape) / 2**bits
        return [words, scale, random.normal(size=shape) - 0.5]

    if spec.bits is None:
        keys, values = (random.normal(size=(b, g, s, width)) for width in (k, v))
        keys[0, :, : spec.group] = values[0, :, : spec.group] = np.nan
        keys, values = (jnp.asarray(x, spec.dtype) for x in (keys, values))
    else:
        keys = coded(k, spec.bits, (b, g, s // spec.group, k))
        values = coded(v, spec.v_bits or spec.bits, (b, g, v // spec.channels, s))
        for x in (*keys[1:], *(y.swapaxes(2, 3) for y in values[1:])):
            x[0, :, 0] = np.nan
        keys, values = (
            Coded(jnp.asarray(x[0]), *(jnp.asarray(y, spec.dtype) for y in x[1:])) for x in (keys, values)
        )
    arguments = {
        "q": jnp.asarray(random.normal(size=(b, h, k)), spec.dtype),
        "k": keys,
        "v": values,
        "visible": jnp.asarray(visible),
    }
    options = {"softcap": spec.softcap, "v_bits": spec.v_bits}
    return arguments | {name: value for name, value in options.items() if value is not None}


FACTS = Facts(
    lambda s: 2.0 * s.b * s.h * s.s * (s.k + s.v),
    lambda s: (s.s, 0),
    lambda s: 2.0 * s.b * s.s * s.h * (s.k + s.v),
    gradients=False,
)


def _slots(keys: int, warps: int) -> dict[str, Any]:
    return {"keys": keys, "warps": warps, "stages": 2}


# By kernel, bytes per number, and the largest width of an entry.
BLOCKS: Table = {
    # Slots of a tile, in codes of one group of keys at most.
    "decode_attention/triton_gpu/codes": {2: {256: _slots(64, 4)}, 4: {256: _slots(32, 8)}},
    "decode_attention/triton_gpu/numbers": {
        2: {256: _slots(64, 4)},
        4: {128: _slots(32, 8), 256: _slots(16, 8)},
    },
    # A few megabytes of numbers, and copies large enough to amortise their latency.
    "decode_attention/pallas_tpu/tile": everywhere(tile=2048),
}


def _sample() -> Sample:
    random, lead = np.random.default_rng(0), (BATCH, HEADS)
    words = [
        jnp.asarray(random.integers(0, 2**32, size=(*lead, WIDTH // 8, TIME), dtype=np.uint32))
        for _ in range(2)
    ]
    groups = [
        [0.1 * normal(seed, *lead, *shape) for seed in (1, 2)]
        for shape in ((TIME // 32, WIDTH), (WIDTH // 32, TIME))
    ]
    k, v = (Coded(codes, *found) for codes, found in zip(words, groups, strict=True))
    return (normal(3, *lead, WIDTH), k, v, jnp.ones((BATCH, TIME), bool)), {}


# Small calls by the names of the ops, for `seqlab doctor`.
SAMPLES = {"decode_attention": _sample}
