"""Spiking neurons: leaky integrate-and-fire units that run along time, trained through their spikes by a
surrogate gradient."""

import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from seqlab.checks import UserError
from seqlab.models.batch_norm import BatchNorm
from seqlab.models.layers import step_by_step
from seqlab.module import Module
from seqlab.shapes import Activations, Steps, accumulator
from seqlab.state import State, mask_steps


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def fire(z: Array, alpha: float) -> Array:
    """1 where z >= 0, else 0, with the surrogate derivative of sigmoid(alpha z): alpha s (1 - s)."""
    return (z >= 0).astype(z.dtype)


@fire.defjvp
def _fire_jvp(alpha: float, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (z,), (dz,) = primals, tangents
    s = jax.nn.sigmoid(alpha * z)
    return fire(z, alpha), alpha * s * (1 - s) * dz


def lif(
    x: Activations,
    v: Float[Array, "b d"] | None = None,
    *,
    tau: float = 2.0,
    threshold: float = 1.0,
    rest: float | None = 0.0,
    decay_input: bool = True,
    detach_reset: bool = True,
    alpha: float = 4.0,
    reset: Steps | None = None,
    valid: Steps | None = None,
) -> tuple[Activations, Float[Array, "b t d"]]:
    """Leaky integrate-and-fire along time: spikes [b, t, d] of 0 and 1 in the dtype of x, membranes after the
    reset [b, t, d] in float32.

        v <- v + (x_t - (v - rest)) / tau
        s_t = 1 if v >= threshold else 0          v <- (1 - s_t) v + s_t rest

    Args:
      x: input currents.
      v: membranes before the first step, `rest` by default.
      rest: the membrane after a spike (hard reset). None: a spike subtracts `threshold` (soft reset) and the
        leak is towards 0.
      decay_input: False adds x_t undecayed, v <- v - (v - rest) / tau + x_t.
      detach_reset: no gradient through s_t where it resets the membrane.
      alpha: slope of the surrogate gradient, see `fire`.
      reset, valid: as in all mixers; an invalid step does not leak, its spikes are 0 and its membrane is
        unchanged.

    Source: the multi-step LIF node of spikingjelly 0.0.0.0.14, with its defaults.
    """
    if not tau >= 1:
        raise UserError(f"tau must be a number of steps >= 1, got {tau!r}")
    wide, base = accumulator(x.dtype), 0.0 if rest is None else rest
    start = jnp.full_like(x, base, wide, shape=(x.shape[0], x.shape[2])) if v is None else v.astype(wide)
    reset = reset & valid if reset is not None and valid is not None else reset

    def step(old: Array, now: tuple[Array | None, ...]) -> tuple[Array, tuple[Array, Array]]:
        x, reset, valid = now
        v = old if reset is None else jnp.where(reset[:, None], base, old)
        v = v + (x - (v - base)) / tau if decay_input else v - (v - base) / tau + x
        s = fire(v - threshold, alpha)
        fallen = jax.lax.stop_gradient(s) if detach_reset else s
        v = v - fallen * threshold if rest is None else (1 - fallen) * v + fallen * rest
        if valid is not None:
            s, v = jnp.where(valid[:, None], s, 0), jnp.where(valid[:, None], v, old)
        return v, (s, v)

    _, (spikes, membranes) = step_by_step(step, start, (mask_steps(x, valid).astype(wide), reset, valid))
    return spikes.astype(x.dtype), membranes


class Spike(Module):
    """BatchNorm, then leaky integrate-and-fire, in place of an activation.

    A spike is a threshold: if a membrane is within rounding error of it, another split of the same sequence,
    another machine or another precision may fire differently, and then differ by whole spikes. In exact
    arithmetic the streaming contract holds; with float32 sums such near ties cannot be excluded (a membrane
    within 1e-6 of the threshold, one in a million steps).

    State: the membrane v [b, d], float32.
    """

    causal, lookahead, exact = True, 0, True
    torch_names: ClassVar = {"norm": ""}

    def __init__(self, dim: int, *, tau: float = 2.0, threshold: float = 1.0, rngs: nnx.Rngs | None = None):
        self.dim, self.tau, self.threshold = dim, tau, threshold
        self.norm = BatchNorm(dim)

    def init_state(self, batch: int, dtype: jax.typing.DTypeLike = jnp.float32) -> Float[Array, "b d"]:
        return jnp.zeros((batch, self.dim), accumulator(dtype))

    def __call__(
        self,
        x: Activations,
        state: State | None = None,
        reset: Steps | None = None,
        valid: Steps | None = None,
    ) -> tuple[Activations, State | None]:
        spikes, v = lif(
            self.norm(x, valid), state, tau=self.tau, threshold=self.threshold, reset=reset, valid=valid
        )
        return spikes, (state if state is None or x.shape[1] == 0 else v[:, -1])
