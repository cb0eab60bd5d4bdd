"""Block sizes of the kernels as data, by kernel, bytes per number, and width of heads (or channels).

The built-in sizes of an op are the `BLOCKS` of its `specs`. Sizes found by `seqlab bench OP --tune` take
precedence, from a file:

    with seqlab.use_blocks("blocks.json"):      for a block of code
    SEQLAB_BLOCKS=blocks.json seqlab train ...  for a process; read whenever a kernel is traced

Sizes are upper limits: every kernel reduces them for shorter calls, see `blocks` of its module.
"""

import contextlib
import contextvars
import functools
import importlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from seqlab.checks import UserError, check_choice

ANY, WIDEST = 0, 2**31 - 1  # numbers of any size, and any width


class Row(NamedTuple):
    """The blocks of a kernel, named op/implementation/kernel, for numbers of `bytes` bytes and widths up to
    `width`."""

    kernel: str
    bytes: int
    width: int
    blocks: dict[str, Any]

    @property
    def place(self) -> tuple[str, int, int]:
        return self[:3]


def everywhere(**blocks: int) -> dict[int, dict[int, dict[str, Any]]]:
    """The same blocks for numbers of any size and any width."""
    return {ANY: {WIDEST: blocks}}


# By kernel, bytes per number, and the largest width of an entry.
Table = dict[str, dict[int, dict[int, dict[str, Any]]]]


@functools.cache
def table(op: str) -> Table:
    """The built-in blocks of an op: `BLOCKS` of its `specs`, empty where it cuts nothing."""
    return getattr(importlib.import_module(f"seqlab.kernels.{op}.specs"), "BLOCKS", {})


def tables() -> Table:
    """The built-in blocks of all ops."""
    from seqlab import kernels

    return {kernel: rows for op in kernels.__all__ for kernel, rows in table(op).items()}


class _Rows:
    """Rows that take precedence over the table; a new object every time, so that jax.jit traces again."""

    def __init__(self, rows: Sequence[Row]):
        self.blocks = {row.place: row.blocks for row in rows}


_chosen = jax.make_user_context(default_value=None)
_asked: contextvars.ContextVar[dict[tuple[str, int, int], Row] | None] = contextvars.ContextVar(
    "seqlab_blocks", default=None
)


def find(kernel: str, itemsize: int, width: int) -> dict[str, Any]:
    """The blocks of a kernel for numbers of `itemsize` bytes and a width of at most `widest(kernel,
    itemsize)`."""
    known = table(kernel.partition("/")[0])[kernel]
    size = itemsize if itemsize in known else ANY
    most = next(most for most in known[size] if width <= most)
    place = (kernel, size, most)
    blocks = known[size][most] | _rows().blocks.get(place, {})
    asked = _asked.get()
    if asked is not None:
        asked[place] = Row(*place, blocks)
    return blocks


def widest(kernel: str, itemsize: int) -> int:
    """The width of heads up to which there are blocks."""
    known = table(kernel.partition("/")[0])[kernel]
    return max(known[itemsize if itemsize in known else ANY])


def asked_by(function: Callable[..., Any], *args: Any) -> list[Row]:
    """The rows that determine the blocks of a call, in order. The call is traced, not run."""
    found: dict[tuple[str, int, int], Row] = {}
    token = _asked.set(found)
    try:
        with _chosen(_Rows([Row(*place, blocks) for place, blocks in _rows().blocks.items()])):
            jax.eval_shape(function, *args)
    finally:
        _asked.reset(token)
    return list(found.values())


@contextlib.contextmanager
def use_blocks(source: str | os.PathLike | Sequence[Row]) -> Iterator[None]:
    """Within the block, kernels use the block sizes of a file written by `seqlab bench OP --tune FILE`, or of
    rows.

    Functions compiled by `jax.jit` outside the block are traced again inside. Raises ValueError for a file
    written on another device, and for rows of an unknown kernel, with the nearest name.
    """
    rows = _Rows(
        load(source)
        if isinstance(source, str | os.PathLike)
        else [_checked(row, "use_blocks") for row in source]
    )
    with _chosen(rows):
        yield


def load(path: str | os.PathLike) -> list[Row]:
    """The rows of a file for this device."""
    try:
        content = json.loads(pathlib.Path(path).read_text())
        measured, rows = (
            content["device"],
            [Row(*(row[name] for name in Row._fields)) for row in content["rows"]],
        )
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path}: expected what `seqlab bench OP --tune FILE` writes, got {type(error).__name__}: {error}"
        ) from None
    if measured != device():
        raise UserError(
            f"{path} was measured on {measured}, and this is {device()}: `seqlab bench OP --tune` measures "
            "here"
        )
    return [_checked(row, os.fspath(path)) for row in rows]


def _checked(row: Row, source: str) -> Row:
    """The row, if the table has an entry for it with the same fields."""
    known = tables()
    check_choice(row.kernel, tuple(known), f"{source}: kernel")
    own = known[row.kernel].get(row.bytes, {}).get(row.width)
    if own is None:
        places = [
            f"bytes={size} width={width}" for size, widths in known[row.kernel].items() for width in widths
        ]
        raise UserError(
            f"{source}: {row.kernel} has rows for {', '.join(places)}, got bytes={row.bytes} "
            f"width={row.width}"
        )
    for name, value in row.blocks.items():
        check_choice(name, tuple(own), f"{source}: block size of {row.kernel}")
        if type(value) is not type(own[name]) or (isinstance(value, int) and value < 1):
            raise UserError(
                f"{source}: {row.kernel} {name}: got {value!r}, expected something like {own[name]!r}"
            )
    return row


def device() -> str:
    """A name of the kind of device that JAX uses."""
    kind = jax.devices()[0].device_kind
    if jax.default_backend() != "cpu":
        return kind
    described = pathlib.Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), kind)
    return f"{os.cpu_count()} cores of {model}"


def _rows() -> _Rows:
    if _chosen.value is not None:
        return _chosen.value
    path = os.environ.get("SEQLAB_BLOCKS")
    return _of_file(path, os.stat(path).st_mtime_ns) if path else _NONE


@functools.lru_cache(maxsize=8)
def _of_file(path: str, written: int) -> _Rows:
    return _Rows(load(path))


_NONE = _Rows([])
