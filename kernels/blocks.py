"""Block sizes of the kernels as data, by kernel, bytes per number, and width of heads (or channels).

`TABLE` holds the built-in sizes. Sizes found by `seqlab bench OP --tune` take precedence, from a file:

    with seqlab.use_blocks("blocks.json"):      for a block of code
    SEQLAB_BLOCKS=blocks.json seqlab train ...  for a process; read whenever a kernel is traced

Sizes are upper limits: every kernel reduces them for shorter calls, see `blocks` of its module.
"""

import contextlib
import contextvars
import functools
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


def _tile(rows: int, keys: int, warps: int, stages: int, precision: str = "tf32x3") -> dict[str, Any]:
    return {"rows": rows, "keys": keys, "warps": warps, "stages": stages, "precision": precision}


def _chunks(steps: int, values: int, warps: int, stages: int) -> dict[str, Any]:
    return {"steps": steps, "values": values, "warps": warps, "stages": stages}


def _slots(keys: int, warps: int) -> dict[str, Any]:
    return {"keys": keys, "warps": warps, "stages": 2}


def _everywhere(**blocks: int) -> dict[int, dict[int, dict[str, Any]]]:
    return {ANY: {WIDEST: blocks}}


# By kernel, bytes per number, and the largest width of an entry.
TABLE: dict[str, dict[int, dict[int, dict[str, Any]]]] = {
    # Rows and keys of a tile. Three products in TF32 are as accurate as one in float32; for wide heads in
    # float32 tensor cores need too many registers, so plain arithmetic is used.
    "attention/triton_gpu/forward": {
        2: {64: _tile(128, 64, 4, 3), 128: _tile(128, 64, 8, 2), 256: _tile(64, 64, 8, 2)},
        4: {
            32: _tile(64, 64, 4, 2),
            64: _tile(128, 64, 8, 1),
            128: _tile(32, 16, 8, 1, "ieee"),
            256: _tile(32, 16, 8, 1, "ieee"),
        },
    },
    "attention/triton_gpu/backward_keys": {
        2: {64: _tile(64, 64, 4, 2), 128: _tile(32, 64, 8, 2), 256: _tile(64, 32, 8, 1)},
        4: {64: _tile(32, 32, 8, 1), 128: _tile(16, 16, 4, 1, "ieee"), 256: _tile(16, 16, 8, 1, "ieee")},
    },
    "attention/triton_gpu/backward_queries": {
        2: {64: _tile(64, 64, 4, 2), 128: _tile(64, 64, 8, 2), 256: _tile(32, 32, 8, 1)},
        4: {64: _tile(16, 32, 4, 1), 128: _tile(32, 16, 8, 1, "ieee"), 256: _tile(16, 16, 8, 1, "ieee")},
    },
    # Queries or keys: the logits of a tile take a MiB of float32, and a few of these fit beside everything
    # else.
    "attention/pallas_tpu/tile": {ANY: {128: {"tile": 512}, WIDEST: {"tile": 256}}},
    # Slots of a tile, in codes of one group of keys at most.
    "decode_attention/triton_gpu/codes": {2: {256: _slots(64, 4)}, 4: {256: _slots(32, 8)}},
    "decode_attention/triton_gpu/numbers": {
        2: {256: _slots(64, 4)},
        4: {128: _slots(32, 8), 256: _slots(16, 8)},
    },
    # A few megabytes of numbers, and copies large enough to amortise their latency.
    "decode_attention/pallas_tpu/tile": _everywhere(tile=2048),
    # Wide rows are read 256 bytes at a time; `stretch` steps share one partial sum of the weights' gradient.
    "conv/triton_gpu/tile": {
        ANY: {
            64: {"steps": 32, "channels": 32, "stretch": 256, "warps": 4},
            WIDEST: {"steps": 16, "channels": 128, "stretch": 256, "warps": 4},
        }
    },
    # One MiB of float32, an efficient transfer size, and ten of them fit.
    "conv/pallas_tpu/tile": _everywhere(steps=512, channels=512),
    # One state is kept per tile: long tiles need less memory, short ones fewer registers. Both directions use
    # the same steps.
    "scan/triton_gpu/forward": _everywhere(steps=64, channels=16, warps=4),
    "scan/triton_gpu/backward": _everywhere(channels=16, warps=4),
    "scan/pallas_tpu/block": _everywhere(channels=512),
    # The states kept, t / 64 of them, then take n / 64 of the memory of u.
    "scan/xla/chunk": _everywhere(steps=64),
    # By kind: longer chunks cost more in the triangular solve and in channel decays than they save.
    "linear_attention/xla/plain": _everywhere(chunk=64),
    "linear_attention/xla/delta": _everywhere(chunk=32),
    "linear_attention/xla/channel": _everywhere(chunk=32),
    "linear_attention/xla/value": _everywhere(chunk=16),
    # Steps of a chunk, values of a program, whose state [k, values] is in registers.
    "linear_attention/triton_gpu/carry": {
        2: {64: _chunks(64, 64, 4, 2), 128: _chunks(64, 32, 4, 2), 256: _chunks(32, 16, 4, 1)},
        4: {64: _chunks(64, 32, 4, 1), 128: _chunks(32, 16, 8, 1)},
    },
    # Steps of a chunk and of a block, in which heads wider than the lanes leave less room: the vector memory
    # of a v4 has 16 MiB.
    **{
        f"linear_attention/pallas_tpu/{kind}": {
            ANY: {128: {"chunk": chunk, "steps": 512}, WIDEST: {"chunk": chunk, "steps": 128}}
        }
        for kind, chunk in (("plain", 128), ("delta", 64), ("channel", 64), ("value", 16))
    },
    "lmu/xla/chunk": _everywhere(steps=32),
}


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
    table = TABLE[kernel]
    size = itemsize if itemsize in table else ANY
    most = next(most for most in table[size] if width <= most)
    place = (kernel, size, most)
    blocks = table[size][most] | _rows().blocks.get(place, {})
    asked = _asked.get()
    if asked is not None:
        asked[place] = Row(*place, blocks)
    return blocks


def widest(kernel: str, itemsize: int) -> int:
    """The width of heads up to which there are blocks."""
    table = TABLE[kernel]
    return max(table[itemsize if itemsize in table else ANY])


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
    check_choice(row.kernel, tuple(TABLE), f"{source}: kernel")
    own = TABLE[row.kernel].get(row.bytes, {}).get(row.width)
    if own is None:
        places = [
            f"bytes={size} width={width}" for size, widths in TABLE[row.kernel].items() for width in widths
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
