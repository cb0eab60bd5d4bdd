"""The GGUF format: metadata of a file and places of its tensors, none of which is read here.

Little-endian files of versions 2 and 3 (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

import math
import os
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

_MAGIC, _VERSIONS, _ALIGNMENT = b"GGUF", (2, 3), 32
_SCALARS = "BbHhIif?"  # of the types 0 to 7, as `struct` writes them
_STRING, _ARRAY = 8, 9
_WIDE = {10: "Q", 11: "q", 12: "d"}


class Tensor(NamedTuple):
    """Place of a tensor in its file: `shape` with the innermost axis first, `kind` the number of its
    quantization, which has `block` bytes per block; `begin` and `count`: its bytes in the file."""

    name: str
    shape: tuple[int, ...]
    kind: int
    block: int
    begin: int
    count: int


def read(
    path: str | os.PathLike[str], sizes: Mapping[int, tuple[int, int]]
) -> tuple[dict[str, Any], list[Tensor]]:
    """The fields of a file, and its tensors.

    Args:
      sizes: numbers and bytes of a block, by the number of a quantization.

    Raises:
      ValueError: what is no GGUF file, of another version, damaged or cut short.
    """
    data = np.memmap(path, mode="r")
    cursor = _Cursor(data)
    if bytes(cursor.bytes(4)) != _MAGIC:
        raise ValueError("it does not begin as GGUF files do")
    version, tensors, fields = cursor.numbers("IQQ")
    if version not in _VERSIONS:
        raise ValueError(f"version {version}, of which only {', '.join(map(str, _VERSIONS))} are known")
    found: dict[str, Any] = {}
    for _ in range(fields):
        name = cursor.text()
        if name in found:
            raise ValueError(f"{name} is there twice")
        found[name] = cursor.value(cursor.numbers("I")[0])
    headers = [_header(cursor) for _ in range(tensors)]
    if len({header[0] for header in headers}) < len(headers):
        raise ValueError("a tensor is there twice")
    alignment = found.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r}")
    start = -(-cursor.at // alignment) * alignment
    return found, [_tensor(len(data), start, sizes, *header) for header in headers]


class _Cursor:
    """Reads values one behind the other."""

    def __init__(self, data: np.ndarray):
        self._data, self.at = memoryview(data), 0

    def bytes(self, count: int) -> memoryview:
        end = self.at + count
        if end > len(self._data):
            raise ValueError("it ends too early")
        piece, self.at = self._data[self.at : end], end
        return piece

    def numbers(self, form: str) -> tuple[Any, ...]:
        form = "<" + form
        return struct.unpack(form, self.bytes(struct.calcsize(form)))

    def text(self) -> str:
        return str(self.bytes(self.numbers("Q")[0]), "utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            inner, count = self.numbers("IQ")
            if inner == _ARRAY:
                raise ValueError("an array of arrays, of which no field is known")
            if inner != _STRING:
                form = _form(inner)
                return list(self.numbers(f"{count}{form}")) if count < len(self._data) else self.bytes(count)
            return [self.text() for _ in range(count)]
        return self.numbers(_form(kind))[0]


def _form(kind: int) -> str:
    form = _WIDE.get(kind) or (_SCALARS[kind] if kind < len(_SCALARS) else None)
    if form is None:
        raise ValueError(f"a field of the unknown type {kind}")
    return form


def _header(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.text()
    (axes,) = cursor.numbers("I")
    if axes > 8:
        raise ValueError(f"tensor {name} has {axes} axes")
    shape = cursor.numbers(f"{axes}Q")
    return name, shape, *cursor.numbers("IQ")


def _tensor(
    end: int,
    start: int,
    sizes: Mapping[int, tuple[int, int]],
    name: str,
    shape: tuple[int, ...],
    kind: int,
    offset: int,
) -> Tensor:
    if kind not in sizes:
        raise ValueError(f"tensor {name} is of the unknown type {kind}")
    numbers, size = sizes[kind]
    if not shape or shape[0] % numbers:
        raise ValueError(
            f"tensor {name} has the shape {list(shape)}, and rows of blocks of {numbers} numbers"
        )
    row = shape[0] // numbers * size
    count, begin = row * math.prod(shape[1:]), start + offset
    if begin + count > end:
        raise ValueError("it ends too early")
    return Tensor(name, shape, kind, size, begin, count)
