"""Attention of one query over a cache whose keys and values are codes of a few bits: one step of decoding.

Implementations: `reference` (numbers from codes, then dense attention, the truth), `xla` (the same by the attention that runs
everywhere), `triton_gpu` (codes become numbers in registers; forward only).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt

from seqlab.kernels.dispatch import Named, Op

_op = Op("decode_attention", __name__, ("reference", "xla", "triton_gpu"))
BITS = (2, 4, 8)


class Coded(NamedTuple):
    """Numbers x = code * scale + least, 32 / bits codes in a word, the first one in the lowest bits."""

    words: UInt[Array, "b g s w"]
    scale: Float[Array, "b g ..."]
    least: Float[Array, "b g ..."]


def decode_attention(
    q: Float[Array, "b h k"],
    k: Coded,
    v: Coded,
    visible: Bool[Array, "b s"],
    *,
    scale: float | None = None,
    implementation: Named = None,
) -> tuple[Float[Array, "b h v"], Float[Array, "b h"]]:
    """Softmax attention of one query a row over the slots of a cache in few bits, with the log-sum-exp that `merge` needs.

    Keys share scale and least value over steps, values over channels (KIVI): k = code scale[s // n] + least[s // n], n = s / (groups of
    k), and v = code scale[c // m] + least[c // m], m = channels / (groups of v). Slots may stand in any order, as in a ring.

    Args:
      q: [b, h, k]; query head i reads key/value head i // (h // g).
      k: words [b, g, s, k bits / 32], scale and least [b, g, groups, k], where the number of groups divides s.
      v: words [b, g, s, v bits / 32], scale and least [b, g, s, groups]; as many bits as k.
      visible: [b, s]; what the other slots hold, NaN included, reaches no result. A row that sees nothing has out = 0 and lse = -inf.
      scale: default 1 / sqrt(k).
      implementation: "reference", "xla" or "triton_gpu"; None lets `seqlab.kernels.dispatch` choose.

    Returns:
      out [b, h, v] in the dtype of q, and lse [b, h] (natural logarithm) in float32.

    Raises:
      ValueError: if an argument has the wrong shape or type, or `implementation` is unknown.

    Source: KIVI (arXiv 2402.02750) for the codes, Flash-Decoding for keys that are split among programs.
    """
    _check(q, k, v, visible)
    return _op(q, k, v, visible, scale=q.shape[-1] ** -0.5 if scale is None else float(scale), implementation=implementation)


def unpack(words: UInt[Array, "*b w"], bits: int) -> UInt[Array, "*b d"]:
    """The codes in words, 32 / bits each."""
    return ((words[..., None] >> shifts(bits)) & jnp.uint32(2**bits - 1)).reshape(*words.shape[:-1], -1)


def shifts(bits: int) -> UInt[Array, " c"]:
    """By how many bits the codes of a word are shifted."""
    return jnp.arange(0, 32, bits, dtype=jnp.uint32)


def bits_of(k: Coded, width: int) -> int:
    """How many bits a number of k has."""
    return 32 * k.words.shape[-1] // width


def _check(q: Array, k: Coded, v: Coded, visible: Array) -> None:
    if q.ndim != 3 or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"q must be a floating-point array [b, h, k], got {q.dtype}{q.shape}")
    b, h, width = q.shape
    for name, x in (("k", k), ("v", v)):
        if x.words.ndim != 4 or x.words.dtype != jnp.uint32 or x.words.shape[0] != b:
            raise ValueError(f"{name}.words must be an array [b, g, s, words] of uint32 with b={b}, got {x.words.dtype}{x.words.shape}")
    g, s, count = k.words.shape[1:]
    if g == 0 or h % g:
        raise ValueError(f"k.words must have a number of heads that divides the {h} heads of q, got g={g}")
    if v.words.shape[1:3] != (g, s):
        raise ValueError(f"v.words must begin with the axes of k.words, [b, g, s] = {(b, g, s)}, got {v.words.shape}")
    if 32 * count % width or 32 * count // width not in BITS:
        raise ValueError(f"k.words must hold {width} numbers of {', '.join(map(str, BITS))} bits, got {count} words of 32 bits")
    values = 32 * v.words.shape[3] // bits_of(k, width)
    for name, x, axes, fits in (
        ("k", k, f"[b, g, groups, k] with k={width} and groups that divide s={s}", lambda x: x[3] == width and x[2] and s % x[2] == 0),
        (
            "v",
            v,
            f"[b, g, s, groups] with s={s} and groups that divide {values} values",
            lambda x: x[2] == s and x[3] and values % x[3] == 0,
        ),
    ):
        for part, array in (("scale", x.scale), ("least", x.least)):
            if array.ndim != 4 or array.shape[:2] != (b, g) or not fits(array.shape) or array.shape != x.scale.shape:
                raise ValueError(f"{name}.{part} must be {axes}, got {array.shape}")
    if visible.shape != (b, s) or visible.dtype != bool:
        raise ValueError(f"visible must be a boolean array [b, s] = {(b, s)}, got {visible.dtype}{visible.shape}")
