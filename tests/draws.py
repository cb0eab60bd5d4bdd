"""A model whose logits are a table, and the draws from it by their definition, in NumPy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from seqlab.module import Module

VOCABULARY = 200  # more than the 128 candidates that are sorted first


class Markov(Module):
    """Logits that are a table of the last token: the same bits in every batch."""

    causal, lookahead, exact, vocab_size = True, 0, True, VOCABULARY

    def __init__(self, seed, scale=3.0, step=None):
        table = np.random.default_rng(seed).normal(size=(VOCABULARY, VOCABULARY)) * scale
        self.kind = seed, step  # models of one kind share their programs
        self.table = nnx.Param(
            jnp.asarray(table if step is None else np.round(table / step) * step, jnp.float32)
        )

    def init_state(self, batch, dtype=jnp.float32):
        return jnp.zeros((batch,), jnp.int32)

    def features(self, inputs, state=None, reset=None, valid=None):
        count = state + (inputs.shape[1] if valid is None else jnp.sum(valid, axis=1, dtype=jnp.int32))
        return self.table[...][inputs], count

    def read_out(self, x):
        return x

    def __call__(self, inputs, state=None, reset=None, valid=None):
        return self.features(inputs, state, reset, valid)


@functools.cache
def noise(seed):
    """Additions to the log-probabilities at the first positions of a row."""
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(np.uint32(seed))))(jnp.arange(700))
    return np.asarray(jax.vmap(lambda key: jax.random.gumbel(key, (VOCABULARY,)))(keys))


def chosen(logits, past, place, options):
    """The token that the documentation asks for after `past`, and its log-probability where it was drawn."""
    x, seed = logits.astype(np.float32), options.get("seed", 0)  # whose ties are those of float32
    for token, bias in (options.get("logit_bias") or {}).items():
        x[token] += np.float32(bias)
    seen, counts = np.unique(past[-512:], return_counts=True)
    scale, once, each = (
        np.float32(options.get(f"{name}_penalty", default))
        for name, default in (("repetition", 1.0), ("presence", 0.0), ("frequency", 0.0))
    )
    x[seen] = np.where(x[seen] > 0, x[seen] / scale, x[seen] * scale)
    x[seen] -= once + each * counts.astype(np.float32)
    x = x.astype(np.float64)
    temperature = options.get("temperature", 1.0)
    if temperature == 0:
        return int(np.argmax(x)), 0.0
    x = (x - x.max()) / temperature
    order = np.argsort(-x, kind="stable")[: options.get("top_k") or None]
    weights = np.exp(x[order])
    if (share := options.get("top_p")) is not None:
        before = np.cumsum(weights) - weights
        order = order[before < share * (1 - 2.0**-20) * weights.sum()]
    least = math.log(options.get("min_p") or 1e-300)
    order = order[x[order] >= least - 2.0**-20]
    kept = np.full_like(x, -np.inf)
    kept[order] = x[order]
    token = int(np.argmax(kept.astype(np.float32) + noise(seed)[place]))
    return token, float(kept[token] - np.log(np.exp(kept).sum()))


def check(net, prompt, options, made):
    """Every token of one row against its definition."""
    table, past = np.asarray(net.table[...]), list(prompt)
    for token in made:
        expected, logprob = chosen(table[past[-1]], past, len(past), options)
        assert token.token == expected, (token.index, options)
        raw = table[past[-1]].astype(np.float64)
        raw = raw - raw.max()
        raw -= np.log(np.exp(raw).sum())
        np.testing.assert_allclose(token.logprob, raw[expected], atol=2e-5)
        np.testing.assert_allclose(token.sampled_logprob, logprob, atol=2e-5)
        past.append(token.token)
