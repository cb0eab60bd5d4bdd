"""The rule of speculative sampling: which drafted tokens are kept, and from what the next one is drawn, so
that the output follows the target's distribution exactly (arXiv 2211.17192, 2302.01318)."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Verdict(NamedTuple):
    """`accepted` [b]: the number of drafted tokens kept. `probability` [b, g]: with which each is accepted if
    those before it are. `following` [b, v]: the distribution of the token after the accepted ones."""

    accepted: Int[Array, " b"]
    probability: Float[Array, "b g"]
    following: Float[Array, "b v"]


def judge(
    p: Float[Array, "b g+1 v"],
    q: Float[Array, "b g v"],
    tokens: Int[Array, "b g"],
    u: Float[Array, "b g"],
    offered: Int[Array, " b"] | None = None,
) -> Verdict:
    """Accept drafted tokens from the left while u < min(1, p/q); the token after the first rejection follows
    norm(max(p - q, 0)), that after all drafted tokens p.

    Args:
      p: the target's distributions at the drafted tokens and after them.
      q: the draft's distributions, of which `tokens` are draws.
      u: uniform numbers in [0, 1), used for nothing else.
      offered: only the first `offered` [b] tokens count; None for all.
    """
    of_p = jnp.take_along_axis(p[:, :-1], tokens[..., None], axis=2)[..., 0]
    of_q = jnp.take_along_axis(q, tokens[..., None], axis=2)[..., 0]
    probability = jnp.where(of_q > 0, jnp.minimum(1.0, of_p / jnp.where(of_q > 0, of_q, 1.0)), 0.0)
    kept = u < probability
    if offered is not None:
        counts = jnp.arange(tokens.shape[1]) < offered[:, None]
        kept, q = kept & counts, jnp.where(counts[..., None], q, 0.0)
    accepted = jnp.sum(jnp.cumprod(kept, axis=1, dtype=jnp.int32), axis=1, dtype=jnp.int32)
    place = accepted[:, None, None]
    there = jnp.take_along_axis(p, place, axis=1)[:, 0]
    drafted = jnp.take_along_axis(jnp.pad(q, ((0, 0), (0, 1), (0, 0))), place, axis=1)[:, 0]
    residual = jnp.maximum(there - drafted, 0.0)
    mass = jnp.sum(residual, axis=1, keepdims=True)
    # Where p and q agree up to rounding nothing is left, and p itself is as good.
    following = jnp.where(mass > 0, residual / jnp.where(mass > 0, mass, 1.0), there)
    return Verdict(accepted, probability, following)


def agreement(p: Float[Array, "b g+1 v"], q: Float[Array, "b g v"]) -> Float[Array, "b g"]:
    """The probability alpha = sum(min(p, q)) with which each drafted token is accepted."""
    return jnp.sum(jnp.minimum(p[:, :-1], q), axis=2)


def expected_tokens(alpha: Float[Array, "b g"]) -> Float[Array, " b"]:
    """The expected number of tokens per pass of the target: 1 + alpha_1 + alpha_1 alpha_2 + ..."""
    return 1.0 + jnp.sum(jnp.cumprod(alpha, axis=1), axis=1)


def inverse_cdf(distribution: Float[Array, "b v"], r: Float[Array, " b"]) -> Int[Array, " b"]:
    """The token at which the cumulative probability first exceeds `r` [b], uniform in [0, 1)."""
    cumulative = jnp.cumsum(distribution, axis=1)
    # The last possible token ends the sum whatever its rounding.
    last = distribution.shape[1] - 1 - jnp.argmax(distribution[:, ::-1] > 0, axis=1)
    passed = jnp.sum(cumulative <= r[:, None], axis=1)
    return jnp.minimum(passed, last).astype(jnp.int32)
