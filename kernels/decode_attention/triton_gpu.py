"""Decoding from codes by Triton: memory is read in the bits that it has, by as many programs as it takes to keep all of it busy."""

import jax.numpy as jnp

from seqlab.kernels import triton
from seqlab.kernels.attention.triton_gpu import merged, splits_of

GROUPS = (16, 32, 64, 128)  # steps that share a scale are a tile
WARPS = {2: {256: 4}, 4: {128: 8}}  # by the bytes of a number of the query, and by the width of heads up to which an entry serves


def decode_attention(q, k, v, visible, *, scale):
    """`out, lse`; see `seqlab.kernels.decode_attention`, which has checked the arguments. Not to be differentiated."""
    from seqlab.kernels.decode_attention import bits_of
    from seqlab.kernels.decode_attention import triton_kernels as kernels

    (b, h, width), (g, s), bits = q.shape, k.words.shape[1:3], bits_of(k, q.shape[-1])
    values, group = v.words.shape[3] * 32 // bits, s // k.scale.shape[2]
    triton.require(q, *k, *v)
    table = WARPS[q.dtype.itemsize]
    if group not in GROUPS or max(width, values) > max(table):
        most = f"heads of up to {max(table)} in {q.dtype}"
        raise NotImplementedError(f"kernels for groups of {GROUPS} steps and {most} exist, got {group} and {width}, {values}")
    warps = next(found for most, found in table.items() if max(width, values) <= most)
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
        "BITS": bits,
        "K_GROUP": group,
        "V_GROUP": values // v.scale.shape[3],
        "SCALE": scale,
        "SPLITS": splits,
        "PRECISION": "tf32x3",
        "KP": triton.power(width, 16),
        "VP": triton.power(values, 16),
        "BM": rows,
    }
    arrays = (q, *k, *v, visible.astype(jnp.int8))
    shapes = [((splits, b, h, values), jnp.float32), ((splits, b, h), jnp.float32)]
    out, lse = triton.launch(kernels.forward, arrays, shapes, grid=(blocks * splits, g, b), constants=constants, warps=warps, stages=2)
    out, lse = merged(out, lse)
    return out.astype(q.dtype), lse
