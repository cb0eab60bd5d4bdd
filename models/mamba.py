"""Mamba: a gated, diagonal state-space model whose step size, input map and output map depend on the token (arXiv 2312.00752)."""

import math
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from seqlab import kernels
from seqlab.models.layers import Linear, ShortConv, positive
from seqlab.module import Module
from seqlab.shapes import Activations, Steps, accumulator
from seqlab.state import State, mask_steps


class MambaState(NamedTuple):
    """`conv` [b, w-1, e]: the last inputs of the convolution; `ssm` [b, e, n]: the recurrent state, float32."""

    conv: Float[Array, "b w-1 e"]
    ssm: Float[Array, "b e n"]


class Mamba(Module):
    """The S6 mixer. Symbols of the paper: E = expand * d inner channels, N = state_size, R = rank of the step size, K = conv_width.

        a, z = in_proj(x);  c = silu(conv(a));  r, B, C = x_proj(c);  Δ = softplus(dt_proj(r))
        h_t = exp(Δ_t A) h_{t-1} + Δ_t c_t B_t;  y_t = C_t h_t + D c_t;  out_proj(y * silu(z))

    The state transition is exact, the input map is Euler's (Δ B), as in the published code; a chunk continues the scan from its state,
    whatever its length.
    """

    causal, lookahead, exact = True, 0, True
    torch_names: ClassVar = {"conv": "conv1d"}

    def __init__(
        self,
        dim: int,
        *,
        expand: int = 2,
        state_size: int = 16,
        conv_width: int = 4,
        dt_rank: int | None = None,
        conv_bias: bool = True,
        bias: bool = False,
        out_scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        self.dim, self.inner, self.state_size = dim, positive("expand", expand) * dim, positive("state_size", state_size)
        self.dt_rank = -(-dim // 16) if dt_rank is None else positive("dt_rank", dt_rank)
        self.in_proj = Linear(dim, 2 * self.inner, bias=bias, rngs=rngs)
        self.conv = ShortConv(self.inner, width=conv_width, bias=conv_bias, rngs=rngs)
        self.x_proj = Linear(self.inner, self.dt_rank + 2 * state_size, rngs=rngs)
        self.dt_proj = Linear(self.dt_rank, self.inner, bias=True, scale=1 / math.sqrt(3), rngs=rngs)
        self.dt_proj.bias[...] = _inverse_softplus_of_log_uniform(rngs.params(), self.inner)
        self.A_log = nnx.Param(jnp.broadcast_to(jnp.log(jnp.arange(1, state_size + 1, dtype=jnp.float32)), (self.inner, state_size)))
        self.D = nnx.Param(jnp.ones((self.inner,)))
        self.out_proj = Linear(self.inner, dim, bias=bias, scale=out_scale, rngs=rngs)

    def init_state(self, batch: int, dtype: jax.typing.DTypeLike = jnp.float32) -> MambaState:
        ssm = jnp.zeros((batch, self.inner, self.state_size), accumulator(dtype))
        return MambaState(self.conv.init_state(batch, dtype), ssm)

    def __call__(self, x: Activations, state: State | None = None, reset: Steps | None = None, valid: Steps | None = None):
        conv, ssm = (None, None) if state is None else state
        a, z = jnp.split(self.in_proj(mask_steps(x, valid)), 2, axis=-1)
        c, conv = self.conv(a, conv, reset, valid)
        rank, B, C = jnp.split(self.x_proj(c), [self.dt_rank, self.dt_rank + self.state_size], axis=-1)
        wide = accumulator(x.dtype)  # step sizes and decays in float32 whatever the activations are
        delta = jax.nn.softplus(rank.astype(wide) @ self.dt_proj.weight[...].astype(wide) + self.dt_proj.bias[...].astype(wide))
        A = -jnp.exp(self.A_log[...].astype(wide))
        y, ssm = kernels.scan(c, delta, A, B, C, initial_state=ssm, reset=reset, valid=valid)
        y = y + self.D[...].astype(x.dtype) * c
        return self.out_proj(y * jax.nn.silu(z)), (None if state is None else MambaState(conv, ssm))


def _inverse_softplus_of_log_uniform(key: jax.Array, size: int, low: float = 1e-3, high: float = 0.1, floor: float = 1e-4) -> Array:
    """Biases that make softplus(bias) log-uniform in [low, high]: the step sizes at initialisation."""
    dt = jnp.exp(jax.random.uniform(key, (size,)) * (math.log(high) - math.log(low)) + math.log(low))
    dt = jnp.maximum(dt, floor)
    return dt + jnp.log(-jnp.expm1(-dt))
