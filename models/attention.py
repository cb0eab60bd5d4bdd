"""Softmax attention as a mixer: projections around a cache policy."""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from seqlab.checks import UserError, check_choice, check_divides, check_positive
from seqlab.models.cache import Full, Policy, Scores, parse_cache
from seqlab.models.layers import Linear, RMSNorm, RotaryScaling, ShortConv, rotate
from seqlab.module import M, Module
from seqlab.resets import sealed
from seqlab.shapes import Activations, Counts, Keys, LogSumExp, Queries, Steps, Values
from seqlab.state import State, mask_steps, state_bytes


class KeyConvState(NamedTuple):
    """`cache`: the state of the policy. `conv` [b, w-1, g * k]: the last projected keys, oldest first."""

    cache: State
    conv: Float[Array, "b p d"]


class Attention(Module):
    """Multi-head attention with rotary positions; heads may share keys and values (GQA, arXiv 2305.13245).

    Args:
      dim: model width d.
      heads: query heads h; `kv_heads` (default h) divides it; `head_dim` defaults to d / h.
      v_head_dim: width of a head's values, default `head_dim`.
      cache: which past keys a query sees and how they are stored: a policy of `seqlab.models.cache`, or its
        string form.
      softcap, scale: logits are softcap · tanh(scale q·k / softcap); default: no cap, 1 / sqrt(head_dim).
      rotary_base: base of the rotary frequencies; None for no positions. `rotary_width`: the number of
        leading channels of a head that are rotated.
      rotary_scaling: a `RotaryScaling` of these frequencies, for sequences longer than those of training.
      qk_norm: apply RMSNorm (with `norm_eps` and `norm_offset`) to queries and keys before the rotation:
        True or "head" for one norm per head (Qwen3, Gemma 3), "width" for one over all heads together
        (OLMo-2, arXiv 2501.00656).
      key_conv: taps w of a causal depthwise convolution of the projected keys, k_t + silu(sum_{j < w} w_j
        k_{t-w+1+j}), which makes mean keys of blocks more informative (FlashMoBA, arXiv 2511.11571).
      sink: a logit without a value, which takes weight from the keys: "zero" (softmax-off-by-one) or
        "learned", one per head.
      gate: multiply the heads' outputs by sigmoid(W x) (Qwen3-Next, arXiv 2505.06708).
      bias, out_bias: biases of the projections into and out of the heads.

    The state is the policy's: of a full cache `kv_heads * (head_dim + v_head_dim)` numbers per stored key,
    and its position. A `key_conv` adds the last w - 1 keys.

    Pitfalls:
      A full cache has a capacity: beyond it outputs are NaN, never a wrong number. A window is unbounded.
      A window W is the query and the W - 1 keys before it.
    """

    causal, lookahead = True, 0
    torch_names: ClassVar = {
        "qkv": ("q_proj", "k_proj", "v_proj"),
        "out_gate": "gate_proj",
        "out": "o_proj",
    }

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        v_head_dim: int | None = None,
        cache: Policy | str = Full(),  # noqa: B008 - frozen
        softcap: float | None = None,
        scale: float | None = None,
        rotary_base: float | None = 10_000.0,
        rotary_width: int | None = None,
        rotary_scaling: RotaryScaling | None = None,
        qk_norm: bool | str = False,
        norm_eps: float = 1e-5,
        norm_offset: float = 0.0,
        key_conv: int | None = None,
        sink: str | None = None,
        gate: bool = False,
        bias: bool = False,
        out_bias: bool = False,
        out_scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        self.dim, self.heads = dim, check_positive("heads", heads)
        self.kv_heads = check_divides("kv_heads", kv_heads, "heads", heads)
        if head_dim is None and dim % heads:
            raise UserError(f"heads must divide dim={dim} where head_dim is not given, got {heads}")
        self.head_dim = dim // heads if head_dim is None else check_positive("head_dim", head_dim)
        self.rotary_width = (
            self.head_dim if rotary_width is None else check_positive("rotary_width", rotary_width)
        )
        if rotary_base is not None and self.rotary_width % 2:
            name = "head_dim" if rotary_width is None else "rotary_width"
            raise UserError(f"{name} must be even for rotary positions, got {self.rotary_width}")
        if self.rotary_width > self.head_dim:
            raise UserError(f"rotary_width must not exceed head_dim={self.head_dim}, got {rotary_width}")
        if sink is not None:
            check_choice(sink, ("zero", "learned"), "sink")
        self.v_head_dim = self.head_dim if v_head_dim is None else check_positive("v_head_dim", v_head_dim)
        self.cache, self.softcap = _own_softcap(cache, softcap)
        self.scale = scale
        self.rotary_base, self.rotary_scaling = rotary_base, rotary_scaling
        self.sink = sink
        sizes = heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.v_head_dim
        self.qkv = Linear(dim, sum(sizes), bias=bias, rngs=rngs)
        values = heads * self.v_head_dim
        self.out_gate = Linear(dim, values, bias=bias, rngs=rngs) if gate else None
        self.out = Linear(values, dim, bias=out_bias, scale=out_scale, rngs=rngs)
        check_choice(qk_norm, (False, True, "head", "width"), "qk_norm")
        widths = sizes[:2] if qk_norm == "width" else (self.head_dim, self.head_dim)
        self.q_norm, self.k_norm = (
            RMSNorm(width, eps=norm_eps, offset=norm_offset) if qk_norm else None for width in widths
        )
        self.norm_over = "width" if qk_norm == "width" else "head"
        self.key_conv = (
            None if key_conv is None else ShortConv(self.kv_heads * self.head_dim, width=key_conv, rngs=rngs)
        )
        self.sink_logits = nnx.Param(jnp.zeros((heads,))) if sink == "learned" else None

    @property
    def torch_sizes(self) -> dict[str, tuple[int, ...]]:
        """Output sizes of the three published projections that are merged here."""
        q, k = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {"qkv": (q, k, self.kv_heads * self.v_head_dim)}

    @property
    def exact(self) -> bool:
        """Whether a stream equals the parallel form: False for caches that approximate."""
        return self.cache.exact

    @property
    def capacity(self) -> int | None:
        """The longest sequence that the cache can hold; None if unbounded."""
        return self.cache.end

    def init_state(self, batch: int, dtype: jax.typing.DTypeLike = jnp.float32) -> State:
        cache = self.cache.init_state(batch, self.kv_heads, self.head_dim, dtype, self.v_head_dim)
        return cache if self.key_conv is None else KeyConvState(cache, self.key_conv.init_state(batch, dtype))

    def __call__(
        self,
        x: Activations,
        state: State | None = None,
        reset: Steps | None = None,
        valid: Steps | None = None,
    ) -> tuple[Activations, State | None]:
        cache, conv = (state, None) if self.key_conv is None or state is None else state
        x = mask_steps(x, valid)
        q, k, v, conv = self.project(x, conv, reset, valid)
        if cache is not None:
            self.cache.check(cache)
        if x.shape[1] == 0:  # an empty chunk
            return jnp.zeros((x.shape[0], 0, self.dim), x.dtype), state
        scores = Scores(self.rotary, self.softcap, self.scale)

        def attend(qkv: tuple[Array, ...], cache: State | None) -> tuple[tuple[Array, Array], State | None]:
            out, lse, new = self.cache(*qkv, cache, reset, valid, scores)
            return (out, lse), new

        qkv = (q, k, v)
        (out, lse), new = attend(qkv, cache) if reset is None else sealed(attend, qkv, cache, reset, valid)
        y = mask_steps(self.read_out(self.without_sink(out, lse), x), valid)
        return y, (new if conv is None else KeyConvState(new, conv))

    def project(
        self,
        x: Activations,
        conv: State | None = None,
        reset: Steps | None = None,
        valid: Steps | None = None,
    ) -> tuple[Queries, Keys, Values, State | None]:
        """Queries, keys and values in heads, before the rotation, and the state of the key convolution."""
        q_size, k_size, _ = self.torch_sizes["qkv"]
        q, k, v = jnp.split(self.qkv(x), [q_size, q_size + k_size], axis=-1)
        if self.q_norm is not None and self.norm_over == "width":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (rearrange(y, "b t (h k) -> b t h k", k=self.head_dim) for y in (q, k))
        v = rearrange(v, "b t (h v) -> b t h v", v=self.v_head_dim)
        if self.key_conv is not None:
            near, conv = self.key_conv(rearrange(k, "b t g k -> b t (g k)"), conv, reset, valid)
            k = k + near.reshape(k.shape)
        if self.q_norm is not None and self.norm_over == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v, conv

    def without_sink(self, out: Float[Array, "b t h v"], lse: LogSumExp) -> Float[Array, "b t h v"]:
        """The heads' outputs times the weight left by a sink, exp(lse) / (exp(lse) + exp(z))."""
        if self.sink is None:
            return out
        z = 0.0 if self.sink_logits is None else self.sink_logits[...].astype(lse.dtype)
        return out * jax.nn.sigmoid(lse - z)[..., None].astype(out.dtype)

    def read_out(self, heads: Float[Array, "b t h v"], x: Activations) -> Activations:
        """The output projection of the heads' outputs, gated by the input `x`."""
        y = rearrange(heads, "b t h v -> b t (h v)")
        return self.out(y if self.out_gate is None else y * jax.nn.sigmoid(self.out_gate(x)))

    def rotary(self, x: Float[Array, "b t h k"], positions: Int[Array, "b t"]) -> Float[Array, "b t h k"]:
        """Queries or keys, rotated by their positions."""
        if self.rotary_base is None:
            return x
        if self.rotary_width == self.head_dim:
            return rotate(x, positions, self.rotary_base, self.rotary_scaling)
        turned, rest = jnp.split(x, [self.rotary_width], axis=-1)
        return jnp.concatenate(
            [rotate(turned, positions, self.rotary_base, self.rotary_scaling), rest], axis=-1
        )

    def rewind(self, state: State, steps: Counts) -> State:
        """The state `steps` steps ago; ValueError where the cache no longer has it."""
        if self.key_conv is not None:
            raise UserError(
                f"steps={jnp.asarray(steps).tolist()} cannot be taken back: key_conv has forgotten the keys "
                "before its last"
            )
        return self.cache.rewind(state, steps)

    def with_room(self, state: State, steps: int) -> State:
        """`state` with slots for sequences of `steps` steps, if it has fewer."""
        return self._of_cache(self.cache.with_room, state, steps)

    def make_room(self, state: State, steps: Counts) -> State:
        """`state` before a turn of `steps` steps, where the cache drops keys for a turn."""
        return self._of_cache(self.cache.make_room, state, steps)

    def compact(self, state: State, steps: int) -> State:
        """`state` of sequences of at most `steps` steps, reduced to the slots these need."""
        return self._of_cache(self.cache.compact, state, steps)

    def adopt(self, state: State) -> State:
        """A state from outside; ValueError if it was made by another cache."""
        return self._of_cache(lambda own, _: self.cache.adopt(own), state, 0)

    def _of_cache(self, function: Callable[[State, Any], State], state: State, steps: Any) -> State:
        if self.key_conv is None:
            return function(state, steps)
        return state._replace(cache=function(state.cache, steps))


def _own_softcap(cache: Policy | str, softcap: float | None) -> tuple[Policy, float | None]:
    """The policy, and its deprecated softcap option."""
    cache = parse_cache(cache) if isinstance(cache, str) else cache
    if not isinstance(cache, Policy):
        raise UserError(f"cache must be a policy of seqlab.models.cache or its words, got {cache!r}")
    old = getattr(cache, "softcap", None)
    if old is None:
        return cache, softcap
    warnings.warn("softcap is an option of Attention now, not of its cache", DeprecationWarning, stacklevel=3)
    return dataclasses.replace(cache, softcap=None), old if softcap is None else softcap


def with_cache(model: M, cache: str | Policy | Sequence[Policy]) -> M:
    """A copy of `model` with another cache in its attention layers, or one per layer from a sequence of
    policies.

    A string is parsed by `parse_cache`: "sinks(4)+window(1020)+int4". Raises ValueError for an invalid one,
    for a model without attention, or if the number of policies differs from that of attention layers.
    """
    copy = nnx.merge(*nnx.split(model))
    cache = parse_cache(cache) if isinstance(cache, str) else cache
    layers = [module for _, module in nnx.iter_modules(copy) if isinstance(module, Attention)]
    policies = [cache] * len(layers) if isinstance(cache, Policy) else list(cache)
    if len(policies) != len(layers) or not layers:
        raise UserError(f"the model has {len(layers)} attention layers, got {len(policies)} caches")
    for layer, policy in zip(layers, policies, strict=True):
        layer.cache, layer.softcap = _own_softcap(policy, layer.softcap)
    return copy


def leaves_training(model: Module) -> int | None:
    """After how many steps of a stream `model` meets rotary positions that it was not trained on; None for
    never, or where it is not known what it was trained on (`Model.trained_length`)."""
    trained = getattr(model, "trained_length", None)
    if trained is None:
        return None
    layers = [module for _, module in nnx.iter_modules(model) if isinstance(module, Attention)]
    reaches = [layer.cache.reach for layer in layers if layer.rotary_base is not None]
    return trained if any(reach is None or reach > trained for reach in reaches) else None


def bytes_per_step(model: Module, dtype: jax.typing.DTypeLike = jnp.float32) -> float:
    """Bytes stored by the attention layers of `model` per step; 0 without attention."""
    layers = [module for _, module in nnx.iter_modules(model) if isinstance(module, Attention)]
    return sum(state_bytes(layer, dtype=dtype) / layer.cache.span for layer in layers)
