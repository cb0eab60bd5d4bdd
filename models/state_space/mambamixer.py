"""MambaMixer: selection along tokens and along channels, and learned sums of all earlier outputs instead of a
residual stream (Behrouz, Santacatterina and Zabih, arXiv 2403.19888, first version).

The authors released no code. Where their text leaves a choice open, Mamba's code is followed (the selection
reads the convolved input, the input map is Euler's), or the choice is noted in place.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from seqlab.checks import UserError, check_positive
from seqlab.mixer import Composite
from seqlab.models.kinds import make_mixer, make_norm
from seqlab.models.layers import Factory, LayerNorm, Linear
from seqlab.models.state_space.mamba import MambaState, Selective
from seqlab.module import Module
from seqlab.parallel import sequence_parallel
from seqlab.shapes import Activations, Steps, accumulator
from seqlab.state import State, mask_steps


class Direction(Selective):
    """One direction of a `SelectiveMixer`: with its own convolution, selection and scan."""

    def __call__(
        self,
        a: Activations,
        state: State | None = None,
        reset: Steps | None = None,
        valid: Steps | None = None,
    ) -> tuple[Activations, State | None]:
        return self.selected(a, state, reset, valid)


class SelectiveMixer(Module):
    """Mamba in one direction or two: one input projection and one gate, and one convolution, selection and
    scan per direction.

        a, z = in_proj(x);  y = direction_1(a) + flip(direction_2(flip(a)));  out_proj(y * silu(z))

    One direction is exactly `Mamba`, with its state, and streams. Two are not causal: there is no state,
    `init_state` is empty, and the sequence must be given whole. Sequences packed in a row are separate in
    both directions, and invalid steps are skipped in both. `inner` is E, expand * dim by default; the other
    sizes are Mamba's.

    Raises:
      ValueError: a state is given to a mixer of two directions, which cannot work in chunks.

    Source: MambaMixer (arXiv 2403.19888); the mixer of one direction is Mamba's (arXiv 2312.00752).

    Pitfalls:
      The input is reversed before a convolution that stays causal, which differs from an anticausal
        convolution. Directions are added before the gate, which they share; originals with one gate per
        direction have other weights. "MambaMixer" in other libraries is the plain Mamba block.
    """

    causal, lookahead, exact = True, 0, True

    def __init__(
        self,
        dim: int,
        *,
        bidirectional: bool = False,
        expand: int = 2,
        inner: int | None = None,
        state_size: int = 16,
        conv_width: int = 4,
        dt_rank: int | None = None,
        out_scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        self.dim, self.causal = check_positive("dim", dim), not bidirectional
        inner = check_positive("expand", expand) * dim if inner is None else check_positive("inner", inner)
        dt_rank = -(-dim // 16) if dt_rank is None else dt_rank
        self.in_proj = Linear(dim, 2 * inner, rngs=rngs)
        options = {"dt_rank": dt_rank, "state_size": state_size, "conv_width": conv_width, "conv_bias": True}
        self.directions = nnx.List([Direction(inner, **options, rngs=rngs) for _ in range(1 + bidirectional)])
        self.out_proj = Linear(inner, dim, scale=out_scale, rngs=rngs)

    def init_state(self, batch: int, dtype: jax.typing.DTypeLike = jnp.float32) -> MambaState | tuple[()]:
        return self.directions[0].init_state(batch, dtype) if self.causal else ()

    def __call__(
        self,
        x: Activations,
        state: State | None = None,
        reset: Steps | None = None,
        valid: Steps | None = None,
    ) -> tuple[Activations, State | None]:
        if state is not None and not self.causal:
            raise UserError(
                "state must be None: a mixer of two directions has to see the whole sequence at once"
            )
        a, z = jnp.split(self.in_proj(mask_steps(x, valid)), 2, axis=-1)
        y, state = self.directions[0](a, state, reset, valid)
        if not self.causal:
            backward = None if reset is None else jnp.flip(ends(reset, valid), axis=1)
            back, _ = self.directions[1](
                jnp.flip(a, axis=1), None, backward, None if valid is None else jnp.flip(valid, axis=1)
            )
            y = y + jnp.flip(back, axis=1)
        return self.out_proj(y * jax.nn.silu(z)), state


def ends(reset: Steps, valid: Steps | None = None) -> Steps:
    """The ends of sequences: the steps before a reset, which are the resets of the reversed sequence. Invalid
    steps are skipped."""
    time = reset.shape[1]
    if valid is None:
        return jnp.pad(reset[:, 1:], ((0, 0), (0, min(time, 1))))
    places = jnp.where(valid, jnp.arange(time), time)
    following = jnp.pad(
        jax.lax.cummin(places, axis=1, reverse=True)[:, 1:], ((0, 0), (0, min(time, 1))), constant_values=time
    )
    return jnp.take_along_axis(jnp.pad(reset, ((0, 0), (0, 1))), following, axis=1)


class SelectiveChannelMixer(Module):
    """The paper's channel mixer: a bidirectional `SelectiveMixer` on the transpose, which scans channels,
    with tokens as features.

        y = mixer(xᵀ)ᵀ        x [b, tokens, d]; the width of the mixer is the number of tokens

    Every output sees every step, and the weights belong to one sequence length: it neither streams nor
    accepts other lengths (as in MLP-Mixer). `GroupedChannelMixer` is the streaming form. Invalid steps count
    as 0; documents cannot be separated.

    `mixer` is a `SelectiveMixer` with other sizes, called as mixer(width, bidirectional=True, rngs=rngs).

    Raises:
      ValueError: x has another number of steps than `tokens`; a `reset` or a state is given.

    Source: MambaMixer (arXiv 2403.19888).

    Pitfalls:
      Every output sees the future: after a causal token mixer it makes the whole model non-causal. A row
        shorter than `tokens` must be padded and marked by `valid`; padding counts as zeros, not as absent.
    """

    causal, lookahead, exact = False, 0, True

    def __init__(self, dim: int, *, tokens: int, mixer: Factory = SelectiveMixer, rngs: nnx.Rngs):
        self.dim, self.tokens = check_positive("dim", dim), check_positive("tokens", tokens)
        self.mixer = make_mixer("mixer", mixer, tokens, bidirectional=True, rngs=rngs)

    def init_state(self, batch: int, dtype: jax.typing.DTypeLike = jnp.float32) -> tuple[()]:
        return ()

    def __call__(
        self,
        x: Activations,
        state: State | None = None,
        reset: Steps | None = None,
        valid: Steps | None = None,
    ) -> tuple[Activations, None]:
        if x.shape[1] != self.tokens:
            raise UserError(
                f"x must have tokens={self.tokens} steps, to which the weights belong, got {x.shape[1]}"
            )
        if state is not None or reset is not None:
            raise UserError("state and reset must be None: this mixer treats all steps of a row as one whole")
        with sequence_parallel.within_steps():
            y, _ = self.mixer(mask_steps(x, valid).swapaxes(1, 2))
        return mask_steps(y.swapaxes(1, 2), valid), None


class GroupedChannelMixer(Module):
    """A selective channel mixer that is pointwise in time: the channels of a step are `groups` tokens,
    scanned in both directions.

        y_t = flat(mixer(x_t as [groups, d / groups]))

    Causal and stateless, unlike the paper's channel mixer, whose weights belong to one sequence length; the
    layout is that of the paper's TSM2, where the tokens of a step are variates (arXiv 2403.19888). `mixer` is
    called as mixer(d // groups, bidirectional=True, rngs=rngs).

    Pitfalls:
      Channels of one group are mixed by matrix products, those of different groups only by the scan: the
        order of channels matters. There are b * t small scans over the groups, and memory grows with their
        number.
    """

    causal, lookahead, exact = True, 0, True

    def __init__(self, dim: int, *, groups: int = 4, mixer: Factory = SelectiveMixer, rngs: nnx.Rngs):
        self.dim, self.groups = check_positive("dim", dim), check_positive("groups", groups)
        if dim % groups:
            raise UserError(f"groups must divide dim={dim}, got {groups}")
        self.mixer = make_mixer("mixer", mixer, dim // groups, bidirectional=True, rngs=rngs)

    def init_state(self, batch: int, dtype: jax.typing.DTypeLike = jnp.float32) -> tuple[()]:
        return ()

    def __call__(
        self,
        x: Activations,
        state: State | None = None,
        reset: Steps | None = None,
        valid: Steps | None = None,
    ) -> tuple[Activations, State | None]:
        tokens = rearrange(mask_steps(x, valid), "b t (g k) -> b t g k", g=self.groups)
        return rearrange(within_steps(self.mixer, tokens, valid), "b t g k -> b t (g k)"), state


def within_steps(mixer: Module, x: Float[Array, "b t s k"], valid: Steps | None) -> Float[Array, "b t s k"]:
    """`mixer` over the tokens s of each step separately."""
    # Time first: if it is split over devices, so are the rows that the two axes are merged into.
    x = mask_steps(x, valid).swapaxes(0, 1)
    with sequence_parallel.within_steps():
        y, _ = mixer(x.reshape(-1, *x.shape[2:]))
    return mask_steps(y.reshape(x.shape).swapaxes(0, 1), valid)


class MambaMixerStack(Composite, Module):
    """Blocks of a token mixer and a channel mixer; each reads a learned sum of the outputs of all mixers
    before it.

        xT_l = Σ_{i<l} α_{l,i} yT_i + Σ_{i<l} β_{l,i} yC_i        yT_l = token_mixer_l(norm(xT_l))
        xC_l = Σ_{i≤l} θ_{l,i} yT_i + Σ_{i<l} γ_{l,i} yC_i        yC_l = channel_mixer_l(norm(xC_l))
        yT_0 = yC_0 = x

    The weights are scalars in four tables [depth, depth + 1] with row l - 1 for block l; entries beyond a sum
    are unused. They are initialised to 1, but β_{l,0} = γ_{l,0} = 0 because x would count twice: initially
    every mixer reads what it would in a residual network.

    `final_sum` adds a box that only the paper's figures show: the output is norm(Σ_{i≤depth} ω_i yT_i +
    Σ_{i≤depth} υ_i yC_i), with the same initialisation; without it the output is the last mixer's, as in the
    equations. The norms are our addition: the paper states none, and a mixer is of degree five in its input,
    so sums without normalisation explode with depth.

    The sums are pointwise in time: the stack is causal, and streams, if its mixers do. Arrays may have axes
    between time and width ([b, t, m, d]) if mixers and norms accept them.

    Source: MambaMixer (arXiv 2403.19888); DenseFormer (arXiv 2402.02622).
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        token_mixer: Factory = SelectiveMixer,
        channel_mixer: Factory = GroupedChannelMixer,
        norm: Factory = LayerNorm,
        *,
        final_sum: bool = True,
        rngs: nnx.Rngs,
    ):
        self.dim, self.depth = check_positive("dim", dim), check_positive("depth", depth)
        rows = range(depth)

        def norms() -> nnx.List:
            return nnx.List([make_norm("norm", norm, dim, rngs=rngs) for _ in rows])

        def mixers(name: str, factory: Factory) -> nnx.List:
            return nnx.List([make_mixer(name, factory, dim, rngs=rngs) for _ in rows])

        self.token_norms = norms()
        self.token_mixers = mixers("token_mixer", token_mixer)
        self.channel_norms = norms()
        self.channel_mixers = mixers("channel_mixer", channel_mixer)
        self.alpha, self.beta, self.theta, self.gamma = (
            _sums(depth, first) for first in (1.0, 0.0, 1.0, 0.0)
        )
        self.omega, self.upsilon = (
            nnx.Param(jnp.ones((depth + 1,)).at[0].set(first)) if final_sum else None for first in (1.0, 0.0)
        )
        self.norm = make_norm("norm", norm, dim, rngs=rngs) if final_sum else None

    def children(self) -> list[Any]:
        pairs = zip(self.token_mixers, self.channel_mixers, strict=True)
        return [mixer for pair in pairs for mixer in pair]

    def map_states(self, state: State, function: Callable[[Any, State], State]) -> State:
        layers = zip(self.token_mixers, self.channel_mixers, state, strict=True)
        return tuple(
            (function(token, own_token), function(channel, own_channel))
            for token, channel, (own_token, own_channel) in layers
        )

    def init_state(
        self, batch: int, dtype: jax.typing.DTypeLike = jnp.float32
    ) -> tuple[tuple[State, State], ...]:
        pairs = zip(self.token_mixers, self.channel_mixers, strict=True)
        return tuple(
            (token.init_state(batch, dtype), channel.init_state(batch, dtype)) for token, channel in pairs
        )

    def __call__(
        self,
        x: Float[Array, "b t *m d"],
        state: State | None = None,
        reset: Steps | None = None,
        valid: Steps | None = None,
    ) -> tuple[Float[Array, "b t *m d"], State | None]:
        x = mask_steps(x, valid)
        y_token, y_channel, new = [x], [x], []
        for i, (token, channel) in enumerate(zip(self.token_mixers, self.channel_mixers, strict=True)):
            at_token, at_channel = (None, None) if state is None else state[i]
            read = weighted_sum((self.alpha[i], self.beta[i]), (y_token, y_channel))
            y, at_token = token(self.token_norms[i](read), at_token, reset, valid)
            y_token.append(y)
            read = weighted_sum((self.theta[i], self.gamma[i]), (y_token, y_channel))
            y, at_channel = channel(self.channel_norms[i](read), at_channel, reset, valid)
            y_channel.append(y)
            new.append((at_token, at_channel))
        if self.norm is not None:
            y = self.norm(weighted_sum((self.omega[...], self.upsilon[...]), (y_token, y_channel)))
        return mask_steps(y, valid), (None if state is None else tuple(new))


def _sums(depth: int, first: float) -> nnx.Param:
    """Weights [depth, depth + 1]: ones, but `first` for the input of the stack."""
    return nnx.Param(jnp.ones((depth, depth + 1)).at[:, 0].set(first))


def weighted_sum(weights: tuple[Array, ...], terms: tuple[list[Array], ...]) -> Array:
    """Σ over both lists of weight times term, summed in float32 at least; weights beyond the end of a list
    are unused."""
    wide = accumulator(terms[0][0].dtype)
    total = sum(
        w[i].astype(wide) * y.astype(wide)
        for w, ys in zip(weights, terms, strict=True)
        for i, y in enumerate(ys)
    )
    return total.astype(terms[0][0].dtype)
