"""Kernels of the depthwise convolution: one pass over the inputs forwards, one backwards.

The inputs are the rows of the state, `KEPT` = W - 1 of them, and then the steps of x. With resets or invalid
steps, `source` [b, w, t] is the row read at each lag of a step, -1 for none; `target` [b, w + 1, KEPT + t] is
the inverse, the step that reads a row at each lag, and last the row's place in the final state. Without
resets and invalid steps both are computed.
"""

import triton
import triton.language as tl


@triton.jit
def forward(
    x, weight, bias, state, source, y,
    T: tl.constexpr, D: tl.constexpr, W: tl.constexpr, GIVEN: tl.constexpr, BT: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """y [b, t, d], program (a block of steps, a block of channels, a row of the batch)."""
    b = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    channels = d < D
    KEPT: tl.constexpr = W - 1
    total = tl.zeros((BT, BD), tl.float32) + tl.load(bias + d, channels, 0.0).to(tl.float32)[None, :]
    counts = t < T
    for lag in tl.static_range(W):
        if GIVEN:
            row = tl.load(source + (b * W + lag) * T + t, t < T, -1)
        else:
            row = tl.where(t < T, t + KEPT - lag, -1)
        if lag == 0:
            counts = row >= 0  # an invalid step does not even meet itself
        step = (b * T + row - KEPT)[:, None] * D + d[None, :]
        value = tl.load(x + step, (row >= KEPT)[:, None] & channels[None, :], 0.0).to(tl.float32)
        if lag > 0:
            held = (row >= 0) & (row < KEPT)
            value += tl.load(
                state + (b * KEPT + row)[:, None] * D + d[None, :], held[:, None] & channels[None, :], 0.0
            ).to(tl.float32)
        tap = tl.load(weight + (KEPT - lag) * D + d, channels, 0.0).to(tl.float32)
        total += value * tap[None, :]
    total = tl.where(counts[:, None], total, 0.0)
    tl.store(
        y + (b * T + t)[:, None] * D + d[None, :],
        total.to(y.dtype.element_ty),
        (t < T)[:, None] & channels[None, :],
    )


@triton.jit
def backward(
    x, weight, state, target, dy, dend, dx, dstate, dweight, dbias,
    T: tl.constexpr, D: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, GIVEN: tl.constexpr,
    ROWS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dx, dstate, and the parts of dweight [b, stretches, w, d] and dbias [b, stretches, d] from ROWS inputs.

    Program (a stretch, a block of channels, a row of the batch). Both gradients use the output gradient that
    belongs to an input at each lag: times the tap it contributes to the input's gradient, times the input to
    the tap's.
    """
    b = tl.program_id(2).to(tl.int64)
    stretch = tl.program_id(0)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    channels = d < D
    KEPT: tl.constexpr = W - 1
    part = b * tl.num_programs(0) + stretch
    lags = tl.arange(0, WP)
    taps = tl.zeros((WP, BD), tl.float32)
    total = tl.zeros((BD,), tl.float32)
    for start in range(0, ROWS, BT):
        row = stretch * ROWS + start + tl.arange(0, BT)
        own, held = (row >= KEPT) & (row < KEPT + T), row < KEPT
        x_at = (b * T + row - KEPT)[:, None] * D + d[None, :]
        state_at = (b * KEPT + row)[:, None] * D + d[None, :]
        own, held = own[:, None] & channels[None, :], held[:, None] & channels[None, :]
        value = tl.load(x + x_at, own, 0.0).to(tl.float32)
        if KEPT > 0:
            value += tl.load(state + state_at, held, 0.0).to(tl.float32)
        if KEPT > 0:
            if GIVEN:
                place = tl.load(target + (b * (W + 1) + W) * (KEPT + T) + row, row < KEPT + T, -1)
            else:
                place = tl.where(row < KEPT + T, row - T, -1)
            left = (place >= 0)[:, None] & channels[None, :]
            gradient = tl.load(dend + (b * KEPT + place)[:, None] * D + d[None, :], left, 0.0).to(tl.float32)
        else:
            gradient = tl.zeros((BT, BD), tl.float32)
        for lag in tl.static_range(W):
            if GIVEN:
                step = tl.load(target + (b * (W + 1) + lag) * (KEPT + T) + row, row < KEPT + T, -1)
            else:
                step = row - KEPT + lag
            met = ((step >= 0) & (step < T))[:, None] & channels[None, :]
            got = tl.load(dy + (b * T + step)[:, None] * D + d[None, :], met, 0.0).to(tl.float32)
            tap = tl.load(weight + (KEPT - lag) * D + d, channels, 0.0).to(tl.float32)
            gradient += got * tap[None, :]
            change = tl.sum(tl.where(met, value * got, 0.0), 0)
            taps += tl.where((lags == KEPT - lag)[:, None], change[None, :], 0.0)
            if lag == 0:
                total += tl.sum(got, 0)
        tl.store(dx + x_at, gradient.to(dx.dtype.element_ty), own)
        if KEPT > 0:
            tl.store(dstate + state_at, gradient.to(dstate.dtype.element_ty), held)
    tl.store(
        dweight + (part * W + lags)[:, None] * D + d[None, :], taps, (lags < W)[:, None] & channels[None, :]
    )
    tl.store(dbias + part * D + d, total, channels)
