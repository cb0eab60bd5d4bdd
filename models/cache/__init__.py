"""Key/value caches as values with a policy.

A policy is a small frozen object, a `Policy`: which past keys a query may see, and what is stored so that it
can. Called with the unturned queries, keys and values of a chunk it gives the attention output, its
log-sum-exp and the new state,

    out, lse, state = policy(q, k, v, state, reset, valid, scores)

and the same call with `state=None` is the parallel form for training. `scores` says how logits are formed
(rotary positions, soft-cap, scale): that belongs to the model, so choosing a cache never changes it. Partial
results carry their log-sum-exp, so policies can be built from parts.
"""

from seqlab.models.cache.common import CacheState, Scores
from seqlab.models.cache.full import Full
from seqlab.models.cache.heads import Heads, duo
from seqlab.models.cache.moba import MoBA
from seqlab.models.cache.policy import Policy
from seqlab.models.cache.quantized import Quantized
from seqlab.models.cache.spec import parse_cache
from seqlab.models.cache.window import Window

__all__ = [
    "CacheState",
    "Full",
    "Heads",
    "MoBA",
    "Policy",
    "Quantized",
    "Scores",
    "Window",
    "duo",
    "parse_cache",
]
