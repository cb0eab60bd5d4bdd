"""Dense attention of one query; codes are dequantized where they are read, as far as XLA fuses it."""

import jax
import jax.numpy as jnp

from seqlab.kernels.decode_attention.reference import of_numbers
from seqlab.shapes import accumulator


def decode_attention(q, k, v, visible, *, softcap, scale, bits):
    """`out, lse`; see `seqlab.kernels.decode_attention`, which has checked the arguments."""
    from seqlab.kernels.decode_attention import Coded

    wide, (b, h, width) = accumulator(q.dtype), q.shape
    coded, see = isinstance(k, Coded), visible[:, None, None]
    if coded:  # 0 * NaN is NaN: hidden scales become 0, which are few numbers
        v = v._replace(scale=jnp.where(see, v.scale, 0), least=jnp.where(see, v.least, 0))
    else:
        v = jnp.where(see.swapaxes(2, 3), v, jnp.zeros((), v.dtype))
    k, v = of_numbers(k, v, bits, wide if coded else k.dtype)
    g = k.shape[1]
    q_groups = q.reshape(b, g, h // g, width).astype(wide if coded else q.dtype)
    x = jnp.einsum("bgrk,bgsk->bgrs", q_groups, k, preferred_element_type=wide) * scale
    x = x if softcap is None else softcap * jnp.tanh(x / softcap)
    x = jnp.where(see, x, -jnp.inf)
    top = jax.lax.stop_gradient(x.max(-1, keepdims=True, initial=jnp.finfo(wide).min))
    p = jnp.exp(x - top)
    total = p.sum(-1)
    some = jnp.where(total == 0, 1, total)
    out = jnp.einsum("bgrs,bgsv->bgrv", p.astype(v.dtype), v, preferred_element_type=wide) / some[..., None]
    lse = jnp.where(total == 0, -jnp.inf, top[..., 0] + jnp.log(some))
    return out.reshape(b, h, -1).astype(q.dtype), lse.reshape(b, h)
