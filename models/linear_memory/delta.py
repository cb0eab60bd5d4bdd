"""The delta rule: a memory that reads the value stored under a key and writes only the difference."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from seqlab.checks import UserError, check_choice, check_divides, check_positive
from seqlab.models.layers import Linear, step_size_bias
from seqlab.models.linear_memory.matrix_memory import (
    FEATURES,
    LowRank,
    MatrixMemory,
    Rule,
    head_widths,
    repeat_heads,
    sum_to_one,
    unit,
)
from seqlab.shapes import accumulator


class DeltaNet(MatrixMemory):
    """DeltaNet: S_t = S_{t-1} + β_t k_t (v_t - S_{t-1}ᵀ k_t)ᵀ, unit keys, β = sigmoid(x W) per head (arXiv
    2406.06484, 2102.11174).

    Writing under a key replaces the stored value, so the memory can hold as many pairs as it has key
    channels.

    Args:
      qk_activation: of queries and keys after the short convolution, "silu", "relu", "elu" (+1) or
        "identity"; values take silu.
      qk_norm: "l2", or "sum" to divide by the sum of the channels.
      use_beta: False writes with β = 1.
      negative_eigenvalues: β in (0, 2), so that the memory may flip signs and track parity (arXiv
        2411.12537).
      gate: silu gate on the read-out.

    Pitfalls:
      Keys must have unit length and β lie in (0, 2), or I - β k kᵀ expands and the memory grows without bound
        ("sum" does not guarantee it). The triangular system of a chunk is solved in float32 whatever the
        compute dtype; in bfloat16 stored pairs would be lost.
    """

    torch_names: ClassVar = MatrixMemory.torch_names | {"beta": "b_proj"}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        qk_activation: str = "silu",
        qk_norm: str = "l2",
        use_beta: bool = True,
        negative_eigenvalues: bool = False,
        gate: bool = False,
        conv_width: int | None = 4,
        conv_bias: bool = False,
        norm_eps: float = 1e-5,
        out_scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        check_choice(qk_norm, ("l2", "sum"), "qk_norm")
        check_choice(qk_activation, tuple(FEATURES), "qk_activation")
        options = {"conv_width": conv_width, "conv_bias": conv_bias, "activations": (qk_activation, "silu")}
        options |= {"gate": "silu" if gate else None, "norm_eps": norm_eps, "out_scale": out_scale}
        super().__init__(
            dim, (heads, heads, heads), head_widths(dim, heads, expand_k, expand_v), **options, rngs=rngs
        )
        self.beta = Linear(dim, heads, rngs=rngs) if use_beta else None
        self.qk_norm, self.reach = qk_norm, 2.0 if negative_eigenvalues else 1.0

    def rule(self, x, q, k, v, positions) -> Rule:
        q, k = (unit(y) if self.qk_norm == "l2" else sum_to_one(y) for y in (q, k))
        wide = accumulator(x.dtype)
        beta = jnp.ones(k.shape[:3], wide) if self.beta is None else jax.nn.sigmoid(self.beta(x).astype(wide))
        return Rule(q, k, v, None, self.reach * beta)


class GatedDeltaNet(MatrixMemory):
    """Gated DeltaNet: S_t = a_t (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ, unit keys, a and β per head and
    step (arXiv 2412.06464).

    log a = -exp(A_log) softplus(x W_a + dt_bias), β = sigmoid(x W_b). The decay clears the whole memory, the
    delta rule replaces single pairs.

    Args:
      head_dim: key channels of a head; by default 0.75 dim / heads, rounded up to a multiple of 8, for 6
        dim^2 parameters.
      value_heads: number of memories; each query and key head is shared by value_heads / heads of them.
      negative_eigenvalues: β in (0, 2) (arXiv 2411.12537).

    Pitfalls:
      The decay acts before the delta rule reads: the subtracted value is the decayed one.
      The read-out is normed, then gated; in Mamba-2 the order is reversed.
    """

    torch_names: ClassVar = MatrixMemory.torch_names | {"beta": "b_proj", "decay": "a_proj"}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        value_heads: int | None = None,
        head_dim: int | None = None,
        expand_v: float = 2.0,
        negative_eigenvalues: bool = False,
        gate: bool = True,
        conv_width: int | None = 4,
        conv_bias: bool = False,
        norm_eps: float = 1e-5,
        out_scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        counts, shape = _value_heads(heads, value_heads, _head_dim(dim, heads, head_dim, 0.75), expand_v)
        options = {"conv_width": conv_width, "conv_bias": conv_bias, "activations": ("silu", "silu")}
        options |= {"gate": "silu" if gate else None, "norm_eps": norm_eps, "out_scale": out_scale}
        super().__init__(dim, counts, shape, **options, rngs=rngs)
        self.decay, self.beta = Linear(dim, counts[2], rngs=rngs), Linear(dim, counts[2], rngs=rngs)
        rates = jax.random.uniform(rngs.params(), (counts[2],), minval=1e-4, maxval=16.0)
        self.A_log, self.dt_bias = (
            nnx.Param(jnp.log(rates)),
            nnx.Param(step_size_bias(rngs.params(), counts[2])),
        )
        self.reach = 2.0 if negative_eigenvalues else 1.0

    def rule(self, x, q, k, v, positions) -> Rule:
        wide = accumulator(x.dtype)
        delta = jax.nn.softplus(self.decay(x).astype(wide) + self.dt_bias[...].astype(wide))
        beta = self.reach * jax.nn.sigmoid(self.beta(x).astype(wide))
        return Rule(unit(q), unit(k), v, -jnp.exp(self.A_log[...].astype(wide)) * delta, beta)


class KimiDeltaAttention(MatrixMemory):
    """KDA: the gated delta rule with a decay per key channel, S_t = (I - β_t k_t k_tᵀ) diag(a_t) S_{t-1} +
    β_t k_t v_tᵀ (arXiv 2510.26692).

    log a = -exp(A_log) softplus(low-rank(x) + dt_bias), A_log per head and dt_bias per channel; the read-out
    is normed per head and gated by the sigmoid of another low-rank map. `value_heads` and
    `negative_eigenvalues` as in `GatedDeltaNet`.

    Pitfalls:
      With a decay per channel the scores of a chunk are not a single product; they are built by recursive
        halving, and chunks are shorter.
    """

    torch_names: ClassVar = MatrixMemory.torch_names | {"beta": "b_proj", "decay": "f_proj"}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        value_heads: int | None = None,
        head_dim: int | None = None,
        expand_v: float = 1.0,
        negative_eigenvalues: bool = False,
        conv_width: int | None = 4,
        conv_bias: bool = False,
        norm_eps: float = 1e-5,
        out_scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        counts, shape = _value_heads(heads, value_heads, _head_dim(dim, heads, head_dim, 1.0), expand_v)
        gate_map = LowRank(dim, shape[1], counts[2] * shape[1], bias=True, rngs=rngs)
        options = {
            "conv_width": conv_width,
            "conv_bias": conv_bias,
            "activations": ("silu", "silu"),
            "gate": "sigmoid",
        }
        super().__init__(
            dim,
            counts,
            shape,
            **options,
            gate_map=gate_map,
            norm_eps=norm_eps,
            out_scale=out_scale,
            rngs=rngs,
        )
        self.decay, self.beta = (
            LowRank(dim, shape[1], heads * shape[0], rngs=rngs),
            Linear(dim, heads, rngs=rngs),
        )
        self.A_log = nnx.Param(jnp.log(jax.random.uniform(rngs.params(), (heads,), minval=1.0, maxval=16.0)))
        self.dt_bias = nnx.Param(jnp.zeros((heads * shape[0],)))
        self.reach = 2.0 if negative_eigenvalues else 1.0

    def rule(self, x, q, k, v, positions) -> Rule:
        wide = accumulator(x.dtype)
        delta = jax.nn.softplus(self.decay(x).astype(wide) + self.dt_bias[...].astype(wide)).reshape(k.shape)
        decay = -jnp.exp(self.A_log[...].astype(wide))[:, None] * delta
        beta = self.reach * jax.nn.sigmoid(self.beta(x).astype(wide))
        beta = beta if self.heads == beta.shape[2] else jnp.repeat(beta, self.heads // beta.shape[2], axis=2)
        return Rule(unit(q), unit(k), v, repeat_heads(decay, self.heads), beta)


def _head_dim(dim: int, heads: int, head_dim: int | None, share: float) -> int:
    return (
        max(8, -(-int(share * dim) // (8 * check_positive("heads", heads))) * 8)
        if head_dim is None
        else check_positive("head_dim", head_dim)
    )


def _value_heads(
    heads: int, value_heads: int | None, head_dim: int, expand_v: float
) -> tuple[tuple[int, int, int], tuple[int, int]]:
    """Numbers of query, key and value heads, and the channels of a key and of a value."""
    values = heads if value_heads is None else check_positive("value_heads", value_heads)
    check_divides("heads", heads, "value_heads", values)
    width = head_dim * expand_v
    if width < 1 or width != int(width):
        raise UserError(
            f"expand_v must make a whole number of value channels of head_dim={head_dim}, got {expand_v}"
        )
    return (heads, heads, values), (head_dim, int(width))
