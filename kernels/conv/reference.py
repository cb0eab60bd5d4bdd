"""Reference implementation: a window that slides over the sequence, one step in a scan."""

import jax
import jax.numpy as jnp

from seqlab.shapes import accumulator


def conv(x, weight, bias, initial_state, reset, valid):
    """`y, final_state`; see `xla.conv` for the arguments."""
    # The conversion is lossless for inputs; gradients are rounded once.
    dtype = accumulator(jnp.result_type(x, weight, bias))
    weight, bias = weight.astype(dtype), bias.astype(dtype)
    arrays = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (x.astype(dtype), reset, valid))  # time leads
    state, y = jax.lax.scan(
        lambda state, x: step(state, weight, bias, *x), initial_state.astype(dtype), arrays
    )
    return jnp.moveaxis(y, 0, 1).astype(x.dtype), state.astype(x.dtype)


def step(state, weight, bias, x, reset, valid):
    """One token: state [b, w-1, d]; weight [w, d]; bias [d]; x [b, d]; reset and valid [b] or None."""
    before = state
    if reset is not None:
        state = jnp.where(reset[:, None, None], 0, state)
    if valid is not None:
        x = jnp.where(valid[:, None], x, 0)
    window = jnp.concatenate([state, x[:, None]], axis=1)  # oldest first
    y, state = bias[None] + jnp.sum(window * weight[None], axis=1), window[:, 1:]
    if valid is not None:
        y, state = jnp.where(valid[:, None], y, 0), jnp.where(valid[:, None, None], state, before)
    return state, y
