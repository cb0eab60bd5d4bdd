"""Reference implementation: the recurrence, one step in a scan."""

import jax
import jax.numpy as jnp


def linear_attention(q, k, v, decay, beta, initial_state, reset, *, scale, chunk=None):
    """`out, final_state`: decay [b, t, h, 1 or k], beta [b, t, h, 1 or v], initial_state [b, h, k, v] in its
    accumulator. No chunks."""
    dtype = initial_state.dtype

    def time_first(x):
        return jnp.moveaxis(x if x.dtype == bool else x.astype(dtype), 1, 0)

    steps = jax.tree.map(time_first, (q, k, v, decay, beta, reset))
    final_state, out = jax.lax.scan(lambda state, x: step(state, *x, scale=scale), initial_state, steps)
    return jnp.moveaxis(out, 0, 1).astype(v.dtype), final_state


def step(state, q, k, v, decay, beta, reset, *, scale):
    """One step: state [b, h, k, v], q and k [b, g, k], v [b, h, v], decay [b, h, 1 or k], beta [b, h, 1 or
    v], reset [b]."""
    q, k = (jnp.repeat(x, v.shape[1] // x.shape[1], axis=1) for x in (q, k))
    if reset is not None:
        state = jnp.where(reset[:, None, None, None], 0, state)
    if decay is not None:
        state = jnp.exp(decay)[..., None] * state  # S~ = diag(a) S
    # u = v or beta (v - S~' k)
    write = v if beta is None else beta * (v - jnp.einsum("bhkv,bhk->bhv", state, k))
    state = state + k[..., None] * write[..., None, :]  # S = S~ + k u'
    return state, scale * jnp.einsum("bhkv,bhk->bhv", state, q)
