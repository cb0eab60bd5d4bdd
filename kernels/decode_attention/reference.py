"""Reference implementation: dequantize, then attention by its definition."""

import jax.numpy as jnp

from seqlab.kernels.attention import attention
from seqlab.shapes import accumulator


def decode_attention(q, k, v, visible, *, softcap, scale, bits):
    """`out, lse`; see `seqlab.kernels.decode_attention`, which has checked the arguments."""
    wide = accumulator(q.dtype)
    keys, values = (x.swapaxes(1, 2) for x in of_numbers(k, v, bits, wide))
    limits = {"causal": False, "softcap": softcap, "scale": scale, "implementation": "reference"}
    out, lse = attention(
        q[:, None].astype(wide), keys, values, kv_segments=visible.astype(jnp.int32), **limits
    )
    return out[:, 0].astype(q.dtype), lse[:, 0]


def of_numbers(k, v, bits, wide):
    """Keys and values as numbers [b, g, s, width] of the dtype `wide`; `bits` of both, None if not
    quantized."""
    from seqlab.kernels.decode_attention import Coded, keys_of, values_of

    if not isinstance(k, Coded):
        return k.astype(wide), v.astype(wide)
    return keys_of(k, bits[0], wide), values_of(v, bits[1], wide)
