"""The fast form: time in chunks of c steps, each a handful of matrix products. For j = 0 .. c-1 and the state
s before a chunk

    m_j = Ā^{j+1} s + sum_{i <= j} Ā^{j-i} B̄ u_i          s' = m_{c-1}

The sum is a product with the impulse response Āʲ B̄ laid out as a Toeplitz tensor [i, j, d]. The states
between chunks come first, by a scan over the t/c chunks; then Ā^{j+1} s of all chunks at once by doubling,
[X, Ā^k X], so that only Ā, Ā², Ā⁴ ... are needed and never the c powers [c, d, d].

The number of operations is that of the recurrence, t d² per row. What is saved are the t sequential steps:
nearly all the time on an accelerator, nothing on a CPU, whose loops are as fast as its matrix products.

An arbitrary `valid` is handled by compaction: the valid steps of a row are moved together in order, and their
memories moved back. The final state is the memory of the last valid step, bit for bit.
"""

import jax
import jax.numpy as jnp
import numpy as np

from seqlab.kernels.blocks import find
from seqlab.kernels.lmu import reference
from seqlab.kernels.lmu.reference import HIGHEST
from seqlab.state import mask_steps


def lmu(u, A, B, initial_state, reset, valid, *, chunk=None):
    """`m, final_state`; see `reference.lmu` for the arguments. Resets at invalid steps have been removed."""
    time = u.shape[1]
    state = (
        jnp.zeros_like(u, shape=(u.shape[0], u.shape[2], B.shape[0]))
        if initial_state is None
        else initial_state
    )
    if time == 1:  # decoding: one product
        flags = (None if x is None else x[:, 0] for x in (reset, valid))
        state, m = reference.step(state, constant(A, u.dtype), constant(B, u.dtype), u[:, 0], *flags)
        return m[:, None], state
    size = min(chunk or find("lmu/xla/chunk", u.dtype.itemsize, B.shape[0])["steps"], time)
    if valid is None:
        m = _chunks(u, A, B, state, reset, size)
        return m, m[:, -1]
    count = jnp.sum(valid, axis=1, keepdims=True)
    place = jnp.where(valid, jnp.cumsum(valid, axis=1) - 1, count + jnp.cumsum(~valid, axis=1) - 1)
    order = jnp.argsort(place, axis=1)
    u = jnp.take_along_axis(mask_steps(u, valid), order[..., None], axis=1)
    reset = None if reset is None else jnp.take_along_axis(reset, order, axis=1)
    m = _chunks(u, A, B, state, reset, size)
    last = jnp.take_along_axis(m, jnp.maximum(count - 1, 0)[..., None, None], axis=1)[:, 0]
    state = jnp.where(count[..., None] > 0, last, state)
    return mask_steps(jnp.take_along_axis(m, place[..., None, None], axis=1), valid), state


def _chunks(u, A, B, state, reset, c):
    """m [b, t, q, d], all steps valid."""
    b, time, q = u.shape
    n = -(-time // c)
    u, reset = (None if x is None else _split(x, n, c) for x in (u, reset))
    H = impulse_response(A, B, c)
    # [b, n, c]: the index of the sequence within its chunk, 0 = the one carried in.
    sequence = None if reset is None else jnp.cumsum(reset, axis=2)
    starts = _starts(u, A, constant(H, u.dtype), state, sequence)
    carried = spread(starts, A, c)
    if sequence is not None:
        carried = jnp.where((sequence == 0)[..., None, None], carried, 0)
    m = carried + _within(u, constant(H, u.dtype), sequence)
    return m.reshape(b, n * c, q, -1)[:, :time]


def _split(x, n, c):
    """[b, t, ...] in n chunks [b, n, c, ...], the last padded with zeros."""
    padding = ((0, 0), (0, n * c - x.shape[1]), *((0, 0),) * (x.ndim - 2))
    return jnp.pad(x, padding).reshape(x.shape[0], n, c, *x.shape[2:])


def _starts(u, A, H, state, sequence):
    """[b, n, q, d]: the memory before every chunk."""
    c = u.shape[2]
    if sequence is not None:
        # The state at the end of the chunk's last sequence.
        u = jnp.where((sequence == sequence[..., -1:])[..., None], u, 0)
    added = jnp.einsum("bncq,cd->nbqd", u, H[::-1], precision=HIGHEST)
    carries = None if sequence is None else (sequence[..., -1] == 0).T
    decay = constant(matrix_power(A, c), u.dtype)

    def body(state, chunk):
        added, carries = chunk
        kept = jnp.matmul(state, decay.T, precision=HIGHEST)
        return added + (kept if carries is None else jnp.where(carries[:, None, None], kept, 0)), state

    _, starts = jax.lax.scan(body, state, (added, carries))
    return jnp.swapaxes(starts, 0, 1)


def _within(u, H, sequence):
    """[b, n, c, q, d]: the contribution of a chunk's own inputs to each of its memories."""
    c = H.shape[0]
    lag = np.arange(c)[None] - np.arange(c)[:, None]  # [i, j]
    toeplitz = jnp.where((lag >= 0)[..., None], H[np.maximum(lag, 0)], 0)
    if sequence is None:
        b, n, _, q = u.shape
        return jnp.swapaxes(
            _times(jnp.swapaxes(u, 2, 3), toeplitz.reshape(c, -1)).reshape(b, n, q, c, -1), 2, 3
        )
    same = sequence[..., :, None] == sequence[..., None, :]
    # [b, n, i, j, q]; selecting keeps NaN out.
    seen = jnp.where((same & (lag >= 0))[..., None], u[:, :, :, None], 0)
    return jnp.einsum("bnijq,ijd->bnjqd", seen, toeplitz, precision=HIGHEST)


def spread(state, A, steps):
    """Ā^{j+1} s for j = 0 .. steps-1: state [b, n, q, d] -> [b, n, steps, q, d], by doubling."""
    power = A
    x = _times(state, constant(A, state.dtype).T)[:, :, None]
    while (done := x.shape[2]) < steps:
        more = _times(x[:, :, : steps - done], constant(power, state.dtype).T)
        x, power = jnp.concatenate([x, more], axis=2), _product(power, power)
    return x


def advance(A, steps, state, *, most):
    """Ā^steps s: the state [b, q, d] after steps [b] without input, none of them more than `most`."""
    power = A
    for bit in range(most.bit_length()):
        moved = _times(state, constant(power, state.dtype).T)
        state, power = (
            jnp.where(((steps >> bit) & 1 == 1)[:, None, None], moved, state),
            _product(power, power),
        )
    return state


def impulse_response(A, B, steps):
    """Āʲ B̄ for j = 0 .. steps-1: [steps, d], by doubling."""
    H, power = B[None], A
    while (done := H.shape[0]) < steps:
        joined = [H, _product(H[: steps - done], power.T)]
        H, power = (np if isinstance(H, np.ndarray) else jnp).concatenate(joined), _product(power, power)
    return H


def response(A, B, steps, dtype):
    """The spectrum [steps + 1, d] of the impulse response, padded to twice its length."""
    return jnp.fft.rfft(constant(impulse_response(A, B, steps), dtype), 2 * steps, axis=0)


def matrix_power(A, exponent):
    """A^exponent, exponent >= 1."""
    result, power = None, A
    while True:
        if exponent & 1:
            result = power if result is None else _product(result, power)
        exponent >>= 1
        if not exponent:
            return result
        power = _product(power, power)


def _times(x, matrix):
    """x [..., i] times matrix [i, o]. On a CPU the leading axes are merged, since XLA would transpose x for a
    gradient; elsewhere they are kept, since each may be sharded over its own mesh axis."""
    rows = x.reshape(-1, x.shape[-1]) if jax.default_backend() == "cpu" else x
    return jnp.matmul(rows, matrix, precision=HIGHEST).reshape(*x.shape[:-1], matrix.shape[1])


def _product(x, y):
    """Computed on the host in float64 if both are NumPy arrays: constants cost no device time and no
    precision."""
    return (
        x @ y
        if isinstance(x, np.ndarray) and isinstance(y, np.ndarray)
        else jnp.matmul(x, y, precision=HIGHEST)
    )


def constant(x, dtype):
    """A matrix from host or device in the dtype of the computation."""
    return jnp.asarray(x, dtype)
