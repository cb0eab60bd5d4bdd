"""The selective scan on a TPU: the state of a block of channels stays in registers throughout time.

The state is [n, e], channels in the lanes. A step is elementwise work on it, with rows of u and Δ and columns
of B and C: these have time in the lanes, [b, n, t], and are rotated until the columns of the next eight steps
come first. The equations are those of `xla`.

The forward pass keeps the state before every block of time. The backward pass processes the blocks in
reverse, recomputes all states of one in vector memory, and goes backwards through its steps. dB and dC are
sums over channels: every block of channels has its own part, summed outside.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from seqlab.kernels import pallas
from seqlab.kernels.blocks import find

_STEPS = 128  # per block of time: as many as lanes, which hold B and C
# Elements of the state per block: 16 registers of 64; the states of a block of time take 8 MiB.
_STATE = 2**14
_STATES = 128  # n of one call: states are independent up to y, so more of them are several calls
_UNIT = pallas.LANES  # blocks of channels are multiples of it
_GROUP = 8  # unrolled steps: the rows of a tile


def scan(u, delta, A, B, C, initial_state, reset, *, chunk=None):
    """`y, final_state`; see `xla.scan` for the arguments. `chunk` has no effect here."""
    pallas.require(u, delta, A, B, C, initial_state)
    e, n = A.shape
    lanes = _width(e, min(n, _STATES))
    if lanes is None:  # no block divides the channels: channels of zeros do nothing
        more = pallas.up(e, _UNIT) - e
        u, delta = (jnp.pad(x, ((0, 0), (0, 0), (0, more))) for x in (u, delta))
        A, initial_state = (
            jnp.pad(A, ((0, more), (0, 0))),
            jnp.pad(initial_state, ((0, 0), (0, more), (0, 0))),
        )
        lanes = _width(e + more, min(n, _STATES))
    ys, states = [], []
    for start in range(0, n, _STATES):
        part = slice(start, start + _STATES)
        state = jnp.swapaxes(initial_state[..., part], 1, 2)
        y, state = _scan(
            lanes,
            u.dtype if n <= _STATES else jnp.float32,
            u,
            delta,
            A[:, part],
            B[..., part],
            C[..., part],
            state,
            reset,
        )
        ys.append(y)
        states.append(jnp.swapaxes(state, 1, 2))
    return sum(ys[1:], ys[0])[..., :e].astype(u.dtype), jnp.concatenate(states, axis=-1)[:, :e]


def _width(e, n):
    """The channels of a block: all if they are few, else a divisor of their number, or None."""
    channels = find("scan/pallas_tpu/block", 4, e)["channels"]  # in vector memory everything is float32
    most = max(_UNIT, min(channels, _STATE // n // _UNIT * _UNIT))
    return e if e <= most else next((size for size in range(most, 0, -_UNIT) if e % size == 0), None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(lanes, dtype, u, delta, A, B, C, h, reset):
    y, state = _forward(False, lanes, dtype, u, delta, A, B, C, h, reset)
    return y, state


def _scan_fwd(lanes, dtype, u, delta, A, B, C, h, reset):
    y, state, starts = _forward(True, lanes, dtype, u, delta, A, B, C, h, reset)
    return (y, state), (u, delta, A, B, C, reset, starts)


def _forward(save, lanes, dtype, u, delta, A, B, C, h, reset):
    """y, the final state and, to `save`, the states before the blocks of time [b, blocks, n, e]."""
    (b, t, e), n = u.shape, A.shape[1]
    steps, blocks = pallas.block(t, _STEPS), pl.cdiv(t, _STEPS)
    rows = pallas.vector((pallas.up(steps, _GROUP), lanes))
    timed, columns, once, flags = _specs(n, steps, lanes, lambda i: i)
    return pallas.call(
        functools.partial(_forward_kernel, t, save),
        [u, delta, _wide(A.T), _columns(B), _columns(C), h, *_flags(reset)],
        [(u.shape, dtype), (h.shape, h.dtype), ((b, blocks, n, e), jnp.float32)][: 2 + save],
        grid=(b, e // lanes, blocks),
        in_specs=[
            timed,
            timed,
            pl.BlockSpec((n, lanes), lambda b, e, t: (0, e)),
            columns,
            columns,
            once,
            *flags[: reset is not None],
        ],
        out_specs=[timed, once, pl.BlockSpec((None, None, n, lanes), lambda b, e, t: (b, t, 0, e))][
            : 2 + save
        ],
        scratch=[rows, rows, rows],
        parallel=2,
    )


def _specs(n, steps, lanes, block):
    """Block specs of [b, t, e], [b, n, t], [b, n, e] and of flags; the i-th visited block of time is
    `block(i)`."""
    return (
        pl.BlockSpec((None, steps, lanes), lambda b, e, t: (b, block(t), e)),
        pl.BlockSpec((None, n, _STEPS), lambda b, e, t: (b, 0, block(t))),
        pl.BlockSpec((None, n, lanes), lambda b, e, t: (b, 0, e)),
        [pl.BlockSpec((None, None, 1, _STEPS), lambda b, e, t: (b, block(t), 0, 0), memory_space=pltpu.SMEM)],
    )


def _wide(x):
    return x.astype(jnp.float32)


def _in_blocks(x):
    """x [b, t, ...] with time padded to whole blocks."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % _STEPS), *((0, 0),) * (x.ndim - 2)))


def _columns(x):
    """[b, t, n] -> [b, n, t]."""
    return jnp.swapaxes(_in_blocks(_wide(x)), 1, 2)


def _flags(reset):
    return [] if reset is None else [_in_blocks(reset).astype(jnp.int32).reshape(len(reset), -1, 1, _STEPS)]


def _forward_kernel(time, save, u, delta, A, B, C, h, *rest):
    *rest, sizes, inputs, outputs = rest
    *reset, y, state, start = rest if save else (*rest, None)

    @pl.when(pl.program_id(2) == 0)
    def _():
        state[...] = h[...]

    if save:
        start[...] = state[...]
    _lay(time, delta, sizes, pl.program_id(2))
    _lay(time, u, inputs, pl.program_id(2))
    inputs[...] = inputs[...] * sizes[...]
    decay = A[...]

    def group(i, h):
        rows = pl.ds(pl.multiple_of(i * _GROUP, _GROUP), _GROUP)
        size, x, b, c = sizes[rows], inputs[rows], _turned(B, i), _turned(C, i)
        ys = []
        for j in range(_GROUP):
            h = _update(
                _fresh(h, reset, i * _GROUP + j), decay, size[j : j + 1], x[j : j + 1], b[:, j : j + 1]
            )
            ys.append(jnp.sum(h * c[:, j : j + 1], axis=0, keepdims=True))
        outputs[rows] = jnp.concatenate(ys, axis=0)
        return h

    state[...] = jax.lax.fori_loop(0, len(sizes) // _GROUP, group, state[...])
    y[...] = outputs[: len(y)].astype(y.dtype)


def _lay(time, block, rows, index):
    """A block of steps in float32, in whole groups: steps of zeros beyond the end have no effect."""
    steps, x = len(block), _wide(block[...])
    if time % steps:
        x = jnp.where(pallas.places((steps, 1), 0) < time - index * steps, x, 0)
    rows[:steps] = x
    if len(rows) > steps:
        rows[steps:] = jnp.zeros((len(rows) - steps, rows.shape[1]), jnp.float32)


def _turned(columns, group):
    """[n, steps] rotated to the columns of a group."""
    steps = columns.shape[1]
    return pltpu.roll(columns[...], jax.lax.rem(steps - group * _GROUP, steps), 1)


def _fresh(h, reset, step):
    """The state before a step: zeros at a reset, whatever it held."""
    return jnp.where(jnp.full(h.shape, reset[0][0, step]) != 0, 0, h) if reset else h


def _update(h, A, size, x, b):
    """One step: h and A [n, e]; size, Δ, and x, Δ u, [1, e]; b [n, 1]."""
    return jnp.exp(size * A) * h + x * b


def _scan_bwd(lanes, dtype, residuals, cotangents):
    u, delta, A, B, C, reset, starts = residuals
    dy, g = cotangents
    (b, t, e), n, blocks = u.shape, A.shape[1], starts.shape[1]
    steps = pallas.block(t, _STEPS)
    timed, columns, once, flags = _specs(n, steps, lanes, lambda i: blocks - 1 - i)
    start = pl.BlockSpec((None, None, n, lanes), lambda b, e, t: (b, blocks - 1 - t, 0, e))
    part = pl.BlockSpec((None, None, n, _STEPS), lambda b, e, t: (b, e, 0, blocks - 1 - t))
    parts = ((b, e // lanes, n, blocks * _STEPS), jnp.float32)
    rows = pallas.vector((pallas.up(steps, _GROUP), lanes))
    du, ddelta, dB, dC, dA, dh = pallas.call(
        functools.partial(_backward_kernel, t),
        [u, delta, dy, _wide(A.T), _columns(B), _columns(C), starts, g, *_flags(reset)],
        [
            (u.shape, u.dtype),
            (delta.shape, delta.dtype),
            parts,
            parts,
            (g.shape, jnp.float32),
            (g.shape, g.dtype),
        ],
        grid=(b, e // lanes, blocks),
        in_specs=[timed] * 3
        + [
            pl.BlockSpec((n, lanes), lambda b, e, t: (0, e)),
            columns,
            columns,
            start,
            once,
            *flags[: reset is not None],
        ],
        out_specs=[timed, timed, part, part, once, once],
        scratch=[rows] * 5 + [pallas.vector((pallas.up(steps, _GROUP) + 1, n, lanes))],
        parallel=2,
    )
    dB, dC = (jnp.swapaxes(x.sum(1), 1, 2)[:, :t] for x in (dB, dC))
    return du, ddelta, dA.sum(0).T.astype(A.dtype), dB.astype(B.dtype), dC.astype(C.dtype), dh, None


_scan.defvjp(_scan_fwd, _scan_bwd)


def _backward_kernel(time, u, delta, dy, A, B, C, start, g, *rest):
    *reset, du, ddelta, dB, dC, dA, dh, sizes, inputs, slopes, du_rows, ddelta_rows, states = rest
    block, groups = pl.num_programs(2) - 1 - pl.program_id(2), len(sizes) // _GROUP

    @pl.when(pl.program_id(2) == 0)
    def _():
        dh[...], dA[...] = g[...], jnp.zeros_like(dA)

    for source, rows in ((delta, sizes), (u, inputs), (dy, slopes)):
        _lay(time, source, rows, block)
    decay = A[...]

    def again(i, h):
        rows = pl.ds(pl.multiple_of(i * _GROUP, _GROUP), _GROUP)
        size, x, b = sizes[rows], inputs[rows], _turned(B, i)
        for j in range(_GROUP):
            h = _fresh(h, reset, i * _GROUP + j)
            h = _update(h, decay, size[j : j + 1], size[j : j + 1] * x[j : j + 1], b[:, j : j + 1])
            states[i * _GROUP + j + 1] = h
        return h

    states[0] = start[...]
    jax.lax.fori_loop(0, groups, again, start[...])
    lane = pallas.places(dB.shape, 1)

    def back(k, carry):
        g, dA, dB, dC = carry
        i = groups - 1 - k
        rows = pl.ds(pl.multiple_of(i * _GROUP, _GROUP), _GROUP)
        size, x, slope, b, c = sizes[rows], inputs[rows], slopes[rows], _turned(B, i), _turned(C, i)
        du, ddelta = [], []
        for j in reversed(range(_GROUP)):
            step, one, column = i * _GROUP + j, slice(j, j + 1), (slice(None), slice(j, j + 1))
            dC = jnp.where(lane == step, jnp.sum(states[step + 1] * slope[one], axis=1, keepdims=True), dC)
            g += slope[one] * c[column]
            dB = jnp.where(lane == step, jnp.sum(g * (size[one] * x[one]), axis=1, keepdims=True), dB)
            gB = jnp.sum(g * b[column], axis=0, keepdims=True)
            g = _fresh(jnp.exp(size[one] * decay) * g, reset, step)
            s = g * _fresh(states[step], reset, step)
            dA += s * size[one]
            du.insert(0, size[one] * gB)
            ddelta.insert(0, x[one] * gB + jnp.sum(s * decay, axis=0, keepdims=True))
        du_rows[rows], ddelta_rows[rows] = jnp.concatenate(du, axis=0), jnp.concatenate(ddelta, axis=0)
        return g, dA, dB, dC

    zeros = jnp.zeros(dB.shape, jnp.float32)
    dh[...], dA[...], dB[...], dC[...] = jax.lax.fori_loop(0, groups, back, (dh[...], dA[...], zeros, zeros))
    du[...], ddelta[...] = (
        du_rows[: len(du)].astype(du.dtype),
        ddelta_rows[: len(ddelta)].astype(ddelta.dtype),
    )
