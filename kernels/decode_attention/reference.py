"""The truth: numbers from codes, then attention as its definition reads."""

import jax.numpy as jnp

from seqlab.kernels.attention import attention
from seqlab.shapes import accumulator


def decode_attention(q, k, v, visible, *, scale):
    """`out, lse`; see `seqlab.kernels.decode_attention`, which has checked the arguments."""
    return of_numbers(q, k, v, visible, scale, "reference")


def of_numbers(q, k, v, visible, scale, implementation):
    """The same by an implementation of `attention`."""
    from seqlab.kernels.decode_attention import bits_of, unpack

    bits, wide = bits_of(k, q.shape[-1]), accumulator(q.dtype)
    scales, leasts = zip(*((x.scale.astype(wide), x.least.astype(wide)) for x in (k, v)), strict=True)
    repeats = k.words.shape[2] // k.scale.shape[2], 32 // bits * v.words.shape[3] // v.scale.shape[3]
    keys, values = (
        unpack(x.words, bits).astype(wide) * jnp.repeat(scale, n, axis=axis) + jnp.repeat(least, n, axis=axis)
        for x, scale, least, n, axis in zip((k, v), scales, leasts, repeats, (2, 3), strict=True)
    )
    out, lse = attention(
        q[:, None].astype(wide),
        keys.swapaxes(1, 2),
        values.swapaxes(1, 2),
        causal=False,
        kv_segments=visible.astype(jnp.int32),
        scale=scale,
        implementation=implementation,
    )
    return out[:, 0].astype(q.dtype), lse[:, 0]
