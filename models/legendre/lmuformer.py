"""LMUFormer: convolutions, Legendre memories and channel mixers, classified at every step; and its spiking
form (arXiv 2402.04882)."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from seqlab import kernels
from seqlab.checks import UserError, check_positive
from seqlab.kernels.lmu import legendre
from seqlab.mixer import Composite
from seqlab.models.backbone import Backbone
from seqlab.models.batch_norm import BatchNorm
from seqlab.models.layers import Identity, Linear
from seqlab.models.legendre.in_turn import Residual, TimeConv, in_turn, init_in_turn, map_in_turn
from seqlab.models.legendre.lmu import LMU, Pointwise, uniform_linear
from seqlab.models.legendre.spiking import Spike
from seqlab.models.legendre.spiking_attention import SpikingAttention
from seqlab.module import Module
from seqlab.shapes import Activations, Steps, accumulator
from seqlab.state import State, mask_steps, segments

_STD = 0.02  # of the linear maps at initialisation; convolutions of width 1 have PyTorch's default instead


_pointwise = functools.partial(uniform_linear, kind=Pointwise)


class LMUMixer(Module):
    """The token mixer of LMUFormer: norm(proj(LMU(x))), an LMU followed by a projection and BatchNorm.

    Args:
      order: coefficients of the memory; by default dim.
      theta: length of its window in steps.
      channels: signals that it remembers, 1 as published.

    Pitfalls:
      No norm stands in front of it: build its blocks by `Backbone(norm=Identity)`. BatchNorm means something
        only after training.
    """

    causal, lookahead, exact = True, 0, True
    torch_names: ClassVar = {"proj": "proj_conv", "norm": "proj_bn"}

    def __init__(
        self, dim: int, *, order: int | None = None, theta: float = 128.0, channels: int = 1, rngs: nnx.Rngs
    ):
        self.dim = dim
        self.lmu = LMU(dim, order=order, theta=theta, channels=channels, init_std=_STD, rngs=rngs)
        self.proj, self.norm = _pointwise(dim, dim, rngs=rngs), BatchNorm(dim)

    def init_state(self, batch: int, dtype: jax.typing.DTypeLike = jnp.float32) -> Float[Array, "b q d"]:
        return self.lmu.init_state(batch, dtype)

    def __call__(
        self,
        x: Activations,
        state: State | None = None,
        reset: Steps | None = None,
        valid: Steps | None = None,
    ) -> tuple[Activations, State | None]:
        y, state = self.lmu(x, state, reset, valid)
        return self.norm(self.proj(y), valid), state


class ConvMLP(Module):
    """The channel mixer of LMUFormer: relu(norm(down(gelu(norm(up(x)))))). The last activation is the
    published one."""

    causal, lookahead, exact = True, 0, True
    torch_names: ClassVar = {"up": "fc1_conv", "up_norm": "fc1_bn", "down": "fc2_conv", "down_norm": "fc2_bn"}

    def __init__(self, dim: int, *, expand: int = 4, rngs: nnx.Rngs):
        self.dim, hidden = dim, check_positive("expand", expand) * dim
        self.up, self.up_norm = _pointwise(dim, hidden, rngs=rngs), BatchNorm(hidden)
        self.down, self.down_norm = _pointwise(hidden, dim, rngs=rngs), BatchNorm(dim)

    def init_state(self, batch: int, dtype: jax.typing.DTypeLike = jnp.float32) -> tuple[()]:
        return ()

    def __call__(
        self,
        x: Activations,
        state: State | None = None,
        reset: Steps | None = None,
        valid: Steps | None = None,
    ) -> tuple[Activations, State | None]:
        y = jax.nn.gelu(self.up_norm(self.up(mask_steps(x, valid)), valid), approximate=False)
        return jax.nn.relu(self.down_norm(self.down(y), valid)), state


class SpikingLMUState(NamedTuple):
    """Membranes v [b, ...] of the inputs, of u, of the memory and of h; `memory` [b, 1, d] is real-valued and
    never spikes inside."""

    inputs: Float[Array, "b d"]
    u: Float[Array, "b 1"]
    memory: Float[Array, "b 1 n"]
    read: Float[Array, "b n"]
    hidden: Float[Array, "b d"]


class SpikingLMU(Module):
    """The LMU between spikes: u = spike(W_u s), m the exact linear memory of u, h = spike(W_h [spike(m) ;
    s]).

    Only what is read of the memory is binary: its recurrence is the same as without spikes, and so it too has
    the parallel form.
    """

    torch_names: ClassVar = {"spike_u": "bn_u", "spike_m": "bn_m", "spike_h": "bn_h"}

    def __init__(self, dim: int, *, order: int, theta: float, rngs: nnx.Rngs):
        legendre(order, theta)
        self.order, self.theta = order, theta
        self.W_u, self.spike_u = uniform_linear(dim, 1, std=_STD, rngs=rngs), Spike(1)
        self.spike_m = Spike(order)
        self.W_h, self.spike_h = uniform_linear(order + dim, dim, std=_STD, rngs=rngs), Spike(dim)

    def __call__(
        self, s: Activations, state: Sequence[State | None], reset: Steps | None, valid: Steps | None
    ) -> tuple[Activations, tuple[Any, ...]]:
        u, memory, read, hidden = state
        u_spikes, u = self.spike_u(self.W_u(s), u, reset, valid)
        m, new = kernels.lmu(
            u_spikes, *legendre(self.order, self.theta), initial_state=memory, reset=reset, valid=valid
        )
        m, read = self.spike_m(m[:, :, 0], read, reset, valid)
        h, hidden = self.spike_h(self.W_h(jnp.concatenate([m, s], axis=-1)), hidden, reset, valid)
        return h, (u, new, read, hidden)


class SpikingLMUMixer(Module):
    """The token mixer of the spiking LMUFormer: norm(proj(LMU(spike(x)))), the LMU itself between spikes.

        s = spike(x)          u = spike(W_u s)          m_t = Ā m_{t-1} + B̄ u_t          h = spike(W_h
        [spike(m) ; s])

    Every spike is BatchNorm and a leaky integrate-and-fire unit; its own inputs have a threshold of 0.5, the
    others of 1.

    Args:
      order: coefficients of the memory; by default 2 dim.
      theta: length of its window in steps.

    Pitfalls:
      A membrane that ends within rounding of its threshold may fire in one split of a sequence and not in
        another, and from there on the two differ by whole spikes: no order of float32 sums rules that out.
      The memory never spikes inside its recurrence, only what is read of it; the paper's figure shows another
        wiring than its code.
    """

    causal, lookahead, exact = True, 0, True
    torch_names: ClassVar = {"spike": "prev_bn", "proj": "proj_conv", "norm": "proj_bn"}

    def __init__(self, dim: int, *, order: int | None = None, theta: float = 128.0, rngs: nnx.Rngs):
        self.dim, order = dim, 2 * dim if order is None else order
        self.spike = Spike(dim, threshold=0.5)
        self.lmu = SpikingLMU(dim, order=order, theta=theta, rngs=rngs)
        self.proj, self.norm = _pointwise(dim, dim, rngs=rngs), BatchNorm(dim)

    def init_state(self, batch: int, dtype: jax.typing.DTypeLike = jnp.float32) -> SpikingLMUState:
        order, wide = self.lmu.order, accumulator(dtype)
        shapes = ((self.dim,), (1,), (1, order), (order,), (self.dim,))
        return SpikingLMUState(*(jnp.zeros((batch, *shape), wide) for shape in shapes))

    def __call__(
        self,
        x: Activations,
        state: State | None = None,
        reset: Steps | None = None,
        valid: Steps | None = None,
    ) -> tuple[Activations, State | None]:
        inputs, *inner = (None,) * 5 if state is None else state
        s, inputs = self.spike(mask_steps(x, valid), inputs, reset, valid)
        h, inner = self.lmu(s, inner, reset, valid)
        return self.norm(self.proj(h), valid), (None if state is None else SpikingLMUState(inputs, *inner))


class SpikingMLP(Module):
    """The channel mixer of the spiking LMUFormer: down(spike(up(spike(x))))."""

    causal, lookahead, exact = True, 0, True
    torch_names: ClassVar = {
        "up_spike": "fc1_bn",
        "up": "fc1_conv",
        "down_spike": "fc2_bn",
        "down": "fc2_conv",
    }

    def __init__(self, dim: int, *, expand: int = 4, rngs: nnx.Rngs):
        self.dim, hidden = dim, check_positive("expand", expand) * dim
        self.up_spike, self.up = Spike(dim), _pointwise(dim, hidden, rngs=rngs)
        self.down_spike, self.down = Spike(hidden), _pointwise(hidden, dim, rngs=rngs)

    def init_state(self, batch: int, dtype: jax.typing.DTypeLike = jnp.float32) -> tuple[Array, Array]:
        return self.up_spike.init_state(batch, dtype), self.down_spike.init_state(batch, dtype)

    def __call__(
        self,
        x: Activations,
        state: State | None = None,
        reset: Steps | None = None,
        valid: Steps | None = None,
    ) -> tuple[Activations, State | None]:
        outer, inner = (None, None) if state is None else state
        s, outer = self.up_spike(mask_steps(x, valid), outer, reset, valid)
        s, inner = self.down_spike(self.up(s), inner, reset, valid)
        return mask_steps(self.down(s), valid), (None if state is None else (outer, inner))


class ConvStage(Module):
    """norm(relu(conv(x))) with a convolution of width 3."""

    causal, exact = True, True
    torch_names: ClassVar = {"conv": "0", "norm": "3"}

    def __init__(self, inputs: int, dim: int, *, centred: bool, rngs: nnx.Rngs):
        self.conv, self.norm = TimeConv(inputs, dim, centred=centred, rngs=rngs), BatchNorm(dim)
        self.lookahead = self.conv.lookahead

    def init_state(self, batch: int, dtype: jax.typing.DTypeLike = jnp.float32) -> State:
        return self.conv.init_state(batch, dtype)

    def __call__(
        self,
        x: Activations,
        state: State | None = None,
        reset: Steps | None = None,
        valid: Steps | None = None,
    ) -> tuple[Activations, State | None]:
        y, state = self.conv(x, state, reset, valid)
        return self.norm(jax.nn.relu(y), valid), state


class ConvEmbedding(Module):
    """Four stages of convolution, ReLU and norm; then x + conv(x), from which the positions are known."""

    torch_names: ClassVar = {"stages": "conv_layers", "position": "rpe_conv"}

    def __init__(self, inputs: int, dim: int, *, centred: bool, rngs: nnx.Rngs):
        self.stages = nnx.List(
            [ConvStage(dim if i else inputs, dim, centred=centred, rngs=rngs) for i in range(4)]
        )
        self.position = TimeConv(dim, dim, centred=centred, rngs=rngs)
        self.dim = dim

    @property
    def parts(self) -> list[Any]:
        return [*self.stages, Residual(self.dim, self.position)]


class SpikingEmbedding(Module):
    """Four convolutions with spikes between them; then x + conv(spike(x)). What leaves is real-valued, as the
    residual stream is."""

    torch_names: ClassVar = {
        "convs": ["proj_conv", "proj_conv1", "proj_conv2", "proj_conv3", "rpe_conv"],
        "spikes": ["proj_bn", "proj_bn1", "proj_bn2", "proj_bn3"],
    }

    def __init__(self, inputs: int, dim: int, *, centred: bool, rngs: nnx.Rngs):
        self.convs = nnx.List(
            [TimeConv(dim if i else inputs, dim, centred=centred, rngs=rngs) for i in range(5)]
        )
        self.spikes = nnx.List([Spike(dim) for _ in range(4)])
        self.dim = dim

    @property
    def parts(self) -> list[Any]:
        *inner, (spike, conv) = zip(self.spikes, self.convs[1:], strict=True)
        return [self.convs[0], *(part for pair in inner for part in pair), Residual(self.dim, spike, conv)]


class LMUFormer(Composite, Module):
    """A classifier that gives its answer at every step: logits [b, t, classes] of the mean of what it has
    seen so far.

    Embedding by five convolutions of width 3; `depth` blocks x + LMU mixer, x + channel mixer, without a norm
    of their own; a linear head at every step; and the running mean of its logits, of which the last is the
    published answer to the whole sequence.

    As published the convolutions are centred: five steps of look-ahead. The stream gives the answer of step t
    after step t+5, exactly; the answers of the last five steps, in which the convolutions look beyond the
    end, only the parallel form gives. `centred=False` is the causal variant, which waits for nothing.

    `spiking=True` is the published spiking form ("membrane shortcut"): leaky integrate-and-fire units along
    time where the other has activations, a real-valued residual stream, and twice the coefficients of memory.
    See `Spike` for what near ties of a threshold mean. With `attention_heads` it is the published attention
    model of the same frame, which `SpikingAttention` mixes instead of memories: not causal, except with
    `centred=False`.

    Trained by seqlab's training step, whose batch statistics become the affine maps of evaluation; see
    `BatchNorm`.

    Args:
      inputs: features of a step (mel bins, pixels of a row).
      theta: window of the memories in steps: the length of the sequences, or of what matters in them.
      expand: hidden channels of the channel mixer, in units of dim.
      order: coefficients of the memories; by default dim, and 2 dim where spiking.
      centred, spiking: see above.
      attention_heads: heads of spiking attention in place of the memories, which theta and order belong to;
        None for memories. 8 in the published code.

    Raises:
      ValueError: attention_heads without spiking, or that do not divide dim.

    State: two inputs a convolution, a memory a block, membranes where spiking, and the sum of the logits.
    """

    torch_names: ClassVar = {"embedding": "patch_embed", "backbone": "", "head_spike": "head_bn"}

    def __init__(
        self,
        inputs: int,
        classes: int,
        *,
        dim: int = 256,
        depth: int = 1,
        theta: float = 128.0,
        expand: int = 4,
        order: int | None = None,
        centred: bool = True,
        spiking: bool = False,
        attention_heads: int | None = None,
        rngs: nnx.Rngs,
    ):
        if attention_heads is not None and not spiking:
            raise UserError(
                f"attention_heads needs spiking=True: the model without spikes has no attention, got "
                f"{attention_heads}"
            )
        self.inputs, self.dim, self.classes = (
            check_positive("inputs", inputs),
            check_positive("dim", dim),
            check_positive("classes", classes),
        )
        embedding, mixer, mlp = (
            (SpikingEmbedding, SpikingLMUMixer, SpikingMLP) if spiking else (ConvEmbedding, LMUMixer, ConvMLP)
        )
        self.embedding = embedding(inputs, dim, centred=centred, rngs=rngs)
        if attention_heads is None:
            mixer = functools.partial(mixer, theta=theta, order=order)
        else:
            mixer = functools.partial(SpikingAttention, heads=attention_heads, causal=not centred)
        mlp = functools.partial(mlp, expand=expand)
        self.backbone = Backbone(dim, depth, mixer, channel_mixer=mlp, norm=Identity, rngs=rngs)
        self.head_spike = Spike(dim) if spiking else None
        self.head = uniform_linear(dim, classes, std=_STD, rngs=rngs)

    @property
    def parts(self) -> list[Any]:
        spike = [] if self.head_spike is None else [self.head_spike]
        return [*self.embedding.parts, self.backbone, *spike, RunningMean(self.head, self.classes)]

    def children(self) -> list[Any]:
        return self.parts

    def map_states(self, state: State, function: Callable[[Any, State], State]) -> State:
        return map_in_turn(self.parts, state, function)

    def init_state(self, batch: int, dtype: jax.typing.DTypeLike = jnp.float32) -> State:
        return init_in_turn(self.parts, batch, dtype)

    def __call__(
        self,
        x: Activations,
        state: State | None = None,
        reset: Steps | None = None,
        valid: Steps | None = None,
    ) -> tuple[Float[Array, "b t c"], State | None]:
        return in_turn(self.parts, mask_steps(x, valid), state, reset, valid)


class MeanState(NamedTuple):
    """`total` [b, classes]: the sum so far; `length` [b]: of how many steps."""

    total: Float[Array, "b c"]
    length: Array


class RunningMean:
    """(1/t) sum_{s <= t} head(x_s): the mean over the sequence so far, which commutes with a linear head."""

    causal, lookahead, exact = True, 0, True

    def __init__(self, head: Linear, classes: int):
        self.head, self.classes = head, classes

    def init_state(self, batch: int, dtype: jax.typing.DTypeLike = jnp.float32) -> MeanState:
        return MeanState(jnp.zeros((batch, self.classes), accumulator(dtype)), jnp.zeros((batch,), jnp.int32))

    def __call__(
        self,
        x: Activations,
        state: State | None = None,
        reset: Steps | None = None,
        valid: Steps | None = None,
    ) -> tuple[Float[Array, "b t o"], State | None]:
        y = self.head(mask_steps(x, valid), accumulator(x.dtype))
        total, length = self.init_state(x.shape[0], x.dtype) if state is None else state
        # A sum is the scan whose decay is exp(0): it knows resets and invalid steps, and forgets without
        # subtracting.
        ones = jnp.ones((*y.shape[:2], 1), y.dtype)
        still = jnp.zeros((self.classes, 1), y.dtype)
        sums, total = kernels.scan(
            y, jnp.ones_like(y), still, ones, ones, initial_state=total[..., None], reset=reset, valid=valid
        )
        steps = segments(x.shape[:2], length, reset, valid)
        mean = sums / jnp.maximum(steps.positions + 1, 1)[..., None].astype(y.dtype)
        return mask_steps(mean, valid), (None if state is None else MeanState(total[..., 0], steps.length))
