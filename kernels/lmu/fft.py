"""The whole call as one convolution with the impulse response Āᵗ B̄: t log t, and no state in between (arXiv
2102.11417)."""

import jax.numpy as jnp

from seqlab.kernels.lmu.xla import response, spread


def lmu(u, A, B, initial_state, reset, valid, *, chunk=None):
    """`m, final_state`; see `reference.lmu` for the arguments."""
    if reset is not None or valid is not None:
        raise NotImplementedError(
            "one convolution over all steps cannot begin anew at resets or pass over invalid steps"
        )
    time = u.shape[1]
    # Products of spectra are circular: 2t points keep the end of the sequence out of its beginning.
    spectrum = jnp.fft.rfft(u, 2 * time, axis=1)[..., None] * response(A, B, time, u.dtype)[:, None, :]
    m = jnp.fft.irfft(spectrum, 2 * time, axis=1)[:, :time]
    if initial_state is not None:
        m = m + spread(initial_state[:, None], A, time)[:, 0]
    return m, m[:, -1]
