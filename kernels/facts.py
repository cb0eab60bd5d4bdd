"""Facts about ops declared in their `specs`, for bench, doctor, docs and tests."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Sample = tuple[tuple[Any, ...], dict[str, Any]]  # arguments and options of a call

# Sizes of samples that the tiles of an accelerator take as they are: a sample asks whether a kernel runs, not
# what else it supports.
BATCH, TIME, HEADS, WIDTH, STATE = 1, 128, 2, 128, 16


class Facts(NamedTuple):
    """Of one call by its spec.

    `flops`: operations of the definition. `sums`: the lengths of the sums behind values and gradients.
    `held`: the numbers that the reference holds at once. `gradients`: whether the op has any.
    """

    flops: Callable[[Any], float]
    sums: Callable[[Any], tuple[int, int]]
    held: Callable[[Any], float]
    gradients: bool = True


def normal(seed: int, *shape: int) -> jax.Array:
    """Normal float32 numbers of a fixed seed, for samples."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def heads(seed: int) -> jax.Array:
    """Such numbers as queries, keys or values [b, t, h, d]."""
    return normal(seed, BATCH, TIME, HEADS, WIDTH)
