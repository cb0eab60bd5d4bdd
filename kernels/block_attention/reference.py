"""Reference implementation: every logit at once, those of blocks that were not chosen masked."""

import jax
import jax.numpy as jnp

from seqlab.shapes import accumulator


def block_attention(q, k, v, chosen, *, block, scale, softcap):
    """See `seqlab.kernels.block_attention.block_attention`, which has checked the arguments."""
    dtype, h, (s, g) = accumulator(jnp.result_type(q, k, v)), q.shape[2], k.shape[1:3]
    sees = (chosen[..., None] == jnp.arange(s) // block).any(axis=3)  # [b, t, h, s]
    k, v = (jnp.repeat(x, h // g, axis=2) for x in (k, v))
    x = scale * jnp.einsum("bthk,bshk->bths", q, k, preferred_element_type=dtype)
    x = x if softcap is None else softcap * jnp.tanh(x / softcap)
    x = jnp.where(sees, x, -jnp.inf)
    top = x.max(-1, initial=-jnp.inf)
    top = jax.lax.stop_gradient(jnp.where(top == -jnp.inf, 0, top))
    p = jnp.exp(x - top[..., None])
    total = p.sum(-1)
    some = jnp.where(total == 0, 1, total)
    out = jnp.einsum(
        "bths,bshv->bthv", (p / some[..., None]).astype(v.dtype), v, preferred_element_type=dtype
    )
    return out.astype(q.dtype), jnp.where(total == 0, -jnp.inf, top + jnp.log(some))
