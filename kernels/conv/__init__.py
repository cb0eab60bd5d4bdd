"""The short causal convolution in front of recurrent mixers: depthwise, over time, with a state.

Implementations: `reference` (a sliding window), `xla` (shifted products; runs everywhere), `pallas_tpu`,
`triton_gpu`.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from seqlab.checks import UserError
from seqlab.kernels.dispatch import Op, vary_alike
from seqlab.parallel import sequence_parallel
from seqlab.shapes import Activations, Steps

_op = Op("conv", __name__, ("reference", "xla", "pallas_tpu", "triton_gpu"))


def conv(
    x: Activations,
    weight: Float[Array, "w d"],
    bias: Float[Array, " d"] | None = None,
    *,
    initial_state: Float[Array, "b p d"] | None = None,
    reset: Steps | None = None,
    valid: Steps | None = None,
    implementation: str | None = None,
) -> tuple[Activations, Float[Array, "b p d"]]:
    """Causal depthwise convolution over time: the weighted sum of the current input and the w-1 before it.

        y_t[d] = bias[d] + sum_{j < w} weight[j, d] x_{t-w+1+j}[d]

    The last tap meets the current input. Inputs before the beginning of the sequence count as 0.

    Args:
      x: [b, t, d].
      weight: [w, d], w >= 1.
      bias: [d]; none by default.
      initial_state: [b, w-1, d], the last inputs of the sequence so far, oldest first, zeros where it had
        fewer; zeros by default.
      reset: [b, t]; where True a fresh sequence starts, and what came before, NaN included, is forgotten.
      valid: [b, t]; a step with False has no effect: its input, NaN included, reaches no other output, no
        state and no gradient, windows skip it, its own output is 0 and its reset is ignored.
      implementation: "reference", "xla", "pallas_tpu" or "triton_gpu"; None: chosen by
        `seqlab.kernels.dispatch`.

    Returns:
      y [b, t, d], summed in `accumulator` of the widest input dtype, and the final state [b, w-1, d], both in
      the dtype of x. Both may be differentiated, in any way through `reference`, once and in reverse through
      the others.

    Raises:
      ValueError: if an argument has the wrong shape or type, or `implementation` is unknown.

    Source: the layer conv1d of Mamba (arXiv 2312.00752).
    """
    _check_arrays(x, weight, bias, initial_state)
    for name, flags in (("reset", reset), ("valid", valid)):
        if flags is not None and (flags.shape != x.shape[:2] or flags.dtype != bool):
            raise UserError(
                f"{name} must be a boolean array [b, t] = {x.shape[:2]}, got {flags.dtype}{flags.shape}"
            )
    (b, t, d), w = x.shape, weight.shape[0]
    bias = jnp.zeros((d,), weight.dtype) if bias is None else bias
    state = jnp.zeros((b, w - 1, d), x.dtype) if initial_state is None else initial_state.astype(x.dtype)
    if t == 0:
        return x, state
    reset = reset & valid if reset is not None and valid is not None else reset
    if sequence_parallel.parts(t) > 1:
        valid = sequence_parallel.all_valid(valid, x.shape)
        run = functools.partial(_stretch, implementation)
        return sequence_parallel.split(run, (x, reset, valid), (weight, bias, initial_state))
    return _op(*vary_alike(x, weight, bias, state, reset, valid), implementation=implementation)


def _stretch(implementation: str | None, timed: tuple, whole: tuple) -> tuple[Array, Array]:
    """The work of one device if time is split over several: its initial state is the end of the previous
    segments."""
    (x, reset, valid), (weight, bias, initial_state) = timed, whole
    kept, options = weight.shape[0] - 1, {"reset": reset, "valid": valid, "implementation": implementation}
    initial = None if initial_state is None else initial_state.astype(x.dtype)
    if valid is None and x.shape[1] >= kept:  # earlier inputs have left the window
        end, moved = conv(x, weight, **options)[1], None
    else:  # a linear map, as a matrix: the images of the identity's columns
        zeros, eye = (
            jnp.zeros((len(x), x.shape[1], kept), x.dtype),
            jnp.broadcast_to(jnp.eye(kept, dtype=x.dtype), (len(x), kept, kept)),
        )
        both = jnp.concatenate([jnp.zeros((len(x), kept, x.shape[2]), x.dtype), eye], axis=-1)
        taps = jnp.zeros((kept + 1, x.shape[2] + kept), x.dtype)
        _, end = conv(jnp.concatenate([x, zeros], axis=-1), taps, initial_state=both, **options)
        end, moved = end[..., : x.shape[2]], end[..., x.shape[2] :]
    stretch = sequence_parallel.Stretch(end, moved, sequence_parallel.continues(reset, valid))
    start = sequence_parallel.carried(
        stretch, initial, functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    )
    y, end = conv(x, weight, bias, initial_state=start, **options)
    return y, sequence_parallel.of_last(end)


def _check_arrays(x: Array, weight: Array, bias: Array | None, initial_state: Array | None) -> None:
    if x.ndim != 3:
        raise UserError(f"x must be an array [b, t, d], got {x.dtype}{x.shape}")
    b, _, d = x.shape
    if weight.ndim != 2 or weight.shape[0] == 0 or weight.shape[1] != d:
        raise UserError(f"weight must be [w, d] with w >= 1 and d={d} as x {x.shape}, got {weight.shape}")
    if bias is not None and bias.shape != (d,):
        raise UserError(f"bias must be [d] = ({d},), got {bias.shape}")
    state = (b, weight.shape[0] - 1, d)
    if initial_state is not None and initial_state.shape != state:
        raise UserError(f"initial_state must be [b, w-1, d] = {state}, got {initial_state.shape}")
    for name, array in (("x", x), ("weight", weight), ("bias", bias), ("initial_state", initial_state)):
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            raise UserError(f"{name} must hold floating-point numbers, got {array.dtype}")
