"""Tokenizers: from text to integers, and back one token at a time.

A tokenizer is anything that satisfies `Tokenizer`; `ByteTokenizer` needs no files. Streamed text must use a
decoder, never `decode` of single tokens: a character may need several tokens.
"""

import codecs
import json
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from seqlab.checks import UserError


@runtime_checkable
class TextDecoder(Protocol):
    """A decoder of a stream of tokens: its pieces joined are `decode` of all tokens."""

    def push(self, token: int) -> str:
        """The text that `token` completes; often empty."""

    def finish(self) -> str:
        """The text of an incomplete rest; resets the decoder."""


@runtime_checkable
class Tokenizer(Protocol):
    """The protocol of tokenizers for generation and training. `bos` begins every document and thereby marks
    the end of the previous one.

    A tokenizer may have an `eos` too, or several `ends`: a row of a stream ends after such a token.
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
    """The bytes of UTF-8 as tokens. Byte 0, which text does not use, begins documents."""

    vocab_size = 256
    bos = 0

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self)

    def __hash__(self) -> int:
        return hash(type(self))

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def encode(self, text: str | bytes) -> Int[np.ndarray, " t"]:
        """`text` as int32 tokens; bytes are used unchanged, valid UTF-8 or not."""
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
    """A decoder that holds back the bytes of a character until it is complete; invalid bytes become
    U+FFFD."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def raw(self, token: int) -> bytes:
        """The byte of `token`. Raises ValueError for a token outside 0..255."""
        value = int(token)
        if not 0 <= value < ByteTokenizer.vocab_size:
            raise UserError(f"token: got {value}, expected a byte, 0 to 255")
        return bytes((value,))

    def push(self, token: int) -> str:
        """The text that `token` completes, "" inside a character. Raises ValueError for a token outside
        0..255."""
        return self._utf8.decode(self.raw(token))

    def finish(self) -> str:
        """U+FFFD if the stream ended inside a character, else ""; resets the decoder."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


class FileTokenizer:
    """The tokenizer of a tokenizer.json, as the `tokenizers` library writes it (an optional package, imported
    here). Files are read as data; no code of the model is run.

    Args:
      path: the file.
      bos: a token that precedes every text, regardless of the file; None: as in the file.
      eos: the token, or tokens, that end a text; None for none.
      settings: the contents of tokenizer_config.json: `add_bos_token`, `add_eos_token`, the names of the
        special tokens, and tokens that tokenizer.json lacks.
      template: the chat template, Jinja's text.
      content: the content of a tokenizer.json, in place of the file's.
      start: the first token of an empty text if the files define no prefix.

    `bos` is None if texts have no prefix, `eos` is the first end token and `ends` are all of them; `special`
    has the text of every special token by its number.

    Raises:
      ImportError: `tokenizers` is not installed.
      FileNotFoundError, UserError: there is no such file, or it is no tokenizer; settings that contradict it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        bos: int | None = None,
        eos: int | Iterable[int] | None = None,
        *,
        settings: Mapping[str, Any] | None = None,
        template: str | None = None,
        start: int | None = None,
        content: str | None = None,
    ):
        self._tokenizer = _read(path, content)
        self.template, self.settings = template, dict(settings or {})
        self.names = _special_names(self.settings)
        _add_tokens(self._tokenizer, self.settings, self.names, path)
        self.special = {
            number: token.content
            for number, token in self._tokenizer.get_added_tokens_decoder().items()
            if token.special
        }
        self.vocab_size = 1 + max(self._tokenizer.get_vocab().values(), default=-1)
        self._edges = {
            edge: (
                self.settings.get(f"add_{edge}_token"),
                self._tokenizer.token_to_id(self.names.get(name, "")),
            )
            for edge, name in (("bos", "bos_token"), ("eos", "eos_token"))
        }
        if bos is not None:
            self._edges["bos"] = (True, bos)
        self.start = None
        self.prefix, self.suffix = self._around()
        self.start = start
        self.bos = self.prefix[0] if self.prefix else None
        ends = () if eos is None else (eos,) if isinstance(eos, int | np.integer) else tuple(eos)
        self.eos, self.ends = (ends[0] if ends else None), frozenset(ends)

    def encode(self, text: str | bytes) -> Int[np.ndarray, " t"]:
        """`text` as int32 tokens, without special ones around it."""
        return np.asarray(self._tokenizer.encode(_as_text(text), add_special_tokens=False).ids, np.int32)

    def begin(self, text: str | bytes) -> Int[np.ndarray, " t"]:
        """`text` as int32 tokens with the special tokens around a text defined by the tokenizer's files: its
        post-processor, and `add_bos_token` and `add_eos_token` of the settings."""
        text = _as_text(text)
        ids = self._tokenizer.encode(text, add_special_tokens=True).ids
        plain = self._tokenizer.encode(text, add_special_tokens=False).ids
        for edge, place in (("bos", 0), ("eos", -1)):
            wanted, token = self._edges[edge]
            there, own = (bool(some) and some[place] == token for some in (ids, plain))
            if wanted is True and token is not None and not there:
                ids = [token, *ids] if place == 0 else [*ids, token]
            elif wanted is False and there and not own:
                ids = ids[1:] if place == 0 else ids[:-1]
        if not ids and self.start is not None:
            ids = [self.start]
        return np.asarray(ids, np.int32)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of `tokens`; special ones have none. Invalid UTF-8 becomes U+FFFD."""
        decoder = self.decoder()
        return "".join(map(decoder.push, tokens)) + decoder.finish()

    def number(self, token: str) -> int | None:
        """The id of the token with this text; None if there is none."""
        return self._tokenizer.token_to_id(token)

    def decoder(self) -> "FileDecoder":
        """A new decoder for one stream of tokens."""
        return FileDecoder(self._tokenizer)

    def as_json(self) -> str:
        """The text of a tokenizer.json equivalent to this tokenizer."""
        return self._tokenizer.to_str()

    def _around(self) -> tuple[list[int], list[int]]:
        """The special tokens before and after a text."""
        for text in ("a", "0", "the"):
            plain, whole = self.encode(text).tolist(), self.begin(text).tolist()
            for place in range(len(whole) - len(plain) + 1):
                if plain and whole[place : place + len(plain)] == plain:
                    return whole[:place], whole[place + len(plain) :]
        return self.begin("").tolist(), []


class FileDecoder:
    """The text of a stream of tokens of a tokenizer.json, with bounded memory.

    Byte tokens (byte-level BPE, byte fallback) give their bytes, and a character is emitted with its last
    one. The text of other tokens is what they add to the text of a few previous tokens, so that it has the
    blanks of a continuation.
    """

    _CONTEXT = 4  # previous tokens; decoders of tokenizer.json depend on one at most

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = {
            number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special
        }
        kinds = _decoder_kinds(tokenizer)
        self._bytewise = "ByteLevel" in kinds and kinds <= {"ByteLevel", "Fuse"}
        self._fallback = "ByteFallback" in kinds
        self._begin()

    def _begin(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._context: list[int] = []
        self._held: list[int] = []
        self._broken = ""

    def raw(self, token: int) -> bytes:
        """The bytes of UTF-8 that `token` adds, which may end inside a character."""
        token = int(token)
        name = self._tokenizer.id_to_token(token) if token >= 0 else None
        if name is None or token in self._special:
            return b""
        if self._bytewise:
            values = [_BYTE_OF.get(letter) for letter in name]
            return name.encode() if None in values else bytes(values)
        byte = _BYTE_TOKEN.fullmatch(name) if self._fallback else None
        if byte:
            rest = self._rest()
            self._context = [*self._context, token][-self._CONTEXT :]
            return rest + bytes((int(byte[1], 16),))
        added = self._added([*self._held, token])
        # Some decoder may need further tokens for a character, at most three more.
        if added.endswith("\ufffd") and len(self._held) < 3:
            self._held.append(token)
            return b""
        self._context = [*self._context, *self._held, token][-self._CONTEXT :]
        self._held = []
        return added.encode("utf-8", errors="replace")

    def push(self, token: int) -> str:
        """The text that `token` completes, "" inside a character. Of invalid bytes the last three are emitted
        with the following text."""
        text = self._broken + self._utf8.decode(self.raw(token))
        whole = text.rstrip("\ufffd")
        self._broken = text[max(len(whole), len(text) - 3) :]
        return text[: len(text) - len(self._broken)]

    def finish(self) -> str:
        """The text that was held back; resets the decoder."""
        rest = self._broken + self._utf8.decode(self._rest(), final=True)
        self._begin()
        return rest

    def _rest(self) -> bytes:
        """The bytes of the held-back tokens, which are cleared."""
        if not self._held:
            return b""
        added = self._added(self._held)
        self._context = [*self._context, *self._held][-self._CONTEXT :]
        self._held = []
        return added.encode("utf-8", errors="replace")

    def _added(self, tokens: list[int]) -> str:
        before = self._tokenizer.decode(self._context, skip_special_tokens=True)
        after = self._tokenizer.decode([*self._context, *tokens], skip_special_tokens=True)
        if after.startswith(before):
            return after[len(before) :]
        pairs = enumerate(zip(before, after, strict=False))
        return after[next((i for i, (a, b) in pairs if a != b), min(len(before), len(after))) :]


def _decoder_kinds(tokenizer: Any) -> set[str]:
    """The types of the decoder's parts, by their names in tokenizer.json."""
    if tokenizer.decoder is None:
        return set()
    described = json.loads(tokenizer.decoder.__getstate__())
    parts = described["decoders"] if described["type"] == "Sequence" else [described]
    return {part["type"] for part in parts}


def _byte_letters() -> dict[str, int]:
    """The characters that represent bytes in byte-level BPE: printable bytes as themselves, the others from
    U+0100 on, in order (Radford et al. 2019)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_letters()
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


def begin(tokenizer: Tokenizer, text: str | bytes) -> Int[np.ndarray, " t"]:
    """`text` at the start of a stream, as tokens: with the tokenizer's special tokens if it has any, else
    preceded by its `bos`."""
    if isinstance(tokenizer, FileTokenizer):
        return tokenizer.begin(text)
    ids = np.asarray(tokenizer.encode(text), np.int32)
    return ids if tokenizer.bos is None else np.concatenate([np.asarray([tokenizer.bos], np.int32), ids])


def ends_of(tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that end a text: all of a tokenizer's `ends`, or its one `eos`, or none."""
    eos = getattr(tokenizer, "eos", None)
    return getattr(tokenizer, "ends", frozenset() if eos is None else frozenset((eos,)))


def _as_text(text: str | bytes) -> str:
    try:
        return text.decode("utf-8") if isinstance(text, bytes) else text
    except UnicodeDecodeError as error:
        raise UserError(f"text: this tokenizer reads UTF-8, and the bytes are none: {error}") from error


def _read(path: str | os.PathLike[str], content: str | None = None) -> Any:
    """The library's tokenizer of a file, without truncation and padding."""
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(f"reading {path} needs the tokenizers package: pip install tokenizers") from error
    if not os.path.isfile(path):
        raise FileNotFoundError(f"path: there is no file {path}")
    try:
        read = tokenizers.Tokenizer
        found = read.from_file(os.fspath(path)) if content is None else read.from_str(content)
        found.no_truncation()
        found.no_padding()
    except BaseException as error:  # the library raises plain Exception, and panics with something else
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise UserError(f"path: {path} is no tokenizer ({str(error).splitlines()[0]})") from error
    return found


def _content(token: Any) -> str | None:
    """The text of a token in tokenizer_config.json: a string, or an object with options."""
    found = token.get("content") if isinstance(token, Mapping) else token
    return found if isinstance(found, str) else None


def _special_names(settings: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that have a name ("bos_token", ...): name -> text."""
    names = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
    found = {name: _content(settings.get(name)) for name in names}
    return {name: text for name, text in found.items() if text}


def _add_tokens(tokenizer: Any, settings: Mapping[str, Any], names: Mapping[str, str], path: Any) -> None:
    """Add the tokens of tokenizer_config.json that tokenizer.json lacks, and mark special tokens."""
    from tokenizers import AddedToken

    extra = settings.get("additional_special_tokens") or settings.get("extra_special_tokens") or []
    extra = list(extra.values()) if isinstance(extra, Mapping) else extra
    special = [*names.values(), *filter(None, map(_content, extra if isinstance(extra, list) else []))]
    decoder = settings.get("added_tokens_decoder")
    numbered = decoder if isinstance(decoder, Mapping) else {}
    wrong = [key for key in numbered if not str(key).isdecimal()]
    if wrong:
        raise UserError(f"{path}: added_tokens_decoder: got {wrong[0]!r}, expected the number of a token")
    listed = {int(key): value for key, value in numbered.items()}
    for number, token in sorted(listed.items()):
        content = _content(token)
        if content is None:
            continue
        if tokenizer.token_to_id(content) is None:
            options = ("single_word", "lstrip", "rstrip", "normalized", "special")
            chosen = {name: bool(token[name]) for name in options if name in token}
            (tokenizer.add_special_tokens if chosen.get("special") else tokenizer.add_tokens)(
                [AddedToken(content, **chosen)]
            )
        if tokenizer.token_to_id(content) != number:
            raise UserError(
                f"{path}: token {content!r} is {tokenizer.token_to_id(content)} there and {number} in the "
                "settings"
            )
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    for content in special:
        if content not in known:
            tokenizer.add_special_tokens([AddedToken(content, normalized=False, special=True)])
