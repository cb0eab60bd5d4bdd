"""The data of a language-model run as a config value: small, printable, and read on demand."""

import dataclasses

import numpy as np
from jaxtyping import Int

from seqlab.checks import UserError
from seqlab.tokenizers import ByteTokenizer, Tokenizer
from seqlab.train.data import FileSource, TfdsSource, Windows, pack

_VALIDATION_ORDER = 0  # the held-out documents stand in one order, whatever the seed of the run


@dataclasses.dataclass(frozen=True)
class Text:
    """The bytes of files, packed into windows of `length` tokens.

    Args:
      paths: files and folders; none means the sources of the Python standard library, which every machine
        has.
      include: patterns of file names in the folders, such as "*.md"; none takes every file.
      length: tokens per window.
      tokenizer: bytes by default; that of a published model is `seqlab.studies.start.tokenizer_at(folder)`.
      lead: begin every window with the token that begins documents, wherever it was cut: a position visible
        to all queries, which attention uses as a sink (StreamingLLM, arXiv 2309.17453).
    Raises:
      ValueError: an argument of another kind. Paths are checked by `train` and `validation`, which raise
        OSError naming the path, or ValueError for too little data.
    """

    paths: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    length: int = 256
    lead: bool = False
    tokenizer: Tokenizer = ByteTokenizer()  # noqa: RUF009 - without a state

    def __post_init__(self) -> None:
        for name in ("paths", "include"):
            value = getattr(self, name)
            if not isinstance(value, tuple) or not all(isinstance(item, str) and item for item in value):
                raise UserError(f"{name} must be a tuple of strings that are not empty, got {value!r}")
        _check_length(self.length)
        if self.lead and self.length < 2:
            raise UserError(f"length must be at least 2 with lead, got {self.length}")

    def train(self, seed: int) -> Windows:
        """The training windows; the order of the documents in them is drawn from `seed`."""
        return self._windows("train", seed)

    def validation(self) -> Windows:
        """The windows held out, the same for every seed."""
        return self._windows("validation", _VALIDATION_ORDER)

    def _windows(self, split: str, seed: int) -> Windows:
        source = FileSource(self.paths or None, split, include=self.include or None)
        if isinstance(self.tokenizer, ByteTokenizer):
            return pack(source, self.length, seed, bos=self.tokenizer.bos, lead=self.lead)
        tokens = _Tokens(source, self.tokenizer)
        return pack(tokens, self.length, seed, bos=_mark(self.tokenizer), lead=self.lead)


class _Tokens:
    """The documents of a source as tokens."""

    def __init__(self, source: FileSource, tokenizer: Tokenizer):
        self._source, self._tokenizer = source, tokenizer

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Int[np.ndarray, " t"]:
        text = bytes(self._source[index]).decode("utf-8", errors="replace")
        return np.asarray(self._tokenizer.encode(text), np.int32)


def _mark(tokenizer: Tokenizer) -> int:
    """The token between documents: that which begins texts, else that which ends them."""
    marks = (tokenizer.bos, getattr(tokenizer, "start", None), tokenizer.eos)
    found = next((mark for mark in marks if mark is not None), None)
    if found is None:
        raise UserError("tokenizer: it has no token that begins or ends a text, which separates documents")
    return found


@dataclasses.dataclass(frozen=True)
class TfdsText:
    """Feature `key` of a prepared TensorFlow Datasets data set, as bytes packed into windows of `length`
    tokens.

    `name`, `data_dir` and `key` are those of `seqlab.train.data.TfdsSource`. Without a validation split in
    the data set, `train_split` and `validation_split` divide one: "train[:95%]" and "train[95%:]".
    """

    name: str
    data_dir: str | None = None
    key: str = "text"
    train_split: str = "train"
    validation_split: str = "validation"
    length: int = 256

    def __post_init__(self) -> None:
        for name in ("name", "key", "train_split", "validation_split"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise UserError(f"{name} must be a string that is not empty, got {getattr(self, name)!r}")
        if self.data_dir is not None and not isinstance(self.data_dir, str):
            raise UserError(f"data_dir must be a path or None, got {self.data_dir!r}")
        _check_length(self.length)

    @property
    def tokenizer(self) -> Tokenizer:
        """Bytes are the tokens."""
        return ByteTokenizer()

    def train(self, seed: int) -> Windows:
        """The training windows; the order of the documents in them is drawn from `seed`."""
        return self._windows(self.train_split, seed)

    def validation(self) -> Windows:
        """The windows held out, the same for every seed."""
        return self._windows(self.validation_split, _VALIDATION_ORDER)

    def _windows(self, split: str, seed: int) -> Windows:
        return pack(
            TfdsSource(self.name, split, self.key, self.data_dir), self.length, seed, bos=self.tokenizer.bos
        )


def _check_length(length: int) -> None:
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise UserError(f"length must be a positive number of tokens, got {length!r}")
