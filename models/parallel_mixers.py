"""Several mixers side by side in one layer."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from seqlab.checks import UserError
from seqlab.mixer import Composite
from seqlab.models.kinds import make_mixer
from seqlab.models.layers import Factory
from seqlab.module import Module
from seqlab.shapes import Activations, Steps
from seqlab.state import State


class ParallelMixers(Composite, Module):
    """The sum of mixers that read the same input: y = sum of b_i mixer_i(a_i x), as attention and Mamba-2
    heads in a layer of Falcon-H1.

    Args:
      mixers: their factories.
      in_scales, out_scales: the constants a_i and b_i, by default 1.

    The state is the tuple of theirs.

    Source: Falcon-H1 (arXiv 2507.22448), Hymba (arXiv 2411.13676).

    Pitfalls:
      Outputs of different kinds of mixers may differ in size: give each an `out_scale` or a norm of its own.
    """

    def __init__(
        self,
        dim: int,
        mixers: Sequence[Factory],
        *,
        in_scales: Sequence[float] | None = None,
        out_scales: Sequence[float] | None = None,
        rngs: nnx.Rngs,
    ):
        if not mixers:
            raise UserError("mixers must name at least one factory")
        self.dim = dim
        self.mixers = nnx.List([make_mixer("mixers", mixer, dim, rngs=rngs) for mixer in mixers])
        for name, scales in (("in_scales", in_scales), ("out_scales", out_scales)):
            if scales is not None and len(scales) != len(mixers):
                raise UserError(f"{name} must be one number for each of {len(mixers)} mixers, got {scales}")
        plain = (1.0,) * len(mixers)
        self.in_scales = plain if in_scales is None else tuple(map(float, in_scales))
        self.out_scales = plain if out_scales is None else tuple(map(float, out_scales))
        if self.lookahead:
            raise UserError(f"mixers must not look ahead, got a lookahead of {self.lookahead} steps")

    def children(self) -> list[Module]:
        return list(self.mixers)

    def init_state(self, batch: int, dtype: jax.typing.DTypeLike = jnp.float32) -> tuple[State, ...]:
        return tuple(mixer.init_state(batch, dtype) for mixer in self.mixers)

    def __call__(
        self,
        x: Activations,
        state: State | None = None,
        reset: Steps | None = None,
        valid: Steps | None = None,
    ) -> tuple[Activations, State | None]:
        total, new = None, []
        states = (None,) * len(self.mixers) if state is None else state
        for mixer, old, before, after in zip(
            self.mixers, states, self.in_scales, self.out_scales, strict=True
        ):
            y, own = mixer(x if before == 1.0 else x * before, old, reset, valid)
            y = y if after == 1.0 else y * after
            total = y if total is None else total + y
            new.append(own)
        return total, (None if state is None else tuple(new))
