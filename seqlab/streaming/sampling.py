"""How a token is drawn from logits."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from seqlab.checks import UserError


class Sampling(NamedTuple):
    """How a token is drawn from logits; hashable, because it shapes the compiled loop."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None


def draw(
    logits: Float[Array, "b v"], seed: UInt32[Array, " b"], index: Int[Array, " b"], sampling: Sampling
) -> Int[Array, " b"]:
    """One token a row. A row's draw depends on its seed and place in the sequence alone, not on the batch or
    the block."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        kth = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered = -jnp.sort(-logits, axis=-1)
        before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) - jax.nn.softmax(ordered, axis=-1)
        least = jnp.min(jnp.where(before < sampling.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    noise = jax.vmap(
        lambda s, i: jax.random.gumbel(jax.random.fold_in(jax.random.key(s), i), logits.shape[1:])
    )(seed, index)
    return jnp.argmax(logits + noise, axis=-1).astype(jnp.int32)


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> Sampling:
    """The options as one value, refused where out of range."""
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature must be >= 0 (0 takes the likeliest token), got {temperature!r}")
    if top_k is not None and (not isinstance(top_k, int | np.integer) or top_k < 1):
        raise UserError(f"top_k must be a positive integer or None, got {top_k!r}")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p must be in (0, 1] or None, got {top_p!r}")
    return Sampling(float(temperature), top_k, top_p)
