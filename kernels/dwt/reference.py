"""Reference implementation: an orthonormal 4 × 4 matrix that takes a cell (a, b, c, d) to (low, three
bands)."""

import jax.numpy as jnp
import numpy as np
from einops import rearrange

from seqlab.shapes import accumulator

HAAR = np.array([[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]]) / 2


def dwt(x):
    """x [b, 2i, 2j, d] -> low [b, i, j, d], bands [b, i, j, d, 3]."""
    cells = rearrange(x, "b (i p) (j q) d -> b i j d (p q)", p=2, q=2)
    wide = accumulator(x.dtype)
    y = jnp.einsum("bijdn,mn->bijdm", cells.astype(wide), jnp.asarray(HAAR, wide)).astype(x.dtype)
    return y[..., 0], y[..., 1:]


def idwt(low, bands):
    """low [b, i, j, d], bands [b, i, j, d, 3] -> x [b, 2i, 2j, d]."""
    wide = accumulator(low.dtype)
    y = jnp.concatenate([low[..., None], bands], axis=-1).astype(wide)
    cells = jnp.einsum("bijdm,mn->bijdn", y, jnp.asarray(HAAR, wide)).astype(low.dtype)
    return rearrange(cells, "b i j d (p q) -> b (i p) (j q) d", p=2, q=2)
