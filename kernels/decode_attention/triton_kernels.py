"""One kernel: a program reads a part of a cache, dequantizes in registers, and keeps an online softmax."""

import triton
import triton.language as tl


@triton.jit
def _codes(words, word, slot, S: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr):
    """[WIDTH, slots]: the codes of slots (int64) as float32, of words at `words`, in rows of `_channels`."""
    PER: tl.constexpr = 32 // BITS
    packed = tl.load(words + word[:, None] * S + slot[None, :], (word < WORDS)[:, None], 0)
    shifts = tl.arange(0, PER) * BITS
    codes = (packed[None, :, :] >> shifts.to(tl.uint32)[:, None, None]) & (2**BITS - 1)
    return tl.reshape(codes, (WIDTH, slot.shape[0])).to(tl.float32)


@triton.jit
def _channels(BITS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """The channels of the rows of `_codes`, D or more for none; in order if not quantized (BITS = 0)."""
    row = tl.arange(0, WIDTH)
    if BITS == 0:
        return row
    WORDS: tl.constexpr = WIDTH * BITS // 32
    at = row % WORDS
    return tl.where(at < D * BITS // 32, row // WORDS * (D * BITS // 32) + at, D)


@triton.jit
def forward(
    q, k, k_scale, k_least, v, v_scale, v_least, visible, first, count, out, lse,
    ROWS: tl.constexpr, S: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, BN: tl.constexpr,
    K_GROUP: tl.constexpr, V_GROUP: tl.constexpr, SOFTCAP: tl.constexpr, SCALE: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """out [splits, b, h, v] and lse [splits, b, h] over the slots of a split. Program (block of heads and
    split, group, row of the batch).

    A tile is BN slots; with quantized keys, of one group, whose scales are the same. Row b reads count[b]
    tiles from first[b], those it sees, shared evenly among its splits.
    """
    b, g = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    R: tl.constexpr = H // G
    BLOCKS: tl.constexpr = (R + BM - 1) // BM
    split = tl.program_id(0) // BLOCKS
    head = tl.program_id(0) % BLOCKS * BM + tl.arange(0, BM)
    width, value = _channels(K_BITS, K, KP), _channels(V_BITS, V, VP)
    row = b * H + g * R + head
    inside = head < R
    query = tl.load(q + row[:, None] * K + width[None, :], inside[:, None] & (width < K)[None, :], 0.0)
    top, total = tl.full((BM,), float("-inf"), tl.float32), tl.zeros((BM,), tl.float32)
    mass = tl.zeros((BM, VP), tl.float32)
    pair = b * G + g
    begin, tiles = tl.load(first + b), tl.load(count + b)
    for tile in range(begin + tiles * split // SPLITS, begin + tiles * (split + 1) // SPLITS):
        slot = (tile * BN + tl.arange(0, BN)).to(tl.int64)
        see = tl.load(visible + b * S + slot, slot < S, 0) != 0
        if K_BITS == 0:
            key = tl.load(
                k + (pair * S + slot)[:, None] * K + width[None, :], see[:, None] & (width < K)[None, :], 0.0
            )
            x = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        else:
            K_PER: tl.constexpr = 32 // K_BITS
            group = (pair * (S // K_GROUP) + tile * BN // K_GROUP) * K + width
            scale, least = tl.load(k_scale + group, width < K, 0.0), tl.load(k_least + group, width < K, 0.0)
            codes = _codes(
                k + pair * (K // K_PER) * S, tl.arange(0, KP // K_PER), slot, S, K_BITS, K // K_PER, KP
            )
            key = codes * scale.to(tl.float32)[:, None] + least.to(tl.float32)[:, None]
            x = tl.dot(query, key.to(query.dtype), input_precision=PRECISION)
        if SOFTCAP > 0.0:
            bent = 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * SCALE * 1.4426950408889634 / SOFTCAP)))  # tanh
            x = bent * (SOFTCAP * 1.4426950408889634)
        else:
            x = x * (SCALE * 1.4426950408889634)
        x = tl.where(see[None, :] & inside[:, None], x, float("-inf"))
        new = tl.maximum(top, tl.max(x, 1))
        base = tl.where(new == float("-inf"), 0.0, new)
        p, fade = tl.exp2(x - base[:, None]), tl.exp2(top - base)
        total = total * fade + tl.sum(p, 1)
        if V_BITS == 0:
            number = tl.load(
                v + (pair * S + slot)[:, None] * V + value[None, :], see[:, None] & (value < V)[None, :], 0.0
            )
            mass = tl.dot(p.to(query.dtype), number, mass * fade[:, None], input_precision=PRECISION)
        else:
            V_PER: tl.constexpr = 32 // V_BITS
            group = (pair * (V // V_GROUP) + value // V_GROUP)[:, None] * S + slot[None, :]
            here = (value < V)[:, None] & see[None, :]
            codes = _codes(
                v + pair * (V // V_PER) * S, tl.arange(0, VP // V_PER), slot, S, V_BITS, V // V_PER, VP
            )
            number = codes * tl.load(v_scale + group, here, 0.0).to(tl.float32) + tl.load(
                v_least + group, here, 0.0
            ).to(tl.float32)
            mass = tl.dot(
                p.to(query.dtype),
                tl.trans(number.to(query.dtype)),
                mass * fade[:, None],
                input_precision=PRECISION,
            )
        top = new
    dead = total == 0.0
    mass = mass / tl.where(dead, 1.0, total)[:, None]
    row += split.to(tl.int64) * (ROWS * H)
    tl.store(
        out + row[:, None] * V + value[None, :],
        mass.to(out.dtype.element_ty),
        inside[:, None] & (value < V)[None, :],
    )
    tl.store(
        lse + row,
        tl.where(dead, float("-inf"), (top + tl.log2(tl.where(dead, 1.0, total))) * 0.6931471805599453),
        inside,
    )
