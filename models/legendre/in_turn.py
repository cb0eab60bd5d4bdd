"""Sequential composition of mixers with look-ahead: after a part with n steps of delay, all later parts are n
steps late as well.

A convolution centred on its step needs the next input. When streaming, it outputs at step t the result of
step t-1, and its first output belongs to no input step. Downstream parts must treat it as invalid and start
their own sequence one step later. The stream of the whole is then exactly its parallel form, delayed by the
sum of the look-aheads.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from seqlab import kernels
from seqlab.checks import UserError, check_positive
from seqlab.mixer import Composite
from seqlab.models.layers import matmul
from seqlab.module import Module
from seqlab.shapes import Activations, Steps
from seqlab.state import Segments, State, mask_steps, segments

Lengths = Int[Array, " b"]


def init_in_turn(
    parts: Sequence[Any], batch: int, dtype: jax.typing.DTypeLike = jnp.float32
) -> tuple[Lengths | tuple[()], tuple[State, ...]]:
    """The state of `in_turn`: the number of steps seen (() without look-ahead), and the states of the
    parts."""
    seen = jnp.zeros((batch,), jnp.int32) if any(part.lookahead for part in parts) else ()
    return seen, tuple(part.init_state(batch, dtype) for part in parts)


def in_turn(
    parts: Sequence[Any],
    x: Activations,
    state: State | None = None,
    reset: Steps | None = None,
    valid: Steps | None = None,
) -> tuple[Float[Array, "b t o"], State | None]:
    """x through all `parts` (mixers); when streaming, delayed by the sum of their look-aheads."""
    if state is None:
        for part in parts:
            x, _ = part(x, None, reset, valid)
        return x, None
    seen, states = state
    ahead = sum(part.lookahead for part in parts)
    steps = segments(x.shape[:2], seen, reset, valid) if ahead else None
    late, new = 0, []
    for part, old in zip(parts, states, strict=True):
        x, updated = part(x, old, *(_later(steps, late, reset) if late else (reset, valid)))
        new.append(updated)
        late += part.lookahead
    # Only whether a sequence has fewer than `ahead` steps matters; the count is capped so that it cannot
    # overflow.
    seen = jnp.minimum(steps.length, ahead + 1) if ahead else ()
    return x, (seen, tuple(new))


def _later(steps: Segments, late: int, reset: Steps | None) -> tuple[Steps | None, Steps]:
    """The flags of a part that is `late` steps late: its sequence starts, and its steps are valid, after that
    many steps."""
    there = steps.ids > 0
    return (None if reset is None else there & (steps.positions == late)), there & (steps.positions >= late)


def map_in_turn(parts: Sequence[Any], state: State, function: Callable[[Any, State], State]) -> State:
    """`state` of `in_turn` with each part's state replaced by `function(part, its state)`."""
    seen, states = state
    return seen, tuple(function(part, own) for part, own in zip(parts, states, strict=True))


class Residual(Composite):
    """x + f(x) with f the composition of `parts`; x is delayed by their look-ahead. No parameters of its
    own."""

    def __init__(self, dim: int, *parts: Any):
        self.dim, self.parts = dim, parts

    def children(self) -> tuple[Any, ...]:
        return self.parts

    def map_states(self, state: State, function: Callable[[Any, State], State]) -> State:
        waiting, inner = state
        return waiting, map_in_turn(self.parts, inner, function)

    def init_state(self, batch: int, dtype: jax.typing.DTypeLike = jnp.float32) -> tuple[Array, State]:
        return jnp.zeros((batch, self.lookahead, self.dim), dtype), init_in_turn(self.parts, batch, dtype)

    def __call__(
        self,
        x: Activations,
        state: State | None = None,
        reset: Steps | None = None,
        valid: Steps | None = None,
    ) -> tuple[Activations, State | None]:
        waiting, inner = (None, None) if state is None else state
        y, inner = in_turn(self.parts, x, inner, reset, valid)
        if state is None:
            return x + y, None
        if self.lookahead:
            x, waiting = _ago(x, self.lookahead, self.lookahead + 1, waiting, reset, valid)
        return x + y, (waiting, inner)


class TimeConv(Module):
    """A full convolution over time, [b, t, inputs] -> [b, t, outputs]: all channels of `width` steps mixed,
    with zero padding.

        y_t = sum_{j < w} W_j x_{t - (w-1) + j + lookahead}

    `centred` looks (w-1)/2 steps ahead, as a convolution with the same padding on both sides does; otherwise
    none. Initialised uniform in ±1/sqrt(width * inputs), PyTorch's default.

    State: the last w-1 inputs [b, w-1, inputs].
    """

    causal, exact = True, True
    torch_layout: ClassVar = {"weight": "[out, in, w]"}

    def __init__(self, inputs: int, outputs: int, *, width: int = 3, centred: bool = False, rngs: nnx.Rngs):
        bound = 1 / math.sqrt(check_positive("inputs", inputs) * check_positive("width", width))
        if centred and width % 2 == 0:
            raise UserError(f"width must be odd where the convolution is centred, got {width}")
        self.inputs, self.width, self.lookahead = inputs, width, (width - 1) // 2 if centred else 0
        self.weight = nnx.Param(
            jax.random.uniform(rngs.params(), (width, inputs, outputs), minval=-bound, maxval=bound)
        )

    def init_state(self, batch: int, dtype: jax.typing.DTypeLike = jnp.float32) -> Float[Array, "b p i"]:
        return jnp.zeros((batch, self.width - 1, self.inputs), dtype)

    def __call__(
        self,
        x: Activations,
        state: State | None = None,
        reset: Steps | None = None,
        valid: Steps | None = None,
    ) -> tuple[Activations, State | None]:
        ahead = 0 if state is not None else self.lookahead
        new, taps = None, [mask_steps(x, valid)]  # oldest first
        for ago in range(1, self.width - ahead):
            y, new = _ago(x, ago, self.width, state, reset, valid)
            taps.insert(0, y)
        for _ in range(ahead):
            taps.append(_next(taps[-1], reset, valid))
        weight = self.weight[...].astype(x.dtype)
        y = matmul(jnp.concatenate(taps, axis=-1), weight.reshape(-1, weight.shape[-1]))
        return y, (None if state is None else state if new is None else new)


def _ago(
    x: Activations, steps: int, width: int, state: State | None, reset: Steps | None, valid: Steps | None
) -> tuple[Activations, State]:
    """A delay by a number of valid steps, 0 before the sequence: a convolution with one tap."""
    tap = np.eye(width)[width - 1 - steps][:, None]
    weight = jnp.broadcast_to(jnp.asarray(tap, x.dtype), (width, x.shape[-1]))
    return kernels.conv(x, weight, initial_state=state, reset=reset, valid=valid)


def _next(x: Activations, reset: Steps | None, valid: Steps | None) -> Activations:
    """The input of the next valid step, 0 where the sequence ends."""
    if x.shape[1] == 0:
        return x
    if reset is None and valid is None:
        return jnp.pad(x[:, 1:], ((0, 0), (0, 1), (0, 0)))
    batch, time = x.shape[:2]
    index = jnp.broadcast_to(jnp.arange(time), (batch, time))
    here = index if valid is None else jnp.where(valid, index, time)
    following = jnp.pad(
        jax.lax.cummin(here, axis=1, reverse=True)[:, 1:], ((0, 0), (0, 1)), constant_values=time
    )
    at = jnp.minimum(following, time - 1)
    there = following < time if valid is None else (following < time) & valid
    if reset is not None:
        there &= ~jnp.take_along_axis(reset, at, axis=1)
    return mask_steps(jnp.take_along_axis(x, at[..., None], axis=1), there)
