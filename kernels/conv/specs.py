"""Shapes for tests and benchmarks, as plain data."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seqlab.kernels.blocks import ANY, WIDEST, Table, everywhere
from seqlab.kernels.facts import BATCH, TIME, WIDTH, Facts, Sample, normal


class Spec(NamedTuple):
    """One call of `conv`."""

    b: int
    t: int
    d: int
    w: int
    bias: bool = True
    reset: bool = False
    valid: bool = False
    dtype: str = "float32"


SPECS = {
    "one_step": Spec(3, 1, 6, 4),
    "one_step_masked": Spec(4, 1, 6, 4, reset=True, valid=True),
    "one_tap": Spec(2, 7, 5, 1, reset=True, valid=True),
    "two_taps": Spec(2, 9, 5, 2, bias=False),
    "shorter_than_the_window": Spec(3, 2, 4, 5, reset=True, valid=True),
    "odd": Spec(2, 37, 7, 4, bias=False),
    "resets": Spec(3, 33, 5, 4, reset=True),
    "masked": Spec(3, 26, 5, 3, valid=True),
    "resets_masked": Spec(4, 41, 6, 5, reset=True, valid=True),
    "bfloat16": Spec(2, 37, 8, 4, reset=True, valid=True, dtype="bfloat16"),
}

BENCHMARKS = {
    "rows": Spec(4, 2048, 512, 4),
    "mamba_130m_layer": Spec(1, 2048, 1536, 4),
    "packed": Spec(4, 2048, 512, 4, reset=True),
    "padded": Spec(4, 2048, 512, 4, valid=True),
    "decode": Spec(8, 1, 1536, 4),
}

LARGE = {
    "mamba_130m_layer_bfloat16": Spec(1, 2048, 1536, 4, dtype="bfloat16"),
    "mamba_370m_layers": Spec(8, 4096, 2048, 4, dtype="bfloat16"),
}


def inputs(spec: Spec, seed: int = 0) -> dict[str, jax.Array | None]:
    """Random arguments of `conv` by name; None where the spec has none."""
    random, (b, t, d, w) = np.random.default_rng(seed), spec[:4]
    normal = random.normal
    return {
        "x": jnp.asarray(normal(size=(b, t, d)), spec.dtype),
        "weight": jnp.asarray(normal(size=(w, d)), spec.dtype),
        "bias": jnp.asarray(normal(size=(d,)), spec.dtype) if spec.bias else None,
        "initial_state": jnp.asarray(normal(size=(b, w - 1, d)), spec.dtype),
        "reset": jnp.asarray(random.random((b, t)) < 0.15) if spec.reset else None,
        "valid": jnp.asarray(random.random((b, t)) < 0.7) if spec.valid else None,
    }


FACTS = Facts(
    lambda s: 2.0 * s.w * s.b * s.t * s.d, lambda s: (s.w, s.b * s.t), lambda s: s.w * s.b * s.t * s.d
)


# By kernel, bytes per number, and the largest width of an entry.
BLOCKS: Table = {
    # Wide rows are read 256 bytes at a time; `stretch` steps share one partial sum of the weights' gradient.
    "conv/triton_gpu/tile": {
        ANY: {
            64: {"steps": 32, "channels": 32, "stretch": 256, "warps": 4},
            WIDEST: {"steps": 16, "channels": 128, "stretch": 256, "warps": 4},
        }
    },
    # One MiB of float32, an efficient transfer size, and ten of them fit.
    "conv/pallas_tpu/tile": everywhere(steps=512, channels=512),
}


def _sample() -> Sample:
    return (normal(0, BATCH, TIME, WIDTH), normal(1, 4, WIDTH), None), {}


# Small calls by the names of the ops, for `seqlab doctor`.
SAMPLES = {"conv": _sample}
