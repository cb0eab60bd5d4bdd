"""Reference implementation: the recurrence, one step in a scan."""

import jax
import jax.numpy as jnp

HIGHEST = jax.lax.Precision.HIGHEST


def lmu(u, A, B, initial_state, reset, valid, *, chunk=None):
    """`m, final_state`. u [b, t, q] in the state's dtype; A [d, d]; B [d]; initial_state [b, q, d] or None;
    reset, valid [b, t] or None."""
    A, B = jnp.asarray(A, u.dtype), jnp.asarray(B, u.dtype)
    state = jnp.zeros_like(u[:, 0, :, None] * B) if initial_state is None else initial_state
    arrays = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (u, reset, valid))  # time leads
    state, m = jax.lax.scan(lambda state, x: step(state, A, B, *x), state, arrays)
    return jnp.moveaxis(m, 0, 1), state


def step(state, A, B, u, reset, valid):
    """One token: state [b, q, d]; u [b, q]; reset and valid [b] or None."""
    before = state
    if reset is not None:
        state = jnp.where(reset[:, None, None], 0, state)
    if valid is not None:
        u = jnp.where(valid[:, None], u, 0)
    state = m = jnp.matmul(state, A.T, precision=HIGHEST) + u[:, :, None] * B
    if valid is not None:
        m, state = jnp.where(valid[:, None, None], m, 0), jnp.where(valid[:, None, None], state, before)
    return state, m
