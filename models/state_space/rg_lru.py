"""The recurrent block of Griffin and Hawk: a gated linear recurrence per channel (arXiv 2402.19427)."""

import math
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from seqlab import kernels
from seqlab.checks import check_choice, check_divides, check_positive
from seqlab.models.layers import ACTIVATIONS, Linear, ShortConv
from seqlab.models.linear_memory.matrix_memory import counted
from seqlab.module import Module
from seqlab.shapes import Activations, Steps, accumulator
from seqlab.state import State, mask_steps

_RATE = 8.0  # c of the paper
_LEAST = 1e-20  # of a decay's logarithm: inputs are divided by it


class RGLRUState(NamedTuple):
    """`conv` [b, w-1, e]: the last inputs of the convolution; `memory` [b, e, 1]: the recurrent state,
    float32; `position` [b]: steps seen."""

    conv: Float[Array, "b p e"]
    memory: Float[Array, "b e n"]
    position: Int[Array, " b"]


class RGLRU(Module):
    """The real-gated linear recurrent unit in its block.

        z = activation(gate x);  u = conv(in_proj x);  r, i = sigmoid of block-diagonal maps of u
        a_t = exp(-8 softplus(Λ) r_t);  h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t u_t;  y = out_proj(h z)

    The first step of a sequence is not scaled: h_0 = i_0 u_0.

    Args:
      width: channels e of the recurrence, default d.
      heads: blocks of the two maps of gates, which must divide `width`.
      conv_width: taps of the convolution, which has a bias and no activation.
      activation: of the gate z.

    Source: Griffin (arXiv 2402.19427), RecurrentGemma (arXiv 2404.07839).

    Pitfalls:
      The scale of an input depends on whether its step is the first of a sequence, so the state counts steps.
        Step sizes are float32 whatever the compute dtype.
    """

    causal, lookahead, exact = True, 0, True
    torch_names: ClassVar = {
        "gate": "linear_y",
        "in_proj": "linear_x",
        "conv": "conv_1d",
        "out_proj": "linear_out",
        "input_gate": "rg_lru.input_gate_weight",
        "input_bias": "rg_lru.input_gate_bias",
        "decay_gate": "rg_lru.recurrent_gate_weight",
        "decay_bias": "rg_lru.recurrent_gate_bias",
        "decay": "rg_lru.recurrent_param",
    }

    def __init__(
        self,
        dim: int,
        *,
        width: int | None = None,
        heads: int = 4,
        conv_width: int = 4,
        activation: str = "gelu_tanh",
        out_scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        check_choice(activation, tuple(ACTIVATIONS), "activation")
        self.dim, self.activation = check_positive("dim", dim), activation
        self.width = dim if width is None else check_positive("width", width)
        self.heads = check_divides("heads", heads, "width", self.width)
        self.gate = Linear(dim, self.width, bias=True, rngs=rngs)
        self.in_proj = Linear(dim, self.width, bias=True, rngs=rngs)
        self.conv = ShortConv(self.width, width=conv_width, bias=True, activation=None, rngs=rngs)
        size = self.width // heads
        shape = (heads, size, size)
        maps = [jax.random.normal(rngs.params(), shape) / math.sqrt(size) for _ in range(2)]
        self.input_gate, self.input_bias = nnx.Param(maps[0]), nnx.Param(jnp.zeros(shape[:2]))
        self.decay_gate, self.decay_bias = nnx.Param(maps[1]), nnx.Param(jnp.zeros(shape[:2]))
        slowest = jax.random.uniform(rngs.params(), (self.width,), minval=0.9, maxval=0.999)
        self.decay = nnx.Param(jnp.log(jnp.expm1(-jnp.log(slowest) / _RATE)))
        self.out_proj = Linear(self.width, dim, bias=True, scale=out_scale, rngs=rngs)

    def init_state(self, batch: int, dtype: jax.typing.DTypeLike = jnp.float32) -> RGLRUState:
        memory = jnp.zeros((batch, self.width, 1), accumulator(dtype))
        return RGLRUState(self.conv.init_state(batch, dtype), memory, jnp.zeros((batch,), jnp.int32))

    def __call__(
        self,
        x: Activations,
        state: State | None = None,
        reset: Steps | None = None,
        valid: Steps | None = None,
    ) -> tuple[Activations, State | None]:
        conv, memory, start = (None, None, 0) if state is None else state
        x = mask_steps(x, valid)
        z = ACTIVATIONS[self.activation](self.gate(x))
        u, conv = self.conv(self.in_proj(x), conv, reset, valid)
        wide = u.astype(accumulator(x.dtype))
        chosen = jax.nn.sigmoid(self._of_heads(wide, self.input_gate, self.input_bias))
        rate = jax.nn.sigmoid(self._of_heads(wide, self.decay_gate, self.decay_bias))
        delta = _RATE * jax.nn.softplus(self.decay[...].astype(wide.dtype)) * rate
        delta = jnp.maximum(delta, _LEAST)
        positions, end = counted(x.shape[:2], start, reset, valid)
        scale = jnp.where(positions[..., None] == 0, 1.0, jnp.sqrt(-jnp.expm1(-2 * delta)))
        # The scan multiplies its input by the step size, which is minus the logarithm of the decay here.
        ones = jnp.ones((*x.shape[:2], 1), wide.dtype)
        h, memory = kernels.scan(
            scale * chosen * wide / delta,
            delta,
            -jnp.ones((self.width, 1), wide.dtype),
            ones,
            ones,
            initial_state=memory,
            reset=reset,
            valid=valid,
        )
        y = mask_steps(self.out_proj(h.astype(x.dtype) * z), valid)
        return y, (None if state is None else RGLRUState(conv, memory, end))

    def _of_heads(self, u: Activations, weight: nnx.Param, bias: nnx.Param) -> Activations:
        """A map of u in blocks of channels."""
        blocks = rearrange(u, "b t (h i) -> b t h i", h=self.heads)
        y = jnp.einsum("bthi,hio->btho", blocks, weight[...].astype(u.dtype)) + bias[...].astype(u.dtype)
        return rearrange(y, "b t h o -> b t (h o)")
