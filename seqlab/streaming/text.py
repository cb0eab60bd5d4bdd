"""Text of a stream: complete characters, and stop texts found across token boundaries and optionally
withheld."""

import codecs
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from seqlab.tokenizers import Tokenizer

CONTEXT = 32  # tokens before a stream's first one on which its text may depend


class RowText:
    """The incremental text of one row.

    UTF-8 bytes are searched and withheld, so that a stop text may begin or end inside a token or a character.
    A stop text counts only if its last byte is new.

    Args:
      texts: byte strings that end the row.
      sequences: so do these sequences of tokens.
      withhold: withhold the text of the stop, and text that may become one.
      before: the last tokens before those of `spoken`.
      spoken: the tokens of the row that can be part of a stop, oldest first.
      held: withheld bytes of the text of `spoken`; -1 for as many as `withhold` implies.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        texts: Sequence[bytes] = (),
        sequences: Sequence[tuple[int, ...]] = (),
        withhold: bool = False,
        before: Sequence[int] = (),
        spoken: Sequence[int] = (),
        held: int = 0,
    ):
        self._decoder = tokenizer.decoder()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._texts, self._sequences, self._withhold = tuple(texts), tuple(sequences), withhold
        self._bytes = max(map(len, self._texts), default=1) - 1  # of the past that a stop text may have
        self._tokens = max(map(len, self._sequences), default=1) - 1
        self._utf8.decode(b"".join(map(self._raw, before)))
        raw = [self._raw(token) for token in spoken]
        said = b"".join(raw)
        self._special = getattr(tokenizer, "special", {})
        self._tail = _Bytes.of(zip(raw, map(self._written, spoken), strict=True)).last(self._bytes)
        self._last = list(zip(spoken, map(len, raw), strict=True))[len(raw) - min(len(raw), self._tokens) :]
        held = min(self._open(self._tail, self._last) if held < 0 else held, len(said))
        self._utf8.decode(said[: len(said) - held])
        self._buffer = said[len(said) - held :]

    @property
    def held(self) -> int:
        """The number of withheld bytes, which may begin a stop text."""
        return len(self._buffer)

    @property
    def rest(self) -> str:
        """All withheld text, including incomplete characters."""
        return (self._utf8.getstate()[0] + self._buffer).decode("utf-8", errors="replace")

    def push(self, token: int, ends: bool = False) -> tuple[str, bool]:
        """The text that `token` completes, and whether the row has ended: by `ends` for this token, or by a
        complete stop. Then nothing is withheld any more."""
        new = self._raw(token)
        if not (self._texts or self._sequences or ends):
            waiting, self._buffer = self._buffer + new, b""
            return self._utf8.decode(waiting), False
        written = self._written(token)
        waiting, searched = self._buffer + new, self._tail.then(new, written)
        last = [*self._last, (token, len(new))]
        stop = max(
            self._found(searched, len(new) + len(written)), self._ended(last), len(new) if ends else -1
        )
        if stop >= 0:
            cut = max(0, len(waiting) - stop) if self._withhold else len(waiting)
            self._buffer = b""
            return self._utf8.decode(waiting[:cut], final=True), True
        self._tail = searched.last(self._bytes)
        self._last = last[len(last) - min(len(last), self._tokens) :]
        held = min(self._open(searched, last), len(waiting))
        self._buffer = waiting[len(waiting) - held :]
        return self._utf8.decode(waiting[: len(waiting) - held]), False

    def _found(self, searched: "_Bytes", new: int) -> int:
        """The number of trailing bytes from the start of a stop text that ends among the `new` ones; -1 for
        none."""
        size = len(searched.data)
        starts = [searched.data.find(text, max(0, size - new - len(text) + 1)) for text in self._texts]
        return max((searched.shown(size - start) for start in starts if new and start >= 0), default=-1)

    def _ended(self, last: list[tuple[int, int]]) -> int:
        """The bytes of a sequence of tokens that is complete; -1 for none."""
        tokens = tuple(token for token, _ in last)
        found = [len(one) for one in self._sequences if tokens[-len(one) :] == one]
        return max((sum(size for _, size in last[-n:]) for n in found), default=-1)

    def finish(self) -> str:
        """The withheld text at the end of a row, with U+FFFD for an incomplete character."""
        waiting = self._buffer + self._decoder.finish().encode("utf-8", errors="replace")
        self._buffer = b""
        return self._utf8.decode(waiting, final=True)

    def _raw(self, token: int) -> bytes:
        """The bytes of a token. A model may have more tokens than its tokenizer: those have no text."""
        try:
            if hasattr(self._decoder, "raw"):
                return self._decoder.raw(token)
            return self._decoder.push(token).encode("utf-8", errors="replace")
        except ValueError:
            return b""

    def _written(self, token: int) -> bytes:
        """The written form of a special token, which has no text: stop texts of chats may contain it."""
        return self._special.get(token, "").encode("utf-8", errors="replace")

    def _open(self, said: "_Bytes", last: list[tuple[int, int]]) -> int:
        """The number of trailing bytes that may be the beginning of a withheld stop."""
        if not self._withhold:
            return 0
        sizes = range(min(len(said.data), self._bytes), 0, -1)
        ends = (n for n in sizes if any(one.startswith(said.data[-n:]) for one in self._texts))
        of_text = said.shown(next(ends, 0))
        tokens = tuple(token for token, _ in last)
        counts = range(min(len(last), self._tokens), 0, -1)
        count = next((n for n in counts if any(one[:n] == tokens[-n:] for one in self._sequences)), 0)
        return max(of_text, sum(size for _, size in last[len(last) - count :]))


class _Bytes(NamedTuple):
    """Bytes in which stop texts are searched, with a 1 for each that is text."""

    data: bytes = b""
    text: bytes = b""

    @classmethod
    def of(cls, pieces: Iterable[tuple[bytes, bytes]]) -> "_Bytes":
        """All pieces: the text of a token, or its written form if it has none."""
        made = cls()
        for text, written in pieces:
            made = made.then(text, written)
        return made

    def then(self, text: bytes, written: bytes) -> "_Bytes":
        """These bytes and those of a further token."""
        return _Bytes(self.data + text + written, self.text + b"\1" * len(text) + b"\0" * len(written))

    def last(self, count: int) -> "_Bytes":
        """The last `count` bytes."""
        start = len(self.data) - min(len(self.data), count)
        return _Bytes(self.data[start:], self.text[start:])

    def shown(self, count: int) -> int:
        """The number of text bytes among the last `count`."""
        return sum(self.last(count).text)
