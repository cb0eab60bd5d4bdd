"""Linear attention: a matrix memory a head, written by outer products and read by the query."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from seqlab import kernels
from seqlab.models.layers import Linear, RMSNorm, ShortConv, positive
from seqlab.module import Module
from seqlab.shapes import Activations, Steps, accumulator
from seqlab.state import State, mask_steps


class MemoryState(NamedTuple):
    """`conv`: the short convolution's buffer, () where there is none; `memory` [b, h, k, v], float32."""

    conv: Float[Array, "b w-1 d"] | tuple[()]
    memory: Float[Array, "b h k v"]


class GatedLinearAttention(Module):
    """GLA: S_t = diag(a_t) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t / sqrt(k), a gate a_t in (0, 1) per key channel (arXiv 2312.06635).

    log a = logsigmoid(low-rank projection of x) / `gate_normalizer`; the output is RMS-normalised per head, then gated by silu.
    `conv_width` puts one short causal convolution in front of queries, keys and values (off by default, as published).
    """

    causal, lookahead, exact = True, 0, True

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        gate_rank: int = 16,
        gate_normalizer: float = 16.0,
        conv_width: int | None = None,
        out_scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        self.dim, self.heads = dim, positive("heads", heads)
        keys, values = int(dim * expand_k), int(dim * expand_v)
        if keys < heads or keys % heads or values < heads or values % heads:
            raise ValueError(f"heads={heads} must divide dim * expand_k = {keys} and dim * expand_v = {values}")
        self.splits = (keys, 2 * keys)  # of the joint projection: queries | keys | values
        self.head_shape = (keys // heads, values // heads)
        self.gate_normalizer = gate_normalizer
        self.qkv = Linear(dim, 2 * keys + values, rngs=rngs)
        self.gate_down = Linear(dim, positive("gate_rank", gate_rank), rngs=rngs)
        self.gate_up = Linear(gate_rank, keys, bias=True, rngs=rngs)
        self.out_gate = Linear(dim, values, rngs=rngs)
        self.conv = None if conv_width is None else ShortConv(2 * keys + values, width=conv_width, rngs=rngs)
        self.norm = RMSNorm(values // heads)
        self.out = Linear(values, dim, scale=out_scale, rngs=rngs)

    def init_state(self, batch: int, dtype: jax.typing.DTypeLike = jnp.float32) -> MemoryState:
        conv = () if self.conv is None else self.conv.init_state(batch, dtype)
        return MemoryState(conv, jnp.zeros((batch, self.heads, *self.head_shape), accumulator(dtype)))

    def __call__(self, x: Activations, state: State | None = None, reset: Steps | None = None, valid: Steps | None = None):
        conv, memory = (None, None) if state is None else state
        x = mask_steps(x, valid)
        qkv = self.qkv(x)
        if self.conv is not None:
            qkv, conv = self.conv(qkv, conv, reset, valid)
        gate = self.gate_up(self.gate_down(x)).astype(accumulator(x.dtype))
        decay = jax.nn.log_sigmoid(gate) / self.gate_normalizer
        q, k, v, decay = (rearrange(y, "b t (h k) -> b t h k", h=self.heads) for y in (*jnp.split(qkv, self.splits, axis=-1), decay))
        o, memory = kernels.linear_attention(q, k, v, decay=decay, initial_state=memory, reset=reset, valid=valid)
        o = rearrange(self.norm(o), "b t h v -> b t (h v)") * jax.nn.silu(self.out_gate(x))
        return self.out(o), (None if state is None else MemoryState(conv, memory))
