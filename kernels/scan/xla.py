"""The fast form: one pass over time that never holds more than a chunk of states.

Writing a_t = exp(Δ_t A), the state runs forwards and its cotangent g_t = dL/dh_t backwards in time,

    h_t = a_t h_{t-1} + Δ_t u_t B_t          y_t = sum_n C_t h_t
    g_t = a_{t+1} g_{t+1} + dy_t C_t         dC_t = sum_e dy_t h_t
    s_t = g_t a_t h_{t-1}                    dB_t = sum_e g_t Δ_t u_t
    dA = sum_t Δ_t s_t                       du_t = Δ_t sum_n g_t B_t
                                             dΔ_t = u_t sum_n g_t B_t + sum_n A s_t

The forward pass keeps the state before every chunk of time; the backward pass recomputes the states of one
chunk at a time, so that nothing of shape [b, t, e, n] ever exists. Inside, the state is [b, n, e]: vector
units need the long axis innermost.

Steps are not unrolled: XLA would fuse them and compute the exponentials, which are most of the work, once per
use.
"""

import functools

import jax
import jax.numpy as jnp
from jax.lax import fori_loop

from seqlab.kernels.blocks import find
from seqlab.kernels.scan import reference


def scan(u, delta, A, B, C, initial_state, reset, *, chunk=None):
    """`y, final_state`. u, delta [b, t, e]; A [e, n]; B, C [b, t, n]; initial_state [b, e, n] in the state's
    dtype; reset [b, t]."""
    if u.shape[1] == 1:  # decoding: a handful of elementwise operations, no loop
        h, y = reference.step(
            initial_state,
            A.astype(initial_state.dtype),
            *_at((u, delta, B, C, reset), 0, initial_state.dtype),
        )
        return y[:, None].astype(u.dtype), h
    size = chunk or find("scan/xla/chunk", u.dtype.itemsize, u.shape[2])["steps"]
    y, h = _scan(size, u, delta, A, B, C, jnp.swapaxes(initial_state, 1, 2), reset)
    return y, jnp.swapaxes(h, 1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(chunk, u, delta, A, B, C, h, reset):
    return _run(0, u.shape[1], (u, delta, B, C, reset), A.T.astype(h.dtype), h, jnp.zeros_like(u))


def _run(start, stop, arrays, A, h, y):
    """Steps start to stop from h [b, n, e], writing their outputs into y."""

    def body(i, carry):
        h, y = carry
        u, delta, B, C, reset = _at(arrays, i, h.dtype)
        h = _update(h, A, u, delta, B, reset)
        return h, _put(y, _over_states(h, C), i)

    h, y = fori_loop(start, stop, body, (h, y))
    return y, h


def _update(h, A, u, delta, B, reset):
    """One token: h [b, n, e]; A [n, e]; u and delta [b, e]; B [b, n]; reset [b] or None."""
    return jnp.exp(delta[:, None] * A[None]) * _fresh(h, reset) + (delta * u)[:, None] * B[:, :, None]


def _forward(chunk, u, delta, A, B, C, h, reset):
    time = u.shape[1]
    chunks = -(-time // chunk)
    arrays, decay = (u, delta, B, C, reset), A.T.astype(h.dtype)

    def body(k, carry):
        h, y, starts = carry
        starts = jax.lax.dynamic_update_index_in_dim(starts, h, k, 0)
        y, h = _run(k * chunk, jnp.minimum((k + 1) * chunk, time), arrays, decay, h, y)
        return h, y, starts

    h, y, starts = fori_loop(
        0, chunks, body, (h, jnp.zeros_like(u), jnp.zeros_like(h, shape=(chunks, *h.shape)))
    )
    return (y, h), (u, delta, A, B, C, reset, starts)


def _backward(chunk, residuals, cotangents):
    u, delta, A, B, C, reset, starts = residuals
    dy, g = cotangents
    time, dtype, decay = u.shape[1], g.dtype, A.T.astype(g.dtype)

    def body(k, carry):
        g, dA, grads, states = carry
        k = starts.shape[0] - 1 - k
        start, stop = k * chunk, jnp.minimum((k + 1) * chunk, time)
        states = jax.lax.dynamic_update_index_in_dim(states, starts[k], 0, 0)

        def again(i, states):
            h = _update(states[i - start], decay, *_at((u, delta, B, reset), i, dtype))
            return jax.lax.dynamic_update_index_in_dim(states, h, i - start + 1, 0)

        def back(j, carry):
            g, dA, grads = carry
            i = start + stop - 1 - j
            now, before = states[i - start + 1], states[i - start]
            g, change, new = _step_back(g, now, before, decay, *_at((u, delta, B, C, reset, dy), i, dtype))
            return g, dA + change, tuple(_put(x, value, i) for x, value in zip(grads, new, strict=True))

        states = fori_loop(start, stop, again, states)
        return *fori_loop(start, stop, back, (g, dA, grads)), states

    grads = tuple(jnp.zeros_like(x) for x in (u, delta, B, C))
    states = jnp.zeros_like(g, shape=(chunk + 1, *g.shape))
    g, dA, (du, ddelta, dB, dC), _ = fori_loop(
        0, starts.shape[0], body, (g, jnp.zeros_like(g), grads, states)
    )
    return du, ddelta, dA.sum(0).T.astype(A.dtype), dB, dC, g, None


_scan.defvjp(_forward, _backward)


def _step_back(g, h, before, A, u, delta, B, C, reset, dy):
    """From g [b, n, e] after the step and the states on both sides of it: g before the step, its part of dA,
    and du, dΔ, dB, dC."""
    dC = _over_channels(h, dy)
    g = g + dy[:, None] * C[:, :, None]
    dB = _over_channels(g, delta * u)
    gB = _over_states(g, B)
    g = _fresh(jnp.exp(delta[:, None] * A[None]) * g, reset)
    s = g * _fresh(before, reset)
    ddelta = u * gB + _sum_rows(s * A[None])
    return g, s * delta[:, None], (delta * gB, ddelta, dB, dC)


def _fresh(h, reset):
    """The state before a step: zeros at a reset, whatever it held."""
    return h if reset is None else jnp.where(reset[:, None, None], 0, h)


def _over_states(x, weight):
    """[b, n, e], [b, n] -> [b, e]."""
    return jnp.einsum("bne,bn->be", x, weight, precision=jax.lax.Precision.HIGHEST)


def _over_channels(x, weight):
    """[b, n, e], [b, e] -> [b, n]."""
    return jnp.einsum("bne,be->bn", x, weight, precision=jax.lax.Precision.HIGHEST)


def _sum_rows(x):
    """[b, n, e] -> [b, e]."""
    rows = [x[:, i] for i in range(x.shape[1])]
    while len(rows) > 1:  # pairwise: short chains, small rounding errors
        rows = [a + b for a, b in zip(rows[::2], rows[1::2], strict=False)] + rows[len(rows) // 2 * 2 :]
    return rows[0]


def _at(arrays, i, dtype):
    """Step i of arrays [b, t, ...], in the dtype of the state; None stays None."""
    steps = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 1, keepdims=False), arrays)
    return jax.tree.map(lambda x: x if x.dtype == bool else x.astype(dtype), steps)


def _put(x, value, i):
    return jax.lax.dynamic_update_index_in_dim(x, value.astype(x.dtype), i, 1)
