"""Mixers: the public protocol, defaults for everything else, and composite mixers.

`Mixer` is the required protocol. `MixerBase` adds optional members with defaults: no bound on the length, no
rewinding. `Composite` derives these from its `children`, so a mixer made of mixers keeps all their bounds.
Code uses `as_mixer`, which supplies the same defaults for a class that has only the members of the protocol.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from seqlab.checks import UserError
from seqlab.shapes import Activations, Counts, Steps

State = Any  # a pytree of arrays, by convention a NamedTuple


class CannotRewind(NotImplementedError):
    """A mixer keeps a summary of its past instead of the steps, and cannot be rewound."""


@runtime_checkable
class Mixer(Protocol):
    """The members of every token mixer, channel mixer and model.

    `causal`, `lookahead` and `exact` declare which clauses of the contract apply: with `lookahead = n` the
    streamed outputs are those of the full pass, n steps late; with `exact = False` streaming approximates,
    for a reason given in the docstring. They are only read, so attributes, class attributes and properties
    all work. The protocol is for type checkers and `isinstance`; inherit `MixerBase`, which has defaults for
    optional members.
    """

    @property
    def causal(self) -> bool: ...

    @property
    def lookahead(self) -> int: ...

    @property
    def exact(self) -> bool: ...

    def init_state(self, batch: int, dtype: jax.typing.DTypeLike = jnp.float32) -> State:
        """The state of `batch` fresh sequences whose activations have `dtype`."""

    def __call__(
        self,
        x: Activations,
        /,
        state: State | None = None,
        reset: Steps | None = None,
        valid: Steps | None = None,
    ) -> tuple[Activations, State | None]:
        """Mix a chunk of any length. With `state=None` the sequence starts fresh and None is returned: the
        training form."""


class MixerBase:
    """Defaults for the optional members of mixers; inherit it and override.

    `dim`, `inputs`, `vocab_size`: width of the activations, channels of a model of numbers, tokens of a
    language model; None if not applicable. `dtype`: the compute dtype of a model. `capacity`: the longest
    sequence in steps that the state can hold; None for no bound.
    """

    causal: bool = True
    lookahead: int = 0
    exact: bool = True
    dim: int | None = None
    inputs: int | None = None
    vocab_size: int | None = None
    dtype: str | None = None
    capacity: int | None = None

    def children(self) -> Sequence[Any]:
        """The parts of this mixer, in the order in which they run."""
        return ()

    def state_for(self, batch: int, steps: int, dtype: jax.typing.DTypeLike | None = None) -> State:
        """The state of fresh sequences with room for `steps` steps; `dtype` None: that of `init_state`."""
        asked = as_mixer(self)
        made = self.init_state(batch) if dtype is None else self.init_state(batch, dtype)
        return asked.with_room(asked.compact(made, steps), steps)

    def with_room(self, state: State, steps: int) -> State:
        """`state` with room for sequences of `steps` steps if it grows; itself otherwise."""
        return state

    def make_room(self, state: State, steps: Counts) -> State:
        """`state` before a turn of `steps` steps (per row), where the mixer drops some of its past for a
        turn; itself otherwise."""
        return state

    def compact(self, state: State, steps: int) -> State:
        """`state` of sequences of at most `steps` steps, reduced to the room these need; itself if a state
        has one size."""
        return state

    def adopt(self, state: State) -> State:
        """A state from outside, adapted to this mixer; ValueError if its values show that another mixer made
        it. It inspects values: not for jitted code."""
        return state

    def rewind(self, state: State, steps: Counts) -> State:
        """The state `steps` [b] steps ago; CannotRewind if the mixer does not keep the steps."""
        raise CannotRewind(
            f"{type(self).__name__} keeps a summary of all steps, from which none can be taken back"
        )

    def unrolled(self) -> Any:
        """The same function in the best form for decoding; its states may have another structure."""
        return self


class Composite(MixerBase):
    """A mixer made of mixers, with the bounds of its children.

    A subclass defines `children`, and `map_states` unless its state is a tuple of theirs.
    """

    causal = property(lambda self: all(as_mixer(child).causal for child in self.children()))
    lookahead = property(lambda self: sum(as_mixer(child).lookahead for child in self.children()))
    exact = property(lambda self: all(as_mixer(child).exact for child in self.children()))

    @property
    def capacity(self) -> int | None:
        """The longest sequence that every child can hold; None without a bound."""
        bounds = [as_mixer(child).capacity for child in self.children()]
        return min((bound for bound in bounds if bound is not None), default=None)

    def map_states(self, state: State, function: Callable[[Any, State], State]) -> State:
        """`state` with each child's state replaced by `function(child, its state)`."""
        return tuple(function(child, own) for child, own in zip(self.children(), state, strict=True))

    def with_room(self, state: State, steps: int) -> State:
        return self.map_states(state, lambda child, own: as_mixer(child).with_room(own, steps))

    def make_room(self, state: State, steps: Counts) -> State:
        return self.map_states(state, lambda child, own: as_mixer(child).make_room(own, steps))

    def compact(self, state: State, steps: int) -> State:
        return self.map_states(state, lambda child, own: as_mixer(child).compact(own, steps))

    def adopt(self, state: State) -> State:
        return self.map_states(state, lambda child, own: as_mixer(child).adopt(own))

    def rewind(self, state: State, steps: Counts) -> State:
        """The state `steps` steps ago, per row, as if these steps had not been seen. It inspects values: not
        for jitted code.

        Raises:
          ValueError: a cache no longer has the keys visible then. CannotRewind: a mixer keeps a summary of
            its past.
        """

        def back(child: Any, own: State) -> State:
            if not jax.tree.leaves(own) or not np.any(np.asarray(steps)):
                return own
            return as_mixer(child).rewind(own, steps)

        return self.map_states(state, back)


class _Adapted:
    """A wrapper of a mixer with only the protocol, with the defaults of `MixerBase`."""

    def __init__(self, mixer: Any):
        self._mixer = mixer

    def __getattr__(self, name: str) -> Any:
        mixer = self._mixer
        if hasattr(type(mixer), name) or name in vars(mixer):
            return getattr(mixer, name)
        default = getattr(MixerBase, name)
        return default.__get__(mixer) if callable(default) else default


def as_mixer(mixer: Mixer) -> Any:
    """`mixer` with all members of `MixerBase`; itself if it inherits them."""
    return mixer if isinstance(mixer, MixerBase) else _Adapted(mixer)


def width_of(mixer: Any) -> int:
    """The input width of `mixer`: its `inputs` or `dim`, or else a size of its parameters with which it maps
    [b, t, d] to [b, t, d].

    Raises:
      ValueError: no width is known and none of those sizes works.
    """
    asked = as_mixer(mixer)
    if (width := asked.dim if asked.inputs is None else asked.inputs) is not None:
        return width
    leaves = jax.tree.leaves(nnx.state(mixer, nnx.Param))
    for size in sorted({size for leaf in leaves for size in leaf.shape}):
        shape = jax.ShapeDtypeStruct((2, 3, size), jnp.float32)
        try:
            y, _ = jax.eval_shape(lambda x: mixer(x), shape)
        except (TypeError, ValueError):  # JAX's errors for mismatched shapes
            continue
        if y.shape == shape.shape:
            return size
    raise UserError(
        f"{type(mixer).__name__} has no attribute dim, and no size of its parameters is its width: set "
        "self.dim, or give inputs"
    )
