"""Key/value caches as values with a policy.

A policy is a small frozen object, a `Policy`: which past keys a query may see, and what is stored so that it
can. Called with the unturned queries, keys and values of a chunk it gives the attention output, its
log-sum-exp and the new state,

    out, lse, state = policy(q, k, v, state, reset, valid, scores)

and the same call with `state=None` is the parallel form for training. `scores` says how logits are formed
(rotary positions, soft-cap, scale): that belongs to the model, so choosing a cache never changes it. Partial
results carry their log-sum-exp, so policies can be built from parts.

Most policies are products, `Cache(retention, storage, selection)`: which steps stay (`Full`, `Window`), how
they are kept (`Exact`, `Ints`), and which of them a query reads (`All`, `Blocks`). Each part is a file of
this folder that declares its own words; what is in the folder is found.
"""

import importlib
import pkgutil

from seqlab.models.cache.common import CacheState, Scores
from seqlab.models.cache.exact import All, Exact, StepStorage
from seqlab.models.cache.full import Full
from seqlab.models.cache.heads import Heads, duo
from seqlab.models.cache.moba import Blocks, MoBA
from seqlab.models.cache.parts import Selection, Storage, Word
from seqlab.models.cache.policy import Policy
from seqlab.models.cache.product import Cache, Retention
from seqlab.models.cache.quantized import Ints, Quantized
from seqlab.models.cache.spec import parse_cache
from seqlab.models.cache.window import Window

for _found in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_found.name}")

__all__ = [
    "All",
    "Blocks",
    "Cache",
    "CacheState",
    "Exact",
    "Full",
    "Heads",
    "Ints",
    "MoBA",
    "Policy",
    "Quantized",
    "Retention",
    "Scores",
    "Selection",
    "StepStorage",
    "Storage",
    "Window",
    "Word",
    "duo",
    "parse_cache",
]
