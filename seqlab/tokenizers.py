"""Tokens: text in, integers out, and text back one token at a time.

A tokenizer is anything that satisfies `Tokenizer`; `ByteTokenizer` is the one that needs no files. Text that
is streamed must go
through a decoder, never through `decode` of single tokens: a character may need several tokens, and half a
character is not text.
"""

import codecs
import os
from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from seqlab.checks import UserError


@runtime_checkable
class TextDecoder(Protocol):
    """Turns a stream of tokens into text, piece by piece: the pieces joined are `decode` of all the
    tokens."""

    def push(self, token: int) -> str:
        """The text that `token` completes; often empty."""

    def finish(self) -> str:
        """The text of what was left incomplete; the decoder is as new afterwards."""


@runtime_checkable
class Tokenizer(Protocol):
    """What generation and training ask of a tokenizer. `bos` begins every document and so also tells where
    one ends.

    A tokenizer may have an `eos` too: a row of a stream ends after this token.
    """

    vocab_size: int
    bos: int

    def encode(self, text: str | bytes) -> Int[np.ndarray, " t"]:
        """`text` as int32 tokens, without a leading `bos`."""

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of `tokens`."""

    def decoder(self) -> TextDecoder:
        """A new decoder for one stream."""


class ByteTokenizer:
    """Every byte of UTF-8 is a token. Byte 0, which text does not use, begins documents."""

    vocab_size = 256
    bos = 0

    def encode(self, text: str | bytes) -> Int[np.ndarray, " t"]:
        """`text` as int32 tokens; bytes are taken as they are, valid UTF-8 or not."""
        data = text.encode("utf-8") if isinstance(text, str) else bytes(text)
        return np.frombuffer(data, np.uint8).astype(np.int32)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of `tokens`, with U+FFFD in place of bytes that are not UTF-8. Raises ValueError for a
        token outside 0..255."""
        decoder = self.decoder()
        return "".join(map(decoder.push, tokens)) + decoder.finish()

    def decoder(self) -> "ByteDecoder":
        """A new decoder for one stream of tokens."""
        return ByteDecoder()


class ByteDecoder:
    """Holds back the bytes of a character until it is complete; bytes that cannot become one turn into
    U+FFFD."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that `token` completes, "" inside a character. Raises ValueError for a token outside
        0..255."""
        value = int(token)
        if not 0 <= value < ByteTokenizer.vocab_size:
            raise UserError(f"token: got {value}, expected a byte, 0 to 255")
        return self._utf8.decode(bytes((value,)))

    def finish(self) -> str:
        """U+FFFD if the stream broke off inside a character, else ""; the decoder is as new afterwards."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


class FileTokenizer:
    """The tokenizer of a tokenizer.json, as the `tokenizers` library writes it (an optional package, imported
    here).

    Args:
      path: the file.
      bos, eos: the tokens that begin and end documents, which the file does not tell; None for none.

    Raises:
      ImportError: `tokenizers` is not installed.
      FileNotFoundError, ValueError: there is no such file, or it is no tokenizer.
    """

    def __init__(self, path: str | os.PathLike[str], bos: int | None = None, eos: int | None = None):
        try:
            import tokenizers
        except ImportError as error:
            raise ImportError(
                f"reading {path} needs the tokenizers package: pip install tokenizers"
            ) from error
        if not os.path.isfile(path):
            raise FileNotFoundError(f"path: there is no file {path}")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(os.fspath(path))
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"path: {path} is no tokenizer ({error})") from error
        self.vocab_size, self.bos, self.eos = self._tokenizer.get_vocab_size(), bos, eos

    def encode(self, text: str | bytes) -> Int[np.ndarray, " t"]:
        """`text` as int32 tokens, without any special ones around it."""
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of `tokens`; special ones have none."""
        return self._tokenizer.decode([int(token) for token in tokens], skip_special_tokens=True)

    def decoder(self) -> "FileDecoder":
        """A new decoder for one stream of tokens."""
        return FileDecoder(self._tokenizer)


class FileDecoder:
    """Holds tokens back until their text can no longer change by what follows."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._begin()

    def _begin(self) -> None:
        from tokenizers.decoders import DecodeStream

        self._stream, self._held = DecodeStream(skip_special_tokens=True), []

    def push(self, token: int) -> str:
        """The text that `token` completes, "" inside a character."""
        self._held.append(int(token))
        text = self._stream.step(self._tokenizer, int(token))
        if text is None:
            return ""
        self._held.clear()
        return text

    def finish(self) -> str:
        """The text of what was held back; the decoder is as new afterwards."""
        rest = self._tokenizer.decode(self._held, skip_special_tokens=True)
        self._begin()
        return rest
