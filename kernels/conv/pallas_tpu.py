"""The convolution on a TPU: one pass over x, channels in the lanes, time in the rows and block after block.

A block of x is placed after the last rows of the previous one, and each tap reads it at its own offset. The
gradient goes backwards in time with the first rows of the next block, since the gradient of a step comes from
its own output and the w-1 after it:

    dx_t = sum_j weight_{w-1-j} dy_{t+j}        dweight_{w-1-j} = sum_t x_t dy_{t+j}        over the j that
    t+j may look back
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from seqlab.kernels import pallas
from seqlab.kernels.blocks import find
from seqlab.kernels.conv import xla


def conv(x, weight, bias, initial_state, reset, valid):
    """`y, final_state`; see `xla.conv` for the arguments. Valid steps are compacted as there, and moved
    back."""
    pallas.require(x, weight, bias, initial_state)
    return xla.of_valid_steps(_conv, x, weight, bias, initial_state, reset, valid)


@jax.custom_vjp
def _conv(x, weight, bias, state, past):
    (b, t, d), w, kept = x.shape, len(weight), _kept(state)
    steps, lanes = _block(x)
    timed = pl.BlockSpec((None, steps, lanes), lambda b, d, t: (b, t, d))
    arrays = [x, weight, bias[None], _padded(state, kept)]
    specs = [
        timed,
        pl.BlockSpec((w, lanes), lambda b, d, t: (0, d)),
        pl.BlockSpec((1, lanes), lambda b, d, t: (0, d)),
        pl.BlockSpec((None, kept, lanes), lambda b, d, t: (b, 0, d)),
    ]
    if past is not None:
        arrays.append(past[..., None])
        specs.append(pl.BlockSpec((None, steps, 1), lambda b, d, t: (b, t, 0)))
    (y,) = pallas.call(
        _forward_kernel,
        arrays,
        [(x.shape, x.dtype)],
        grid=(b, pl.cdiv(d, lanes), pl.cdiv(t, steps)),
        in_specs=specs,
        out_specs=[timed],
        scratch=[pallas.vector((kept + pallas.up(steps, 8), lanes))],
        parallel=2,
    )
    return y


def _forward_kernel(x, weight, bias, state, *rest):
    *past, y, rows = rest
    (steps, _), kept, w = x.shape, len(state), len(weight)

    @pl.when(pl.program_id(2) == 0)
    def _():
        rows[:kept] = state[...].astype(jnp.float32)

    @pl.when(pl.program_id(2) > 0)
    def _():
        rows[:kept] = rows[len(rows) - kept :]

    rows[kept : kept + steps] = x[...].astype(jnp.float32)
    taps = weight[...].astype(jnp.float32)
    total = jnp.broadcast_to(bias[...].astype(jnp.float32), x.shape)
    for lag in range(w):
        tap = rows[kept - lag : kept - lag + steps]
        if past and lag:
            tap = jnp.where(past[0][...] >= lag, tap, 0)
        total += tap * taps[w - 1 - lag : w - lag]
    y[...] = total.astype(y.dtype)


def _conv_fwd(x, weight, bias, state, past):
    return _conv(x, weight, bias, state, past), (x, weight, bias, state, past)


def _conv_bwd(residuals, dy):
    x, weight, bias, state, past = residuals
    (b, t, d), w, kept = x.shape, len(weight), _kept(state)
    steps, lanes = _block(x)
    last, rows = pl.cdiv(t, steps) - 1, pallas.up(steps, 8) + 2 * kept
    timed = pl.BlockSpec((None, steps, lanes), lambda d, b, t: (b, last - t, d))
    once = pl.BlockSpec((None, kept, lanes), lambda d, b, t: (b, 0, d))
    arrays, scratch = [x, dy, weight, _padded(state, kept)], [pallas.vector((rows, lanes))]
    specs = [timed, timed, pl.BlockSpec((w, lanes), lambda d, b, t: (0, d)), once]
    if past is not None:
        arrays.append(past[..., None])
        specs.append(pl.BlockSpec((None, steps, 1), lambda d, b, t: (b, last - t, 0)))
        scratch.append(pallas.vector((rows, 1), jnp.int32))
    dx, dstate, sums = pallas.call(
        functools.partial(_backward_kernel, t),
        arrays,
        [(x.shape, x.dtype), ((b, kept, d), state.dtype), ((w + 1, d), jnp.float32)],
        grid=(pl.cdiv(d, lanes), b, last + 1),
        in_specs=specs,
        out_specs=[timed, once, pl.BlockSpec((w + 1, lanes), lambda d, b, t: (0, d))],
        scratch=scratch,
        parallel=1,
    )
    return dx, sums[:w].astype(weight.dtype), sums[w].astype(bias.dtype), dstate[:, kept - w + 1 :], None


_conv.defvjp(_conv_fwd, _conv_bwd)


def _backward_kernel(time, x, dy, weight, state, *rest):
    """`rows` holds kept rows of zeros, a block of dy and the kept rows after it; `looks` how far back each
    may look."""
    (*past, dx, dstate, sums), (rows, *looks) = (
        (rest[:-2], rest[-2:]) if len(rest) == 6 else (rest[:-1], rest[-1:])
    )
    (steps, _), kept, w = x.shape, len(state), len(weight)
    row, step = pl.program_id(1), pl.program_id(2)

    @pl.when(step == 0)
    def _():
        for buffer in (rows, *looks):
            buffer[...] = jnp.zeros_like(buffer)

    @pl.when((row == 0) & (step == 0))
    def _():
        sums[...] = jnp.zeros_like(sums)

    @pl.when(step > 0)
    def _():
        for buffer in (rows, *looks):
            buffer[len(buffer) - kept :] = buffer[kept : 2 * kept]

    inputs, slopes = x[...].astype(jnp.float32), dy[...].astype(jnp.float32)
    if time % steps:  # behind the end lies anything
        inside = pallas.places((steps, 1), 0) < time - (pl.num_programs(2) - 1 - step) * steps
        inputs, slopes = jnp.where(inside, inputs, 0), jnp.where(inside, slopes, 0)
    rows[kept : kept + steps] = slopes
    if past:
        looks[0][kept : kept + steps] = past[0][...]
    taps = weight[...].astype(jnp.float32)

    def passed_back(start, values, first):
        """The gradients of the inputs `values`, at row `start` of the buffer, and their contribution to
        `sums`."""
        total = jnp.zeros_like(values)
        for lag in range(first, w):
            moved, part = rows[start + lag : start + lag + len(values)], slice(w - 1 - lag, w - lag)
            product = values * moved
            if past and lag:
                seen = looks[0][start + lag : start + lag + len(values)] >= lag
                moved, product = jnp.where(seen, moved, 0), jnp.where(seen, product, 0)
            total += moved * taps[part]
            sums[part] += jnp.sum(product, axis=0, keepdims=True)
        return total

    dx[...] = passed_back(kept, inputs, 0).astype(dx.dtype)
    sums[w : w + 1] += jnp.sum(slopes, axis=0, keepdims=True)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        dstate[...] = passed_back(0, state[...].astype(jnp.float32), 1).astype(dstate.dtype)


def _block(x):
    """Steps and channels of a block of x [b, t, d]."""
    found = find("conv/pallas_tpu/tile", x.dtype.itemsize, x.shape[2])
    return pallas.block(x.shape[1], found["steps"]), pallas.block(x.shape[2], found["channels"])


def _kept(state):
    """The state [b, w-1, d] padded to whole tiles of rows."""
    return pallas.up(max(state.shape[1], 1), 8)


def _padded(state, kept):
    return jnp.pad(state, ((0, 0), (kept - state.shape[1], 0), (0, 0)))
