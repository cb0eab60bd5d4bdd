"""Shapes for tests and benchmarks, as plain data."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from seqlab.kernels.decode_attention import Coded


class Spec(NamedTuple):
    """One call of `decode_attention`: keys in groups of `group` steps, values in groups of `channels`."""

    b: int
    s: int
    h: int
    g: int
    k: int
    v: int
    bits: int
    group: int = 32
    channels: int = 32
    seen: float = 0.7
    dtype: str = "float32"


SPECS = {
    "int8": Spec(2, 96, 4, 2, 32, 32, 8),
    "int4": Spec(2, 96, 4, 2, 32, 64, 4),
    "int2": Spec(2, 96, 4, 2, 64, 32, 2),
    "one_head": Spec(1, 32, 1, 1, 32, 32, 4),
    "odd_widths": Spec(2, 64, 6, 2, 40, 24, 4, group=16, channels=8),
    "many_heads": Spec(1, 64, 40, 2, 32, 32, 4),
    "split": Spec(1, 1088, 4, 2, 32, 32, 4),
    "nothing_seen": Spec(2, 64, 4, 2, 32, 32, 4, seen=0.0),
    "bfloat16": Spec(2, 96, 4, 2, 64, 64, 4, dtype="bfloat16"),
}

BENCHMARKS = {
    "int8_32k": Spec(4, 32768, 32, 8, 128, 128, 8, dtype="bfloat16"),
    "int4_32k": Spec(4, 32768, 32, 8, 128, 128, 4, dtype="bfloat16"),
    "int2_32k": Spec(4, 32768, 32, 8, 128, 128, 2, dtype="bfloat16"),
}


def inputs(spec: Spec, seed: int = 0) -> dict[str, Any]:
    """Random arguments of `decode_attention` by name; the first group of the first row is hidden and has scales that are NaN."""
    random, (b, s, h, g, k, v) = np.random.default_rng(seed), spec[:6]
    visible = random.random((b, s)) < spec.seen
    visible[0, : spec.group] = False

    def coded(width, shape):
        words = random.integers(0, 2**32, size=(b, g, s, width * spec.bits // 32), dtype=np.uint32)
        scale = random.uniform(0.5, 2.0, size=shape) / 2**spec.bits
        return [words, scale, random.normal(size=shape) - 0.5]

    keys, values = coded(k, (b, g, s // spec.group, k)), coded(v, (b, g, s, v // spec.channels))
    for x in (*keys[1:], values[1]):
        x[0, :, 0] = np.nan
    keys, values = (Coded(jnp.asarray(x[0]), *(jnp.asarray(y, spec.dtype) for y in x[1:])) for x in (keys, values))
    return {"q": jnp.asarray(random.normal(size=(b, h, k)), spec.dtype), "k": keys, "v": values, "visible": jnp.asarray(visible)}
