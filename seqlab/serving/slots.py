"""The rows of a batch on the device: who has which, their settings and states, and the calls that advance
them."""

from collections.abc import Sequence
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

BIASES, ENDS = 512, 64  # biased tokens and end tokens of a row at most
_PATIENCE = 64  # steps for which a smaller state would have done before the state shrinks


class Piece(NamedTuple):
    """A piece of a prompt: the row that reads it, its tokens, whether the row starts fresh, and its seed."""

    row: int
    tokens: np.ndarray
    begins: bool
    seed: int


class Part(NamedTuple):
    """Some rows of a batch that draw tokens on their own, while the others have nothing to do."""

    rows: tuple[int, ...]
    state: StreamState
    settings: Any


class Slots:
    """The state of a batch, and the settings of its rows.

    Where few rows draw tokens, these are computed as a smaller batch, so that a stream alone is not slowed by
    empty rows.

    Args:
      model: prepared for streaming.
      rows: of the batch.
      rooms: the sizes of its state.
      pieces: sizes in which prompts are read, ascending.
      budget: tokens of prompts in a call at most.
      top: likeliest tokens that rows may ask for.
      function, values: the function of logits, and its values of one row.

    Attributes:
      owners: who has each row; None for a free one.
      lengths: [b], steps of each row's stream.
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
        self._values = jax.tree.map(lambda leaf: np.repeat(np.asarray(leaf), rows, axis=0), values)
        self._sampling = check_sampling(rows=rows)._replace(
            bias_tokens=np.full((rows, BIASES), 2**31 - 1, np.int32),
            bias=np.zeros((rows, BIASES), np.float32),
        )
        self._ends = np.full((rows, ENDS), -1, np.int32)
        self._arrays: Any = None  # the settings on the device; None where a row has changed
        self._size, self._state, self._slack = 0, None, 0
        self._part: Part | None = None  # newer than its rows of the state
        self._widths = tuple(4**n for n in range(8) if 4**n < rows)
        self.owners: list[Any] = [None] * rows
        self.lengths = np.zeros(rows, np.int64)

    @property
    def bytes(self) -> int:
        """The bytes of the state; 0 before the first stream."""
        states = (self._state, None if self._part is None else self._part.state)
        return sum(leaf.nbytes for leaf in jax.tree.leaves(states))

    def row_of(self, owner: Any) -> int:
        """The row of `owner`."""
        return self.owners.index(owner)

    def claim(self, owner: Any, sampling: Sampling, ends: np.ndarray, values: Any) -> int:
        """Give a free row to `owner`, with settings of one row each."""
        row = self.owners.index(None)
        self.owners[row], self.lengths[row] = owner, 0
        self._sampling.bias_tokens[row], self._sampling.bias[row] = 2**31 - 1, 0
        for whole, own in zip(self._sampling, sampling, strict=True):
            if own.ndim == 1:
                whole[row] = own[0]
            else:
                whole[row, : own.shape[1]] = own[0]
        self._ends[row] = -1
        self._ends[row, : ends.shape[1]] = ends[0]
        for whole, own in zip(*map(jax.tree.leaves, (self._values, values)), strict=True):
            whole[row] = np.asarray(own)[0]
        self._arrays = None
        if self._part is not None:
            self._part = self._part._replace(settings=None)
        return row

    def release(self, owner: Any) -> None:
        """Free the row of `owner`, if it has one."""
        if owner in self.owners:
            self.owners[self.owners.index(owner)] = None

    def lose(self) -> None:
        """Give the state up: a call that consumed it has failed."""
        self._state = self._arrays = self._part = None
        self._size, self.owners = 0, [None] * len(self.owners)

    def place(self, row: int, one: StreamState, seed: int) -> None:
        """Put the state of a stream into a row, growing the batch if needed.

        Raises ValueError for a state of another size than streams of these rows have.
        """
        length, size = int(np.asarray(one.length)[0]), size_of(self._rooms, one)
        if size is None:
            raise UserError("state has a size that this batcher does not know: give it a larger `steps`")
        self._change_size(max(self._size, self._rooms.size_for(length)))
        one = self._rooms.resized(one, size, self._size)
        self._state = self._programs.place(self._whole(), np.int32(row), one, np.uint32(seed))
        self.lengths[row] = length

    def take(self, row: int) -> StreamState:
        """A copy of the state of a row, in the size that it needs."""
        one = self._programs.take(self._whole(), np.int32(row))
        size = min(self._size, self._rooms.size_for(int(self.lengths[row])))
        return self._rooms.resized(one, self._size, size)

    def run(self, pieces: Sequence[Piece], limits: np.ndarray, top: bool) -> tuple[Drawn, list[int]]:
        """Read `pieces`, then draw up to `limits` [b] tokens per row, the likeliest beside them if `top`.

        Returns the tokens, and the row of each of their rows.
        """
        coming = self.lengths + limits
        for piece in pieces:
            coming[piece.row] += len(piece.tokens)
        self._fit(int(max(coming[row] for row, owner in enumerate(self.owners) if owner is not None)))
        options = {"top": self._top if top else 0, "function": self._function}
        rows = list(range(len(self.owners)))
        if not pieces and (part := self._part_of(np.flatnonzero(limits).tolist())) is not None:
            rows, self._part = list(part.rows), None  # taken over
            work = (part.state, limits[rows], *part.settings)
            state, drawn = self._programs.draw(self._leaves, *work, **options)
            self._part = part._replace(state=state)
        elif pieces:
            state, self._state = self._whole(), None
            work = (state, self._rooms.fresh(self._size), self._cut(pieces), limits, *self._settings())
            self._state, drawn = self._programs.step(self._leaves, *work, **options)
        else:
            state, self._state = self._whole(), None
            work = (state, limits, *self._settings())
            self._state, drawn = self._programs.draw(self._leaves, *work, **options)
        drawn = jax.block_until_ready(drawn)
        for piece in pieces:
            self.lengths[piece.row] += len(piece.tokens)
        self.lengths[rows] += np.asarray(drawn.count)
        return drawn, rows

    def width(self, active: int) -> int:
        """The number of rows that are computed where so many draw tokens."""
        return next((width for width in self._widths if width >= active), len(self.owners))

    def _part_of(self, active: list[int]) -> Part | None:
        """The active rows as a smaller batch; None if there is no smaller one for so many."""
        if (width := self.width(len(active))) == len(self.owners):
            return None
        if self._part is None or len(self._part.rows) != width or not set(active) <= set(self._part.rows):
            others = [row for row in range(len(self.owners)) if row not in active]
            rows = np.asarray([*active, *others][:width], np.int32)
            state = self._programs.gather(self._whole(), rows)
            self._part = Part(tuple(rows.tolist()), state, None)
        if self._part.settings is None:
            index = np.asarray(self._part.rows)
            settings = jax.tree.map(lambda leaf: jnp.array(leaf[index]), self._host_settings)
            self._part = self._part._replace(settings=settings)
        return self._part

    def warm(self, size: int) -> tuple[int, StreamState]:
        """Run every program once on states of a size: their number, and a state of two steps."""
        rooms, use, none = self._rooms, self._programs, np.zeros(len(self.owners), np.int32)
        state, fresh, done = rooms.batch(size), rooms.fresh(size), 2
        for top in sorted({0, self._top}):
            options = {"top": top, "function": self._function}
            for piece in self._pieces:
                pieces = self._blank(piece)._replace(count=np.int32(1))
                pieces.valid[0] = min(2, piece)
                work = (state, fresh, pieces, none, *self._settings())
                state, _ = use.step(self._leaves, *work, **options)
            state, _ = use.draw(self._leaves, state, none, *self._settings(), **options)
            done += len(self._pieces) + 1
            for width in self._widths:
                rows = np.arange(width, dtype=np.int32)
                part = use.gather(state, rows)
                settings = jax.tree.map(lambda leaf, rows=rows: jnp.array(leaf[rows]), self._host_settings)
                part, _ = use.draw(self._leaves, part, none[rows], *settings, **options)
                state = use.scatter(state, rows, part)
                done += 3
        one = use.take(state, np.int32(0))
        state = use.place(state, np.int32(0), one, np.uint32(0))
        for other in (size - 1, size + 1):
            if 0 <= other < len(rooms.sizes):
                rooms.resized(state, size, other)
                rooms.resized(one, size, other)
                done += 2
        return done, one

    def _whole(self) -> StreamState:
        """The state of all rows, up to date."""
        if self._state is None:
            self._state = self._rooms.batch(self._size)
        if self._part is not None:
            part, self._part = self._part, None
            self._state = self._programs.scatter(self._state, np.asarray(part.rows, np.int32), part.state)
        return self._state

    def _fit(self, steps: int) -> None:
        """Room for streams of `steps` steps; less of it once a smaller state would have done for a while."""
        size = self._rooms.size_for(steps)
        self._slack = self._slack + 1 if size < self._size else 0
        if size > self._size or self._slack > _PATIENCE:
            self._change_size(size)
            self._slack = 0

    def _change_size(self, size: int) -> None:
        if size != self._size:
            self._state = self._rooms.resized(self._whole(), self._size, size)
            self._size = size

    def _settings(self) -> tuple[Any, Any, Any]:
        """The settings of all rows, on the device."""
        if self._arrays is None:
            self._arrays = jax.tree.map(jnp.array, self._host_settings)
        return self._arrays

    @property
    def _host_settings(self) -> tuple[Any, Any, Any]:
        return self._sampling, self._ends, self._values

    def _cut(self, pieces: Sequence[Piece]) -> Pieces:
        """The pieces as arrays, cut into those of the size that computes least."""
        counts = [len(piece.tokens) for piece in pieces]
        size = min(self._pieces, key=lambda size: sum(-(-count // size) * (size + 8) for count in counts))
        arrays, i = self._blank(size), 0
        for piece in pieces:
            for start in range(0, len(piece.tokens), size):
                part = piece.tokens[start : start + size]
                arrays.row[i], arrays.valid[i], arrays.seed[i] = piece.row, len(part), piece.seed
                arrays.begins[i] = piece.begins and not start
                arrays.tokens[i, : len(part)] = part
                i += 1
        return arrays._replace(count=np.int32(i))

    def _blank(self, size: int) -> Pieces:
        """No pieces, in arrays for as many as a call can have."""
        slots = len(self.owners) + -(-self._budget // size)
        return Pieces(
            np.int32(0),
            np.zeros(slots, np.int32),
            np.zeros(slots, bool),
            np.zeros(slots, np.uint32),
            np.zeros((slots, size), np.int32),
            np.zeros(slots, np.int32),
        )
