"""Tokens: text in, integers out, and text back one token at a time.

A tokenizer is anything that satisfies `Tokenizer`; `ByteTokenizer` is the one that needs no files. Text that is streamed must go
through a decoder, never through `decode` of single tokens: a character may need several tokens, and half a character is not text.
"""

import codecs
from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int


@runtime_checkable
class TextDecoder(Protocol):
    """Turns a stream of tokens into text, piece by piece: the pieces joined are `decode` of all the tokens."""

    def push(self, token: int) -> str:
        """The text that `token` completes; often empty."""

    def finish(self) -> str:
        """The text of what was left incomplete; the decoder is as new afterwards."""


@runtime_checkable
class Tokenizer(Protocol):
    """What generation and training ask of a tokenizer. `bos` begins every document and so also tells where one ends."""

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
        """The text of `tokens`, with U+FFFD in place of bytes that are not UTF-8. Raises ValueError for a token outside 0..255."""
        decoder = self.decoder()
        return "".join(map(decoder.push, tokens)) + decoder.finish()

    def decoder(self) -> "ByteDecoder":
        """A new decoder for one stream of tokens."""
        return ByteDecoder()


class ByteDecoder:
    """Holds back the bytes of a character until it is complete; bytes that cannot become one turn into U+FFFD."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that `token` completes, "" inside a character. Raises ValueError for a token outside 0..255."""
        value = int(token)
        if not 0 <= value < ByteTokenizer.vocab_size:
            raise ValueError(f"token: got {value}, expected a byte, 0 to 255")
        return self._utf8.decode(bytes((value,)))

    def finish(self) -> str:
        """U+FFFD if the stream broke off inside a character, else ""; the decoder is as new afterwards."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest
