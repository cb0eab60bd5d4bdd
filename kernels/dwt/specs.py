"""Shapes for tests and benchmarks, as plain data."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seqlab.kernels.facts import BATCH, WIDTH, Facts, Sample, normal


class Spec(NamedTuple):
    """One call of `dwt`."""

    b: int
    h: int
    w: int
    d: int
    levels: int = 1
    dtype: str = "float32"


SPECS = {
    "one_cell": Spec(2, 2, 2, 3),
    "one_place": Spec(2, 1, 1, 3, levels=2),
    "even": Spec(2, 8, 12, 5, levels=2),
    "odd": Spec(3, 7, 9, 4, levels=3),
    "long": Spec(1, 2, 33, 3, levels=4),
    "bfloat16": Spec(2, 6, 5, 4, levels=2, dtype="bfloat16"),
}

BENCHMARKS = {"wavemix_192": Spec(16, 56, 56, 48, levels=3), "small": Spec(64, 16, 16, 32)}


def inputs(spec: Spec, seed: int = 0) -> dict[str, jax.Array]:
    """Random arguments of `dwt` by name."""
    return {"x": jnp.asarray(np.random.default_rng(seed).normal(size=spec[:4]), spec.dtype)}


FACTS = Facts(lambda s: 3.0 * s.b * s.h * s.w * s.d, lambda s: (4, 4), lambda s: 4.0 * s.b * s.h * s.w * s.d)


def _sample() -> Sample:
    return (normal(0, BATCH, 16, 16, WIDTH),), {}


def _sample_of_inverse() -> Sample:
    return (normal(0, BATCH, 8, 8, WIDTH), [normal(1, BATCH, 8, 8, WIDTH, 3)]), {}


# Small calls by the names of the ops, for `seqlab doctor`.
SAMPLES = {"dwt": _sample, "idwt": _sample_of_inverse}
