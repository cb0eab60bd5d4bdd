"""The axes of seqlab: one letter per axis, the same in signatures, einsums and comments.

    b  batch (rows)            t  time, or the length of a chunk        c  the length of an inner chunk
    d  model width             h  heads                                 g  groups that share something
    (key/value heads)
    k  key width per head      v  value width per head                  e  inner width of a state-space mixer
    n  state size              s  stored keys (a cache), or source time w  window or filter taps
    p  past steps that are kept, one less than taps

Layout is always `[b, t, h, d]`; images are NHWC. Masks say True = keep. Segment ids count from 1, 0 is
padding. Positions count from 0 within a segment. A window W is the query and the W-1 keys before it.

Accumulators (recurrent states, decays, log-sum-exp) are float32, or float64 for float64 inputs: see
`accumulator`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Activations = Float[Array, "b t d"]
Maps = Float[Array, "b *t d"]  # over time, over the places of an image or of a video
Tokens = Int[Array, "b t"]
Counts = int | Int[Array | np.ndarray, " b"]  # of steps: one for all rows, or one per row
Steps = Bool[Array, "b t"]  # one flag per step: `reset` or `valid`
Queries = Float[Array, "b t h k"]
Keys = Float[Array, "b s g k"]
Values = Float[Array, "b s g v"]
LogSumExp = Float[Array, "b t h"]


def accumulator(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """The dtype of accumulators for `dtype`: float32 at least."""
    return jnp.promote_types(dtype, jnp.float32)
