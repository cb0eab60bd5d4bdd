"""Reference implementation of attention: all logits at once, differentiated by JAX."""

import functools
import operator

import jax
import jax.numpy as jnp

from seqlab.shapes import accumulator


def attention(
    q,
    k,
    v,
    *,
    left,
    right,
    sinks,
    q_positions,
    kv_positions,
    q_segments,
    kv_segments,
    softcap,
    sink_logits,
    alibi,
    scale,
):
    """See `seqlab.kernels.attention.attention`, which has checked the arguments. Positions and segments come
    in pairs or not at all."""
    dtype = accumulator(jnp.result_type(q, k, v))
    (t, h), (s, g) = q.shape[1:3], k.shape[1:3]
    if q_positions is None:
        q_positions, kv_positions = jnp.arange(s - t, s)[None], jnp.arange(s)[None]
    k, v = (jnp.repeat(x, h // g, axis=2) for x in (k, v))
    x = scale * jnp.einsum("bthk,bshk->bths", q, k, preferred_element_type=dtype)
    if softcap is not None:
        x = softcap * jnp.tanh(x / softcap)
    query = [None if y is None else y[:, :, None, None] for y in (q_positions, q_segments)]
    key = [None if y is None else y[:, None, None, :] for y in (kv_positions, kv_segments)]
    if alibi is not None:
        x = x - alibi.astype(dtype)[:, None, :, None] * distance(query[0], key[0], dtype)
    x = jnp.where(visible(*query, *key, left=left, right=right, sinks=sinks), x, -jnp.inf)
    z = jnp.full((1, 1, h), -jnp.inf, dtype) if sink_logits is None else sink_logits.astype(dtype)[None, None]
    if q_segments is not None:
        # Padding is not a query: its row is masked whatever the sink.
        z = jnp.where(q_segments[:, :, None] == 0, -jnp.inf, z)
    top = jnp.maximum(x.max(-1, initial=-jnp.inf), z)
    top = jax.lax.stop_gradient(jnp.where(top == -jnp.inf, 0, top))
    p = jnp.exp(x - top[..., None])
    total = p.sum(-1) + jnp.exp(z - top)
    some = jnp.where(total == 0, 1, total)
    out = jnp.einsum(
        "bths,bshv->bthv", (p / some[..., None]).astype(v.dtype), v, preferred_element_type=dtype
    )
    return out.astype(q.dtype), jnp.where(total == 0, -jnp.inf, top + jnp.log(some))


def attention_gradient(q, k, v, alibi, out, lse, dout, dlse, **options):
    """`dq, dk, dv, dalibi` for a part of the keys of an attention, with the weight exp(lse_part - lse);
    `out`, `lse` are those over all keys."""
    (part, part_lse), pull = jax.vjp(
        lambda q, k, v, alibi: attention(q, k, v, sink_logits=None, alibi=alibi, **options), q, k, v, alibi
    )
    seen = (lse > -jnp.inf) & (part_lse > -jnp.inf)
    weight = jnp.where(seen, jnp.exp(jnp.where(seen, part_lse - lse, 0)), 0)
    change = dlse + jnp.sum(dout * (part.astype(lse.dtype) - out), axis=-1)
    dpart = jnp.where(seen[..., None], weight[..., None] * dout, 0).astype(part.dtype)
    return pull((dpart, jnp.where(seen, weight * change, 0)))


def visible(q_positions, q_segments, kv_positions, kv_segments, *, left, right, sinks):
    """The visibility mask: elementwise over positions and segments that broadcast against each other."""
    terms = [jnp.ones((), bool)]
    if right is not None:
        terms.append(kv_positions <= q_positions + right)
    if left is not None:
        terms.append((q_positions - kv_positions <= left) | (kv_positions < sinks))
    if q_segments is not None:
        terms.append((q_segments == kv_segments) & (kv_segments != 0))
    return functools.reduce(operator.and_, terms)


def distance(q_positions, kv_positions, dtype):
    """|i - j| of positions that broadcast against each other; arbitrary for empty slots."""
    return jnp.abs(q_positions - kv_positions).astype(dtype)
