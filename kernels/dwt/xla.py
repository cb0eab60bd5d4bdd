"""The fast form: four sums and differences of a cell's places, in `accumulator` of its dtype, which fuse into
one pass."""

import jax.numpy as jnp
from einops import rearrange

from seqlab.shapes import accumulator


def dwt(x):
    """x [b, 2i, 2j, d] -> low [b, i, j, d], bands [b, i, j, d, 3]."""
    cells = rearrange(x.astype(accumulator(x.dtype)), "b (i p) (j q) d -> b i p j q d", p=2, q=2)
    above, below = cells[:, :, 0], cells[:, :, 1]  # [b, i, j, q, d]
    (left, right), (left_change, right_change) = (
        (x[..., 0, :], x[..., 1, :]) for x in ((above + below) * 0.5, (above - below) * 0.5)
    )
    bands = jnp.stack([left_change + right_change, left - right, left_change - right_change], axis=-1)
    return (left + right).astype(x.dtype), bands.astype(x.dtype)


def idwt(low, bands):
    """low [b, i, j, d], bands [b, i, j, d, 3] -> x [b, 2i, 2j, d]."""
    dtype, low = low.dtype, low.astype(accumulator(low.dtype))
    vertical, horizontal, both = (bands[..., k].astype(low.dtype) for k in range(3))
    left, right = (low + horizontal) * 0.5, (low - horizontal) * 0.5
    left_change, right_change = (vertical + both) * 0.5, (vertical - both) * 0.5
    above = jnp.stack([left + left_change, right + right_change], axis=3)  # [b, i, j, q, d]
    below = jnp.stack([left - left_change, right - right_change], axis=3)
    return rearrange(jnp.stack([above, below], axis=2), "b i p j q d -> b (i p) (j q) d").astype(dtype)
