"""Shapes for tests and benchmarks, as plain data."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seqlab.kernels.blocks import Table, everywhere
from seqlab.kernels.facts import BATCH, STATE, TIME, WIDTH, Facts, Sample, normal


class Spec(NamedTuple):
    """One call of `scan`. `dtype` is that of u, B and C; `wide` that of delta and A. `step` is the typical
    size of Δ."""

    b: int
    t: int
    e: int
    n: int
    chunk: int | None = None
    reset: bool = False
    valid: bool = False
    dtype: str = "float32"
    wide: str = "float32"
    step: float = 0.3


SPECS = {
    "one_step": Spec(3, 1, 6, 4),
    "one_step_masked": Spec(4, 1, 6, 4, reset=True, valid=True),
    "one_state_shorter_than_the_chunk": Spec(2, 5, 6, 1, chunk=8),
    "odd": Spec(2, 37, 7, 5, chunk=8),
    "chunks_of_one": Spec(1, 6, 4, 16, chunk=1),
    "stiff": Spec(2, 19, 5, 4, chunk=8, step=40.0),
    "masked": Spec(3, 26, 5, 4, chunk=8, valid=True),
    "resets_masked": Spec(4, 41, 6, 3, chunk=16, reset=True, valid=True),
    "default_chunk": Spec(1, 131, 4, 3, reset=True),
    "bfloat16": Spec(2, 37, 8, 4, chunk=16, reset=True, valid=True, dtype="bfloat16", wide="bfloat16"),
    "mixed": Spec(2, 21, 8, 4, chunk=16, dtype="bfloat16"),
}

BENCHMARKS = {
    "rows": Spec(4, 2048, 256, 16),
    "mamba_130m_layer": Spec(1, 2048, 1536, 16),
    "many_states": Spec(2, 512, 128, 64),
    "decode": Spec(8, 1, 1536, 16),
}

LARGE = {
    "mamba_130m_layer_bfloat16": Spec(1, 2048, 1536, 16, dtype="bfloat16", wide="bfloat16"),
    "mamba_370m_layers": Spec(8, 4096, 2048, 16, dtype="bfloat16", wide="bfloat16"),
    "long": Spec(1, 65536, 1536, 16, dtype="bfloat16", wide="bfloat16"),
}


def inputs(spec: Spec, seed: int = 0) -> dict[str, jax.Array | None]:
    """Random arguments of `scan` by name; without flags where the spec has none."""
    random, (b, t, e, n) = np.random.default_rng(seed), spec[:4]
    normal = random.normal
    return {
        "u": jnp.asarray(normal(size=(b, t, e)), spec.dtype),
        "delta": jnp.asarray(spec.step * random.gamma(2.0, 0.5, size=(b, t, e)), spec.wide),
        "A": jnp.asarray(-np.exp(normal(size=(e, n))), spec.wide),
        "B": jnp.asarray(normal(size=(b, t, n)), spec.dtype),
        "C": jnp.asarray(normal(size=(b, t, n)), spec.dtype),
        "initial_state": jnp.asarray(normal(size=(b, e, n)), jnp.float32),
        "reset": jnp.asarray(random.random((b, t)) < 0.15) if spec.reset else None,
        "valid": jnp.asarray(random.random((b, t)) < 0.7) if spec.valid else None,
    }


FACTS = Facts(
    lambda s: 7.0 * s.b * s.t * s.e * s.n, lambda s: (s.t, s.b * s.t), lambda s: s.b * s.t * s.e * s.n
)


# By kernel, bytes per number, and the largest width of an entry.
BLOCKS: Table = {
    # A state is kept a tile, so long tiles need less memory and short ones fewer registers. Both directions
    # use the same steps.
    "scan/triton_gpu/forward": everywhere(steps=64, channels=16, warps=4),
    "scan/triton_gpu/backward": everywhere(channels=16, warps=4),
    "scan/pallas_tpu/block": everywhere(channels=512),
    # The states kept, t / 64 of them, then take n / 64 of the memory of u.
    "scan/xla/chunk": everywhere(steps=64),
}


def _sample() -> Sample:
    x, maps = normal(0, BATCH, TIME, WIDTH), (normal(seed, BATCH, TIME, STATE) for seed in (1, 2))
    return (
        x,
        jax.nn.softplus(normal(3, BATCH, TIME, WIDTH)),
        -jnp.exp(normal(4, WIDTH, STATE)),
        *maps,
    ), {}


# Small calls by the names of the ops, for `seqlab doctor`.
SAMPLES = {"scan": _sample}
