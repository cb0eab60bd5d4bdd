"""The fast form: w shifted products, which fuse into one pass over x.

An arbitrary `valid` is handled by compaction: the valid steps of a row are moved together in order,
convolved, and the outputs moved back.
"""

import jax
import jax.numpy as jnp

from seqlab.shapes import accumulator
from seqlab.state import mask_steps


def conv(x, weight, bias, initial_state, reset, valid):
    """`y, final_state`. x [b, t, d]; weight [w, d]; bias [d]; initial_state [b, w-1, d] in the dtype of x;
    reset, valid [b, t] or None.

    Resets at invalid steps have been removed.
    """
    return of_valid_steps(_conv, x, weight, bias, initial_state, reset, valid)


def of_valid_steps(convolve, x, weight, bias, initial_state, reset, valid):
    """The same through `convolve(x, weight, bias, state, past)`, which returns y; `past` [b, t] or None comes
    from `_past`."""
    time, kept = x.shape[1], weight.shape[0] - 1
    if valid is not None:
        count = jnp.sum(valid, axis=1, keepdims=True)
        place = jnp.where(valid, jnp.cumsum(valid, axis=1) - 1, count + jnp.cumsum(~valid, axis=1) - 1)
        order = jnp.argsort(place, axis=1)
        x = _permute(mask_steps(x, valid), order, place)
        reset = None if reset is None else jnp.take_along_axis(reset, order, axis=1)
    past = None if reset is None else _past(reset, kept)
    y = convolve(x, weight, bias, initial_state, past)
    inputs = jnp.concatenate([initial_state, x], axis=1)
    if valid is None:
        state = inputs[:, time:]
    else:
        y = mask_steps(_permute(y, place, order), valid)
        state = jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, kept))(
            inputs, count[:, 0]
        )
    if past is not None:
        # The current sequence has past + 1 inputs at its last step, which is followed by the invalid ones.
        length = past[:, -1:] + 1 - (0 if valid is None else time - count)
        state = mask_steps(state, jnp.arange(kept)[None] >= kept - length)
    return y, state


def _past(reset, kept):
    """The number of earlier inputs visible to each step: those since the reset, or at least `kept` without
    one."""
    index = jnp.arange(reset.shape[1])[None]
    return index - jax.lax.cummax(jnp.where(reset, index, -kept), axis=1)


def _taps(x, weight, bias, state, past):
    dtype, w = accumulator(jnp.result_type(x, weight, bias)), weight.shape[0]
    wide_x, wide_state, wide_weight = x.astype(dtype), state.astype(dtype), weight.astype(dtype)
    y = bias.astype(dtype)
    for lag in range(w):
        y = y + _lagged(wide_x, wide_state, past, lag) * wide_weight[w - 1 - lag]
    return y.astype(x.dtype)


def _lagged(x, state, past, lag):
    """[b, t, d]: the input `lag` steps earlier, from x or from the state, 0 before the sequence."""
    if lag == 0:
        return x
    time, kept = x.shape[1], state.shape[1]
    back = _shift(x, lag, -lag) + _shift(state, lag - kept, time - lag)
    return back if past is None else mask_steps(back, past >= lag)


def _shift(x, before, after):
    """`x` [b, t, d] padded with zeros before and after it in time, or cropped if negative."""
    return jax.lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (before, after, 0), (0, 0, 0)))


_conv = jax.custom_vjp(_taps)


def _conv_fwd(x, weight, bias, state, past):
    return _taps(x, weight, bias, state, past), (x, weight, bias, state, past)


def _conv_bwd(residuals, dy):
    x, weight, bias, state, past = residuals
    _, pull = jax.vjp(lambda x, bias, state: _taps(x, weight, bias, state, past), x, bias, state)
    dx, dbias, dstate = pull(dy)
    # On a CPU XLA does not fuse the operands of reductions, and w shifted copies of x would cost more than
    # everything else here.
    dweight = jax.lax.platform_dependent(*residuals, dy, cpu=_dweight_by_steps, default=_dweight_by_taps)
    return dx, dweight, dbias, dstate, None


_conv.defvjp(_conv_fwd, _conv_bwd)


def _dweight_by_taps(x, weight, bias, state, past, dy):
    dtype, w = accumulator(jnp.result_type(x, weight, bias)), weight.shape[0]
    x, state, dy = x.astype(dtype), state.astype(dtype), dy.astype(dtype)
    return jnp.stack(
        [jnp.sum(_lagged(x, state, past, lag) * dy, axis=(0, 1)) for lag in reversed(range(w))]
    ).astype(weight.dtype)


def _dweight_by_steps(x, weight, bias, state, past, dy):
    dtype, w = accumulator(jnp.result_type(x, weight, bias)), weight.shape[0]
    inputs = jnp.concatenate([state, x], axis=1)

    def body(i, total):
        window = jax.lax.dynamic_slice_in_dim(inputs, i, w, 1).astype(dtype)  # oldest first
        if past is not None:
            window = mask_steps(
                window, jax.lax.dynamic_slice_in_dim(past, i, 1, 1) >= w - 1 - jnp.arange(w)[None]
            )
        return total + window * jax.lax.dynamic_slice_in_dim(dy, i, 1, 1).astype(dtype)

    total = jnp.zeros_like(weight, dtype, shape=(x.shape[0], *weight.shape))
    return jax.lax.fori_loop(0, x.shape[1], body, total).sum(0).astype(weight.dtype)


@jax.custom_vjp
def _permute(x, order, inverse):
    """x[order] per row. The gradient of a gather is a scatter, which is slow; that of a permutation is the
    inverse permutation."""
    return jnp.take_along_axis(x, order[:, :, None], axis=1, mode="promise_in_bounds")


_permute.defvjp(
    lambda x, order, inverse: (_permute(x, order, inverse), (order, inverse)),
    lambda residuals, dy: (_permute(dy, *residuals[::-1]), None, None),
)
