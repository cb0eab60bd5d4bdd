"""The matrices of the Legendre memory, in float64 on the host: in float32 the matrix exponential is wrong by
up to 1e-4."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from seqlab.checks import UserError, check_choice


@functools.lru_cache(maxsize=64)
def legendre(order: int, theta: float, discretizer: str = "zoh") -> tuple[np.ndarray, np.ndarray]:
    """Ā [d, d] and B̄ [d] of the memory m_t = Ā m_{t-1} + B̄ u_t that holds the last `theta` inputs in
    `order` = d coefficients.

    The continuous system, for i, j = 0 .. d-1, is

        A_ij = (2i+1)/θ (-1 if i < j, else (-1)^(i-j+1))          B_i = (2i+1)/θ (-1)^i

    "zoh" keeps the input constant through a step, exp([[A, B], [0, 0]]) = [[Ā, B̄], [0, 1]], and is stable
    for every pair of order and theta that was tried. "euler", Ā = I + A and B̄ = B, is unstable unless theta
    is large, well above 4 d.

    The arrays are float64, read-only and cached.

    Raises:
      ValueError: if order or theta is not positive, or the discretizer is unknown.

    Source: Voelker, Kajić, Eliasmith, "Legendre Memory Units" (NeurIPS 2019), equations 1 and 2.
    """
    if isinstance(order, bool) or not isinstance(order, int) or order < 1:
        raise UserError(f"order must be a positive integer, got {order!r}")
    if not theta > 0:
        raise UserError(f"theta must be a positive number of steps, got {theta!r}")
    check_choice(discretizer, ("zoh", "euler"), "discretizer")
    i, j = np.arange(order)[:, None], np.arange(order)[None]
    rows = (2 * i + 1) / float(theta)
    A = rows * np.where(i < j, -1.0, (-1.0) ** (i - j + 1))
    B = rows * (-1.0) ** i
    if discretizer == "zoh":
        from scipy.linalg import expm

        joint = expm(np.block([[A, B], [np.zeros((1, order + 1))]]))
        A, B = joint[:order, :order], joint[:order, order:]
    else:
        A = np.eye(order) + A
    A, B = np.ascontiguousarray(A), np.ascontiguousarray(B[:, 0])
    A.flags.writeable = B.flags.writeable = False
    return A, B


def legendre_at(
    order: int, inverse_theta: Float[Array, ""], discretizer: str = "zoh"
) -> tuple[Float[Array, "d d"], Float[Array, " d"]]:
    """The matrices of `legendre` for a window that is learnt: of a traced 1/theta >= 0, in its dtype, and
    differentiable.

    In float32 the matrix exponential of "zoh" is wrong by 1e-6 (order 32) to 1e-4 (order 256, theta 128).

    Raises:
      ValueError: if order is not positive, or the discretizer is unknown.

    Source: keras-lmu, whose trainable windows are discretized anew at every step.
    """
    check_choice(discretizer, ("zoh", "euler"), "discretizer")
    A, B = legendre(order, 1.0, "euler")
    A, dtype = A - np.eye(order), inverse_theta.dtype
    if discretizer == "euler":
        return jnp.eye(order, dtype=dtype) + inverse_theta * jnp.asarray(
            A, dtype
        ), inverse_theta * jnp.asarray(B, dtype)
    joint = jnp.asarray(np.block([[A, B[:, None]], [np.zeros((1, order + 1))]]), dtype)
    with jax.default_matmul_precision("highest"):
        joint = jax.scipy.linalg.expm(inverse_theta * joint)
    return joint[:order, :order], joint[:order, order]


def delay_decoder(order: int, theta: float, delays: np.ndarray) -> np.ndarray:
    """[len(delays), order]: row k reads the input of `delays[k]` steps ago, 0 <= delay <= theta, out of a
    memory.

        u(t - τ) ≈ sum_i P_i(2τ/θ - 1) m_i(t)          P_i the Legendre polynomials

    A zero-order hold delays its input by half a step: for the input of exactly τ steps ago use a delay of τ +
    1/2.
    """
    delays = np.asarray(delays, np.float64)
    if delays.ndim != 1 or np.any(delays < 0) or np.any(delays > theta):
        raise UserError(f"delays must be a list of numbers between 0 and theta={theta}, got {delays}")
    return np.polynomial.legendre.legvander(2 * delays / theta - 1, order - 1)
