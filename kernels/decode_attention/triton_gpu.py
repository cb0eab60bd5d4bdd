"""Decoding in Triton: the cache is read in its quantized form, by enough programs to saturate the memory
bandwidth.

Only the visible range is read: each program of a row takes an equal share of the tiles from the first to the
last with anything visible (LeanAttention), so that no program is idle because of a short row or an empty end
of a cache.
"""

import math

import jax.numpy as jnp

from seqlab.kernels import triton
from seqlab.kernels.attention.triton_gpu import merged, splits_of
from seqlab.kernels.blocks import find, widest


def decode_attention(q, k, v, visible, *, softcap, scale, bits):
    """`out, lse`; see `seqlab.kernels.decode_attention`, which has checked the arguments. Not
    differentiable."""
    from seqlab.kernels.decode_attention import Coded, seen_tiles
    from seqlab.kernels.decode_attention import triton_kernels as kernels

    coded, (b, h, width), s = isinstance(k, Coded), q.shape, visible.shape[1]
    k, v = (k, v) if coded else ((k.astype(q.dtype), q, q), (v.astype(q.dtype), q, q))
    triton.require(q, *k, *v)
    g, name = k[0].shape[1], f"decode_attention/triton_gpu/{'codes' if coded else 'numbers'}"
    k_bits, v_bits = bits if coded else (0, 0)
    values = v.words.shape[2] * 32 // v_bits if coded else v[0].shape[3]
    most = widest(name, q.dtype.itemsize)
    if max(width, values) > most:
        raise NotImplementedError(f"kernels for heads of up to {most} exist, got k={width} and v={values}")
    if 0 in (b, h, s):
        raise NotImplementedError("nothing to attend to")
    cut = find(name, q.dtype.itemsize, max(width, values))
    group = s // k.scale.shape[2] if coded else cut["keys"]
    tile = math.gcd(cut["keys"], group)  # within a group all slots have the same scales
    if tile < 16:
        raise NotImplementedError(f"kernels for groups of steps that 16 divides exist, got {group}")
    rows = min(64, triton.power(h // g, 16))
    blocks = triton.blocks(h // g, rows)
    splits = splits_of(b * g * blocks, s)
    constants = {
        "ROWS": b,
        "S": s,
        "H": h,
        "G": g,
        "K": width,
        "V": values,
        "K_BITS": k_bits,
        "V_BITS": v_bits,
        "K_GROUP": group,
        "BN": tile,
        "V_GROUP": values // v.scale.shape[2] if coded else values,
        "SOFTCAP": softcap or 0.0,
        "SCALE": scale,
        "SPLITS": splits,
        "PRECISION": "tf32x3",
        "KP": triton.power(width, 16),
        "VP": triton.power(values, 16),
        "BM": rows,
    }
    arrays = (q, *k, *v, visible.astype(jnp.int8), *seen_tiles(visible, tile))
    shapes = [((splits, b, h, values), jnp.float32), ((splits, b, h), jnp.float32)]
    options = {"warps": cut["warps"], "stages": cut["stages"]}
    out, lse = triton.launch(
        kernels.forward, arrays, shapes, grid=(blocks * splits, g, b), constants=constants, **options
    )
    out, lse = merged(out, lse)
    return out.astype(q.dtype), lse
