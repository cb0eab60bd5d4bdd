"""Mamba's selective scan: a diagonal linear recurrence whose step size, input map and output map depend on
the token.

Implementations: `reference` (one step in a scan), `xla` (chunks, memory linear in time; runs everywhere),
`pallas_tpu`, `triton_gpu`.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from seqlab.checks import UserError
from seqlab.kernels.dispatch import Op, vary_alike
from seqlab.parallel import sequence_parallel
from seqlab.shapes import Steps, accumulator
from seqlab.state import mask_steps

_op = Op("scan", __name__, ("reference", "xla", "pallas_tpu", "triton_gpu"))


def scan(
    u: Float[Array, "b t e"],
    delta: Float[Array, "b t e"],
    A: Float[Array, "e n"],
    B: Float[Array, "b t n"],
    C: Float[Array, "b t n"],
    *,
    initial_state: Float[Array, "b e n"] | None = None,
    reset: Steps | None = None,
    valid: Steps | None = None,
    chunk: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "b t e"], Float[Array, "b e n"]]:
    """The selective scan of S6, without skip and gate.

        h_t[e, n] = exp(Δ_t[e] A[e, n]) h_{t-1}[e, n] + Δ_t[e] u_t[e] B_t[n]          y_t[e] = sum_n C_t[n]
        h_t[e, n]

    The transition is exact (zero-order hold), the input map is Euler's, and the read-out sees the state after
    the update. A segment of time is the affine map h -> exp(A sum Δ) h + (its end state from zero), so only
    the sum of Δ has to be kept besides the state.

    Args:
      u: [b, t, e], the inputs.
      delta: [b, t, e], the step sizes Δ, positive: bias and softplus have been applied.
      A: [e, n], negative.
      B, C: [b, t, n], the input map and the output map of every step. The five may differ in dtype.
      initial_state: [b, e, n]; zeros by default.
      reset: [b, t]; where True a fresh sequence starts and the state, NaN included, is forgotten.
      valid: [b, t]; a step with False has no effect: its inputs, NaN included, reach no other output, no
        state and no gradient, its own output is 0 and its reset is ignored.
      chunk: steps recomputed at a time in the gradient, which keeps one state per chunk; None: automatic.
      implementation: "reference", "xla", "pallas_tpu" or "triton_gpu"; None: chosen by
        `seqlab.kernels.dispatch`.

    Returns:
      y [b, t, e] in the dtype of u, and the final state [b, e, n] in `accumulator` of the widest input dtype.
      Both may be differentiated, in any way through `reference`, once and in reverse through the others.

    Raises:
      ValueError: if an argument has the wrong shape, type or range, or `implementation` is unknown.

    Source: Mamba (arXiv 2312.00752), equation 2 and algorithm 2.
    """
    _check_arrays(u, delta, A, B, C, initial_state)
    for name, flags in (("reset", reset), ("valid", valid)):
        if flags is not None and (flags.shape != u.shape[:2] or flags.dtype != bool):
            raise UserError(
                f"{name} must be a boolean array [b, t] = {u.shape[:2]}, got {flags.dtype}{flags.shape}"
            )
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
        raise UserError(f"chunk must be a positive integer or None, got {chunk!r}")
    dtype = accumulator(jnp.result_type(u, delta, A, B, C))
    state = jnp.zeros((u.shape[0], *A.shape), dtype) if initial_state is None else initial_state.astype(dtype)
    if u.shape[1] == 0:
        return u, state
    if sequence_parallel.parts(u.shape[1]) > 1:  # steps of zeros, which fill up the last stretch, do nothing
        run = functools.partial(_stretch, {"chunk": chunk, "implementation": implementation})
        return sequence_parallel.split(
            run, (u, delta, B, C, reset, valid), (A, None if initial_state is None else state)
        )
    if valid is not None:
        # An invalid step is a step of length 0, exp(0 A) = 1 and 0 u B = 0; selecting, not multiplying, keeps
        # NaN out.
        u, delta, B, C = (mask_steps(x, valid) for x in (u, delta, B, C))
        reset = None if reset is None else reset & valid
    y, state = _op(*vary_alike(u, delta, A, B, C, state, reset), chunk=chunk, implementation=implementation)
    return mask_steps(y, valid), state


def _stretch(options: dict, timed: tuple, whole: tuple) -> tuple[Array, Array]:
    """The work of one device if time is split over several: first the affine map of its segment, then its
    steps from the incoming state."""
    (u, delta, B, C, reset, valid), (A, initial_state) = timed, whole
    run = functools.partial(scan, u, delta, A, B, C, reset=reset, valid=valid, **options)
    end = jax.checkpoint(lambda: run()[1])()
    total = jnp.sum(mask_steps(delta, valid).astype(end.dtype), axis=1)
    stretch = sequence_parallel.Stretch(
        end, jnp.exp(total[..., None] * A), sequence_parallel.continues(reset, valid)
    )
    y, end = run(initial_state=sequence_parallel.carried(stretch, initial_state))
    return y, sequence_parallel.of_last(end)


def _check_arrays(u: Array, delta: Array, A: Array, B: Array, C: Array, initial_state: Array | None) -> None:
    if u.ndim != 3:
        raise UserError(f"u must be an array [b, t, e], got {u.dtype}{u.shape}")
    b, t, e = u.shape
    if A.ndim != 2 or A.shape[0] != e or A.shape[1] == 0:
        raise UserError(f"A must be [e, n] with e={e} as u {u.shape} and n > 0, got {A.shape}")
    n = A.shape[1]
    shapes = {
        "u": (b, t, e),
        "delta": (b, t, e),
        "A": (e, n),
        "B": (b, t, n),
        "C": (b, t, n),
        "initial_state": (b, e, n),
    }
    axes = {
        "u": "b, t, e",
        "delta": "b, t, e",
        "A": "e, n",
        "B": "b, t, n",
        "C": "b, t, n",
        "initial_state": "b, e, n",
    }
    for (name, shape), x in zip(shapes.items(), (u, delta, A, B, C, initial_state), strict=True):
        if x is not None and (x.shape != shape or not jnp.issubdtype(x.dtype, jnp.floating)):
            raise UserError(
                f"{name} must be a floating-point array [{axes[name]}] = {shape}, got {x.dtype}{x.shape}"
            )
