"""Shapes for tests and benchmarks, as plain data."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seqlab.kernels.blocks import Table, everywhere
from seqlab.kernels.facts import BATCH, HEADS, TIME, WIDTH, Facts, Sample, normal
from seqlab.kernels.lmu.legendre import legendre


class Spec(NamedTuple):
    """One call of `lmu` with the matrices of `legendre(d, theta)`."""

    b: int
    t: int
    q: int
    d: int
    theta: float
    chunk: int | None = None
    reset: bool = False
    valid: bool = False
    dtype: str = "float32"


SPECS = {
    "one_step": Spec(3, 1, 2, 6, 16.0),
    "one_step_masked": Spec(4, 1, 2, 6, 16.0, reset=True, valid=True),
    "shorter_than_the_chunk": Spec(2, 5, 1, 4, 9.0, chunk=8),
    "odd": Spec(2, 37, 3, 5, 12.5, chunk=8),
    "chunks_of_one": Spec(1, 6, 2, 8, 16.0, chunk=1),
    "odd_chunks": Spec(2, 23, 1, 7, 6.0, chunk=7),
    "resets": Spec(3, 33, 2, 5, 12.0, chunk=8, reset=True),
    "masked": Spec(3, 26, 2, 5, 12.0, chunk=8, valid=True),
    "resets_masked": Spec(4, 41, 2, 6, 24.0, chunk=16, reset=True, valid=True),
    "default_chunk": Spec(1, 131, 1, 12, 64.0),
    "bfloat16": Spec(2, 37, 2, 8, 24.0, chunk=16, reset=True, valid=True, dtype="bfloat16"),
}

BENCHMARKS = {
    "rows": Spec(4, 2048, 1, 256, 784.0),
    "speech_commands": Spec(128, 128, 1, 256, 128.0),
    "psmnist": Spec(8, 784, 1, 468, 784.0),
    "many_channels": Spec(2, 2048, 64, 32, 128.0),
    "packed": Spec(4, 2048, 1, 256, 784.0, reset=True),
    "padded": Spec(4, 2048, 1, 256, 784.0, valid=True),
    "decode": Spec(8, 1, 1, 256, 784.0),
}


def inputs(spec: Spec, seed: int = 0) -> dict[str, jax.Array | np.ndarray | None]:
    """Random arguments of `lmu` by name; without flags where the spec has none. A and B are float64 constants
    of the host."""
    random, (b, t, q, d, theta) = np.random.default_rng(seed), spec[:5]
    A, B = legendre(d, theta)
    return {
        "u": jnp.asarray(random.normal(size=(b, t, q)), spec.dtype),
        "A": A,
        "B": B,
        "initial_state": jnp.asarray(random.normal(size=(b, q, d)), jnp.float32),
        "reset": jnp.asarray(random.random((b, t)) < 0.15) if spec.reset else None,
        "valid": jnp.asarray(random.random((b, t)) < 0.7) if spec.valid else None,
    }


FACTS = Facts(
    lambda s: 2.0 * s.b * s.t * s.q * s.d * (s.d + 1),
    lambda s: (s.t, s.t),
    lambda s: s.b * s.t * s.q * s.d,
)


# By kernel, bytes per number, and the largest width of an entry.
BLOCKS: Table = {
    "lmu/xla/chunk": everywhere(steps=32),
}


def _sample() -> Sample:
    A, B = legendre(WIDTH, 2.0 * TIME)
    return (normal(0, BATCH, TIME, HEADS), jnp.asarray(A, jnp.float32), jnp.asarray(B, jnp.float32)), {}


# Small calls by the names of the ops, for `seqlab doctor`.
SAMPLES = {"lmu": _sample}
