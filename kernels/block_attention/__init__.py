"""Softmax attention over selected blocks of keys: each query head selects a few, and only these are read.

Implementations: `reference` (a dense mask), `xla` (the queries of a block gathered into tiles; the default on
all platforms).
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seqlab.checks import UserError
from seqlab.kernels.dispatch import Op
from seqlab.shapes import Keys, LogSumExp, Queries, Values

_op = Op("block_attention", __name__, ("reference", "xla"))


def block_attention(
    q: Queries,
    k: Keys,
    v: Values,
    chosen: Int[Array, "b t h c"],
    *,
    block: int,
    scale: float | None = None,
    softcap: float | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "b t h v"], LogSumExp]:
    """Attention of each query head to all keys of its selected blocks, with the log-sum-exp of its logits.

        lse_i = log Σ_j exp(scale q_i·k_j);  out_i = Σ_j exp(scale q_i·k_j - lse_i) v_j,  over the keys j with
        j // block in chosen_i

    There is no causal mask: this is the partial attention over past blocks, to be merged with that over the
    query's own block (`seqlab.kernels.attention.merge`). A query without blocks has out = 0, lse = -inf and
    no gradient.

    Args:
      q: [b, t, h, k]; query head i reads key/value head i // (h // g).
      k, v: [b, s, g, k] and [b, s, g, v], s a multiple of `block`. A cache should be stored as [b, g, s, k]
        and passed as `cache.swapaxes(1, 2)`: `xla` then reads its blocks in place.
      chosen: [b, t, h, c], indices of blocks of this row, in any order, each at most once; -1 for none.
      block: keys per block.
      scale: default 1 / sqrt(k).
      softcap: bound c of the logits, c tanh(x / c).
      implementation: "reference" or "xla"; None: chosen by `seqlab.kernels.dispatch`.

    Returns:
      out [b, t, h, v] in the dtype of q, and lse [b, t, h] (natural logarithm) in `accumulator` of the
      inputs' dtype. Both may be differentiated by q, k and v, once through `xla` and any number of times
      through `reference`.

    Raises:
      ValueError: if an argument has the wrong shape or type, or `implementation` is unknown.

    Source: the sparse half of MoBA (arXiv 2502.13189); queries gathered by block as in FlashMoBA (arXiv
    2511.11571).
    """
    for name, x, axes in (("q", q, "[b, t, h, k]"), ("k", k, "[b, s, g, k]"), ("v", v, "[b, s, g, v]")):
        if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
            raise UserError(f"{name} must be a floating-point array {axes}, got {x.dtype}{x.shape}")
    (b, t, h, width), (s, g) = q.shape, k.shape[1:3]
    if k.shape != (b, s, g, width) or v.shape[:3] != (b, s, g) or g == 0 or h % g:
        raise UserError(
            f"k and v must be [b, s, g, k] and [b, s, g, v] with g dividing h, for q {q.shape}; got "
            f"{k.shape}, {v.shape}"
        )
    if isinstance(block, bool) or not isinstance(block, int) or block < 1 or s % block:
        raise UserError(f"block must be a positive integer that divides the {s} keys, got {block!r}")
    if chosen.ndim != 4 or chosen.shape[:3] != (b, t, h) or not jnp.issubdtype(chosen.dtype, jnp.integer):
        raise UserError(
            f"chosen must be an integer array [b, t, h, c] with [b, t, h] = {(b, t, h)}, got "
            f"{chosen.dtype}{chosen.shape}"
        )
    if softcap is not None and not 0 < softcap < math.inf:
        raise UserError(f"softcap must be a number above 0 or None, got {softcap!r}")
    limits = {
        "scale": 1 / math.sqrt(width) if scale is None else float(scale),
        "softcap": None if softcap is None else float(softcap),
    }
    return _op(q, k, v, chosen, block=block, **limits, implementation=implementation)
