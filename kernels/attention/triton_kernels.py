"""Kernels of attention: the online softmax forwards, and backwards one kernel for the queries and one for the
keys, without atomics.

The R = H / G heads that share a key/value head are packed: row m of group g is query m // R of head g R + m %
R. So a tile of keys is loaded once for all of them, and one decoding step is a tile of R rows. Logits are in
units of log 2.

With default positions and segments, the tiles of keys visited by a tile of rows follow from the shapes;
otherwise they are given by `needed` [b, row tiles, key tiles].
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def _logits(q, k, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """q k', scaled, and the factor of the softcap in its gradient."""
    x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    slope = 1.0
    if SOFTCAP > 0.0:
        bent = 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * SCALE * LOG2E / SOFTCAP)))  # tanh
        slope = 1.0 - bent * bent
        x = bent * (SOFTCAP * LOG2E)
    else:
        x = x * (SCALE * LOG2E)
    return x, slope


@triton.jit
def _visible(
    query, key, q_segment, k_segment,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SINKS: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """The visibility mask, from positions and segments that broadcast against each other."""
    keep = query == query
    if RIGHT >= 0:
        keep = key <= query + RIGHT
    if LEFT >= 0:
        keep = keep & ((query - key <= LEFT) | (key < SINKS))
    if SEGMENTS:
        keep = keep & (q_segment == k_segment) & (k_segment != 0)
    return keep


@triton.jit
def _rows(
    b,
    m,
    q_positions,
    q_segments,
    T: tl.constexpr,
    S: tl.constexpr,
    R: tl.constexpr,
    PLACED: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """Positions and segments of packed rows."""
    t = m // R
    position, segment = t + (S - T), t
    if PLACED:
        position = tl.load(q_positions + b * T + t, t < T, 0)
    if SEGMENTS:
        segment = tl.load(q_segments + b * T + t, t < T, 0)
    return position, segment


@triton.jit
def _keys(b, j, kv_positions, kv_segments, S: tl.constexpr, PLACED: tl.constexpr, SEGMENTS: tl.constexpr):
    position, segment = j, j
    if PLACED:
        position = tl.load(kv_positions + b * S + j, j < S, 0)
    if SEGMENTS:
        segment = tl.load(kv_segments + b * S + j, j < S, 0)
    return position, segment


@triton.jit
def _key_tiles(
    i, T: tl.constexpr, S: tl.constexpr, R: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    SINKS: tl.constexpr,
    MAPPED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The tiles of keys visited by row tile i: those of the sinks, and from `low` up to `high`."""
    sinks, low, high = i * 0, i * 0, i * 0 + (S + BN - 1) // BN
    if not MAPPED:
        if RIGHT >= 0:
            last = (i * BM + BM - 1) // R + (S - T + RIGHT)
            high = tl.minimum(high, tl.maximum(last + BN, 0) // BN)
        if LEFT >= 0:
            low = tl.maximum(i * BM // R + (S - T - LEFT), 0) // BN
            sinks = tl.minimum(low, (SINKS + BN - 1) // BN)
            low = tl.minimum(low, high)
            sinks = tl.minimum(sinks, low)
    return sinks, low, high


@triton.jit
def _row_tiles(
    j, T: tl.constexpr, S: tl.constexpr, R: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    SINKS: tl.constexpr,
    MAPPED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The tiles of rows that see any of key tile j: from `low` up to `high`."""
    low, high = j * 0, j * 0 + (T * R + BM - 1) // BM
    if not MAPPED:
        if RIGHT >= 0:
            low = tl.maximum((j * BN - (S - T + RIGHT)) * R, 0) // BM
        if LEFT >= 0:
            end = tl.maximum((j * BN + BN + LEFT - (S - T)) * R, 0)
            high = tl.where(j * BN < SINKS, high, tl.minimum(high, (end + BM - 1) // BM))
    return low, high


@triton.jit
def _load(x, row, width, inside, WIDTH: tl.constexpr, STRIDE: tl.constexpr):
    """A tile of rows (int64) of x, zeros outside."""
    return tl.load(
        x + row[:, None] * STRIDE + width[None, :], inside[:, None] & (width < WIDTH)[None, :], 0.0
    )


@triton.jit
def forward(
    q, k, v, sink, alibi, q_positions, kv_positions, q_segments, kv_segments, needed, out, lse,
    ROWS: tl.constexpr, T: tl.constexpr, S: tl.constexpr, H: tl.constexpr, G: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr,
    KEY_STRIDE: tl.constexpr, GROUP_STRIDE: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    SINKS: tl.constexpr,
    SOFTCAP: tl.constexpr, SCALE: tl.constexpr, SINK: tl.constexpr, ALIBI: tl.constexpr,
    PLACED: tl.constexpr, SEGMENTS: tl.constexpr,
    SPLITS: tl.constexpr, PRECISION: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """out [splits, b, t, h, v] and lse [splits, b, t, h] over the keys of a split. Program (row tile and
    split, group, row of the batch).

    Key j of group g is at j KEY_STRIDE + g GROUP_STRIDE, times the width of the array.
    """
    b, g = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    R: tl.constexpr = H // G
    TILES: tl.constexpr = (T * R + BM - 1) // BM
    KEY_TILES: tl.constexpr = (S + BN - 1) // BN
    split = tl.program_id(0) // TILES
    i = TILES - 1 - tl.program_id(0) % TILES  # if causal, the last rows see the most keys: they begin first
    m = i * BM + tl.arange(0, BM)
    inside = m < T * R
    width, value = tl.arange(0, KP), tl.arange(0, VP)
    row = (b * T + m // R) * H + g * R + m % R
    query = _load(q, row, width, inside, K, K)
    position, segment = _rows(b, m, q_positions, q_segments, T, S, R, PLACED, SEGMENTS)
    top, total = tl.full((BM,), float("-inf"), tl.float32), tl.zeros((BM,), tl.float32)
    if SINK:
        top = tl.where(inside & (split == 0), tl.load(sink + g * R + m % R) * LOG2E, top)
        if SEGMENTS:
            top = tl.where(segment == 0, float("-inf"), top)
        total = tl.where(top == float("-inf"), 0.0, 1.0)
    mass = tl.zeros((BM, VP), tl.float32)
    slopes = tl.zeros((BM,), tl.float32)
    if ALIBI:
        slopes = tl.load(alibi + b * H + g * R + m % R)
    sinks, low, high = _key_tiles(i, T, S, R, LEFT, RIGHT, SINKS, PLACED or SEGMENTS, BM, BN)
    count = sinks + high - low
    for n in range(count * split // SPLITS, count * (split + 1) // SPLITS):
        tile = tl.where(n < sinks, n, low + n - sinks)
        wanted = True
        if PLACED or SEGMENTS:
            wanted = tl.load(needed + (b * TILES + i) * KEY_TILES + tile) != 0
        if wanted:
            j = tile * BN + tl.arange(0, BN)
            at = b * S * G + j.to(tl.int64) * KEY_STRIDE + g * GROUP_STRIDE
            key = _load(k, at, width, j < S, K, K)
            x, _ = _logits(query, key, SCALE, SOFTCAP, PRECISION)
            where, own = _keys(b, j, kv_positions, kv_segments, S, PLACED, SEGMENTS)
            keep = _visible(
                position[:, None],
                where[None, :],
                segment[:, None],
                own[None, :],
                LEFT,
                RIGHT,
                SINKS,
                SEGMENTS,
            )
            if ALIBI:
                x -= slopes[:, None] * _distance(position[:, None], where[None, :]) * LOG2E
            x = tl.where(keep & (j < S)[None, :], x, float("-inf"))
            new = tl.maximum(top, tl.max(x, 1))
            base = tl.where(new == float("-inf"), 0.0, new)
            p = tl.exp2(x - base[:, None])
            fade = tl.exp2(top - base)
            total = total * fade + tl.sum(p, 1)
            seen = _load(v, at, value, j < S, V, V)
            mass = tl.dot(p.to(v.dtype.element_ty), seen, mass * fade[:, None], input_precision=PRECISION)
            top = new
    dead = total == 0.0
    mass = mass / tl.where(dead, 1.0, total)[:, None]
    row += split.to(tl.int64) * (ROWS * T * H)
    tl.store(
        out + row[:, None] * V + value[None, :],
        mass.to(out.dtype.element_ty),
        inside[:, None] & (value < V)[None, :],
    )
    tl.store(
        lse + row, tl.where(dead, float("-inf"), (top + tl.log2(tl.where(dead, 1.0, total))) * LN2), inside
    )


@triton.jit
def _through(x, dp, peak, d, keep):
    """The weights P of a tile, and the gradient with respect to its logits."""
    p = tl.where(keep, tl.exp2(tl.where(keep, x - peak, 0.0)), 0.0)
    return p, p * (dp - d)


@triton.jit
def _distance(query, key):
    """|i - j| of positions that broadcast against each other."""
    return tl.abs(query - key).to(tl.float32)


@triton.jit
def backward_keys(
    q, k, v, dout, lse, d, alibi, q_positions, kv_positions, q_segments, kv_segments, needed, dk, dv,
    T: tl.constexpr, S: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SINKS: tl.constexpr, SOFTCAP: tl.constexpr, SCALE: tl.constexpr,
    PLACED: tl.constexpr, SEGMENTS: tl.constexpr, ALIBI: tl.constexpr, PRECISION: tl.constexpr,
    KP: tl.constexpr, VP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dk, dv [b, s, g, .] from d [b, t, h] = Σ dout·out - dlse. Program (key tile, group, row of the
    batch)."""
    b, g = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    R: tl.constexpr = H // G
    TILES: tl.constexpr = (T * R + BM - 1) // BM
    KEY_TILES: tl.constexpr = (S + BN - 1) // BN
    tile = tl.program_id(0)
    j = tile * BN + tl.arange(0, BN)
    width, value = tl.arange(0, KP), tl.arange(0, VP)
    at = (b * S + j) * G + g
    key, seen = _load(k, at, width, j < S, K, K), _load(v, at, value, j < S, V, V)
    where, own = _keys(b, j, kv_positions, kv_segments, S, PLACED, SEGMENTS)
    dk_sum, dv_sum = tl.zeros((BN, KP), tl.float32), tl.zeros((BN, VP), tl.float32)
    low, high = _row_tiles(tile, T, S, R, LEFT, RIGHT, SINKS, PLACED or SEGMENTS, BM, BN)
    for i in range(low, high):
        wanted = True
        if PLACED or SEGMENTS:
            wanted = tl.load(needed + (b * TILES + i) * KEY_TILES + tile) != 0
        if wanted:
            m = i * BM + tl.arange(0, BM)
            inside = m < T * R
            row = (b * T + m // R) * H + g * R + m % R
            peak = tl.load(lse + row, inside, float("-inf")) * LOG2E
            # A row that saw nothing has no gradient, whatever its cotangents are.
            live = peak > float("-inf")
            query, grad = _load(q, row, width, inside, K, K), _load(dout, row, value, live, V, V)
            position, segment = _rows(b, m, q_positions, q_segments, T, S, R, PLACED, SEGMENTS)
            keep = _visible(
                position[None, :],
                where[:, None],
                segment[None, :],
                own[:, None],
                LEFT,
                RIGHT,
                SINKS,
                SEGMENTS,
            )
            keep = keep & live[None, :] & (j < S)[:, None]
            x, slope = _logits(key, query, SCALE, SOFTCAP, PRECISION)
            if ALIBI:
                slopes = tl.load(alibi + b * H + g * R + m % R)
                x -= slopes[None, :] * _distance(position[None, :], where[:, None]) * LOG2E
            dp = tl.dot(seen, tl.trans(grad), input_precision=PRECISION)
            p, dx = _through(x, dp, peak[None, :], tl.load(d + row, live, 0.0)[None, :], keep)
            dx = dx * slope
            dv_sum = tl.dot(p.to(grad.dtype), grad, dv_sum, input_precision=PRECISION)
            dk_sum = tl.dot(dx.to(query.dtype), query, dk_sum, input_precision=PRECISION)
    here = (j < S)[:, None]
    tl.store(
        dk + at[:, None] * K + width[None, :],
        (dk_sum * SCALE).to(dk.dtype.element_ty),
        here & (width < K)[None, :],
    )
    tl.store(
        dv + at[:, None] * V + value[None, :], dv_sum.to(dv.dtype.element_ty), here & (value < V)[None, :]
    )


@triton.jit
def backward_queries(
    q, k, v, dout, lse, d, alibi, q_positions, kv_positions, q_segments, kv_segments, needed, dq, dalibi,
    T: tl.constexpr, S: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SINKS: tl.constexpr, SOFTCAP: tl.constexpr, SCALE: tl.constexpr,
    PLACED: tl.constexpr, SEGMENTS: tl.constexpr, ALIBI: tl.constexpr, PRECISION: tl.constexpr,
    KP: tl.constexpr, VP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dq [b, t, h, k], and with ALiBi slopes the contribution of each row to their gradient, dalibi [b, t,
    h]. Program (row tile, group, row of the batch)."""
    b, g = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    R: tl.constexpr = H // G
    TILES: tl.constexpr = (T * R + BM - 1) // BM
    KEY_TILES: tl.constexpr = (S + BN - 1) // BN
    i = TILES - 1 - tl.program_id(0)
    m = i * BM + tl.arange(0, BM)
    inside = m < T * R
    width, value = tl.arange(0, KP), tl.arange(0, VP)
    row = (b * T + m // R) * H + g * R + m % R
    peak = tl.load(lse + row, inside, float("-inf")) * LOG2E
    live = peak > float("-inf")
    query, grad, change = (
        _load(q, row, width, inside, K, K),
        _load(dout, row, value, live, V, V),
        tl.load(d + row, live, 0.0),
    )
    position, segment = _rows(b, m, q_positions, q_segments, T, S, R, PLACED, SEGMENTS)
    dq_sum = tl.zeros((BM, KP), tl.float32)
    slopes, dslopes = tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32)
    if ALIBI:
        slopes = tl.load(alibi + b * H + g * R + m % R)
    sinks, low, high = _key_tiles(i, T, S, R, LEFT, RIGHT, SINKS, PLACED or SEGMENTS, BM, BN)
    for n in range(sinks + high - low):
        tile = tl.where(n < sinks, n, low + n - sinks)
        wanted = True
        if PLACED or SEGMENTS:
            wanted = tl.load(needed + (b * TILES + i) * KEY_TILES + tile) != 0
        if wanted:
            j = tile * BN + tl.arange(0, BN)
            at = (b * S + j) * G + g
            key, seen = _load(k, at, width, j < S, K, K), _load(v, at, value, j < S, V, V)
            where, own = _keys(b, j, kv_positions, kv_segments, S, PLACED, SEGMENTS)
            keep = _visible(
                position[:, None],
                where[None, :],
                segment[:, None],
                own[None, :],
                LEFT,
                RIGHT,
                SINKS,
                SEGMENTS,
            )
            x, slope = _logits(query, key, SCALE, SOFTCAP, PRECISION)
            keep = keep & live[:, None] & (j < S)[None, :]
            if ALIBI:
                far = _distance(position[:, None], where[None, :])
                x -= slopes[:, None] * far * LOG2E
            dp = tl.dot(grad, tl.trans(seen), input_precision=PRECISION)
            _, dx = _through(x, dp, peak[:, None], change[:, None], keep)
            if ALIBI:
                dslopes -= tl.sum(dx * far, 1)
            dx = dx * slope
            dq_sum = tl.dot(dx.to(key.dtype), key, dq_sum, input_precision=PRECISION)
    tl.store(
        dq + row[:, None] * K + width[None, :],
        (dq_sum * SCALE).to(dq.dtype.element_ty),
        inside[:, None] & (width < K)[None, :],
    )
    if ALIBI:
        tl.store(dalibi + row, dslopes, inside)
