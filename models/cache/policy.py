"""The protocol of a cache policy."""

import math
from typing import Any, ClassVar

import jax

from seqlab.checks import UserError
from seqlab.shapes import Counts
from seqlab.state import State

_LEAST = 256  # slots that a stream begins with; then 1,024, 2,048, 4,096, ...


def slots_for(steps: int, most: int, grows: bool = False) -> int:
    """The least of a few sizes that holds `steps` slots: `most` at most, or doublings of it where it `grows`.

    A step costs what is held, and every size is compiled once: few sizes where a step is cheap anyway,
    doublings from 1,024 on.
    """
    if steps > most and grows:
        return most * 2 ** math.ceil(math.log2(steps / most))
    size = _LEAST
    while size < steps:
        size *= 4 if size == _LEAST else 2
    return min(size, most)


class Policy:
    """Base of all cache policies: frozen dataclasses, since a policy is part of a model's description.

    A subclass defines `span`, `init_state`, the call and `rewind`. One whose state has slots that are filled
    in order also defines `held`, `slots_for` and `resize`: a stream then holds, and a step reads, no more
    slots than it needs.

    Attributes:
      exact: whether a stream equals the parallel form.
      capacity: the longest sequence that can be held; None for no such bound.
      grows: whether a host gives a state more slots where it would end.
      state_type: the class of its states, None for any.
    """

    exact: bool = True
    capacity: int | None = None
    grows: bool = False
    state_type: ClassVar[type | None] = None

    @property
    def span(self) -> int:
        """How many steps it remembers at most."""
        raise NotImplementedError

    @property
    def reach(self) -> int | None:
        """How many positions rotary phases tell apart at most, as the policy counts them: by default those
        that it remembers. None where they grow with the stream."""
        return self.span

    @property
    def end(self) -> int | None:
        """Where sequences must end; None for a policy that goes on, in constant memory or because it
        grows."""
        return None if self.grows else self.capacity

    def init_state(
        self,
        batch: int,
        kv_heads: int,
        width: int,
        dtype: jax.typing.DTypeLike,
        v_width: int | None = None,
    ) -> State:
        """The state of `batch` fresh sequences with keys of `width` and values of `v_width` (default: the
        same), with all the slots that sequences may need."""
        raise NotImplementedError

    def __call__(
        self, q: Any, k: Any, v: Any, state: State | None, reset: Any, valid: Any, scores: Any
    ) -> tuple[Any, Any, State | None]:
        """Attention of a chunk: out [b, t, h, v], lse [b, t, h] and the new state, from unturned queries
        [b, t, h, k], keys [b, t, g, k] and values [b, t, g, v]. `state=None` is the parallel form. `scores`
        are the model's (`seqlab.models.cache.Scores`)."""
        raise NotImplementedError

    def rewind(self, state: State, steps: Counts) -> State:
        """The state `steps` steps ago, row by row; ValueError where the past is gone."""
        raise NotImplementedError

    def held(self, state: State) -> int:
        """How many slots a state has."""
        return self.span

    def slots_for(self, steps: int) -> int:
        """How many slots a state should have for sequences of `steps` steps."""
        return self.span

    def resize(self, state: State, slots: int) -> State:
        """`state` with its first `slots` slots, or with empty ones behind its own."""
        return state

    def adopt(self, state: State) -> State:
        """A state that enters from outside, as this policy continues it: ValueError where what it holds is
        not what this policy would have kept. Looks at the numbers: not for jitted code."""
        self.check(state)
        return state

    def check(self, state: State) -> None:
        """Refuse a state that another policy has made, as far as its kind and its slots tell."""
        if self.state_type is not None and not isinstance(state, self.state_type):
            raise UserError(
                f"state is a {type(state).__name__}, not the {self.state_type.__name__} of {self}: it was "
                "made "
                "by another cache"
            )
        held = self.held(state)
        if held != self.slots_for(held) and held != self.all_slots:
            raise UserError(
                f"state has {held} slots, which no state of {self} has ({self.all_slots} at most): it was "
                "made by another cache"
            )

    def make_room(self, state: State, steps: Counts) -> State:
        """`state` before a turn of `steps` steps; itself where nothing is dropped for a turn."""
        return state

    @property
    def all_slots(self) -> int:
        """The slots that `init_state` makes."""
        return self.span

    def with_room(self, state: State, steps: int) -> State:
        """`state` with slots for sequences of `steps` steps, if it has fewer."""
        slots = self.slots_for(steps)
        return state if slots <= self.held(state) else self.resize(state, slots)

    def compact(self, state: State, steps: int) -> State:
        """A state of sequences of at most `steps` steps with no more slots than these need."""
        slots = self.slots_for(steps)
        return self.resize(state, slots) if slots < self.held(state) else state
