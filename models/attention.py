"""Softmax attention as a mixer: projections around a cache policy."""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from seqlab.models.cache import Full, Window
from seqlab.models.layers import Linear, RMSNorm, positive, rotate
from seqlab.module import Module
from seqlab.shapes import Activations, Steps
from seqlab.state import State, mask_steps


class Attention(Module):
    """Multi-head attention with rotary positions; heads may share keys and values (GQA, arXiv 2305.13245).

    Args:
      dim: model width d.
      heads: query heads h; `kv_heads` (default h) divides it; `head_dim` defaults to d / h.
      cache: which past a query may see and how it is stored: `Full(capacity)` or `Window(window, sinks)`.
      rotary_base: base of the rotary frequencies; None for no positions at all.
      qk_norm: RMSNorm queries and keys per head before the rotation.

    The state is the policy's: two arrays of `kv_heads * head_dim` numbers a stored key, and its position.

    Pitfalls:
      A full cache ends: beyond its capacity outputs are NaN, never a wrong number. A window goes on for ever.
      Window W means the query and the W - 1 keys before it.
    """

    causal, lookahead, exact = True, 0, True

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        cache: Full | Window = Full(),  # noqa: B008 - frozen
        rotary_base: float | None = 10_000.0,
        qk_norm: bool = False,
        bias: bool = False,
        out_scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        self.dim, self.heads = dim, positive("heads", heads)
        self.kv_heads = heads if kv_heads is None else positive("kv_heads", kv_heads)
        if heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide heads={heads}, got {kv_heads}")
        if head_dim is None and dim % heads:
            raise ValueError(f"heads must divide dim={dim} where head_dim is not given, got {heads}")
        self.head_dim = dim // heads if head_dim is None else positive("head_dim", head_dim)
        if rotary_base is not None and self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}")
        self.cache, self.rotary_base = cache, rotary_base
        self.qkv = Linear(dim, (heads + 2 * self.kv_heads) * self.head_dim, bias=bias, rngs=rngs)
        self.out = Linear(heads * self.head_dim, dim, bias=bias, scale=out_scale, rngs=rngs)
        self.q_norm = RMSNorm(self.head_dim) if qk_norm else None
        self.k_norm = RMSNorm(self.head_dim) if qk_norm else None

    @property
    def capacity(self) -> int | None:
        """The longest sequence that the cache can hold; None for one without end."""
        return self.cache.capacity if isinstance(self.cache, Full) else None

    def init_state(self, batch: int, dtype: jax.typing.DTypeLike = jnp.float32) -> State:
        return self.cache.init_state(batch, self.kv_heads, self.head_dim, dtype)

    def __call__(self, x: Activations, state: State | None = None, reset: Steps | None = None, valid: Steps | None = None):
        qkv = rearrange(self.qkv(mask_steps(x, valid)), "b t (h k) -> b t h k", k=self.head_dim)
        q, k, v = jnp.split(qkv, [self.heads, self.heads + self.kv_heads], axis=2)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        rotary = (lambda y, _: y) if self.rotary_base is None else functools.partial(rotate, base=self.rotary_base)
        out, _, new = self.cache(q, k, v, state, reset, valid, rotary)
        return self.out(rearrange(out, "b t h k -> b t (h k)")), new
