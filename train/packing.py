"""Packing of documents into indexable windows of equal length.

Documents are joined once into one stream, in an order drawn from the seed, each preceded by its `bos`; window
i is

    inputs = stream[i L : i L + L]        targets = stream[i L + 1 : i L + L + 1]

so every token but the first is predicted exactly once, and the position in the data is one integer.
(First-fit packing wastes less but must be run from the start to find its position, so it cannot resume, shard
or change the number of workers.)
"""

import functools
import hashlib
import operator
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from seqlab.checks import UserError

Item = dict[str, np.ndarray]


@runtime_checkable
class DataSource(Protocol):
    """Indexable documents. Each is a 1-D array of tokens: uint8 for bytes, else any integer dtype."""

    def __len__(self) -> int:
        """The number of documents."""

    def __getitem__(self, index: int) -> Int[np.ndarray, " t"]:
        """Document `index`; always the same array."""


class Windows:
    """The result of `pack`: a sequence of `Item`s cut from one stream of tokens.

    An item has `inputs` and `targets` [length] int32; `reset` [length] bool, True where the input is the
    `bos` of a document; `valid` [length] bool, False where the last window is padded. A window may begin
    inside a document. At the end of a document the target is the `bos` of the next, so that a model learns
    where documents end. With `first` every window begins with that token, followed by one token of the stream
    less.
    """

    def __init__(
        self,
        stream: Int[np.ndarray, " n"],
        starts: Int[np.ndarray, " documents"],
        length: int,
        keep_last: bool,
        first: int | None = None,
    ) -> None:
        self.stream = stream
        self.starts = starts
        self.length, self.first = length, first
        self._step = length - (first is not None)
        predicted = len(stream) - 1
        self._count = -(-predicted // self._step) if keep_last else predicted // self._step

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Item:
        index = operator.index(index)
        if not -self._count <= index < self._count:
            raise IndexError(f"window {index} of {self._count}")
        begin = index % self._count * self._step
        chunk = self.stream[begin : begin + self._step + 1]
        if self.first is not None:
            chunk, begin = np.concatenate([np.array([self.first], chunk.dtype), chunk]), begin - 1
        count = len(chunk) - 1
        inputs, targets, reset = (np.zeros(self.length, dtype) for dtype in (np.int32, np.int32, np.bool_))
        inputs[:count], targets[:count] = chunk[:-1], chunk[1:]
        first, last = np.searchsorted(self.starts, (begin, begin + count))
        reset[self.starts[first:last] - begin] = True
        return {"inputs": inputs, "targets": targets, "reset": reset, "valid": np.arange(self.length) < count}

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change if any window does: a resumed run can verify that its data are
        the same."""
        first = "" if self.first is None else f"{self.first} "
        digest = hashlib.sha256(f"{self.length} {self._count} {self.stream.dtype} {first}".encode())
        digest.update(self.starts)
        digest.update(self.stream)
        return digest.hexdigest()[:16]


def pack(
    source: DataSource, length: int, seed: int, bos: int = 0, keep_last: bool = True, lead: bool = False
) -> Windows:
    """Join the documents of `source`, each preceded by one `bos`, in an order drawn from `seed`, and cut
    windows of `length` steps.

    With `lead` every window begins with `bos`, as every stream of text does in generation.

    The stream is held in memory once, as uint8 if all documents are, else as int32; while it is built, twice.
    Empty documents are left out. `keep_last=False` drops the last window if it would be padded.

    Raises:
      ValueError: for a document that is not a 1-D array of integers from 0 to 2**31-1, or too few tokens for
        one whole window.
    """
    if length < 1 + lead:
        raise UserError(f"length: got {length}, expected at least {1 + lead} step{'s' * lead} a window")
    documents = [
        document
        for document in (_document(source, index) for index in _order(len(source), seed))
        if document.size
    ]
    dtype = np.uint8 if bos < 256 and all(document.dtype == np.uint8 for document in documents) else np.int32
    sizes = np.array([document.size + 1 for document in documents], np.int64)
    if sizes.sum() < length + 1:
        raise UserError(
            f"too little data: {len(documents)} documents with {sizes.sum()} tokens, and one window of "
            f"length {length} takes {length + 1}"
        )
    stream = np.full(sizes.sum(), bos, dtype)
    starts = np.cumsum(sizes) - sizes
    for start, document in zip(starts, documents, strict=True):
        stream[start + 1 : start + 1 + document.size] = document
    stream.setflags(write=False)
    return Windows(stream, starts, length, keep_last, bos if lead else None)


def _order(count: int, seed: int) -> list[int]:
    # NumPy guarantees only raw bits to be the same in all versions.
    return np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable").tolist()


def _document(source: Any, index: int) -> Int[np.ndarray, " t"]:
    document = np.asarray(source[index])
    if document.ndim != 1 or not np.issubdtype(document.dtype, np.integer):
        raise UserError(
            f"document {index}: got {document.dtype}{document.shape}, expected a 1-D array of integer tokens"
        )
    if document.size and document.dtype != np.uint8 and (document.min() < 0 or document.max() >= 2**31):
        raise UserError(
            f"document {index}: tokens from {document.min()} to {document.max()}, expected 0 to 2**31-1"
        )
    return document
