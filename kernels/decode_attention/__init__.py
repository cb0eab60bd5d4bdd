"""Attention of one query over a cache, whose keys and values are plain or quantized: one step of decoding.

Implementations: `reference` (dequantize, then dense attention), `xla` (dense, runs everywhere), `pallas_tpu`
and `triton_gpu` (dequantize on the fly; forward only).
"""

import math
import numbers
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from seqlab.checks import UserError
from seqlab.kernels.dispatch import Named, Op

_op = Op("decode_attention", __name__, ("reference", "xla", "pallas_tpu", "triton_gpu"))
BITS = (2, 4, 8)


class Coded(NamedTuple):
    """Quantized numbers x = code * scale + least, channels before slots. Word i of w holds the codes of the
    channels i, i + w, i + 2 w, ..., the first in the lowest bits.

    Slots are the last axis because a slot has few words, while memory is read, and on a TPU laid out, in
    units of a hundred. Channels of a word are w apart, so that shifting and masking words gives consecutive
    channels without moving data between lanes.
    """

    words: UInt[Array, "b g w s"]
    scale: Float[Array, "b g ..."]
    least: Float[Array, "b g ..."]


def decode_attention(
    q: Float[Array, "b h k"],
    k: Coded | Float[Array, "b g s k"],
    v: Coded | Float[Array, "b g s v"],
    visible: Bool[Array, "b s"],
    *,
    softcap: float | None = None,
    scale: float | None = None,
    v_bits: int | None = None,
    implementation: Named = None,
) -> tuple[Float[Array, "b h v"], Float[Array, "b h"]]:
    """Softmax attention of one query per row over the slots of a cache, with the log-sum-exp for `merge`.

    Quantized keys share scale and least value over steps, values over channels (KIVI): k = code scale[s // n]
    + least[s // n], where n = s / (groups of k), and v = code scale[c // m] + least[c // m], m = channels /
    (groups of v). Slots may be in any order, as in a ring buffer, and any subset may be visible: a window,
    sinks, rows of different lengths.

    Args:
      q: [b, h, k]; query head i reads key/value head i // (h // g).
      k: numbers [b, g, s, k], or words [b, g, k bits / 32, s] with scale and least [b, g, groups, k], where
        the groups divide s.
      v: numbers [b, g, s, v], or words [b, g, v bits / 32, s] with scale and least [b, g, groups, s].
      visible: [b, s]; the contents of other slots, NaN included, reach no result. A row that sees nothing has
        out = 0 and lse = -inf.
      softcap: bound c of the logits, c tanh(x / c).
      scale: default 1 / sqrt(k).
      v_bits: bits per code of v, 2, 4 or 8; default: as for k, which follows from its words and the width of
        q.
      implementation: "reference", "xla", "pallas_tpu" or "triton_gpu"; None: chosen by
        `seqlab.kernels.dispatch`.

    Returns:
      out [b, h, v] in the dtype of q, and lse [b, h] (natural logarithm) in `accumulator` of it.

    Raises:
      ValueError: if an argument has the wrong shape, type or range, or `implementation` is unknown.

    Source: KIVI (arXiv 2402.02750) for the codes; keys split among programs as in Flash-Decoding, evenly by
    visible slots as in LeanAttention (arXiv 2405.10480).
    """
    _check(q, k, v, visible, v_bits)
    if softcap is not None and not (
        isinstance(softcap, numbers.Real) and not isinstance(softcap, bool) and 0 < softcap < math.inf
    ):
        raise UserError(f"softcap must be a number above 0 or None, got {softcap!r}")
    limits = {
        "softcap": None if softcap is None else float(softcap),
        "scale": q.shape[-1] ** -0.5 if scale is None else float(scale),
    }
    k_bits = bits_of(k, q.shape[-1]) if isinstance(k, Coded) else None  # None for numbers
    bits = k_bits, k_bits if v_bits is None else v_bits
    return _op(q, k, v, visible, bits=bits, **limits, implementation=implementation)


def codes_of(words: UInt[Array, "*b w s"], bits: int) -> UInt[Array, "*b d s"]:
    """The codes in words, 32 / bits each, see `Coded`."""
    parts = (words[..., None, :, :] >> _shifts(bits)) & jnp.uint32(2**bits - 1)
    return parts.reshape(*words.shape[:-2], -1, words.shape[-1])


def keys_of(k: Coded, bits: int, dtype: jnp.dtype) -> Float[Array, "b g s k"]:
    """Dequantized keys."""
    scale, least = (x.astype(dtype).swapaxes(2, 3)[..., None] for x in (k.scale, k.least))
    codes = codes_of(k.words, bits).astype(dtype)
    steps = codes.reshape(*scale.shape[:4], -1)  # those that share a scale: the last axis
    return (steps * scale + least).reshape(codes.shape).swapaxes(2, 3)


def values_of(v: Coded, bits: int, dtype: jnp.dtype) -> Float[Array, "b g s v"]:
    """Dequantized values."""
    scale, least = (x.astype(dtype)[:, :, :, None] for x in (v.scale, v.least))
    codes = codes_of(v.words, bits).astype(dtype)
    # Those that share a scale: the last axis but one.
    channels = codes.reshape(*scale.shape[:3], -1, codes.shape[3])
    return (channels * scale + least).reshape(codes.shape).swapaxes(2, 3)


def seen_tiles(visible: Bool[Array, "b s"], size: int) -> tuple[Int[Array, " b"], Int[Array, " b"]]:
    """The first tile of `size` slots with anything visible, and the number of tiles up to the last such
    one."""
    b, s = visible.shape
    seen = jnp.pad(visible, ((0, 0), (0, -s % size))).reshape(b, -1, size).any(2)
    first, beyond = jnp.argmax(seen, axis=1), seen.shape[1] - jnp.argmax(seen[:, ::-1], axis=1)
    return first.astype(jnp.int32), jnp.where(seen.any(1), beyond - first, 0).astype(jnp.int32)


def words_of(codes: UInt[Array, "*b d s"], bits: int) -> UInt[Array, "*b w s"]:
    """The inverse of `codes_of`."""
    parts = codes.reshape(*codes.shape[:-2], 32 // bits, -1, codes.shape[-1])
    return jnp.sum(parts << _shifts(bits), axis=-3, dtype=jnp.uint32)


def _shifts(bits: int) -> UInt[Array, "c 1 1"]:
    """The shifts of the codes of a word, in bits."""
    return jnp.arange(0, 32, bits, dtype=jnp.uint32)[:, None, None]


def bits_of(k: Coded, width: int) -> int:
    """The bits per number of k."""
    return 32 * k.words.shape[2] // width


def _check(q: Array, k: Coded | Array, v: Coded | Array, visible: Array, v_bits: int | None) -> None:
    if q.ndim != 3 or not jnp.issubdtype(q.dtype, jnp.floating):
        raise UserError(f"q must be a floating-point array [b, h, k], got {q.dtype}{q.shape}")
    if isinstance(k, Coded) != isinstance(v, Coded):
        raise UserError(
            f"k and v must both be Coded or both arrays, got {type(k).__name__} and {type(v).__name__}"
        )
    (b, h, _), coded = q.shape, isinstance(k, Coded)
    for name, x in (("k", k), ("v", v)):
        x, axes, kind, suffix = (
            (x.words, "words, s", jnp.uint32, ".words") if coded else (x, f"s, {name}", jnp.floating, "")
        )
        if x.ndim != 4 or not jnp.issubdtype(x.dtype, kind) or x.shape[0] != b:
            raise UserError(
                f"{name}{suffix} must be an array [b, g, {axes}] of {kind.__name__} with b={b}, got "
                f"{x.dtype}{x.shape}"
            )
    g = (k.words if coded else k).shape[1]
    if g == 0 or h % g:
        raise UserError(f"k must have a number of heads that divides the {h} heads of q, got g={g}")
    if v_bits is not None and (not coded or v_bits not in BITS):
        raise UserError(
            f"v_bits must be one of {BITS} or None, and None where v holds numbers, got {v_bits!r} with "
            f"{type(v).__name__}"
        )
    if coded:
        _check_codes(q, k, v, v_bits)
    else:
        _check_numbers(q, k, v)
    s = k.words.shape[3] if coded else k.shape[2]
    if visible.shape != (b, s) or visible.dtype != bool:
        raise UserError(
            f"visible must be a boolean array [b, s] = {(b, s)}, got {visible.dtype}{visible.shape}"
        )


def _check_numbers(q: Array, k: Array, v: Array) -> None:
    if k.shape[3] != q.shape[2]:
        raise UserError(f"k must be [b, g, s, k] with the width k={q.shape[2]} of q, got {k.shape}")
    if v.shape[:3] != k.shape[:3]:
        raise UserError(f"v must begin with the axes of k, [b, g, s] = {k.shape[:3]}, got {v.shape}")


def _check_codes(q: Array, k: Coded, v: Coded, v_bits: int | None) -> None:
    (b, _, width), (_, g, count, s) = q.shape, k.words.shape
    if v.words.shape[1] != g or v.words.shape[3] != s:
        raise UserError(
            f"v.words must be [b, g, words, s] with g={g} and s={s} as k.words, got {v.words.shape}"
        )
    if 32 * count % width or 32 * count // width not in BITS:
        raise UserError(
            f"k.words must hold {width} numbers of {', '.join(map(str, BITS))} bits, got {count} words of "
            "32 bits"
        )
    values = 32 * v.words.shape[2] // (bits_of(k, width) if v_bits is None else v_bits)
    for name, x, axes, last, divided in (
        ("k", k, f"[b, g, groups, k] with k={width} and groups that divide s={s}", width, s),
        ("v", v, f"[b, g, groups, s] with s={s} and groups that divide {values} values", s, values),
    ):
        for part, array in (("scale", x.scale), ("least", x.least)):
            groups = array.shape[2] if array.ndim == 4 else 0
            if (
                array.shape != (b, g, groups, last)
                or groups == 0
                or divided % groups
                or array.shape != x.scale.shape
            ):
                raise UserError(f"{name}.{part} must be {axes}, got {array.shape}")
