"""Basic layers: linear maps, norms, rotary phases, embeddings, short convolutions, channel mixers.

Parameters are float32; a layer casts them to the dtype of its input, so the `dtype` of the embedding sets the
compute dtype of the whole model. Norms and rotary phases are always computed in float32 (float64 for float64
inputs).
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Num

from seqlab import kernels
from seqlab.checks import UserError, check_choice, check_positive
from seqlab.module import Module
from seqlab.parallel import sequence_parallel
from seqlab.shapes import Activations, Maps, Steps, Tokens, accumulator
from seqlab.state import State, mask_steps

Factory = Callable[..., Module]  # called as factory(dim, rngs=rngs)


@jax.checkpoint
def gelu(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """x P(X < x) for a normal X: the exact one (arXiv 1606.08415). Its gradient saves only x."""
    wide = x.astype(accumulator(x.dtype))  # in lower precision 1 + erf would lose the tail
    return (wide * (0.5 + 0.5 * jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": gelu,  # JAX's default is the tanh approximation
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "squared_relu": lambda x: jnp.square(jax.nn.relu(x)),
}


def activation(name: str) -> Callable[[Array], Array]:
    """The activation function of that name; ValueError with the nearest name otherwise."""
    check_choice(name, tuple(ACTIVATIONS), "activation")
    return ACTIVATIONS[name]


def step_size_bias(
    key: jax.Array, size: int, low: float = 1e-3, high: float = 0.1, floor: float = 1e-4
) -> Float[Array, " d"]:
    """Biases that make softplus(bias) log-uniform in [low, high]: the step sizes at initialisation (arXiv
    2312.00752)."""
    dt = jnp.exp(jax.random.uniform(key, (size,)) * (math.log(high) - math.log(low)) + math.log(low))
    dt = jnp.maximum(dt, floor)
    return dt + jnp.log(-jnp.expm1(-dt))


# With so few rows XLA makes one loop of a product and of what x is computed from (a norm, a gate), and
# computes that anew for every column of W: a step of decoding then takes up to 1.7 times as long.
_FEW_ROWS = 16


def matmul(
    x: Float[Array, "*b i"], weight: Float[Array, "i o"], dtype: jax.typing.DTypeLike | None = None
) -> Float[Array, "*b o"]:
    """x W, accumulated and returned in `dtype`. On a CPU the leading axes are merged, since XLA would
    transpose x for the gradient of W."""
    split = x.ndim > 2 and sequence_parallel.parts(x.shape[1]) > 1
    # The axes are kept separate, since each may be sharded over its own mesh axis.
    if split or jax.default_backend() != "cpu":
        return jnp.matmul(x, weight, preferred_element_type=dtype)
    rows = x.reshape(-1, x.shape[-1])
    if isinstance(rows.shape[0], int) and rows.shape[0] <= _FEW_ROWS:  # exports are for any number of rows
        rows = jax.lax.optimization_barrier(rows)
    return jnp.matmul(rows, weight, preferred_element_type=dtype).reshape(*x.shape[:-1], weight.shape[1])


class LowRankMap(Module):
    """scale (x A) B with A [in, rank] and B [rank, out], initially zero (LoRA, arXiv 2106.09685); `lead`: the
    leading axes of stacked layers."""

    def __init__(
        self, inputs: int, rank: int, outputs: int, *, scale: float, lead: tuple[int, ...], rngs: nnx.Rngs
    ):
        self.scale = scale
        normal = jax.random.normal(rngs.params(), (*lead, inputs, rank))
        self.down = nnx.Param(normal / math.sqrt(inputs))
        self.up = nnx.Param(jnp.zeros((*lead, rank, outputs)))

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        down, up = self.down[...].astype(x.dtype), self.up[...].astype(x.dtype)
        return matmul(matmul(x, down), up * self.scale)


class Linear(Module):
    """y = x W + b with W [in, out], initialised normal with standard deviation `scale` / sqrt(in). `adapter`:
    a low-rank map of x that is added (`seqlab.models.lora`)."""

    torch_layout: ClassVar = {"weight": "[out, in]"}
    adapter: LowRankMap | None = None

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False, scale: float = 1.0, rngs: nnx.Rngs):
        std = scale / math.sqrt(check_positive("inputs", inputs))
        self.weight = nnx.Param(
            std * jax.random.normal(rngs.params(), (inputs, check_positive("outputs", outputs)))
        )
        self.bias = nnx.Param(jnp.zeros((outputs,))) if bias else None

    def __call__(
        self, x: Float[Array, "*b i"], dtype: jax.typing.DTypeLike | None = None
    ) -> Float[Array, "*b o"]:
        """y in the dtype of `x`, or accumulated and returned in `dtype`: logits must not be rounded to the
        dtype of the activations."""
        y = matmul(x, self.weight[...].astype(x.dtype), dtype)
        y = y if self.adapter is None else y + self.adapter(x).astype(y.dtype)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


class Identity(Module):
    """x itself: the norm of a model whose mixers normalise inside."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs | None = None):
        self.dim = dim

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        return x


class RMSNorm(Module):
    """x / sqrt(mean(x^2) + eps) * (offset + weight) over the last axis (Zhang and Sennrich, arXiv
    1910.07467). Gemma's has the offset 1 (arXiv 2403.08295): weight decay then pulls the factor to 1. With
    `weighted=False` there is no such factor."""

    def __init__(
        self,
        dim: int,
        *,
        eps: float = 1e-5,
        offset: float = 0.0,
        weighted: bool = True,
        rngs: nnx.Rngs | None = None,
    ):
        size = (check_positive("dim", dim),)
        self.weight = nnx.Param(jnp.full(size, 1.0 - offset)) if weighted else None
        self.eps, self.offset = eps, offset

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        wide = x.astype(accumulator(x.dtype))
        y = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        if self.weight is None:
            return y.astype(x.dtype)
        weight = self.weight[...].astype(y.dtype)
        return (y * (weight + self.offset if self.offset else weight)).astype(x.dtype)


class LayerNorm(Module):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis (arXiv 1607.06450)."""

    def __init__(self, dim: int, *, eps: float = 1e-5, bias: bool = True, rngs: nnx.Rngs | None = None):
        self.weight = nnx.Param(jnp.ones((check_positive("dim", dim),)))
        self.bias = nnx.Param(jnp.zeros((dim,))) if bias else None
        self.eps = eps

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        wide = x.astype(accumulator(x.dtype))
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        y = (
            centred
            * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.eps)
            * self.weight[...].astype(wide.dtype)
        )
        return (y if self.bias is None else y + self.bias[...].astype(wide.dtype)).astype(x.dtype)


class Embedding(Module):
    """Token vectors [vocab, d]. `read_out` is the tied head, so that one array never has two names."""

    def __init__(self, vocab_size: int, dim: int, *, std: float = 0.02, rngs: nnx.Rngs):
        self.weight = nnx.Param(
            std
            * jax.random.normal(
                rngs.params(), (check_positive("vocab_size", vocab_size), check_positive("dim", dim))
            )
        )

    def __call__(self, tokens: Tokens) -> Activations:
        return jnp.take(self.weight[...], tokens, axis=0, mode="clip")

    def read_out(self, x: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        """Logits, in float32 at least."""
        return matmul(x, self.weight[...].astype(x.dtype).T, accumulator(x.dtype))


class ShortConv(Module):
    """Causal depthwise convolution over time with its state; the last tap meets the current step."""

    torch_layout: ClassVar = {"weight": "[d, 1, w]"}

    def __init__(
        self, dim: int, *, width: int = 4, bias: bool = False, activation: str | None = "silu", rngs: nnx.Rngs
    ):
        bound = 1 / math.sqrt(check_positive("width", width))
        self.dim, self.width = dim, width
        self.weight = nnx.Param(jax.random.uniform(rngs.params(), (width, dim), minval=-bound, maxval=bound))
        self.bias = (
            nnx.Param(jax.random.uniform(rngs.params(), (dim,), minval=-bound, maxval=bound))
            if bias
            else None
        )
        self.activation = activation
        if activation is not None:
            check_choice(activation, tuple(ACTIVATIONS), "activation")

    def init_state(self, batch: int, dtype: jax.typing.DTypeLike = jnp.float32) -> Float[Array, "b p d"]:
        return jnp.zeros((batch, self.width - 1, self.dim), dtype)

    def __call__(
        self,
        x: Activations,
        state: State | None = None,
        reset: Steps | None = None,
        valid: Steps | None = None,
    ) -> tuple[Activations, State | None]:
        bias = None if self.bias is None else self.bias[...].astype(x.dtype)
        y, new = kernels.conv(
            x, self.weight[...].astype(x.dtype), bias, initial_state=state, reset=reset, valid=valid
        )
        return (y if self.activation is None else ACTIVATIONS[self.activation](y)), (
            None if state is None else new
        )


class MLP(Module):
    """Channel mixer: down(activation(up x)), pointwise in time, without state.

    Args:
      expand, hidden: the hidden width is `hidden`, by default expand * dim.
      activation: a name, or a factory of a module with its own parameters, called as activation(hidden,
        rngs=rngs).

    Pitfalls:
      "gelu" is exact, as in the papers; JAX's default is the tanh approximation, here "gelu_tanh".
    """

    causal, lookahead, exact = True, 0, True

    def __init__(
        self,
        dim: int,
        *,
        expand: int = 4,
        hidden: int | None = None,
        activation: str | Factory = "gelu",
        bias: bool = True,
        out_scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        hidden = (
            check_positive("expand", expand) * dim if hidden is None else check_positive("hidden", hidden)
        )
        if isinstance(activation, str):
            check_choice(activation, tuple(ACTIVATIONS), "activation")
        self.dim = dim
        self.up = Linear(dim, hidden, bias=bias, rngs=rngs)
        self.activation = activation if isinstance(activation, str) else activation(hidden, rngs=rngs)
        self.down = Linear(hidden, dim, bias=bias, scale=out_scale, rngs=rngs)

    def init_state(self, batch: int, dtype: jax.typing.DTypeLike = jnp.float32) -> tuple[()]:
        return ()

    def __call__(
        self,
        x: Maps,
        state: State | None = None,
        reset: Steps | None = None,
        valid: Steps | None = None,
    ) -> tuple[Maps, State | None]:
        act = ACTIVATIONS[self.activation] if isinstance(self.activation, str) else self.activation
        return self.down(act(self.up(mask_steps(x, valid)))), state


class SwiGLU(Module):
    """Channel mixer: down(activation(gate x) * up x) (Shazeer, arXiv 2002.05202); `hidden` is 8/3 dim,
    rounded up to a multiple of 64.

    Args:
      activation: "silu"; "gelu_tanh" makes it Gemma's GeGLU (arXiv 2403.08295).
      bias: biases of all three projections.
      factors: constant factors of gate x and of the output (Falcon-H1, arXiv 2507.22448).

    Pitfalls:
      Gate and up projection are one matrix here, the gate first; published weights have two.
    """

    causal, lookahead, exact = True, 0, True
    torch_names: ClassVar = {"gate_up": ("gate_proj", "up_proj"), "down": "down_proj"}

    def __init__(
        self,
        dim: int,
        *,
        hidden: int | None = None,
        activation: str = "silu",
        bias: bool = False,
        factors: tuple[float, float] = (1.0, 1.0),
        out_scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        hidden = -(-8 * dim // (3 * 64)) * 64 if hidden is None else check_positive("hidden", hidden)
        check_choice(activation, tuple(ACTIVATIONS), "activation")
        self.dim, self.activation, self.factors = dim, activation, tuple(factors)
        self.gate_up = Linear(dim, 2 * hidden, bias=bias, rngs=rngs)  # one matrix product for both halves
        self.down = Linear(hidden, dim, bias=bias, scale=out_scale, rngs=rngs)

    def init_state(self, batch: int, dtype: jax.typing.DTypeLike = jnp.float32) -> tuple[()]:
        return ()

    def __call__(
        self,
        x: Maps,
        state: State | None = None,
        reset: Steps | None = None,
        valid: Steps | None = None,
    ) -> tuple[Maps, State | None]:
        gate, up = jnp.split(self.gate_up(mask_steps(x, valid)), 2, axis=-1)
        before, after = self.factors
        y = self.down(ACTIVATIONS[self.activation](gate if before == 1.0 else gate * before) * up)
        return y if after == 1.0 else y * after, state


class RotaryScaling(NamedTuple):
    """Scaling of rotary frequencies for sequences longer than those of training: division by `factor`.

    With the other three, only slow frequencies are divided: those with a period above
    `original_max_position_embeddings / low_freq_factor`, and partly those down to `/ high_freq_factor` (Llama
    3.1, arXiv 2407.21783). Without them, all are (linear interpolation, arXiv 2306.15595).
    """

    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None

    def __call__(self, turns: np.ndarray) -> np.ndarray:
        """Scaled frequencies, in turns per step."""
        if self.low_freq_factor is None:
            return turns / self.factor
        periods = self.original_max_position_embeddings * turns  # within the training length
        kept = np.clip(
            (periods - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0.0, 1.0
        )
        return turns * (kept + (1 - kept) / self.factor)


def rotary_phases(
    positions: Num[Array, "b t *a"],
    width: int,
    base: float,
    scaling: RotaryScaling | None = None,
    sections: tuple[int, ...] | None = None,
) -> tuple[Float[Array, "b t r"], Float[Array, "b t r"]]:
    """cos and sin of position * base^(-2i/width), as accurate at step 10^9 as at step 1.

    A float32 angle is off by 0.06 radians after a million steps. Here a frequency is a fraction of a turn
    with 48 bits, and its product with the position is computed in integers, whose overflow is a full turn: 32
    high bits directly, 16 low bits by halves of the position to avoid overflow. The fractional part of a
    position is added in floating point.

    `sections` (a_0, a_1, ..) that add up to width/2: positions [b, t, axes], and the first a_0 frequencies
    use the first axis, the next a_1 the second (time, height and width of a video: Qwen2-VL, arXiv
    2409.12191).
    """
    turns = float(base) ** (-np.arange(0, width, 2, dtype=np.float64) / width) / (2 * np.pi)
    turns = turns if scaling is None else scaling(turns)
    fixed = np.round(turns * 2.0**48).astype(np.uint64)
    high, low = (fixed >> np.uint64(16)).astype(np.uint32), (fixed & np.uint64(0xFFFF)).astype(np.uint32)
    if sections is None:
        positions = positions[..., None]
    elif sum(sections) == width // 2 and len(sections) == positions.shape[-1]:
        positions = positions[..., np.repeat(np.arange(len(sections)), sections)]
    else:
        raise UserError(
            f"sections must give each of {positions.shape[-1]} axes its part of {width // 2} frequencies, "
            f"got {sections}"
        )
    between = jnp.issubdtype(positions.dtype, jnp.floating)
    step = (jnp.floor(positions) if between else positions).astype(jnp.uint32)
    phase = step * high + (step >> 16) * low + (((step & 0xFFFF) * low) >> 16)
    angle = phase.astype(jnp.int32).astype(jnp.float32) * np.float32(np.pi * 2.0**-31)
    if between:
        angle = angle + (positions - jnp.floor(positions)) * (2 * np.pi * turns).astype(np.float32)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(
    x: Float[Array, "b t h k"],
    positions: Num[Array, "b t *a"],
    base: float,
    scaling: RotaryScaling | None = None,
    sections: tuple[int, ...] | None = None,
) -> Float[Array, "b t h k"]:
    """Rotary position embedding with half-split pairing: channels i and i + k/2 form a pair (arXiv
    2104.09864); along one axis, or along several with `sections` of the frequencies, see `rotary_phases`."""
    cos, sin = (
        phase[:, :, None, :] for phase in rotary_phases(positions, x.shape[-1], base, scaling, sections)
    )
    halves = x.astype(accumulator(x.dtype)).reshape(*x.shape[:-1], 2, x.shape[-1] // 2)
    turned = halves * cos[..., None, :] + halves[..., ::-1, :] * jnp.stack([-sin, sin], axis=-2)
    return turned.reshape(x.shape).astype(x.dtype)


def step_by_step(
    step: Callable[..., tuple[State, Any]], state: State, inputs: Any, *constants: Any
) -> tuple[State, Any]:
    """`state, outputs` of step(state, input, *constants) -> state, output along time, the second axis of
    every leaf of the inputs; a single step runs without a loop. Arrays that `step` needs at every step must
    be passed as `constants`, not closed over."""
    if sequence_parallel.parts(jax.tree.leaves(inputs)[0].shape[1]) > 1:
        return _device_by_device(step, state, inputs, constants)
    inputs = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), inputs)
    if {leaf.shape[0] for leaf in jax.tree.leaves(inputs)} == {1}:
        state, outputs = step(state, jax.tree.map(lambda leaf: leaf[0], inputs), *constants)
        return state, jax.tree.map(lambda leaf: leaf[:, None], outputs)
    state, outputs = jax.lax.scan(lambda state, x: step(state, x, *constants), state, inputs)
    return state, jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), outputs)


def _device_by_device(
    step: Callable[..., tuple[State, Any]], state: State, inputs: Any, constants: Any
) -> tuple[State, Any]:
    """The same with time split over devices. Since `step` may be nonlinear, each device starts when the
    previous one ends."""
    leaves, tree = jax.tree.flatten(inputs)
    real = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]
    # The steps that pad the last segment are not valid.
    there = sequence_parallel.all_valid(None, leaves[0].shape)

    def guarded(old: State, now: Any, *constants: Any) -> tuple[State, Any]:
        now, there = now
        new, outputs = step(old, now, *constants)
        if there is not None:
            new = jax.tree.map(
                lambda a, b: jnp.where(there.reshape(-1, *(1,) * (a.ndim - 1)), a, b), new, old
            )
        return new, outputs

    def run(state: State, floats: Any, rest: Any) -> tuple[Any, State]:
        (numbers, constants), (flags, there) = floats, rest
        numbers, flags = iter(numbers), iter(flags)
        inputs = jax.tree.unflatten(tree, [next(numbers if own else flags) for own in real])
        state, outputs = step_by_step(guarded, state, (inputs, there), *constants)
        return outputs, state

    def stretch(timed: Any, whole: Any) -> tuple[Any, State]:
        (leaves, there), (state, constants) = timed, whole
        numbers, flags = (
            [leaf for leaf, own in zip(leaves, real, strict=True) if own is kind] for kind in (True, False)
        )
        return sequence_parallel.relay(run, state, (numbers, constants), (flags, there))

    outputs, state = sequence_parallel.split(stretch, (leaves, there), (state, constants))
    return state, outputs
