"""Speculative sampling: acceptance, the distribution of the next token and its draw."""

import jax.numpy as jnp
import numpy as np

from seqlab.streaming.rejection import agreement, expected_tokens, inverse_cdf, judge


def check(case):
    q, p, u, r = (jnp.asarray(case.inputs[name]) for name in ("q", "p", "u", "r"))
    assert q.dtype == jnp.float64, "the tables are exact to 1e-12"
    tokens = jnp.asarray(case.inputs["draft_tokens"], jnp.int32)
    if "gamma" in case.meta:
        assert q.shape[1] == int(case.meta["gamma"])
    verdict, alpha = judge(p, q, tokens, u), agreement(p, q)
    case.check("accept_prob", verdict.probability)
    case.check("num_accepted", np.asarray(verdict.accepted), exact=True)
    case.check("next_token_dist", verdict.following)
    case.check("next_token", np.asarray(inverse_cdf(verdict.following, r)), exact=True)
    case.check("alpha", alpha)
    case.check("expected_tokens", expected_tokens(alpha))
