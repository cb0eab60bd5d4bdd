"""Kernels that carry the states of linear attention from chunk to chunk, forwards and backwards.

With the state S [k, v] before a chunk, its read matrix W [c, k] and write matrix K [c, k], and the decay a
[k] of the whole chunk,

    u = U - W S            S' = a S + K' u
    du' = du + K G         G' = a G + dS - W' du'          backwards

A program processes one head of one row and a block of value columns, which are independent. The arrays are
[chunks, rows, heads, c, .]; W, K and a may have one head for `SHARE` heads of U.
"""

import triton
import triton.language as tl


@triton.jit
def _tile(x, head, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A matrix [ROWS, COLUMNS] of x, zeros outside."""
    here = (row < ROWS)[:, None] & (column < COLUMNS)[None, :]
    return tl.load(x + head * (ROWS * COLUMNS) + row[:, None] * COLUMNS + column[None, :], here, 0.0)


@triton.jit
def _put(x, head, row, column, value, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    here = (row < ROWS)[:, None] & (column < COLUMNS)[None, :]
    tl.store(x + head * (ROWS * COLUMNS) + row[:, None] * COLUMNS + column[None, :], value, here)


@triton.jit
def _whole(state):
    """[1, columns]: columns without non-finite entries, to avoid 0 * NaN where sequences share a chunk."""
    return (tl.max(tl.where((state == state) & (tl.abs(state) < float("inf")), 0, 1), 0) == 0)[None, :]


@triton.jit
def _keep(keep, head, channel, K: tl.constexpr, KEEP: tl.constexpr):
    """[k, 1]: the decay of a chunk, KEEP numbers per head, or 1 without decay."""
    a = tl.full((channel.shape[0],), 1.0, tl.float32)
    if KEEP == 1:
        a = a * tl.load(keep + head)
    if KEEP > 1:
        a = tl.load(keep + head * KEEP + channel, channel < K, 0.0)
    return a[:, None]


@triton.jit
def forward(
    initial, U, write, read, keep, states, u, final,
    CHUNKS: tl.constexpr, HEADS: tl.constexpr, C: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    SHARE: tl.constexpr, SHARE_KEEP: tl.constexpr, KEEP: tl.constexpr, DELTA: tl.constexpr,
    RESET: tl.constexpr,
    PRECISION: tl.constexpr, CP: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The states before every chunk, the values u, and the state after the last. HEADS counts the heads of
    all rows."""
    head = tl.program_id(0).to(tl.int64)
    step, channel, value = tl.arange(0, CP), tl.arange(0, KP), tl.program_id(1) * BV + tl.arange(0, BV)
    state = _tile(initial, head, channel, value, K, V)
    for _ in range(CHUNKS):
        _put(states, head, channel, value, state, K, V)
        a = _keep(keep, head // SHARE_KEEP, channel, K, KEEP)
        now = _tile(U, head, step, value, C, V)
        finite = channel[:, None] >= 0
        if RESET:
            finite = _whole(state)
            state = tl.where(finite, state, 0.0)
        if DELTA:
            now -= tl.dot(_tile(read, head // SHARE, step, channel, C, K), state, input_precision=PRECISION)
            _put(u, head, step, value, now, C, V)
        k = _tile(write, head // SHARE, step, channel, C, K)
        state = a * state + tl.dot(tl.trans(k), now, input_precision=PRECISION)
        if RESET:
            state = tl.where(finite | (a == 0.0), state, float("nan"))
        states += HEADS * K * V
        U += HEADS * C * V
        u += HEADS * C * V
        write += HEADS // SHARE * C * K
        read += HEADS // SHARE * C * K
        keep += HEADS // SHARE_KEEP * KEEP
    _put(final, head, channel, value, state, K, V)


@triton.jit
def backward(
    states, write, read, keep, dstates, du, dfinal, after, dU, dinitial,
    CHUNKS: tl.constexpr, HEADS: tl.constexpr, C: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    SHARE: tl.constexpr, SHARE_KEEP: tl.constexpr, KEEP: tl.constexpr, DELTA: tl.constexpr,
    RESET: tl.constexpr,
    PRECISION: tl.constexpr, CP: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """From the gradients with respect to the states before every chunk, the values and the final state: those
    with respect to the states `after` every chunk, to U and to the initial state. The other gradients are
    products of these with results of the forward pass."""
    head = tl.program_id(0).to(tl.int64)
    step, channel, value = tl.arange(0, CP), tl.arange(0, KP), tl.program_id(1) * BV + tl.arange(0, BV)
    LAST: tl.constexpr = CHUNKS - 1
    # Triton treats a number between 2^31 and 2^32 as unsigned, whose negative is not negative.
    state_chunk, value_chunk = tl.full((), HEADS * K * V, tl.int64), tl.full((), HEADS * C * V, tl.int64)
    key_chunk, keep_chunk = (
        tl.full((), HEADS // SHARE * C * K, tl.int64),
        tl.full((), HEADS // SHARE_KEEP * KEEP, tl.int64),
    )
    states += LAST * state_chunk
    dstates += LAST * state_chunk
    after += LAST * state_chunk
    du += LAST * value_chunk
    dU += LAST * value_chunk
    write += LAST * key_chunk
    read += LAST * key_chunk
    keep += LAST * keep_chunk
    grad = _tile(dfinal, head, channel, value, K, V)
    for _ in range(CHUNKS):
        a = _keep(keep, head // SHARE_KEEP, channel, K, KEEP)
        finite = channel[:, None] >= 0
        if RESET:
            finite = _whole(_tile(states, head, channel, value, K, V))
            grad = tl.where(finite | (a == 0.0), grad, 0.0)
        _put(after, head, channel, value, grad, K, V)
        now = tl.dot(_tile(write, head // SHARE, step, channel, C, K), grad, input_precision=PRECISION)
        grad = a * grad
        if DELTA:
            now += _tile(du, head, step, value, C, V)
            grad -= tl.dot(
                tl.trans(_tile(read, head // SHARE, step, channel, C, K)), now, input_precision=PRECISION
            )
        _put(dU, head, step, value, now, C, V)
        if RESET:
            grad = tl.where(finite, grad, 0.0)
        grad += _tile(dstates, head, channel, value, K, V)
        states -= state_chunk
        dstates -= state_chunk
        after -= state_chunk
        du -= value_chunk
        dU -= value_chunk
        write -= key_chunk
        read -= key_chunk
        keep -= keep_chunk
    _put(dinitial, head, channel, value, grad, K, V)
