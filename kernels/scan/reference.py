"""Reference implementation: the recurrence, one step in a scan."""

import jax
import jax.numpy as jnp


def scan(u, delta, A, B, C, initial_state, reset, *, chunk=None):
    """`y, final_state`; see `xla.scan` for the arguments. `chunk` has no effect here."""
    dtype = initial_state.dtype
    A = A.astype(dtype)
    # Time first.
    arrays = jax.tree.map(
        lambda x: jnp.moveaxis(x if x.dtype == bool else x.astype(dtype), 1, 0), (u, delta, B, C, reset)
    )
    final_state, y = jax.lax.scan(lambda h, x: step(h, A, *x), initial_state, arrays)
    return jnp.moveaxis(y, 0, 1).astype(u.dtype), final_state


def step(h, A, u, delta, B, C, reset):
    """One token: h [b, e, n]; A [e, n]; u and delta [b, e]; B and C [b, n]; reset [b] or None."""
    if reset is not None:
        h = jnp.where(reset[:, None, None], 0, h)
    # h = exp(Δ A) h + Δ u B
    h = jnp.exp(delta[:, :, None] * A[None]) * h + (delta * u)[:, :, None] * B[:, None, :]
    return h, jnp.einsum("ben,bn->be", h, C, precision=jax.lax.Precision.HIGHEST)  # y = C h, after the update
