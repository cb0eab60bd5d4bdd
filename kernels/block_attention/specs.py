"""Named calls of block attention for tests and benchmarks, and random inputs for them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seqlab.kernels.facts import BATCH, HEADS, TIME, Facts, Sample, heads


class Spec(NamedTuple):
    """A call: sizes by axis, n blocks of `block` keys, c selections per query, of which a share `none` are
    empty."""

    b: int
    t: int
    n: int
    block: int
    c: int
    h: int = 2
    g: int = 2
    k: int = 8
    v: int = 8
    none: float = 0.3
    softcap: float | None = None


SPECS = {
    "decode": Spec(3, 1, 9, 4, 3, h=4, g=2),
    "few_queries": Spec(2, 2, 16, 4, 2, h=4, g=2, v=5, softcap=0.8),
    "many_queries": Spec(2, 37, 5, 8, 2, h=6, g=2, k=5, softcap=0.8),
    "many_tiles": Spec(1, 300, 3, 16, 2, h=4, g=1, v=11),
    "one_block": Spec(2, 40, 1, 8, 1),
    "every_block": Spec(2, 70, 4, 8, 4, none=0.0),
    "no_block": Spec(2, 50, 4, 8, 2, none=1.0),
    "no_choice": Spec(2, 9, 4, 8, 0),
}

BENCHMARKS = {
    "train_4096": Spec(1, 4096, 16, 256, 2, h=4, g=4, k=64, v=64, none=0.0),
    "train_4096_small": Spec(1, 4096, 32, 128, 7, h=4, g=4, k=64, v=64, none=0.0),
    "decode_4096": Spec(1, 1, 16, 256, 2, h=8, g=2, k=64, v=64, none=0.0),
}


def make(spec: Spec, seed: int = 0, dtype: jax.typing.DTypeLike = jnp.float32) -> dict[str, Any]:
    """The arguments of a call of `block_attention`, by name; choices at random."""
    rng = np.random.default_rng(seed)
    shapes = {
        "q": (spec.t, spec.h, spec.k),
        "k": (spec.n * spec.block, spec.g, spec.k),
        "v": (spec.n * spec.block, spec.g, spec.v),
    }
    chosen = np.argsort(rng.random((spec.b, spec.t, spec.h, spec.n)), axis=-1)[..., : spec.c]
    chosen[rng.random(chosen.shape) < spec.none] = -1
    arrays = {name: jnp.asarray(rng.normal(size=(spec.b, *shape)), dtype) for name, shape in shapes.items()}
    return {**arrays, "chosen": jnp.asarray(chosen, jnp.int32), "block": spec.block, "softcap": spec.softcap}


FACTS = Facts(
    lambda s: 2.0 * s.b * s.t * s.h * s.c * s.block * (s.k + s.v),
    lambda s: (s.c * s.block, s.t * s.h // s.g),
    lambda s: 4.0 * s.b * s.h * s.t * s.n * s.block,
)


def _sample() -> Sample:
    return (heads(0), heads(1), heads(2), jnp.zeros((BATCH, TIME, HEADS, 1), jnp.int32)), {"block": TIME // 4}


# Small calls by the names of the ops, for `seqlab doctor`.
SAMPLES = {"block_attention": _sample}
