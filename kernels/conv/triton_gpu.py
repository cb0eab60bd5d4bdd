"""The convolution in Triton: each output is written once and each input read once, also with resets and
invalid steps.

Invalid steps are skipped, not moved: with resets or invalid steps, tables give the kernels the input of every
step and lag.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from seqlab.kernels import triton
from seqlab.kernels.blocks import find
from seqlab.state import mask_steps


class Blocks(NamedTuple):
    """The tiling of a call: steps and channels of a tile, and how many steps share one partial sum of the
    weights' gradient."""

    steps: int
    channels: int
    stretch: int
    warps: int


MOST_TAPS = 8  # the loop over them is unrolled


def blocks(t: int, d: int, w: int, itemsize: int) -> Blocks:
    """The tile for a call: many taps leave fewer registers, short sequences need fewer steps."""
    found = Blocks(**find("conv/triton_gpu/tile", itemsize, d))
    steps = min(found.steps if w <= 4 else found.steps // 2, triton.power(t))
    return found._replace(steps=steps, stretch=min(found.stretch, triton.power(t, steps)))


def conv(x, weight, bias, initial_state, reset, valid):
    """`y, final_state`; see `xla.conv` for the arguments."""
    triton.require(x, weight, bias, initial_state)
    if len(weight) > MOST_TAPS:
        raise NotImplementedError(f"kernels for up to {MOST_TAPS} taps exist, got {len(weight)}")
    maps = None if reset is None and valid is None else _maps(x.shape[:2], weight.shape[0] - 1, reset, valid)
    return _conv(x, weight, bias, initial_state, maps)


class Maps(NamedTuple):
    """The inputs of each step, -1 for none. An input is a row of the state or, counted from kept = w - 1, a
    step of x."""

    source: jax.Array  # [b, w, t]: the input that a step meets at a lag
    # [b, w + 1, kept + t]: the step that an input is met by at a lag; last, its place in the final state.
    target: jax.Array
    end: jax.Array  # [b, kept]: the inputs that the final state holds


def _maps(shape, kept, reset, valid):
    """Counted without the invalid steps, in `order`, the window is contiguous and a reset bounds its
    reach."""
    b, lag = shape[0], jnp.arange(kept + 1)[None, :, None]
    valid = jnp.ones(shape, bool) if valid is None else valid
    rank = jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1
    count = rank[:, -1:] + 1
    # The rank of the first input of the sequence, that of the state without a reset.
    start = jnp.full(shape, -kept, jnp.int32)
    if reset is not None:
        start = jax.lax.cummax(jnp.where(reset, rank, -kept), axis=1)
    state = jnp.broadcast_to(jnp.arange(kept, dtype=jnp.int32)[None], (b, kept))
    order = jnp.concatenate(
        [state, kept + jnp.argsort(~valid, axis=1, stable=True).astype(jnp.int32)], axis=1
    )
    own = jnp.concatenate([state, kept + rank], axis=1)  # the place of every input in `order`

    def at(x, index):
        flat = jnp.clip(index, 0, x.shape[1] - 1).reshape(b, -1)
        return jnp.take_along_axis(x, flat, axis=1, mode="promise_in_bounds").reshape(index.shape)

    seen = valid[:, None] & (rank[:, None] - lag >= start[:, None])
    source = jnp.where(seen, at(order, kept + rank[:, None] - lag), -1)
    real = jnp.concatenate([jnp.ones((b, kept), bool), valid], axis=1)[:, None]
    place = own[:, None] + lag
    step = at(order, place) - kept  # the step that stands `lag` places later, if that many are left
    met = real & (place >= kept) & (place < kept + count[:, None]) & (own[:, None] - kept >= at(start, step))
    left = own - count  # the place in the final state
    last = real[:, 0] & (left >= 0) & (own - kept >= start[:, -1:])
    target = jnp.concatenate([jnp.where(met, step, -1), jnp.where(last, left, -1)[:, None]], axis=1)
    place = count + jnp.arange(kept)[None]
    return Maps(source, target, jnp.where(place - kept >= start[:, -1:], at(order, place), -1))


@jax.custom_vjp
def _conv(x, weight, bias, state, maps):
    from seqlab.kernels.conv import triton_kernels as kernels

    (b, t, d), w = x.shape, weight.shape[0]
    cut = blocks(t, d, w, x.dtype.itemsize)
    constants = {"T": t, "D": d, "W": w, "GIVEN": maps is not None, "BT": cut.steps, "BD": cut.channels}
    arrays = (x, weight, bias, state if w > 1 else x, x if maps is None else maps.source)
    grid = (triton.blocks(t, cut.steps), triton.blocks(d, cut.channels), b)
    (y,) = triton.launch(
        kernels.forward, arrays, [(x.shape, x.dtype)], grid=grid, constants=constants, warps=cut.warps
    )
    return y, _end(x, state, None if maps is None else maps.end)


def _end(x, state, end):
    time, kept = x.shape[1], state.shape[1]
    if end is None:
        return jnp.concatenate([state, x[:, -kept:]], axis=1)[:, -kept:] if kept else state
    old = (
        jnp.take_along_axis(state, jnp.clip(end, 0, max(kept - 1, 0))[:, :, None], axis=1) if kept else state
    )
    new = jnp.take_along_axis(x, jnp.clip(end - kept, 0, time - 1)[:, :, None], axis=1)
    return mask_steps(jnp.where((end < kept)[:, :, None], old, new), end >= 0)


def _forward(x, weight, bias, state, maps):
    return _conv(x, weight, bias, state, maps), (x, weight, bias, state, maps)


def _backward(residuals, cotangents):
    from seqlab.kernels.conv import triton_kernels as kernels

    (x, weight, bias, state, maps), (dy, dend) = residuals, cotangents
    (b, t, d), w = x.shape, weight.shape[0]
    cut = blocks(t, d, w, x.dtype.itemsize)
    kept, stretches = w - 1, triton.blocks(t + w - 1, cut.stretch)
    constants = {"T": t, "D": d, "W": w, "WP": triton.power(w), "GIVEN": maps is not None}
    constants |= {"ROWS": cut.stretch, "BT": cut.steps, "BD": cut.channels}
    arrays = (x, weight, state if kept else x, x if maps is None else maps.target, dy, dend if kept else dy)
    shapes = [
        (x.shape, x.dtype),
        ((b, max(kept, 1), d), x.dtype),
        ((b, stretches, w, d), jnp.float32),
        ((b, stretches, d), jnp.float32),
    ]
    grid = (stretches, triton.blocks(d, cut.channels), b)
    results = triton.launch(kernels.backward, arrays, shapes, grid=grid, constants=constants, warps=cut.warps)
    dx, dstate, dweight, dbias = results
    return (
        dx,
        dweight.sum((0, 1)).astype(weight.dtype),
        dbias.sum((0, 1)).astype(bias.dtype),
        dstate if kept else state,
        None,
    )


_conv.defvjp(_forward, _backward)
