"""The common base of the linear-attention family: projections, short convolution, heads, a matrix memory, a
normalised and gated read-out.

A subclass defines how the memory decays and how it is written; see `linear_attention` and `delta`.
"""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from seqlab import kernels
from seqlab.checks import UserError, check_choice, check_positive
from seqlab.models.layers import Linear, RMSNorm, ShortConv
from seqlab.module import Module
from seqlab.shapes import Activations, Steps, accumulator
from seqlab.state import State, mask_steps, segments

Heads = Float[Array, "b t h k"]

FEATURES = {
    "identity": lambda x: x,
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "elu": lambda x: jax.nn.elu(x) + 1,  # as in feature maps: non-negative
}
GATES = {"silu": jax.nn.silu, "sigmoid": jax.nn.sigmoid}


class MemoryState(NamedTuple):
    """`conv` [b, w-1, d]: the short convolution's buffer; `memory` [b, h, k, v], float32; `position` [b]:
    steps seen. () where unused."""

    conv: Float[Array, "b p d"] | tuple[()]
    memory: Float[Array, "b h k v"]
    position: Int[Array, " b"] | tuple[()] = ()


class Rule(NamedTuple):
    """The arguments of the memory for a chunk: see `seqlab.kernels.linear_attention`."""

    q: Heads
    k: Heads
    v: Float[Array, "b t h v"]
    decay: Array | None = None
    beta: Array | None = None


class LowRank(Module):
    """A linear map through `rank` channels."""

    torch_names: ClassVar = {"down": "0", "up": "1"}

    def __init__(self, inputs: int, rank: int, outputs: int, *, bias: bool = False, rngs: nnx.Rngs):
        self.down = Linear(inputs, rank, rngs=rngs)
        self.up = Linear(rank, outputs, bias=bias, rngs=rngs)

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        return self.up(self.down(x))


class MatrixMemory(Module):
    """The abstract base: `rule` computes the arguments of the memory from projected queries, keys and values.

        q, k, v = activations(conv(x W)), in heads;   S, o = memory(S, rule(...))
        y = (norm(o) * gate(x W_g)) W_o

    Queries, keys and values may have different numbers of heads, which divide the largest, the number of
    memories: head i of n serves the memories from i * heads / n up to (i + 1) * heads / n.
    """

    causal, lookahead, exact = True, 0, True
    torch_names: ClassVar = {
        "qkv": ("q_proj", "k_proj", "v_proj"),
        "conv": ("q_conv1d", "k_conv1d", "v_conv1d"),
        "out_gate": "g_proj",
        "norm": "o_norm",
        "out": "o_proj",
    }

    def __init__(
        self,
        dim: int,
        head_counts: tuple[int, int, int],
        head_shape: tuple[int, int],
        *,
        conv_width: int | None,
        conv_bias: bool = False,
        activations: tuple[str, str] = ("identity", "identity"),
        gate: str | None = "silu",
        gate_map: Module | None = None,
        norm_eps: float | None = 1e-5,
        out_scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        """`head_counts`: of queries, keys and values; `head_shape`: key and value channels of a head;
        `norm_eps` None: no norm."""
        for name in activations:
            check_choice(name, tuple(FEATURES), "activation")
        self.dim, self.head_counts, self.head_shape, self.heads = (
            dim,
            head_counts,
            head_shape,
            max(head_counts),
        )
        widths = [n * width for n, width in zip(head_counts, (head_shape[0], *head_shape), strict=True)]
        values = self.heads * head_shape[1]
        self.splits = (widths[0], widths[0] + widths[1])  # of the joint projection: queries | keys | values
        self.qkv = Linear(dim, sum(widths), rngs=rngs)
        self.conv = (
            None
            if conv_width is None
            else ShortConv(sum(widths), width=conv_width, bias=conv_bias, activation=None, rngs=rngs)
        )
        self.activations, self.gate = activations, gate
        self.out_gate = None if gate is None else gate_map or Linear(dim, values, rngs=rngs)
        self.norm = None if norm_eps is None else RMSNorm(head_shape[1], eps=norm_eps)
        self.out = Linear(values, dim, scale=out_scale, rngs=rngs)

    def init_state(self, batch: int, dtype: jax.typing.DTypeLike = jnp.float32) -> MemoryState:
        conv = () if self.conv is None else self.conv.init_state(batch, dtype)
        return MemoryState(
            conv,
            jnp.zeros((batch, self.heads, *self.memory_shape), accumulator(dtype)),
            self._first_position(batch),
        )

    @property
    def memory_shape(self) -> tuple[int, int]:
        """The shape of the memory of a head: key features and value channels."""
        return self.head_shape

    def rule(self, x: Activations, q: Heads, k: Heads, v: Heads, positions: Int[Array, "b t"] | None) -> Rule:
        """The decay and update of the memory; `positions` only if the subclass keeps them."""
        raise NotImplementedError

    def read(self, o: Heads) -> Heads:
        """Post-processing of the memory's read-outs, before the norm."""
        return o

    def __call__(
        self,
        x: Activations,
        state: State | None = None,
        reset: Steps | None = None,
        valid: Steps | None = None,
    ) -> tuple[Activations, State | None]:
        conv, memory, position = (None, None, 0) if state is None else state
        x = mask_steps(x, valid)
        qkv = self.qkv(x)
        if self.conv is not None:
            qkv, conv = self.conv(qkv, conv, reset, valid)
        q, k, v = jnp.split(qkv, self.splits, axis=-1)
        q, k, v = (
            FEATURES[self.activations[0]](q),
            FEATURES[self.activations[0]](k),
            FEATURES[self.activations[1]](v),
        )
        q, k, v = (
            rearrange(y, "b t (h k) -> b t h k", h=h)
            for y, h in zip((q, k, v), self.head_counts, strict=True)
        )
        positions, position = self._positions(x.shape[:2], position, reset, valid)
        q, k, v, decay, beta = self.rule(x, q, k, v, positions)
        groups = max(q.shape[2], k.shape[2])
        q, k, v = repeat_heads(q, groups), repeat_heads(k, groups), repeat_heads(v, self.heads)
        o, memory = kernels.linear_attention(
            q, k, v, decay=decay, beta=beta, initial_state=memory, reset=reset, valid=valid
        )
        o = self.read(o).astype(x.dtype)
        o = rearrange(o if self.norm is None else self.norm(o), "b t h v -> b t (h v)")
        if self.out_gate is not None:
            o = o * GATES[self.gate](self.out_gate(x))
        return self.out(o), (None if state is None else MemoryState(conv, memory, position))

    def _first_position(self, batch: int) -> Array | tuple[()]:
        return ()

    def _positions(
        self, shape: tuple[int, int], start: Array | int | tuple[()], reset: Steps | None, valid: Steps | None
    ) -> tuple[Array | None, Array | tuple[()]]:
        """The positions of the steps and of the step after them, if the subclass keeps them."""
        return None, ()


def counted(
    shape: tuple[int, int], start: Array | int, reset: Steps | None, valid: Steps | None
) -> tuple[Array, Array]:
    """Positions [b, t] of the steps in their sequences, and the number of steps of the last one [b]."""
    if reset is None and valid is None:
        start = jnp.broadcast_to(jnp.asarray(start, jnp.int32), shape[:1])
        return start[:, None] + jnp.arange(shape[1], dtype=jnp.int32), start + shape[1]
    where = segments(shape, start, reset, valid)
    return where.positions, where.length


def repeat_heads(x: Float[Array, "b t g k"], heads: int) -> Heads:
    """Each head of x repeated consecutively to `heads` heads."""
    return x if x.shape[2] == heads else jnp.repeat(x, heads // x.shape[2], axis=2)


def head_widths(dim: int, heads: int, expand_k: float, expand_v: float) -> tuple[int, int]:
    """Key and value channels per head, with dim * expand channels in total."""
    keys, values = int(dim * expand_k), int(dim * expand_v)
    if keys < check_positive("heads", heads) or keys % heads or values < heads or values % heads:
        raise UserError(f"heads={heads} must divide dim * expand_k = {keys} and dim * expand_v = {values}")
    return keys // heads, values // heads


def unit(x: Heads) -> Heads:
    """x / sqrt(|x|^2 + 1e-6) over the last axis, in float32 at least."""
    wide = x.astype(accumulator(x.dtype))
    return (wide * jax.lax.rsqrt(jnp.sum(jnp.square(wide), axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)


def sum_to_one(x: Heads, eps: float = 0.0) -> Heads:
    """x / (sum of x + eps) over the last axis, in float32 at least."""
    wide = x.astype(accumulator(x.dtype))
    return (wide / (jnp.sum(wide, axis=-1, keepdims=True) + eps)).astype(x.dtype)
