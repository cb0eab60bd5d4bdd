"""Randomness in training: dropout and stochastic depth, as pure functions of the parameters.

A random module keeps its key among the statistics of the model (`Draws`): every training call consumes it and
stores the next one, so that a step is a pure function and a resumed run makes the same draws. In evaluation
nothing is random.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from seqlab.checks import UserError
from seqlab.module import Module


class Draws(nnx.Variable):
    """The raw key of the next draw: consumed in training, without gradient, update or decay, and not a
    published weight."""


def draw(key: jax.Array, rate: float, shape: tuple[int, ...]) -> Bool[Array, "*b"]:
    """A mask of kept entries, each with probability 1 - rate.

    A random word of 32 bits is the main cost per entry, so it serves as many entries as the rate can be
    represented for to within 1e-4: 32 for a rate of one half, two for most others.
    """
    for bits in (1, 2, 4, 8, 16, 32):
        dropped = round(rate * 2**bits)
        if abs(dropped / 2**bits - rate) <= 1e-4 * min(rate, 1 - rate):
            break
    *rows, size = shape
    words = jax.random.bits(key, (*rows, -(-size * bits // 32)))
    parts = (words[..., None] >> jnp.arange(0, 32, bits, dtype=jnp.uint32)) & jnp.uint32(2**bits - 1)
    return parts.reshape(*rows, words.shape[-1] * (32 // bits))[..., :size] >= jnp.uint32(dropped)


class Dropout(Module):
    """Entries set to zero with probability `rate` in training, the others divided by 1 - rate (arXiv
    1207.0580)."""

    def __init__(self, rate: float, *, rngs: nnx.Rngs):
        if not 0 <= rate < 1:
            raise UserError(f"rate must be a probability below 1, got {rate!r}")
        self.rate, self.deterministic = rate, True
        self.key = Draws(jax.random.key_data(rngs.params())) if rate else None

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        return self._drop(x, x.shape)

    def _drop(self, x: Array, shape: tuple[int, ...]) -> Array:
        if self.deterministic or self.key is None:
            return x
        now, following = jax.random.split(jax.random.wrap_key_data(self.key[...]))
        self.key[...] = jax.random.key_data(following)
        return jnp.where(draw(now, self.rate, shape), x / (1 - self.rate), jnp.zeros((), x.dtype))


class DropPath(Dropout):
    """The same for whole rows of the batch: stochastic depth (arXiv 1603.09382)."""

    def __call__(self, x: Float[Array, "b *t d"]) -> Float[Array, "b *t d"]:
        return self._drop(x, (x.shape[0],) + (1,) * (x.ndim - 1))
