"""Spiking attention: the baseline of the spiking LMUFormer (arXiv 2402.04882)."""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from seqlab import kernels
from seqlab.checks import UserError, check_positive
from seqlab.models.batch_norm import BatchNorm
from seqlab.models.legendre.lmu import Pointwise, uniform_linear
from seqlab.models.legendre.spiking import Spike, lif
from seqlab.models.state_space.mambamixer import ends
from seqlab.module import Module
from seqlab.shapes import Activations, Steps, accumulator
from seqlab.state import State, mask_steps


class SpikingAttentionState(NamedTuple):
    """Membranes v [b, ...] of the inputs, of concatenated queries, keys and values, and of the attention
    output; `memory` [b, h, k, k]: the sum of k vᵀ over the steps seen. float32."""

    inputs: Float[Array, "b d"]
    qkv: Float[Array, "b 3*d"]
    memory: Float[Array, "b h k k"]
    attended: Float[Array, "b d"]


class SpikingAttention(Module):
    """Attention without softmax between spikes: the token mixer of the spiking attention model that LMUFormer
    is compared with.

        s = spike(x)                       q, k, v = spike(W s), in heads
        y_t = scale sum_s (q_t · k_s) v_s        norm(proj(fire(y)))

    Every spike is BatchNorm and a leaky integrate-and-fire unit with a threshold of 1; `fire` has no norm and
    a threshold of 0.5. Without a softmax the sum is q_tᵀ (sum_s k_s v_sᵀ): linear in time.

    Args:
      dim: model width d.
      heads: h, a divisor of dim; each has d / h channels.
      scale: of the sums; 0.25 as published, whatever the width of a head.
      causal: False as published: a query attends to all steps of its sequence, which must be given whole.
        True: a query attends to the steps up to its own; the sum over the past is a state, and the mixer
        streams.

    Raises:
      ValueError: `heads` does not divide dim, or a state is given to a mixer that is not causal.

    State of the causal form: membranes and a matrix per head, float32.

    Source: Liu, Datta, Li, Beerel, "LMUFormer" (arXiv 2402.04882), the attention baseline of its code.

    Pitfalls:
      Sums of spikes are integers, exact in float32 up to 2^24. A membrane that ends within rounding of its
        threshold may fire in one split of a sequence and not in another, see `SpikingLMUMixer`.
    """

    causal, lookahead, exact = True, 0, True
    torch_names: ClassVar = {
        "spike": "pre_bn",
        "qkv": ("q_conv", "k_conv", "v_conv"),
        "spike_qkv": ("q_bn", "k_bn", "v_bn"),
        "proj": "proj_conv",
        "norm": "proj_bn",
    }

    def __init__(
        self, dim: int, *, heads: int = 8, scale: float = 0.25, causal: bool = False, rngs: nnx.Rngs
    ):
        if check_positive("dim", dim) % check_positive("heads", heads):
            raise UserError(f"heads must divide dim={dim}, got {heads}")
        self.dim, self.heads, self.scale, self.causal = dim, heads, scale, causal
        self.spike = Spike(dim)
        self.qkv = uniform_linear(dim, 3 * dim, kind=Pointwise, bias=False, rngs=rngs)
        self.spike_qkv = Spike(3 * dim)
        self.proj, self.norm = uniform_linear(dim, dim, kind=Pointwise, rngs=rngs), BatchNorm(dim)

    def init_state(
        self, batch: int, dtype: jax.typing.DTypeLike = jnp.float32
    ) -> SpikingAttentionState | tuple[()]:
        if not self.causal:
            return ()
        width = self.dim // self.heads
        shapes = ((self.dim,), (3 * self.dim,), (self.heads, width, width), (self.dim,))
        return SpikingAttentionState(*(jnp.zeros((batch, *shape), accumulator(dtype)) for shape in shapes))

    def __call__(
        self,
        x: Activations,
        state: State | None = None,
        reset: Steps | None = None,
        valid: Steps | None = None,
    ) -> tuple[Activations, State | None]:
        if state is not None and not self.causal:
            raise UserError(
                "state must be None: with causal=False every step sees the whole sequence at once"
            )
        inputs, qkv, memory, attended = (None,) * 4 if state is None else state
        s, inputs = self.spike(mask_steps(x, valid), inputs, reset, valid)
        spikes, qkv = self.spike_qkv(self.qkv(s), qkv, reset, valid)
        q, k, v = rearrange(
            spikes.astype(accumulator(x.dtype)), "b t (n h k) -> n b t h k", n=3, h=self.heads
        )
        if self.causal:
            y, memory = kernels.linear_attention(
                q, k, v, scale=self.scale, initial_state=memory, reset=reset, valid=valid
            )
        else:
            y = self._over_whole_sequences(q, k, v, reset, valid)
        y = rearrange(y, "b t h k -> b t (h k)")
        fired, membranes = lif(y, attended, threshold=0.5, reset=reset, valid=valid)
        out = self.norm(self.proj(fired.astype(x.dtype)), valid)
        if state is None:
            return out, None
        attended = attended if x.shape[1] == 0 else membranes[:, -1]
        return out, SpikingAttentionState(inputs, qkv, memory, attended)

    def _over_whole_sequences(
        self, q: Array, k: Array, v: Array, reset: Steps | None, valid: Steps | None
    ) -> Float[Array, "b t h k"]:
        """Each query over all steps of its sequence. Invalid steps have no spikes."""
        if reset is None:
            memory = jnp.einsum("bshk,bshv->bhkv", k, v)
            return self.scale * jnp.einsum("bthk,bhkv->bthv", q, memory)
        forward, _ = kernels.linear_attention(q, k, v, scale=self.scale, reset=reset, valid=valid)
        flipped = [None if x is None else jnp.flip(x, axis=1) for x in (q, k, v, ends(reset, valid), valid)]
        backward, _ = kernels.linear_attention(
            *flipped[:3], scale=self.scale, reset=flipped[3], valid=flipped[4]
        )
        own = self.scale * jnp.sum(q * k, axis=-1, keepdims=True) * v  # in both
        return forward + jnp.flip(backward, axis=1) - own
