"""Mamba-2: the state-space model with one decay per head, so that its scan is linear attention (arXiv
2405.21060)."""

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from seqlab import kernels
from seqlab.checks import UserError, check_choice, check_divides, check_positive
from seqlab.models.layers import Linear, ShortConv, step_size_bias
from seqlab.module import Module
from seqlab.shapes import Activations, Steps, accumulator
from seqlab.state import State, mask_steps


class Mamba2State(NamedTuple):
    """`conv` [b, w-1, e + 2 g n]: the last inputs of the convolution; `ssm` [b, h, n, p]: the recurrent
    state, float32."""

    conv: Float[Array, "b p d"]
    ssm: Float[Array, "b h n p"]


class GatedRMSNorm(Module):
    """RMS norm of y * silu(z), or with `gate_first=False` RMS norm of y, times silu(z); computed separately
    over `groups` equal parts of the channels."""

    def __init__(
        self,
        dim: int,
        groups: int = 1,
        *,
        eps: float = 1e-5,
        gate_first: bool = True,
        rngs: nnx.Rngs | None = None,
    ):
        self.gate_first = gate_first
        self.weight = nnx.Param(jnp.ones((check_positive("dim", dim),)))
        self.groups, self.eps = check_divides("groups", groups, "dim", dim), eps

    def __call__(self, y: Float[Array, "b t e"], z: Float[Array, "b t e"]) -> Float[Array, "b t e"]:
        wide = accumulator(y.dtype)
        gate, read = jax.nn.silu(z.astype(wide)), y.astype(wide)
        read = rearrange(read * gate if self.gate_first else read, "b t (g e) -> b t g e", g=self.groups)
        normed = read * jax.lax.rsqrt(jnp.mean(jnp.square(read), axis=-1, keepdims=True) + self.eps)
        normed = rearrange(normed, "b t g e -> b t (g e)") * self.weight[...].astype(wide)
        return (normed if self.gate_first else normed * gate).astype(y.dtype)


class Mamba2(Module):
    """The SSD mixer. Symbols of the paper: E = expand * d inner channels in H heads of P, G groups that share
    B and C, N = state_size.

        z, xBC, dt = in_proj(u);  x, B, C = silu(conv(xBC));  Δ = clip(softplus(dt + dt_bias), *dt_limit)
        S_t = exp(-Δ_t exp(A_log)) S_{t-1} + B_t (Δ_t x_t)ᵀ;  y_t = S_tᵀ C_t + D x_t
        out_proj(norm(y * silu(z)))

    The limits of the step size apply to single steps as well as chunks (the published step ignores them).

    Args:
      head_dim: P, which must divide E.
      inner: E itself, in place of `expand`.
      groups: G, which must divide the number of heads; the norm works on G parts of the channels.
      dt_limit: the smallest and the largest step size.
      norm: "gate_first" as above; "norm_first", norm(y) * silu(z); None, y * silu(z) without a norm.
      norm_groups: parts of the channels that are normed separately; default: `groups`.
      channel_skip: D per channel instead of per head.
      ssm_channels: how many of the E inner channels the recurrence has; the others are a gated MLP beside it,
        silu(z') * x', concatenated in front of its output, as in the published code. Default: all.

      factors: constant factors of z, x, B, C and dt (Falcon-H1, arXiv 2507.22448).

    Pitfalls:
      The gate comes before the norm and the norm works on `groups` parts of the channels: only models with
        several groups reveal an error here. Consecutive heads share B and C (group = head // (heads /
        groups)).
    """

    causal, lookahead, exact = True, 0, True
    torch_names: ClassVar = {"conv": "conv1d"}

    def __init__(
        self,
        dim: int,
        *,
        expand: int = 2,
        inner: int | None = None,
        head_dim: int = 64,
        state_size: int = 128,
        groups: int = 1,
        conv_width: int = 4,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        conv_bias: bool = True,
        bias: bool = False,
        norm: str | None = "gate_first",
        norm_groups: int | None = None,
        norm_eps: float = 1e-5,
        channel_skip: bool = False,
        ssm_channels: int | None = None,
        factors: Sequence[float] | None = None,
        out_scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        outer = check_positive("expand", expand) * dim if inner is None else check_positive("inner", inner)
        self.dim, self.state_size = dim, check_positive("state_size", state_size)
        self.inner = outer if ssm_channels is None else check_positive("ssm_channels", ssm_channels)
        if self.inner > outer:
            raise UserError(f"ssm_channels must not exceed expand * dim = {outer}, got {ssm_channels}")
        if self.inner % check_positive("head_dim", head_dim):
            name = "expand * dim" if ssm_channels is None else "ssm_channels"
            raise UserError(f"head_dim must divide {name} = {self.inner}, got {head_dim}")
        if norm is not None:
            check_choice(norm, ("gate_first", "norm_first"), "norm")
        low, high = dt_limit
        if not 0 <= low < high:
            raise UserError(f"dt_limit must be two numbers with 0 <= least < greatest, got {dt_limit}")
        self.heads, self.groups = (
            self.inner // head_dim,
            check_divides("groups", groups, "heads", self.inner // head_dim),
        )
        self.dt_limit = (float(low), float(high))
        mixed = self.inner + 2 * groups * state_size
        self.beside = outer - self.inner
        parts = (self.beside, self.beside, self.inner, mixed, self.heads)  # z' | x' | z | x B C | dt
        self.splits = tuple(sum(parts[: i + 1]) for i in range(4))
        self.factors = None if factors is None else tuple(map(float, factors))
        if self.factors is not None and len(self.factors) != 5:
            raise UserError(f"factors must be five numbers, of z, x, B, C and dt, got {factors}")
        self.in_proj = Linear(dim, sum(parts), bias=bias, rngs=rngs)
        self.conv = ShortConv(mixed, width=conv_width, bias=conv_bias, rngs=rngs)
        self.dt_bias = nnx.Param(step_size_bias(rngs.params(), self.heads))
        self.A_log = nnx.Param(
            jnp.log(jax.random.uniform(rngs.params(), (self.heads,), minval=1.0, maxval=16.0))
        )
        self.D = nnx.Param(jnp.ones((self.inner if channel_skip else self.heads,)))
        options = {"eps": norm_eps, "gate_first": norm == "gate_first"}
        norm_groups = groups if norm_groups is None else norm_groups
        self.norm = None if norm is None else GatedRMSNorm(self.inner, norm_groups, **options)
        self.out_proj = Linear(outer, dim, bias=bias, scale=out_scale, rngs=rngs)

    def init_state(self, batch: int, dtype: jax.typing.DTypeLike = jnp.float32) -> Mamba2State:
        ssm = jnp.zeros((batch, self.heads, self.state_size, self.inner // self.heads), accumulator(dtype))
        return Mamba2State(self.conv.init_state(batch, dtype), ssm)

    def __call__(
        self,
        x: Activations,
        state: State | None = None,
        reset: Steps | None = None,
        valid: Steps | None = None,
    ) -> tuple[Activations, State | None]:
        conv, ssm = (None, None) if state is None else state
        projected = self.in_proj(mask_steps(x, valid))
        if self.factors is not None:
            projected = projected * self._scales().astype(projected.dtype)
        z_beside, beside, z, mixed, dt = jnp.split(projected, self.splits, axis=-1)
        mixed, conv = self.conv(mixed, conv, reset, valid)
        values, B, C = jnp.split(mixed, [self.inner, self.inner + self.groups * self.state_size], axis=-1)
        values = rearrange(values, "b t (h p) -> b t h p", h=self.heads)
        B, C = (rearrange(y, "b t (g n) -> b t g n", g=self.groups) for y in (B, C))
        wide = accumulator(x.dtype)  # step sizes and decays are float32 whatever the compute dtype
        delta = jnp.clip(jax.nn.softplus(dt.astype(wide) + self.dt_bias[...].astype(wide)), *self.dt_limit)
        decay = -jnp.exp(self.A_log[...].astype(wide)) * delta
        written = (delta[..., None] * values).astype(x.dtype)
        y, ssm = kernels.linear_attention(
            C, B, written, decay=decay, scale=1.0, initial_state=ssm, reset=reset, valid=valid
        )
        skip = self.D[...].astype(x.dtype).reshape(self.heads, -1)
        y = rearrange(y + skip * values, "b t h p -> b t (h p)")
        y = y * jax.nn.silu(z) if self.norm is None else self.norm(y, z)
        if self.beside:
            y = jnp.concatenate([jax.nn.silu(z_beside) * beside, y], axis=-1)
        return self.out_proj(y), (None if state is None else Mamba2State(conv, ssm))

    def _scales(self) -> np.ndarray:
        """`factors`, channel by channel of the projection."""
        shared = self.groups * self.state_size
        sizes = (2 * self.beside, self.inner, self.inner, shared, shared, self.heads)
        return np.repeat(np.asarray((1.0, *self.factors), np.float32), sizes)
