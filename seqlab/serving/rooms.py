"""The sizes of states: caches that fill up hold, and a step reads, little more than streams need."""

from typing import Any

import jax
import numpy as np

from seqlab.module import Module
from seqlab.serving.fused import resizing
from seqlab.streaming.states import StreamState, fresh_state, with_room_for

_LEAST = 256  # steps for which the smallest state has room


class Rooms:
    """The few sizes that states of a model have, each with room for streams of some number of steps.

    Sizes change by one at a time, so that few programs resize states.

    Args:
      model: unrolled.
      steps: of the longest stream, where caches grow with their streams.

    Attributes:
      sizes: the steps for which each size has room, ascending.
      endless: whether streams may be longer than that: caches do not grow any more.
    """

    def __init__(self, model: Module, steps: int):
        self._model = model
        self._grown, self._shrunk = resizing(model)
        sizes, shapes, room = [], [], _LEAST
        while True:
            shape = self._shape(room)
            if shapes and shapes[-1] == shape:
                sizes[-1] = room
            else:
                sizes.append(room)
                shapes.append(shape)
            if room >= steps:
                break
            room *= 2
        self.sizes = tuple(sizes)
        self.endless = self._shape(2**30) == shapes[-1]
        self._fresh: dict[int, StreamState] = {}

    def _shape(self, steps: int) -> tuple[tuple[int, ...], ...]:
        like = jax.eval_shape(lambda: with_room_for(self._model, steps))
        return tuple(leaf.shape for leaf in jax.tree.leaves(like))

    def size_for(self, steps: int) -> int:
        """The index of the least size with room for `steps` steps; the last one for more."""
        return next((i for i, room in enumerate(self.sizes) if room >= steps), len(self.sizes) - 1)

    def batch(self, size: int, rows: int) -> StreamState:
        """The state of `rows` fresh streams."""
        return fresh_state(self._model, np.zeros(rows, np.uint32), self.sizes[size])

    def fresh(self, size: int) -> StreamState:
        """The state of one fresh stream, to be copied from."""
        if size not in self._fresh:
            self._fresh[size] = fresh_state(self._model, np.zeros(1, np.uint32), self.sizes[size])
        return self._fresh[size]

    def resized(self, state: StreamState, size: int, new: int) -> StreamState:
        """`state` of `size` in the size `new`; a smaller one must hold its streams."""
        while size < new:
            size += 1
            state = self._grown(state, steps=self.sizes[size])
        while size > new:
            size -= 1
            state = self._shrunk(state, steps=self.sizes[size])
        return state


def size_of(rooms: Rooms, state: Any) -> int | None:
    """The size of a state of one row; None if it is none of the sizes."""
    shapes = [leaf.shape for leaf in jax.tree.leaves(state)]
    for size in range(len(rooms.sizes)):
        if shapes == [leaf.shape for leaf in jax.tree.leaves(rooms.fresh(size))]:
            return size
    return None
