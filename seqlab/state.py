"""Operations on the states of mixers.

A state is a pytree of arrays created by `mixer.init_state`; batch is the first axis of every leaf, except
inside `Stacked`, where layers come first. Since a state is a plain value, saving, forking and moving rows are
operations on pytrees and need nothing from the mixer.
"""

import json
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from seqlab.checks import UserError
from seqlab.mixer import Mixer
from seqlab.mixer import State as State  # for mixers, which import what they need of states from here
from seqlab.parallel.sequence_parallel import running_max, running_sum
from seqlab.shapes import Steps

T = TypeVar("T")


class Stacked(NamedTuple):
    """The states of layers run by one scan: every leaf has the layers first and the batch second."""

    layers: State


class Segments(NamedTuple):
    """The segments and positions of the steps of a chunk.

    `ids` [b, t]: 1 for the sequence carried by the state, incremented at every reset, 0 for invalid steps.
    `positions` [b, t]: position within the sequence. `length` [b]: the number of steps of the last sequence.
    `last` [b]: its id.
    """

    ids: Int[Array, "b t"]
    positions: Int[Array, "b t"]
    length: Int[Array, " b"]
    last: Int[Array, " b"]


def segments(
    shape: tuple[int, int], start: Int[Array, " b"] | int, reset: Steps | None, valid: Steps | None
) -> Segments:
    """Number the steps of a chunk of `shape` (b, t) whose carried sequence has `start` steps. Resets at
    invalid steps are ignored."""
    batch, time = shape
    start = jnp.broadcast_to(jnp.asarray(start, jnp.int32), (batch,))
    keep = jnp.ones(shape, bool) if valid is None else valid
    index = running_sum(keep) - 1  # among the valid steps
    count = index[:, -1] + 1 if time else jnp.zeros((batch,), jnp.int32)
    if reset is None:
        return Segments(
            keep.astype(jnp.int32), start[:, None] + index, start + count, jnp.ones((batch,), jnp.int32)
        )
    fresh = reset & keep
    ids = 1 + running_sum(fresh)
    origin = running_max(jnp.where(fresh, index, -start[:, None]))
    last, base = (ids[:, -1], origin[:, -1]) if time else (jnp.ones((batch,), jnp.int32), -start)
    return Segments(jnp.where(keep, ids, 0), index - origin, count - base, last)


def mask_steps(x: T, valid: Steps | None) -> T:
    """`x` [b, t, ...] with exact zeros at invalid steps, whatever they hold, without gradients there."""
    if valid is None:
        return x
    return jnp.where(valid.reshape(valid.shape + (1,) * (x.ndim - 2)), x, jnp.zeros((), x.dtype))


def state_bytes(mixer: Mixer, batch: int = 1, dtype: jax.typing.DTypeLike = jnp.float32) -> int:
    """The bytes of the state of `batch` sequences, known before anything is allocated."""
    state = jax.eval_shape(lambda: mixer.init_state(batch, dtype))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def take_rows(state: T, rows: Sequence[int] | Int[Array, " r"]) -> T:
    """The state of the given rows, as a new batch in that order. Repeating a row forks it.

    Raises ValueError for rows that the state does not have; traced rows are not checked.
    """
    index = _row_index(rows, _batch_of(state))
    return by_row(lambda leaf, axis: jnp.take(leaf, index, axis=axis), state)


def put_rows(state: T, rows: Sequence[int] | Int[Array, " r"], values: T) -> T:
    """`state` with the given rows replaced by those of `values`; the other rows stay bit-identical.

    Raises ValueError for missing or repeated rows, and for values that do not fit the state or have another
    number of rows.
    """
    check_state(values, state, "values")
    index = _row_index(rows, _batch_of(state), once=True)
    if (batch := _batch_of(values)) not in (None, index.shape[0]):
        raise UserError(f"rows must name one row for each of the {batch} of values, got {index.shape[0]}")
    return by_row(lambda leaf, axis, new: leaf.at[(slice(None),) * axis + (index,)].set(new), state, values)


def check_state(state: State, like: State, name: str = "state") -> None:
    """Refuse a state unlike `like`, a state or a `jax.eval_shape` of one: structure, dtypes and shapes must
    agree, except for the number of rows.

    Raises:
      ValueError: names the argument and the first leaf that does not fit, with both shapes.
    """
    given, wanted = dict(_named_leaves(state)), dict(_named_leaves(like))
    if given.keys() != wanted.keys():
        missing, extra = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
        raise UserError(f"{name} is of another model or cache: missing {missing[:3]}, left over {extra[:3]}")
    axes = dict(_named_leaves(_row_axes(like)))
    for leaf, expected in wanted.items():
        _check_leaf(f"{name}: {leaf or 'the state'}", given[leaf], expected, axes[leaf])
    if jax.tree.structure(state) != jax.tree.structure(like):
        raise UserError(f"{name} is of another model or cache: its leaves fit, but not their containers")
    _batch_of(state, name)


def _check_leaf(name: str, leaf: Any, expected: Any, axis: int) -> None:
    def rest(shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[:axis] + shape[axis + 1 :]

    if leaf.dtype != expected.dtype or leaf.ndim != expected.ndim or rest(leaf.shape) != rest(expected.shape):
        raise UserError(
            f"{name} is {leaf.dtype}{list(leaf.shape)}, expected {expected.dtype}{list(expected.shape)} with "
            f"any number of rows on axis {axis}: it was made by another model or cache"
        )


def _row_axes(state: State) -> State:
    return by_row(lambda leaf, axis: axis, state)


def _batch_of(state: State, name: str = "state") -> int | None:
    """The number of rows; None for a state without leaves."""
    pairs = zip(_named_leaves(state), jax.tree.leaves(_row_axes(state)), strict=True)
    rows = {leaf_name: leaf.shape[axis] for (leaf_name, leaf), axis in pairs}
    if len(set(rows.values())) > 1:
        raise UserError(f"{name} must have one number of rows in all leaves, got {rows}")
    return next(iter(rows.values()), None)


def _row_index(rows: Any, batch: int | None, once: bool = False) -> Int[Array, " r"]:
    """Rows as an array: integers from 0 up to `batch`, without repetition if `once`."""
    if isinstance(rows, jax.core.Tracer):
        return rows.astype(jnp.int32)
    index = np.asarray(rows)
    index = index.astype(np.int32) if index.size == 0 else index
    if index.ndim != 1 or index.dtype.kind not in "iu":
        raise UserError(f"rows must be a sequence of integers, got {rows!r}")
    if batch is not None and np.any((index < 0) | (index >= batch)):
        raise UserError(f"rows must be from 0 to {batch - 1}, the rows of the state, got {index.tolist()}")
    if once and len(np.unique(index)) != len(index):
        raise UserError(f"rows must name each row once, got {index.tolist()}")
    return jnp.asarray(index, jnp.int32)


def select_rows(keep: Array, new: T, old: T) -> T:
    """Per row: `new` where `keep` [b], else `old`."""

    def choose(leaf: Array, axis: int, other: Array) -> Array:
        return jnp.where(keep.reshape((1,) * axis + (-1,) + (1,) * (leaf.ndim - axis - 1)), leaf, other)

    return by_row(choose, new, old)


def by_row(function: Any, state: T, *others: T) -> T:
    """`state` with every leaf replaced by `function(leaf, axis of its rows, leaves of others)`."""

    def visit(axis: int) -> Any:
        def leaf(x: Any, *rest: Any) -> Any:
            if isinstance(x, Stacked):
                return jax.tree.map(visit(1), x, *rest)
            return function(x, axis, *rest)

        return leaf

    return jax.tree.map(visit(0), state, *others, is_leaf=lambda x: isinstance(x, Stacked))


def save_state(state: State, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write a state to `path` in the safetensors format.

    Raises FileExistsError if the file exists; with `overwrite` it is replaced once the new one is complete.
    """
    from safetensors.numpy import save_file

    if os.path.exists(path) and not overwrite:
        raise FileExistsError(f"{os.fspath(path)} exists: name another file, or give overwrite=True")
    arrays, dtypes = to_arrays(state)
    temporary = f"{os.fspath(path)}.tmp"
    save_file(arrays, temporary, metadata={"format": "seqlab.state.1", "dtypes": json.dumps(dtypes)})
    os.replace(temporary, path)


def load_state(path: str | os.PathLike[str], like: T) -> T:
    """Read a state saved by `save_state` into the structure of `like`, a state of the same model or
    `jax.eval_shape` of one.

    The number of rows may differ. Raises ValueError if a leaf is missing, unknown, or has another shape or
    dtype.
    """
    from safetensors import safe_open

    with safe_open(os.fspath(path), framework="numpy") as file:
        dtypes = json.loads(file.metadata()["dtypes"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    return from_arrays(arrays, dtypes, like, os.fspath(path))


def to_arrays(state: State) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The leaves of `state` by name, in dtypes that every reader knows, and their own dtypes."""
    arrays = {name: np.ascontiguousarray(_storable(leaf)) for name, leaf in _named_leaves(state)}
    return arrays, {name: str(leaf.dtype) for name, leaf in _named_leaves(state)}


def from_arrays(
    arrays: dict[str, np.ndarray], dtypes: dict[str, str], like: T, name: str, any_size: bool = False
) -> T:
    """The inverse of `to_arrays`, with the structure of `like`; `name` is used in errors. `any_size`: sizes
    may differ from those of `like`, and are left to the caller to check.

    Raises ValueError if a leaf is missing, unknown, or has another shape or dtype.
    """
    named = _named_leaves(like)
    wanted = {leaf for leaf, _ in named}
    if wanted != arrays.keys():
        missing, extra = sorted(wanted - arrays.keys())[:3], sorted(arrays.keys() - wanted)[:3]
        raise UserError(f"{name}: not a state of this model: missing {missing}, left over {extra}")
    leaves = [jnp.asarray(arrays[leaf]).astype(dtypes[leaf]) for leaf, _ in named]
    state = jax.tree.unflatten(jax.tree.structure(like), leaves)
    if not any_size:
        check_state(state, like, name)
    return state


def _storable(leaf: Array) -> np.ndarray:
    array = np.asarray(leaf)
    # Exact: bfloat16 is a subset of float32
    return array.astype(np.float32) if array.dtype == jnp.bfloat16 else array


def _named_leaves(state: State) -> list[tuple[str, Any]]:
    return [
        (jax.tree_util.keystr(path, simple=True, separator="."), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    ]
