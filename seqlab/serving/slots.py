"""The running streams on the device: their settings and states, and the calls that advance them.

Streams of about the same length share a batch, since a step reads as many slots of a cache as the longest
stream of its batch needs. A batch is as wide as its streams require, in a few widths that are compiled.
"""

import concurrent.futures
import dataclasses
import os
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seqlab.checks import UserError
from seqlab.module import Module, split
from seqlab.serving.fused import Pieces, batch_programs
from seqlab.serving.rooms import Rooms, size_of
from seqlab.streaming.programs import Drawn, LogitsFunction
from seqlab.streaming.sampling import Sampling, check_sampling
from seqlab.streaming.states import StreamState
from seqlab.streaming.stream import slots_of

BIASES, ENDS = 512, 64  # biased tokens and end tokens of a stream at most


class Piece(NamedTuple):
    """A piece of a prompt: who reads it, its tokens, whether the stream starts fresh, and its seed."""

    owner: Hashable
    tokens: np.ndarray
    begins: bool
    seed: int


@dataclasses.dataclass
class Batch:
    """Streams whose states have one size. `owners` [w]: who has each row, None for a free one. `settings`: of
    all rows, on the device; None where a row has changed."""

    owners: list[Any]
    state: StreamState
    settings: Any = None

    @property
    def active(self) -> int:
        """The number of streams."""
        return sum(owner is not None for owner in self.owners)


@dataclasses.dataclass
class _Stream:
    size: int
    length: int
    settings: tuple[Any, Any, Any]  # of one row


class Slots:
    """The states and settings of the running streams.

    Args:
      model: prepared for streaming.
      rows: streams at most.
      rooms: the sizes of states.
      pieces: sizes in which prompts are read, ascending.
      budget: tokens of prompts in a call at most.
      top: likeliest tokens that streams may ask for.
      function, values: the function of logits, and its values of one row.
    """

    def __init__(
        self,
        model: Module,
        rows: int,
        rooms: Rooms,
        *,
        pieces: Sequence[int],
        budget: int,
        top: int = 0,
        function: LogitsFunction | None = None,
        values: Any = None,
    ):
        static, params = split(model)
        self._leaves, self._programs = tuple(params.values()), batch_programs(static)
        self._rooms, self._pieces, self._budget = rooms, tuple(pieces), budget
        self._top, self._function = slots_of(top), function
        self._widths = (*(4**n for n in range(8) if 4**n < rows), rows)
        self._idle = _of_one_row(check_sampling(), np.full((1, 1), -1), values)
        self._streams: dict[Any, _Stream] = {}
        self._batches: dict[int, Batch] = {}  # by size

    @property
    def bytes(self) -> int:
        """The bytes of all states."""
        states = [batch.state for batch in self._batches.values()]
        return sum(leaf.nbytes for leaf in jax.tree.leaves(states))

    def claim(self, owner: Hashable, steps: int, sampling: Sampling, ends: np.ndarray, values: Any) -> None:
        """Let a stream in that will soon have `steps` steps, with settings of one row each."""
        stream = _Stream(self._rooms.size_for(steps), 0, _of_one_row(sampling, ends, values))
        self._streams[owner] = stream
        self._enter(owner, stream.size)

    def release(self, owner: Hashable) -> None:
        """Let a stream go, if it is here."""
        if (stream := self._streams.pop(owner, None)) is not None:
            self._leave(owner, stream.size)

    def lose(self) -> None:
        """Give all states up: a call that consumed one has failed."""
        self._streams, self._batches = {}, {}

    def place(self, owner: Hashable, one: StreamState, seed: int) -> None:
        """Give a stream that is here a state.

        Raises ValueError for a state of another size than streams have here.
        """
        stream, size = self._streams[owner], size_of(self._rooms, one)
        if size is None:
            raise UserError("state has a size that this batcher does not know: give it a larger `steps`")
        stream.length = int(np.asarray(one.length)[0])
        self._move(owner, max(stream.size, self._rooms.size_for(stream.length)))
        batch = self._batches[stream.size]
        one = self._rooms.resized(one, size, stream.size)
        row = np.int32(batch.owners.index(owner))
        batch.state = self._programs.place(batch.state, row, one, np.uint32(seed))

    def take(self, owner: Hashable) -> StreamState:
        """A copy of the state of a stream, in the size that it needs."""
        stream = self._streams[owner]
        size = min(stream.size, self._rooms.size_for(stream.length))
        return self._rooms.resized(self._copied(owner), stream.size, size)

    def shape(self, owners: Sequence[Hashable]) -> Hashable:
        """Of the work of a step in which `owners` draw tokens: steps of one shape take about as long."""
        sizes = sorted({self._streams[owner].size for owner in owners})
        return tuple((size, len(self._batches[size].owners)) for size in sizes)

    def run(
        self, pieces: Sequence[Piece], limits: Mapping[Hashable, int], top: bool
    ) -> list[tuple[Drawn, list[Any]]]:
        """Read `pieces`, then draw up to so many tokens per stream, the likeliest beside them if `top`.

        Returns the tokens of each batch that had work, with the owners of its rows.
        """
        for owner, stream in list(self._streams.items()):
            coming = stream.length + limits.get(owner, 0)
            coming += sum(len(piece.tokens) for piece in pieces if piece.owner is owner)
            self._move(owner, max(stream.size, self._rooms.size_for(coming)))
        drawn = []
        for size, batch in self._batches.items():
            own = [piece for piece in pieces if piece.owner in batch.owners]
            most = np.asarray([limits.get(owner, 0) for owner in batch.owners], np.int32)
            if own or most.any():
                drawn.append((self._call(size, batch, own, most, top), list(batch.owners)))
        for piece in pieces:
            self._streams[piece.owner].length += len(piece.tokens)
        for tokens, owners in jax.block_until_ready(drawn):
            for owner, count in zip(owners, np.asarray(tokens.count).tolist(), strict=True):
                if owner is not None:
                    self._streams[owner].length += count
        return drawn

    def _call(self, size: int, batch: Batch, pieces: Sequence[Piece], limits: np.ndarray, top: bool) -> Drawn:
        """Advance one batch."""
        if batch.settings is None:
            rows = [self._idle if owner is None else self._streams[owner].settings for owner in batch.owners]
            batch.settings = jax.tree.map(lambda *leaves: jnp.array(np.concatenate(leaves)), *rows)
        options = {"top": self._top if top else 0, "function": self._function}
        state, batch.state = batch.state, None  # taken over
        if pieces:
            work = (state, self._rooms.fresh(size), self._cut(batch, pieces), limits, *batch.settings)
            batch.state, drawn = self._programs.step(self._leaves, *work, **options)
        else:
            batch.state, drawn = self._programs.draw(self._leaves, state, limits, *batch.settings, **options)
        return drawn

    # Rows of batches.

    def _enter(self, owner: Hashable, size: int) -> None:
        """Give a stream a row among those of a size, without a state."""
        if size not in self._batches:
            self._batches[size] = Batch([None] * self._widths[0], self._rooms.batch(size, self._widths[0]))
        batch = self._batches[size]
        if batch.active == len(batch.owners):
            self._widen(batch)
        batch.owners[batch.owners.index(None)] = owner
        batch.settings = None

    def _leave(self, owner: Hashable, size: int) -> None:
        batch = self._batches[size]
        batch.owners[batch.owners.index(owner)] = None
        batch.settings = None
        place = self._widths.index(len(batch.owners))
        if not batch.active:
            del self._batches[size]
        elif place and batch.active <= max(1, self._widths[place - 1] // 2):
            self._narrow(batch)

    def _widen(self, batch: Batch) -> None:
        width = self._widths[self._widths.index(len(batch.owners)) + 1]
        have = len(batch.owners)
        rows = np.minimum(np.arange(width), have - 1).astype(np.int32)  # free ones may hold anything
        batch.state, batch.settings = self._programs.gather(batch.state, rows), None
        batch.owners = batch.owners + [None] * (width - have)

    def _narrow(self, batch: Batch) -> None:
        """Move the streams to the next narrower width."""
        width = self._widths[self._widths.index(len(batch.owners)) - 1]
        used = [row for row, owner in enumerate(batch.owners) if owner is not None]
        rows = np.asarray((used + used * width)[:width], np.int32)
        owners = [batch.owners[row] for row in used]
        batch.state, batch.settings = self._programs.gather(batch.state, rows), None
        batch.owners = owners + [None] * (width - len(owners))

    def _move(self, owner: Hashable, size: int) -> None:
        """Move a stream with its state among those of another size."""
        stream = self._streams[owner]
        if size == stream.size:
            return
        one = self._rooms.resized(self._copied(owner), stream.size, size)
        self._leave(owner, stream.size)
        self._enter(owner, size)
        stream.size, batch = size, self._batches[size]
        row = np.int32(batch.owners.index(owner))
        batch.state = self._programs.place(batch.state, row, one, np.asarray(one.seed)[0])

    def _copied(self, owner: Hashable) -> StreamState:
        batch = self._batches[self._streams[owner].size]
        return self._programs.take(batch.state, np.int32(batch.owners.index(owner)))

    # Compilation.

    def warm(self) -> tuple[int, list[StreamState]]:
        """Run every program once, several at a time: their number, and a state of two steps in every size."""
        done, states = 0, {}
        sizes = range(len(self._rooms.sizes))
        for size in sizes:
            self._rooms.fresh(size)
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            work = [
                pool.submit(self._warm_one, size, place)
                for size in sizes
                for place in range(len(self._widths))
            ]
            for count, size, one in (one.result() for one in work):
                done, states[size] = done + count, one
        for size in sizes:
            for other in (size - 1, size + 1):
                if other in sizes:
                    self._rooms.resized(states[size], size, other)
                    done += 1
        return done, list(states.values())

    def _warm_one(self, size: int, place: int) -> tuple[int, int, StreamState]:
        """Run the programs of a size and a width: their number, the size, a state of two steps."""
        width = self._widths[place]
        use, none = self._programs, np.zeros(width, np.int32)
        state, fresh, done = self._rooms.batch(size, width), self._rooms.fresh(size), 0
        settings = jax.tree.map(lambda leaf: jnp.array(np.repeat(leaf, width, axis=0)), self._idle)
        for top in sorted({0, self._top}):
            options = {"top": top, "function": self._function}
            for piece in self._pieces:
                pieces = self._blank(piece)._replace(count=np.int32(1))
                pieces.valid[0] = min(2, piece)
                state, _ = use.step(self._leaves, state, fresh, pieces, none, *settings, **options)
            state, _ = use.draw(self._leaves, state, none, *settings, **options)
            done += len(self._pieces) + 1
        for other in self._widths[max(0, place - 1) : place + 2]:
            use.gather(state, np.zeros(other, np.int32))
        one = use.take(state, np.int32(0))
        use.place(state, np.int32(0), one, np.uint32(0))
        return done + 4, size, one

    # Pieces.

    def _cut(self, batch: Batch, pieces: Sequence[Piece]) -> Pieces:
        """The pieces as arrays, cut into those of the size that computes least."""
        counts = [len(piece.tokens) for piece in pieces]
        size = min(self._pieces, key=lambda size: sum(-(-count // size) * (size + 8) for count in counts))
        arrays, i = self._blank(size), 0
        for piece in pieces:
            row = batch.owners.index(piece.owner)
            for start in range(0, len(piece.tokens), size):
                part = piece.tokens[start : start + size]
                arrays.row[i], arrays.valid[i], arrays.seed[i] = row, len(part), piece.seed
                arrays.begins[i] = piece.begins and not start
                arrays.tokens[i, : len(part)] = part
                i += 1
        return arrays._replace(count=np.int32(i))

    def _blank(self, size: int) -> Pieces:
        """No pieces, in arrays for as many as a call can have."""
        slots = self._widths[-1] + -(-self._budget // size)
        return Pieces(
            np.int32(0),
            np.zeros(slots, np.int32),
            np.zeros(slots, bool),
            np.zeros(slots, np.uint32),
            np.zeros((slots, size), np.int32),
            np.zeros(slots, np.int32),
        )


def _of_one_row(sampling: Sampling, ends: np.ndarray, values: Any) -> tuple[Any, Any, Any]:
    """Settings of one row, with places for as many biased tokens and ends as a stream may have."""
    tokens, bias = np.full((1, BIASES), 2**31 - 1, np.int32), np.zeros((1, BIASES), np.float32)
    count = sampling.bias_tokens.shape[1]
    tokens[0, :count], bias[0, :count] = sampling.bias_tokens[0], sampling.bias[0]
    wide = np.full((1, ENDS), -1, np.int32)
    wide[0, : ends.shape[1]] = ends[0]
    return sampling._replace(bias_tokens=tokens, bias=bias), wide, jax.tree.map(np.asarray, values)
