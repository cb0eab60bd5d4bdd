"""Mamba: a gated, diagonal state-space model whose step size, input map and output map depend on the token
(arXiv 2312.00752)."""

import math
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from seqlab import kernels
from seqlab.checks import check_choice, check_positive
from seqlab.models.layers import Linear, RMSNorm, ShortConv, step_size_bias
from seqlab.module import Module
from seqlab.shapes import Activations, Steps, accumulator
from seqlab.state import State, mask_steps


class MambaState(NamedTuple):
    """`conv` [b, w-1, e]: the last inputs of the convolution; `ssm` [b, e, n]: the recurrent state,
    float32."""

    conv: Float[Array, "b p e"]
    ssm: Float[Array, "b e n"]


class Selective(Module):
    """The selective state-space layer of Mamba and its relatives on E = `inner` channels: convolution,
    selection, scan, skip. Abstract: see `selected`.

    With conv_width=None there is no convolution: the input itself is used for the selection and the scan.
    """

    torch_names: ClassVar = {"conv": "conv1d"}

    def __init__(
        self,
        inner: int,
        *,
        dt_rank: int,
        state_size: int,
        conv_width: int | None,
        conv_bias: bool,
        selection_norm: str | None = None,
        norm_eps: float = 1e-6,
        rngs: nnx.Rngs,
    ):
        self.inner, self.state_size, self.dt_rank = (
            inner,
            check_positive("state_size", state_size),
            check_positive("dt_rank", dt_rank),
        )
        self.conv = (
            None if conv_width is None else ShortConv(inner, width=conv_width, bias=conv_bias, rngs=rngs)
        )
        self.x_proj = Linear(inner, dt_rank + 2 * state_size, rngs=rngs)
        self.dt_proj = Linear(dt_rank, inner, bias=True, scale=1 / math.sqrt(3), rngs=rngs)
        self.dt_proj.bias[...] = step_size_bias(rngs.params(), inner)
        self.A_log = nnx.Param(
            jnp.broadcast_to(jnp.log(jnp.arange(1.0, state_size + 1)), (inner, state_size))
        )
        self.D = nnx.Param(jnp.ones((inner,)))
        if selection_norm is not None:
            check_choice(selection_norm, ("plain", "weighted"), "selection_norm")
        self.dt_norm, self.b_norm, self.c_norm = (
            RMSNorm(size, eps=norm_eps, weighted=selection_norm == "weighted") if selection_norm else None
            for size in (dt_rank, state_size, state_size)
        )

    def init_state(self, batch: int, dtype: jax.typing.DTypeLike = jnp.float32) -> MambaState:
        ssm = jnp.zeros((batch, self.inner, self.state_size), accumulator(dtype))
        return MambaState(() if self.conv is None else self.conv.init_state(batch, dtype), ssm)

    def selected(
        self, a: Activations, state: MambaState | None, reset: Steps | None, valid: Steps | None
    ) -> tuple[Activations, MambaState | None]:
        """a [b, t, e] -> y [b, t, e]: c = silu(conv(a)); r, B, C = x_proj(c); Δ = softplus(dt_proj(r)); scan;
        + D c."""
        conv, ssm = (None, None) if state is None else state
        c, conv = (a, conv) if self.conv is None else self.conv(a, conv, reset, valid)
        rank, B, C = jnp.split(self.x_proj(c), [self.dt_rank, self.dt_rank + self.state_size], axis=-1)
        if self.dt_norm is not None:
            rank, B, C = self.dt_norm(rank), self.b_norm(B), self.c_norm(C)
        wide = accumulator(a.dtype)  # step sizes and decays are float32 whatever the compute dtype
        delta = jax.nn.softplus(
            rank.astype(wide) @ self.dt_proj.weight[...].astype(wide) + self.dt_proj.bias[...].astype(wide)
        )
        A = -jnp.exp(self.A_log[...].astype(wide))
        y, ssm = kernels.scan(c, delta, A, B, C, initial_state=ssm, reset=reset, valid=valid)
        return y + self.D[...].astype(a.dtype) * c, (None if state is None else MambaState(conv, ssm))


class Mamba(Selective):
    """The S6 mixer (arXiv 2312.00752). Symbols of the paper: E = expand * d inner channels, N = state_size,
    R = rank of the step size, K = conv_width.

        a, z = in_proj(x);  c = silu(conv(a));  r, B, C = x_proj(c);  Δ = softplus(dt_proj(r))
        h_t = exp(Δ_t A) h_{t-1} + Δ_t c_t B_t;  y_t = C_t h_t + D c_t;  out_proj(y * silu(z))

    The state transition is exact, the input map is Euler's (Δ B), as in the published code; a chunk continues
    the scan from its state, whatever its length.

    Args:
      selection_norm: RMS norms (with `norm_eps`) of r, B and C: "plain" (Falcon-Mamba, arXiv 2410.05355),
        "weighted" (Jamba, arXiv 2403.19887), or None.

    Pitfalls:
      B, C and Δ come from the convolved half, the gate from the other; D is added before the gate; the bias
        of Δ is inside the softplus. Other libraries restart the scan in cached calls with several tokens;
        compare with them step by step only.
    """

    causal, lookahead, exact = True, 0, True

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
        selection_norm: str | None = None,
        norm_eps: float = 1e-6,
        out_scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        self.dim, inner = dim, check_positive("expand", expand) * dim
        dt_rank = -(-dim // 16) if dt_rank is None else dt_rank
        self.in_proj = Linear(dim, 2 * inner, bias=bias, rngs=rngs)
        super().__init__(
            inner,
            dt_rank=dt_rank,
            state_size=state_size,
            conv_width=conv_width,
            conv_bias=conv_bias,
            selection_norm=selection_norm,
            norm_eps=norm_eps,
            rngs=rngs,
        )
        self.out_proj = Linear(inner, dim, bias=bias, scale=out_scale, rngs=rngs)

    def __call__(
        self,
        x: Activations,
        state: State | None = None,
        reset: Steps | None = None,
        valid: Steps | None = None,
    ) -> tuple[Activations, State | None]:
        a, z = jnp.split(self.in_proj(mask_steps(x, valid)), 2, axis=-1)
        y, state = self.selected(a, state, reset, valid)
        return self.out_proj(y * jax.nn.silu(z)), state
