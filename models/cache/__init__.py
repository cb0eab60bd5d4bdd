"""Key/value caches as values with a policy.

A policy is a small frozen object: which past keys a query may see, and what is stored so that it can. Called
with the unrotated queries, keys and values of a chunk it gives the attention output and the new state,

    out, lse, state = policy(q, k, v, state, reset, valid, rotary)

and the same call with `state=None` is the parallel form for training. `rotary(x, positions)` turns queries or
keys; the policy decides with which positions, because that is where policies differ. Partial results carry
their log-sum-exp, so policies can be built from parts. A policy has `init_state(batch, kv_heads, width,
dtype)`, a `span` of steps that it remembers at most, says whether it is `exact` (streams equal the parallel
form), has a `capacity` where sequences must end, and `rewind(state, steps)`, which raises where the past is
gone.
"""

from seqlab.models.cache.common import CacheState
from seqlab.models.cache.full import Full
from seqlab.models.cache.heads import Heads, duo
from seqlab.models.cache.moba import MoBA
from seqlab.models.cache.quantized import Quantized
from seqlab.models.cache.spec import parse_cache
from seqlab.models.cache.window import Window

__all__ = ["CacheState", "Full", "Heads", "MoBA", "Quantized", "Window", "duo", "parse_cache"]
