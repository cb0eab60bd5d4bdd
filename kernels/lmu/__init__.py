"""The linear memory of an LMU: a window of the past in Legendre coefficients, by one fixed linear recurrence.

Implementations: `reference` (one step in a scan), `xla` (chunks of matrix products; the default on all
platforms), `fft` (one convolution over the whole call; by name only).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from seqlab.checks import UserError
from seqlab.kernels.dispatch import Op, vary_alike
from seqlab.kernels.lmu.legendre import delay_decoder, legendre
from seqlab.kernels.lmu.xla import advance
from seqlab.parallel import sequence_parallel
from seqlab.shapes import Steps, accumulator

__all__ = ["delay_decoder", "legendre", "lmu"]

_op = Op("lmu", __name__, ("reference", "xla", "fft"))


def lmu(
    u: Float[Array, "b t q"],
    A: Float[Array | np.ndarray, "d d"],
    B: Float[Array | np.ndarray, " d"],
    *,
    initial_state: Float[Array, "b q d"] | None = None,
    reset: Steps | None = None,
    valid: Steps | None = None,
    chunk: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "b t q d"], Float[Array, "b q d"]]:
    """The time-invariant linear memory: q channels, each with the same d-dimensional state.

        m_t[q] = A m_{t-1}[q] + B u_t[q]

    The input of a step is inside the memory of that step. With the matrices of `legendre(d, theta)` m_t holds
    the coefficients of the last theta inputs in Legendre polynomials, but A and B may be any. All arithmetic
    is in float32 (float64) at full precision whatever the
    dtype of u: operands with 8 significant bits, a TPU's default, cause errors of 1 to 9 % in m.

    Args:
      u: [b, t, q].
      A, B: [d, d] and [d]. For NumPy arrays, powers of A are computed in float64 on the host, once per
        compilation; traced arrays (a trainable window) work too.
      initial_state: [b, q, d]; zeros by default.
      reset: [b, t]; where True a fresh sequence starts and the state, NaN included, is forgotten.
      valid: [b, t]; a step with False has no effect and does not decay the memory: its input, NaN included,
        reaches no other output, no state and no gradient, its own output is 0 and its reset is ignored.
      chunk: steps per matrix product of `xla`; None: automatic.
      implementation: "reference", "xla" or "fft"; None: chosen by `seqlab.kernels.dispatch`.

    Returns:
      m [b, t, q, d] in the dtype of u, and the final state [b, q, d] in `accumulator` of it. Both may be
      differentiated in any way.

    Raises:
      ValueError: if an argument has the wrong shape, type or range, or `implementation` is unknown.
      NotImplementedError: `implementation="fft"` with `reset` or `valid`.

    Source: Voelker, Kajić, Eliasmith, "Legendre Memory Units" (NeurIPS 2019), equation 9; Chilkuri, Eliasmith
    (arXiv 2102.11417) for the convolution.
    """
    _check_arrays(u, A, B, initial_state)
    for name, flags in (("reset", reset), ("valid", valid)):
        if flags is not None and (flags.shape != u.shape[:2] or flags.dtype != bool):
            raise UserError(
                f"{name} must be a boolean array [b, t] = {u.shape[:2]}, got {flags.dtype}{flags.shape}"
            )
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
        raise UserError(f"chunk must be a positive integer or None, got {chunk!r}")
    (b, t, q), d, dtype = u.shape, B.shape[0], accumulator(u.dtype)
    state = None if initial_state is None else initial_state.astype(dtype)
    if t == 0:
        return jnp.zeros((b, 0, q, d), u.dtype), jnp.zeros((b, q, d), dtype) if state is None else state
    reset = reset & valid if reset is not None and valid is not None else reset
    if sequence_parallel.parts(t) > 1:
        valid, constant = (
            sequence_parallel.all_valid(valid, u.shape),
            isinstance(A, np.ndarray) and isinstance(B, np.ndarray),
        )
        run = functools.partial(
            _stretch, (A, B) if constant else (), {"chunk": chunk, "implementation": implementation}
        )
        return sequence_parallel.split(run, (u, reset, valid), (() if constant else (A, B), state))
    if not (isinstance(A, np.ndarray) and isinstance(B, np.ndarray)):
        A, B = jnp.asarray(A, dtype), jnp.asarray(B, dtype)
    wide, state, reset, valid = vary_alike(u.astype(dtype), state, reset, valid)
    m, state = _op(wide, A, B, state, reset, valid, chunk=chunk, implementation=implementation)
    return m.astype(u.dtype), state


def _stretch(constants: tuple, options: dict, timed: tuple, whole: tuple) -> tuple[Array, Array]:
    """The work of one device if time is split over several. A segment multiplies the state by a power of A,
    the number of its valid steps."""
    (u, reset, valid), (matrices, initial_state) = timed, whole
    A, B = matrices or constants
    run = functools.partial(lmu, u, A, B, reset=reset, valid=valid, **options)
    end = jax.checkpoint(lambda: run()[1])()
    steps = jnp.full(len(u), u.shape[1]) if valid is None else jnp.sum(valid, axis=1)
    stretch = sequence_parallel.Stretch(end, steps, sequence_parallel.continues(reset, valid))
    pass_by = functools.partial(advance, A, most=u.shape[1] * sequence_parallel.count())
    m, end = run(initial_state=sequence_parallel.carried(stretch, initial_state, pass_by, jnp.add))
    return m, sequence_parallel.of_last(end)


def _check_arrays(
    u: Array, A: Array | np.ndarray, B: Array | np.ndarray, initial_state: Array | None
) -> None:
    if u.ndim != 3:
        raise UserError(f"u must be an array [b, t, q], got {u.dtype}{u.shape}")
    b, _, q = u.shape
    if A.ndim != 2 or A.shape[0] != A.shape[1] or A.shape[0] == 0:
        raise UserError(f"A must be a square matrix [d, d], got {A.shape}")
    d = A.shape[0]
    if B.shape != (d,):
        raise UserError(f"B must be [d] = ({d},) as A {A.shape}, got {B.shape}")
    if initial_state is not None and initial_state.shape != (b, q, d):
        raise UserError(f"initial_state must be [b, q, d] = {(b, q, d)}, got {initial_state.shape}")
    for name, array in (("u", u), ("A", A), ("B", B), ("initial_state", initial_state)):
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            raise UserError(f"{name} must hold floating-point numbers, got {array.dtype}")
