"""One backbone for every model: norm, token mixer, norm, channel mixer, repeated (MetaFormer, arXiv
2111.11418).

Mixers are constructor arguments: a hybrid is a tuple of them, and no model needs a copy of this file.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from seqlab.checks import UserError, check_choice, check_positive
from seqlab.mixer import Composite, as_mixer
from seqlab.models.batch_norm import normed
from seqlab.models.kinds import make_mixer, make_norm
from seqlab.models.layers import Factory, RMSNorm, SwiGLU
from seqlab.models.stochastic import DropPath
from seqlab.module import Module, merge, moved_statistics, put_statistics, split, statistics
from seqlab.parallel.sharding import along_time
from seqlab.shapes import Activations, Maps, Steps
from seqlab.state import Stacked, State, mask_steps


class Block(Composite, Module):
    """x + mixer(norm(x)), then x + channel_mixer(norm(x)); without a channel mixer only the first, as in
    Mamba.

    Arrays are [b, t, d], or whatever the mixers take: on images [b, h, w, d] this is the block of PoolFormer
    and related models, with these options (arXiv 2111.11418, 2210.13452):

    Args:
      norms: where the norms stand: "before" the mixers, "after" them (x + norm(mixer(x)), OLMo-2, arXiv
        2501.00656), or "both" (sandwich norms, Gemma 2, arXiv 2408.00118).
      parallel: both mixers read x: x + mixer(norm(x)) + channel_mixer(norm'(x)) (GPT-J, GPT-NeoX, arXiv
        2204.06745).
      branch_scale: a constant factor of both branches (Granite's residual multiplier).
      layer_scale, residual_scale: a learned vector, initialised to this value, that multiplies each branch,
        or the stream it is added to.
      drop_path: the probability that a branch is dropped in training, per row (stochastic depth).
    """

    def __init__(
        self,
        dim: int,
        mixer: Factory,
        channel_mixer: Factory | None = SwiGLU,
        norm: Factory = RMSNorm,
        *,
        norms: str = "before",
        parallel: bool = False,
        branch_scale: float = 1.0,
        layer_scale: float | None = None,
        residual_scale: float | None = None,
        drop_path: float = 0.0,
        rngs: nnx.Rngs,
    ):
        check_choice(norms, ("before", "after", "both"), "norms")
        second = channel_mixer is not None
        if parallel and not second:
            raise UserError("parallel needs a channel_mixer, got None")
        first = norms != "after"
        self.mixer_norm = make_norm("norm", norm, dim, rngs=rngs) if first else None
        self.mixer = make_mixer("mixer", mixer, dim, rngs=rngs)
        self.channel_norm = make_norm("norm", norm, dim, rngs=rngs) if first and second else None
        self.channel_mixer = make_mixer("channel_mixer", channel_mixer, dim, rngs=rngs) if second else None
        self.layer_scale_1, self.residual_scale_1 = _vector(dim, layer_scale), _vector(dim, residual_scale)
        self.layer_scale_2, self.residual_scale_2 = (
            _vector(dim, value) if second else None for value in (layer_scale, residual_scale)
        )
        last = norms != "before"
        self.mixer_out_norm = make_norm("norm", norm, dim, rngs=rngs) if last else None
        self.channel_out_norm = make_norm("norm", norm, dim, rngs=rngs) if last and second else None
        self.parallel, self.branch_scale = parallel, branch_scale
        self.drop_path = DropPath(drop_path, rngs=rngs) if drop_path else None

    def init_state(self, batch: int, dtype: jax.typing.DTypeLike = jnp.float32) -> tuple[State, State]:
        channel = () if self.channel_mixer is None else self.channel_mixer.init_state(batch, dtype)
        return self.mixer.init_state(batch, dtype), channel

    def __call__(
        self,
        x: Maps,
        state: State | None = None,
        reset: Steps | None = None,
        valid: Steps | None = None,
    ) -> tuple[Maps, State | None]:
        mixed, channel = (None, None) if state is None else state
        y, mixed = self.mixer(_normed(self.mixer_norm, x, valid), mixed, reset, valid)
        y = _normed(self.mixer_out_norm, y, valid)
        read, x = x, self._sum(x, y, self.residual_scale_1, self.layer_scale_1)
        if self.channel_mixer is not None:
            read = _normed(self.channel_norm, read if self.parallel else x, valid)
            y, channel = self.channel_mixer(read, channel, reset, valid)
            y = _normed(self.channel_out_norm, y, valid)
            x = self._sum(x, y, self.residual_scale_2, self.layer_scale_2)
        return x, (None if state is None else (mixed, channel))

    def children(self) -> list[Any]:
        return [child for child in (self.mixer, self.channel_mixer) if child is not None]

    def map_states(
        self, state: tuple[State, State], function: Callable[[Any, State], State]
    ) -> tuple[State, State]:
        """`function(mixer, its state)` of both mixers."""
        mixed, channel = state
        return function(self.mixer, mixed), (
            () if self.channel_mixer is None else function(self.channel_mixer, channel)
        )

    def _sum(self, x: Maps, y: Maps, stream: nnx.Param | None, branch: nnx.Param | None) -> Maps:
        y = y if self.branch_scale == 1.0 else y * self.branch_scale
        y = y if branch is None else y * branch[...].astype(y.dtype)
        y = y if self.drop_path is None else self.drop_path(y)
        return along_time((x if stream is None else x * stream[...].astype(x.dtype)) + y)


def _normed(norm: nnx.Module | None, x: Maps, valid: Steps | None) -> Maps:
    return x if norm is None else normed(norm, x, valid)


def _vector(dim: int, value: float | None) -> nnx.Param | None:
    return None if value is None else nnx.Param(jnp.full((dim,), value))


class Backbone(Composite, Module):
    """`depth` blocks and a final norm.

    Args:
      mixers: one factory or a tuple of them, cycled: layer i gets `mixers[i % len(mixers)]`.
      channel_mixer: a factory, a tuple of them likewise, or None.
      norms, parallel, branch_scale: the form of a block, as in `Block`.
      scan_layers: run the repetitions of the pattern by one `lax.scan` over stacked parameters: compile time
        and program size do not grow with depth. The function is the same; `depth` must be a multiple of the
        pattern length.
      remat: what is saved for the backward pass: "none" saves every activation, "dots" the blocks' inputs and
        products with weights, "block" only the blocks' inputs; the rest is recomputed.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        mixers: Factory | tuple[Factory, ...],
        *,
        channel_mixer: Factory | tuple[Factory | None, ...] | None = SwiGLU,
        norm: Factory = RMSNorm,
        norms: str = "before",
        parallel: bool = False,
        branch_scale: float = 1.0,
        scan_layers: bool = False,
        remat: str = "none",
        rngs: nnx.Rngs,
    ):
        mixers = tuple(mixers) if isinstance(mixers, tuple | list) else (mixers,)
        channels = tuple(channel_mixer) if isinstance(channel_mixer, tuple | list) else (channel_mixer,)
        if not mixers or not channels:
            raise UserError("mixers and channel_mixer must name at least one factory each")
        for factory in mixers[depth:] if not scan_layers else ():  # used by no layer, but checked as well
            nnx.eval_shape(lambda factory=factory: make_mixer("mixers", factory, dim, rngs=nnx.Rngs(0)))
        check_choice(remat, ("none", "dots", "block"), "remat")
        self.dim, self.depth, self.scan_layers, self.remat = (
            dim,
            check_positive("depth", depth),
            scan_layers,
            remat,
        )
        period = max(len(mixers), len(channels)) if scan_layers else depth
        if scan_layers and depth % period:
            raise UserError(
                f"depth={depth} must be a multiple of the pattern's length {period} where scan_layers is set"
            )

        def layer(i: int) -> Block:
            options = {"norms": norms, "parallel": parallel, "branch_scale": branch_scale}
            mixer, channel = mixers[i % len(mixers)], channels[i % len(channels)]
            return Block(dim, mixer, channel, norm, **options, rngs=rngs)

        self.blocks = nnx.List(
            [
                _stack([layer(i) for i in range(j, depth, period)]) if scan_layers else layer(j)
                for j in range(period)
            ]
        )
        self.norm = make_norm("norm", norm, dim, rngs=rngs)

    @property
    def lookahead(self) -> int:
        repeats = self.depth // len(self.blocks)
        return repeats * sum(as_mixer(child).lookahead for child in self.children())

    def children(self) -> list[Any]:
        """The mixers of one repetition of the pattern."""
        return [child for block in self.blocks for child in block.children()]

    def unrolled(self) -> "Backbone":
        return unrolled(self)

    def init_state(self, batch: int, dtype: jax.typing.DTypeLike = jnp.float32) -> tuple[State, ...]:
        states = tuple(block.init_state(batch, dtype) for block in self.blocks)
        if not self.scan_layers:
            return states
        repeats = self.depth // len(self.blocks)
        return tuple(
            Stacked(jax.tree.map(lambda leaf: jnp.repeat(leaf[None], repeats, axis=0), state))
            for state in states
        )

    def state_for(self, batch: int, steps: int, dtype: jax.typing.DTypeLike | None = None) -> State:
        if self.scan_layers:
            return super().state_for(batch, steps, dtype)
        # Layer by layer: the state with all the room that there could be is of one layer at a time.
        return tuple(block.state_for(batch, steps, dtype) for block in self.blocks)

    def __call__(
        self,
        x: Activations,
        state: State | None = None,
        reset: Steps | None = None,
        valid: Steps | None = None,
    ) -> tuple[Activations, State | None]:
        x = along_time(mask_steps(x, valid))
        if self.scan_layers:
            x, state = self._scanned(x, state, reset, valid)
        else:
            states = (None,) * self.depth if state is None else state
            new = []
            for block, old in zip(self.blocks, states, strict=True):
                x, updated = self._call(block, x, old, reset, valid)
                new.append(updated)
            state = None if state is None else tuple(new)
        return normed(self.norm, x, valid), state

    def map_states(
        self, state: tuple[State, ...], function: Callable[[Any, State], State]
    ) -> tuple[State, ...]:
        """`function(mixer, its state)` for every mixer, layer by layer; a ValueError or NotImplementedError
        is raised again with the layer."""
        new, period = [], len(self.blocks)
        for j, (block, own) in enumerate(zip(self.blocks, state, strict=True)):
            layers = [own]
            if self.scan_layers:
                layers = [
                    jax.tree.map(lambda leaf, i=i: leaf[i], own.layers) for i in range(self.depth // period)
                ]
            for i, layer in enumerate(layers):
                try:
                    layers[i] = block.map_states(layer, function)
                except (ValueError, NotImplementedError) as reason:
                    raise type(reason)(f"layer {i * period + j}: {reason}") from reason
            new.append(
                Stacked(jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers))
                if self.scan_layers
                else layers[0]
            )
        return tuple(new)

    def _call(self, block: Block, *arguments: Any) -> tuple[Maps, State | None]:
        x, state = arguments[:2]
        streamed = state is not None and isinstance(x, jax.core.Tracer)
        if self.remat == "none" and not streamed:
            return block(*arguments)
        static, params = split(block)
        run = _traced_once(static) if self.remat == "none" else self._run(static)
        x, state, moved = run(params, *arguments)
        put_statistics(block, moved)
        return x, state

    def _run(self, static: Any) -> Any:
        """`_pure` of a block, with what `remat` asks for."""
        run = functools.partial(_pure, static)
        if self.remat == "none":
            return run
        return jax.checkpoint(
            run,
            policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable if self.remat == "dots" else None,
        )

    def _scanned(
        self, x: Activations, state: State | None, reset: Steps | None, valid: Steps | None
    ) -> tuple[Activations, State | None]:
        parts = [split(block) for block in self.blocks]
        runs = [self._run(static) for static, _ in parts]
        states = (None,) * len(parts) if state is None else tuple(stacked.layers for stacked in state)

        def repeat(x, layer):
            new, measured = [], []
            for run, params, old in zip(runs, *layer, strict=True):
                x, updated, moved = run(params, x, old, reset, valid)
                new.append(updated)
                measured.append(moved)
            return x, (tuple(new), measured)  # not parameters: returning them would stack a copy

        x, (states, measured) = jax.lax.scan(repeat, x, (tuple(params for _, params in parts), states))
        for block, moved in zip(self.blocks, measured, strict=True):
            put_statistics(block, moved)
        return x, (None if state is None else tuple(map(Stacked, states)))


def _pure(static: Any, params: Any, x: Maps, state: State | None, reset: Any, valid: Any) -> Any:
    """A block as a pure function of its parameters; the statistics that it moves in training (BatchNorm's,
    dropout's keys) are a result like its state."""
    block = merge(static, params)
    before = statistics(block)
    x, state = block(x, state, reset, valid)
    return x, state, moved_statistics(block, before)


@functools.lru_cache(maxsize=64)
def _traced_once(static: Any) -> Callable[..., Any]:
    """`_pure` as a function that JAX traces and lowers once for all layers alike, and XLA then inlines:
    a deep model's first step waits for one layer, and for XLA."""
    return jax.jit(functools.partial(_pure, static))


def _stack(blocks: list[Block]) -> Block:
    """One block whose parameters carry a leading axis of layers."""
    static, _ = split(blocks[0])
    return merge(
        static, jax.tree.map(lambda *leaves: jnp.stack(leaves), *(split(block)[1] for block in blocks))
    )


def unrolled(backbone: Backbone) -> Backbone:
    """The same function with separate parameters per layer, for decoding, where slicing stacked parameters
    would copy them."""
    if not backbone.scan_layers:
        return backbone
    repeats = backbone.depth // len(backbone.blocks)
    parts = [split(block) for block in backbone.blocks]
    blocks = [
        merge(static, jax.tree.map(lambda leaf, i=i: leaf[i], params))
        for i in range(repeats)
        for static, params in parts
    ]
    static, params = split(backbone)
    copy = merge(static, params)
    copy.blocks, copy.scan_layers = nnx.List(blocks), False
    return copy


def out_scale(depth: int, halves: int = 2) -> float:
    """Initial scale of projections into the residual stream, so that its size does not grow with depth
    (GPT-2's rule)."""
    return 1.0 / (halves * depth) ** 0.5
