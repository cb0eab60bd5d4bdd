"""Linear attention without the delta rule: additive memories, without decay or with a constant, scalar or
per-channel decay."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from seqlab.checks import UserError, check_choice, check_divides, check_positive
from seqlab.models.layers import Linear, rotate
from seqlab.models.linear_memory.matrix_memory import (
    FEATURES,
    LowRank,
    MatrixMemory,
    Rule,
    counted,
    head_widths,
    repeat_heads,
    sum_to_one,
)
from seqlab.module import Module
from seqlab.shapes import Steps, accumulator

_FEATURE_MAPS = ("elementwise_product", "elu", "relu", "identity", "t2r", "hedgehog", "dpfp")
_DPFP = 4  # number of shifted products of DPFP


class FeatureMap(Module):
    """Features of queries or keys, one head at a time, shared by all heads; `width` key channels become
    `features`.

    elementwise_product  (W1 x + b1) * (W2 x + b2)             width
    elu, relu, identity  elu(x) + 1, relu(x), x                 width
    t2r                  relu(W x)                              width      (arXiv 2103.13076)
    hedgehog             softmax of [2 y, -2 y], y = W x + b    2 width    (arXiv 2402.04347)
    dpfp                 r * roll(r, j), j = 1..4, joined      8 width    (arXiv 2102.11174)

    In dpfp r = [relu(x), -relu(x)], as in the published layer; the paper has relu(-x).
    """

    torch_names: ClassVar = {"first": "layer1", "second": "layer2"}

    def __init__(self, kind: str, width: int, *, rngs: nnx.Rngs):
        check_choice(kind, _FEATURE_MAPS, "feature_map")
        self.kind, self.features = kind, {"hedgehog": 2, "dpfp": 2 * _DPFP}.get(kind, 1) * width
        if kind == "elementwise_product":
            self.first, self.second = (Linear(width, width, bias=True, rngs=rngs) for _ in range(2))
        elif kind in ("t2r", "hedgehog"):
            self.layer = Linear(width, width, bias=kind == "hedgehog", rngs=rngs)
        if kind == "hedgehog":
            self.layer.weight[...] = jnp.eye(width)

    def __call__(self, x: Float[Array, "b t h k"]) -> Float[Array, "b t h f"]:
        if self.kind == "elementwise_product":
            return self.first(x) * self.second(x)
        if self.kind == "t2r":
            return jax.nn.relu(self.layer(x))
        if self.kind == "hedgehog":
            y = self.layer(x).astype(accumulator(x.dtype))
            return jax.nn.softmax(jnp.concatenate([2 * y, -2 * y], axis=-1), axis=-1).astype(x.dtype)
        if self.kind == "dpfp":
            r = jnp.concatenate([jax.nn.relu(x), -jax.nn.relu(x)], axis=-1)
            return jnp.concatenate([r * jnp.roll(r, j, axis=-1) for j in range(1, _DPFP + 1)], axis=-1)
        return FEATURES[self.kind](x)


class LinearAttention(MatrixMemory):
    """Linear attention: S_t = S_{t-1} + φ(k_t) v_tᵀ, o_t = S_tᵀ φ(q_t) / sqrt(f) (Katharopoulos et al., arXiv
    2006.16236).

    Nothing is forgotten: the memory is the sum over all steps.

    Args:
      feature_map: φ, see `FeatureMap`; `tie_feature_map` shares it between queries and keys.
      kv_heads: heads of keys and values, each shared by heads / kv_heads query heads.
      normalize: divide by φ(q)·Σ φ(k), as softmax does; requires non-negative features. The sum is one more
        column of the memory.
      norm_q, norm_k: divide features by their sum (plus 1e-4).
      norm_eps: of the RMS norm per head of the read-out; None for no norm.

    Pitfalls:
      With features of both signs the normaliser can be zero: use `normalize` with elu, relu and hedgehog
        only.
      The memory is never cleared: at equal state it recalls fewer pairs than a delta rule, and early tokens
        are lost in long streams.
    """

    torch_names: ClassVar = MatrixMemory.torch_names | {
        "q_map": "feature_map_q",
        "k_map": "feature_map_k",
        "norm": "norm",
    }

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        kv_heads: int | None = None,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        feature_map: str = "elementwise_product",
        tie_feature_map: bool = False,
        normalize: bool = False,
        norm_q: bool = False,
        norm_k: bool = False,
        norm_eps: float | None = 1e-5,
        out_scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        shape, kv = (
            head_widths(dim, heads, expand_k, expand_v),
            check_divides("kv_heads", kv_heads, "heads", heads),
        )
        options = {"conv_width": None, "gate": None, "norm_eps": norm_eps, "out_scale": out_scale}
        super().__init__(dim, (heads, kv, kv), shape, **options, rngs=rngs)
        self.q_map = FeatureMap(feature_map, shape[0], rngs=rngs)
        self.k_map = None if tie_feature_map else FeatureMap(feature_map, shape[0], rngs=rngs)
        self.normalize, self.norm_q, self.norm_k = normalize, norm_q, norm_k

    @property
    def memory_shape(self) -> tuple[int, int]:
        return self.q_map.features, self.head_shape[1] + self.normalize

    def rule(self, x, q, k, v, positions) -> Rule:
        q, k = self.q_map(q), (self.k_map or self.q_map)(k)
        q = sum_to_one(q, 1e-4) if self.norm_q else q
        k = sum_to_one(k, 1e-4) if self.norm_k else k
        if self.normalize:  # the quotient of two sums: both in float32
            q, k, v = (y.astype(accumulator(y.dtype)) for y in (q, k, v))
            v = jnp.concatenate([v, jnp.ones((*v.shape[:3], 1), v.dtype)], axis=-1)
        return Rule(q, k, v)

    def read(self, o) -> Float[Array, "b t h v"]:
        return o[..., :-1] / (o[..., -1:] + 1e-10) if self.normalize else o


class Retention(MatrixMemory):
    """Multi-scale retention (RetNet): S_t = γ_h S_{t-1} + k_t v_tᵀ with γ_h = 1 - 2^(-5-h), rotary queries
    and keys (arXiv 2307.08621).

    The decay is fixed; head h remembers about 2^(5+h) steps. The read-out is normalised per head and gated by
    silu. `conv_width` adds a short causal convolution with silu to queries, keys and values (off by default,
    as published).

    Pitfalls:
      Positions must continue across chunks, or rotated keys no longer match their queries; here they are part
        of the state. 1 - γ is 2^-12 for the eighth head: γ in bfloat16 would be 1. log γ is computed in
        float64 as log1p(-2^(-5-h)).
    """

    torch_names: ClassVar = MatrixMemory.torch_names | {"norm": "g_norm_swish_gate"}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        kv_heads: int | None = None,
        expand_k: float = 1.0,
        expand_v: float = 2.0,
        rotary_base: float = 10_000.0,
        gate: bool = True,
        conv_width: int | None = None,
        norm_eps: float = 1e-5,
        out_scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        shape, kv = (
            head_widths(dim, heads, expand_k, expand_v),
            check_divides("kv_heads", kv_heads, "heads", heads),
        )
        if shape[0] % 2:
            raise UserError(f"dim * expand_k / heads must be even for rotary positions, got {shape[0]}")
        options = {
            "activations": _with_conv(conv_width),
            "gate": "silu" if gate else None,
            "norm_eps": norm_eps,
            "out_scale": out_scale,
        }
        super().__init__(dim, (heads, kv, kv), shape, conv_width=conv_width, **options, rngs=rngs)
        self.rotary_base = rotary_base

    def rule(self, x, q, k, v, positions) -> Rule:
        decay = np.log1p(-(2.0 ** (-5.0 - np.arange(self.heads))))
        q, k = (rotate(y, positions, self.rotary_base) for y in (q, k))
        return Rule(q, k, v, jnp.asarray(decay, accumulator(x.dtype)))

    def _first_position(self, batch: int) -> Array:
        return jnp.zeros((batch,), jnp.int32)

    def _positions(
        self, shape: tuple[int, int], start: Array | int, reset: Steps | None, valid: Steps | None
    ) -> tuple[Array, Array]:
        return counted(shape, start, reset, valid)


class SimpleGatedLinearAttention(MatrixMemory):
    """Linear attention with a scalar gate: S_t = a_t S_{t-1} + k_t v_tᵀ, log a = logsigmoid(x W) /
    `gate_normalizer` per head and step.

    The form of gated linear attention (arXiv 2312.06635) with one gate per head and a short convolution; its
    memory is that of Mamba-2.

    Pitfalls:
      A gate initialised near 1 / 2 forgets within a few steps: with `gate_normalizer` 16 it starts at 0.96.
    """

    torch_names: ClassVar = MatrixMemory.torch_names | {"decay": "gk_proj", "norm": "g_norm_swish_gate"}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        kv_heads: int | None = None,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        gate_normalizer: float = 16.0,
        conv_width: int | None = 4,
        conv_bias: bool = False,
        norm_eps: float = 1e-5,
        out_scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        shape, kv = (
            head_widths(dim, heads, expand_k, expand_v),
            check_divides("kv_heads", kv_heads, "heads", heads),
        )
        options = {"conv_width": conv_width, "conv_bias": conv_bias, "activations": _with_conv(conv_width)}
        super().__init__(
            dim, (heads, kv, kv), shape, **options, norm_eps=norm_eps, out_scale=out_scale, rngs=rngs
        )
        self.decay, self.gate_normalizer = Linear(dim, heads, bias=True, rngs=rngs), gate_normalizer

    def rule(self, x, q, k, v, positions) -> Rule:
        return Rule(
            q, k, v, jax.nn.log_sigmoid(self.decay(x).astype(accumulator(x.dtype))) / self.gate_normalizer
        )


class GatedLinearAttention(MatrixMemory):
    """GLA: S_t = diag(a_t) S_{t-1} + k_t v_tᵀ, o_t = S_tᵀ q_t / sqrt(k), a gate a_t in (0, 1) per key channel
    (arXiv 2312.06635).

    log a = logsigmoid(low-rank projection of x) / `gate_normalizer`, not below `gate_floor` if given; the
    output is RMS-normalised per head, then gated by silu. `conv_width` adds a short causal convolution with
    silu to queries, keys and values (off by default, as published).

    Pitfalls:
      Inside a chunk decays must be computed as differences of sums, never as exp(b) exp(-b): the second
        factor overflows with a strong gate. Without a short convolution a single layer cannot compare
        neighbouring tokens; small models learn much more slowly.
    """

    torch_names: ClassVar = MatrixMemory.torch_names | {"decay": "gk_proj", "norm": "g_norm_swish_gate"}

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        kv_heads: int | None = None,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        gate_rank: int = 16,
        gate_normalizer: float = 16.0,
        gate_floor: float | None = None,
        gate: bool = True,
        conv_width: int | None = None,
        conv_bias: bool = False,
        norm_eps: float = 1e-5,
        out_scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        shape, kv = (
            head_widths(dim, heads, expand_k, expand_v),
            check_divides("kv_heads", kv_heads, "heads", heads),
        )
        if gate_floor is not None and not gate_floor <= 0:
            raise UserError(
                "gate_floor is a bound of the logarithm of the decay and must not be positive, got "
                f"{gate_floor}"
            )
        options = {"conv_width": conv_width, "conv_bias": conv_bias, "activations": _with_conv(conv_width)}
        options |= {"gate": "silu" if gate else None, "norm_eps": norm_eps, "out_scale": out_scale}
        super().__init__(dim, (heads, kv, kv), shape, **options, rngs=rngs)
        self.decay = LowRank(dim, check_positive("gate_rank", gate_rank), kv * shape[0], bias=True, rngs=rngs)
        self.gate_normalizer, self.gate_floor = gate_normalizer, gate_floor

    def rule(self, x, q, k, v, positions) -> Rule:
        decay = jax.nn.log_sigmoid(self.decay(x).astype(accumulator(x.dtype))) / self.gate_normalizer
        decay = decay if self.gate_floor is None else jnp.maximum(decay, self.gate_floor)
        return Rule(q, k, v, repeat_heads(decay.reshape(k.shape), self.heads))


def _with_conv(conv_width: int | None) -> tuple[str, str]:
    """The activations of the published layers: silu after a short convolution, none after a plain
    projection."""
    return ("identity", "identity") if conv_width is None else ("silu", "silu")
