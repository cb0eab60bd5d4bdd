"""Whole models: input layer, backbone, output layer. The common base of models of tokens and of numbers."""

from collections.abc import Callable, Hashable
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Num

from seqlab.checks import UserError
from seqlab.mixer import Composite
from seqlab.models.backbone import Backbone, unrolled
from seqlab.module import Module
from seqlab.shapes import Activations, Steps
from seqlab.state import State, mask_steps


class Model(Composite, Module):
    """A backbone between `embed` and `read_out`; a mixer over its inputs, with the same contract.

    A subclass sets `dtype` and `backbone` and defines the two ends, which are pointwise in time.
    """

    dtype: str
    backbone: Backbone
    origin: Hashable = None  # of a published model: further contents of its folder, for saving it again
    trained_length: int | None = None  # trained positions, if known

    def embed(self, inputs: Num[Array, "b t *c"], valid: Steps | None = None) -> Activations:
        """Activations of the backbone's width for the inputs, in the compute dtype."""
        raise NotImplementedError

    def read_out(self, x: Float[Array, "*b d"]) -> Float[Array, "*b o"]:
        """The outputs for features `x`, in float32 at least."""
        raise NotImplementedError

    def children(self) -> tuple[Backbone]:
        return (self.backbone,)

    def map_states(self, state: State, function: Callable[[Any, State], State]) -> State:
        return function(self.backbone, state)

    def init_state(self, batch: int, dtype: jax.typing.DTypeLike | None = None) -> State:
        return self.backbone.init_state(batch, self.dtype if dtype is None else dtype)

    def state_for(self, batch: int, steps: int, dtype: jax.typing.DTypeLike | None = None) -> State:
        return self.backbone.state_for(batch, steps, self.dtype if dtype is None else dtype)

    def __call__(
        self,
        inputs: Num[Array, "b t *c"],
        state: State | None = None,
        reset: Steps | None = None,
        valid: Steps | None = None,
    ) -> tuple[Float[Array, "b t o"], State | None]:
        x, state = self.features(inputs, state, reset, valid)
        return mask_steps(self.read_out(x), valid), state

    def features(
        self,
        inputs: Num[Array, "b t *c"],
        state: State | None = None,
        reset: Steps | None = None,
        valid: Steps | None = None,
    ) -> tuple[Activations, State | None]:
        """Features before `read_out`: if only some steps' outputs are needed, apply `read_out` to their
        features only."""
        return self.backbone(self.embed(inputs, valid), state, reset, valid)

    def unrolled(self) -> "Model":
        """The same model with separate parameters per layer, for decoding; itself if it has them already."""
        if not self.backbone.scan_layers:
            return self
        static_copy = nnx.merge(*nnx.split(self))
        static_copy.backbone = unrolled(self.backbone)
        return static_copy


def check_dtype(dtype: str) -> str:
    """`dtype`, refused unless it is a supported compute dtype."""
    if dtype not in ("float32", "bfloat16", "float64"):
        raise UserError(f"dtype must be 'float32', 'bfloat16' or 'float64', got {dtype!r}")
    return dtype
