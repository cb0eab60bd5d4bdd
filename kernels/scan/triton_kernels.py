"""Kernels of the selective scan. A program processes a block of channels tile by tile in time.

Inside a tile [BT, BE] the recurrence h_t = a_t h_{t-1} + x_t of one state is a parallel scan of affine maps
over the steps, one state after another, so that u, Δ and y pass through memory once and the states of steps
never do. Between tiles the states go through memory, `states` [b, tiles + 1, n, e], with barriers, since
threads read what others wrote. The gradient starts every tile from the same states.

A map with a = 0 forgets: its argument is removed by selection, not multiplication, since it may be NaN.
"""

import triton
import triton.language as tl


@triton.jit
def _then(a, x, next_a, next_x):
    forgets = next_a == 0.0
    return tl.where(forgets, 0.0, a * next_a), tl.where(forgets, next_x, next_a * x + next_x)


@triton.jit
def _decay(delta, A, fresh):
    return tl.where(fresh[:, None], 0.0, tl.exp(delta * A[None, :]))


@triton.jit
def _tile(x, t, e, here, E: tl.constexpr):
    """Steps t [BT] (int64, of the row) of channels e of x [t, e], as float32, zeros where not `here`."""
    return tl.load(x + t[:, None] * E + e[None, :], here, 0.0).to(tl.float32)


@triton.jit
def forward(
    u, delta, A, B, C, state, reset, y, states,
    T: tl.constexpr, E: tl.constexpr, N: tl.constexpr, RESET: tl.constexpr, BT: tl.constexpr,
    BE: tl.constexpr,
):  # fmt: skip
    """y [b, t, e] and the states around every tile. A [n, e], state [b, n, e]. Program (a block of channels,
    a row of the batch)."""
    b = tl.program_id(1).to(tl.int64)
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    ours = e < E
    TILES: tl.constexpr = (T + BT - 1) // BT
    states += b * (TILES + 1) * N * E + e
    for n in range(N):
        tl.store(states + n * E, tl.load(state + (b * N + n) * E + e, ours, 0.0), ours)
    tl.debug_barrier()
    steps = tl.arange(0, BT)
    for tile in range(TILES):
        t = tile * BT + steps
        inside = t < T
        here = inside[:, None] & ours[None, :]
        row = b * T + t
        step = _tile(delta, row, e, here, E)
        gain = step * _tile(u, row, e, here, E)
        fresh = steps < 0
        if RESET:
            fresh = tl.load(reset + row, inside, 0) != 0
        total = tl.zeros((BT, BE), tl.float32)
        for n in range(N):
            a = _decay(step, tl.load(A + n * E + e, ours, 0.0), fresh)
            x = gain * tl.load(B + row * N + n, inside, 0.0).to(tl.float32)[:, None]
            before = tl.load(states + n * E, ours, 0.0)
            x += tl.where((steps == 0)[:, None] & (a != 0.0), a * before[None, :], 0.0)
            _, h = tl.associative_scan((a, x), 0, _then)
            total += h * tl.load(C + row * N + n, inside, 0.0).to(tl.float32)[:, None]
            tl.store(
                (states + (N + n) * E)[None, :] + steps[:, None] * 0,
                h,
                (steps == BT - 1)[:, None] & ours[None, :],
            )
        tl.store(y + row[:, None] * E + e[None, :], total.to(y.dtype.element_ty), here)
        states += N * E
        tl.debug_barrier()


@triton.jit
def backward(
    u, delta, A, B, C, reset, states, dy, dend, du, ddelta, dA, dB, dC, carry,
    ROWS: tl.constexpr, T: tl.constexpr, E: tl.constexpr, N: tl.constexpr, RESET: tl.constexpr,
    BT: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """du, dΔ [b, t, e], and parts: of dA [b, tiles, n, e], of dB and dC [blocks of channels, b, t, n]. Tiles
    from the last to the first.

    The gradient with respect to the state after a tile passes through `carry` [b, 2, n, e], one half for even
    and one for odd tiles; the gradient with respect to the initial state ends in the first half.
    """
    b = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0).to(tl.int64)
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    ours = e < E
    TILES: tl.constexpr = (T + BT - 1) // BT
    states += (b * (TILES + 1) + TILES - 1) * N * E + e
    dA += (b * TILES + TILES - 1) * N * E + e
    carry += b * 2 * N * E + e
    for n in range(N):
        tl.store(carry + (TILES % 2 * N + n) * E, tl.load(dend + (b * N + n) * E + e, ours, 0.0), ours)
    tl.debug_barrier()
    steps = tl.arange(0, BT)
    first, last = (steps == 0)[:, None], (steps == BT - 1)[:, None]
    for back in range(TILES):
        tile = TILES - 1 - back
        t = tile * BT + steps
        inside = t < T
        row = b * T + t
        here = inside[:, None] & ours[None, :]
        before = (inside & (steps > 0))[:, None] & ours[None, :]
        after = (t + 1 < T)[:, None] & ours[None, :]
        step, value, grad = (
            _tile(delta, row, e, here, E),
            _tile(u, row, e, here, E),
            _tile(dy, row, e, here, E),
        )
        step_before, step_after = _tile(delta, row - 1, e, before, E), _tile(delta, row + 1, e, after, E)
        gain_before = step_before * _tile(u, row - 1, e, before, E)
        fresh, fresh_before, fresh_after = steps < 0, steps < 0, steps < 0
        if RESET:
            fresh = tl.load(reset + row, inside, 0) != 0
            fresh_before = tl.load(reset + row - 1, inside & (steps > 0), 0) != 0
            fresh_after = tl.load(reset + row + 1, t + 1 < T, 0) != 0
        through_B, through_A = tl.zeros((BT, BE), tl.float32), tl.zeros((BT, BE), tl.float32)
        for n in range(N):
            rate = tl.load(A + n * E + e, ours, 0.0)
            old = tl.load(states + n * E, ours, 0.0)
            x = (
                gain_before
                * tl.load(B + (row - 1) * N + n, inside & (steps > 0), 0.0).to(tl.float32)[:, None]
            )
            _, h = tl.associative_scan(
                (_decay(step_before, rate, fresh_before), tl.where(first, old[None, :], x)), 0, _then
            )
            a = _decay(step, rate, fresh)
            kept = tl.where(a == 0.0, 0.0, a * h)  # what is left of the state before the step
            b_n = tl.load(B + row * N + n, inside, 0.0).to(tl.float32)[:, None]
            h = kept + step * value * b_n
            tl.store(
                dC + ((block * ROWS + b) * T + t) * N + n, tl.sum(tl.where(here, h * grad, 0.0), 1), inside
            )
            x = grad * tl.load(C + row * N + n, inside, 0.0).to(tl.float32)[:, None]
            x += tl.where(last, tl.load(carry + ((tile + 1) % 2 * N + n) * E, ours, 0.0)[None, :], 0.0)
            _, g = tl.associative_scan((_decay(step_after, rate, fresh_after), x), 0, _then, reverse=True)
            tl.store(dB + ((block * ROWS + b) * T + t) * N + n, tl.sum(g * step * value, 1), inside)
            through_B += g * b_n
            s = g * kept
            through_A += s * rate[None, :]
            tl.store(dA + n * E, tl.sum(s * step, 0), ours)
            g = tl.where(a == 0.0, 0.0, a * g)
            tl.store((carry + (tile % 2 * N + n) * E)[None, :] + steps[:, None] * 0, g, first & ours[None, :])
        tl.store(du + row[:, None] * E + e[None, :], (step * through_B).to(du.dtype.element_ty), here)
        tl.store(
            ddelta + row[:, None] * E + e[None, :],
            (value * through_B + through_A).to(ddelta.dtype.element_ty),
            here,
        )
        states -= N * E
        dA -= N * E
        tl.debug_barrier()
