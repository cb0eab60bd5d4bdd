"""Passkey retrieval: named numbers hidden in a text of bytes, each to be repeated when its name is queried.

    ...the haystack <X4071> goes on...<X4071>           context, then a question "<X" with the answer "4071"

As in the needle tests of long-context models: one key at a chosen depth is passkey retrieval; several keys
with one question each are the shared context of SCBench (arXiv 2412.10319), whose questions go to one cache
in turn or each to a copy of it.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from seqlab.checks import UserError, check_at_least
from seqlab.tokenizers import ByteTokenizer, Tokenizer
from seqlab.train.data import FileSource
from seqlab.train.tasks.examples import IGNORE, VALIDATION, Examples

OPEN, CLOSE = b"<>"
NAMES = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS = 4  # per number
FRAME = 3  # bytes of a key that are not its number: "<", a name, ">"


class Quiz(NamedTuple):
    """Contexts of one length, and for each the same number of turns.

    A question ends where its answer begins, and an answer ends with a closing byte: appended to the context
    they form a conversation.
    """

    context: Int[np.ndarray, "n c"]
    questions: Int[np.ndarray, "n m q"]
    answers: Int[np.ndarray, "n m a"]

    def joined(self) -> Int[np.ndarray, "n t"]:
        """The whole conversations."""
        turns = np.concatenate([self.questions, self.answers], axis=2)
        return np.concatenate([self.context, turns.reshape(len(turns), -1)], axis=1)


def quiz(
    rng: np.random.Generator,
    haystacks: Int[np.ndarray, "n c"],
    *,
    keys: int,
    digits: int = DIGITS,
    depth: float | None = None,
) -> Quiz:
    """`keys` names and numbers inserted into every haystack, replacing its last bytes, and queried in a
    random order.

    Args:
      haystacks: bytes; the first byte is kept.
      depth: the position of the keys: 0 after the first byte, 1 at the end; None for random.
    Raises:
      ValueError: a haystack too short for its keys, more keys than names, or a depth outside 0..1.
    """
    check_at_least("keys", keys, 1)
    check_at_least("digits", digits, 1)
    needle = digits + FRAME
    room = haystacks.shape[1] - 1 - keys * needle
    if room < 0:
        raise UserError(
            f"haystacks must have at least {1 + keys * needle} bytes for keys={keys} of {needle} bytes, got "
            f"{haystacks.shape[1]}"
        )
    if depth is not None and not 0 <= depth <= 1:
        raise UserError(f"depth must be from 0 to 1, or None, got {depth}")
    contexts, questions, answers = [], [], []
    for hay in haystacks.astype(np.uint8):
        names = _names(rng, hay.tobytes(), keys)
        numbers = rng.integers(0, 10, (keys, digits), dtype=np.uint8) + ord("0")
        places = rng.integers(0, room + 1, keys) if depth is None else np.full(keys, round(depth * room))
        needles = [bytes([OPEN, name, *number, CLOSE]) for name, number in zip(names, numbers, strict=True)]
        pieces, begin = [hay[:1].tobytes()], 1
        for place, text in zip(np.sort(places) + 1, needles, strict=True):
            pieces += [hay[begin:place].tobytes(), text]
            begin = place
        contexts.append(b"".join([*pieces, hay[begin : room + 1].tobytes()]))
        order = rng.permutation(keys)
        questions.append([needles[i][: FRAME - 1] for i in order])
        answers.append([needles[i][FRAME - 1 :] for i in order])
    return Quiz(*(_as_tokens(texts) for texts in (contexts, questions, answers)))


@dataclasses.dataclass(frozen=True)
class Passkeys:
    """`keys` numbers hidden in text and queried after it; the digits of the answers are scored.

    Args:
      length: steps of an example, questions and answers included.
      paths: sources of the text, as in `Text`: files and folders, or none for the sources of the Python
        standard library.
      keys: numbers per context; with several values, equally many contexts of each: retrieval is learned
        sooner with little text between keys.
      digits: per number. One is the hardest: the first digits of longer numbers nearly determine the rest.
      examples, held_out: numbers of training and validation examples.
    """

    length: int = 256
    paths: tuple[str, ...] = ()
    keys: int | tuple[int, ...] = 4
    digits: int = DIGITS
    examples: int = 20_000
    held_out: int = 500

    def __post_init__(self) -> None:
        for name in ("digits", "examples", "held_out"):
            check_at_least(name, getattr(self, name), 1)
        if not self._keys:
            raise UserError("keys must be a number, or several, got ()")
        for keys in self._keys:
            check_at_least("keys", keys, 1)
        turns = max(self._keys) * (self.digits + FRAME)
        check_at_least(
            "length",
            self.length,
            2 * turns,
            f"twice the {turns} bytes of keys={self.keys} questions and answers",
        )

    @property
    def tokenizer(self) -> Tokenizer:
        return ByteTokenizer()

    def train(self, seed: int) -> Examples:
        return self._examples("train", self.examples, seed % VALIDATION)

    def validation(self) -> Examples:
        return self._examples("validation", self.held_out, VALIDATION)

    @property
    def _keys(self) -> tuple[int, ...]:
        return self.keys if isinstance(self.keys, tuple) else (self.keys,)

    def _examples(self, split: str, count: int, seed: int) -> Examples:
        rng, kinds = np.random.default_rng(seed), len(self._keys)
        parts = [
            self._asked(rng, split, count // kinds + (i < count % kinds), keys)
            for i, keys in enumerate(self._keys)
        ]
        tokens, scored = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return Examples(tokens[:, :-1], np.where(scored, tokens, IGNORE)[:, 1:])

    def _asked(
        self, rng: np.random.Generator, split: str, count: int, keys: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Conversations about so many keys each, and which of their bytes are digits of an answer."""
        turns = keys * (self.digits + FRAME)
        tokens = quiz(
            rng,
            haystacks(rng, count, self.length + 1 - turns, self.paths, split),
            keys=keys,
            digits=self.digits,
        ).joined()
        scored = np.zeros(tokens.shape, bool)
        place = np.arange(turns) % (self.digits + FRAME) - (FRAME - 1)
        scored[:, -turns:] = (place >= 0) & (place < self.digits)
        return tokens, scored


def digits_of(data: object) -> int:
    """The digits per number for probing a run with this `data`: as in its training, if it was trained on
    passkeys."""
    return data.digits if isinstance(data, Passkeys) else DIGITS


def haystacks(
    rng: np.random.Generator, count: int, length: int, paths: tuple[str, ...] = (), split: str = "train"
) -> UInt8[np.ndarray, "n c"]:
    """`count` pieces of text of one length, each preceded by the byte that begins documents; reads as many
    documents as needed.

    In lower case, since capitals are names of keys.
    """
    source, bos = FileSource(paths or None, split), ByteTokenizer.bos
    texts, read = [], 0
    for index in rng.permutation(len(source)):
        texts.append(source[int(index)])
        read += len(texts[-1])
        if read >= count * (length - 1):
            break
    text = np.concatenate(texts)
    text = np.where((text >= ord("A")) & (text <= ord("Z")), text + 32, text).astype(np.uint8)
    # Repeated if the text is too short.
    text = np.resize(text, count * (length - 1)).reshape(count, length - 1)
    return np.concatenate([np.full((count, 1), bos, np.uint8), text], axis=1)


def _names(rng: np.random.Generator, hay: bytes, count: int) -> list[int]:
    """Distinct names that do not occur as queries in the haystack."""
    free = [name for name in NAMES if bytes([OPEN, name]) not in hay]
    if count > len(free):
        raise UserError(f"keys must not exceed the {len(free)} names that the text leaves, got {count}")
    return [free[i] for i in rng.permutation(len(free))[:count]]


def _as_tokens(texts: list) -> Int[np.ndarray, "..."]:
    """Bytes strings of one length, nested in lists, as tokens."""
    shape = (len(texts),) if isinstance(texts[0], bytes) else (len(texts), len(texts[0]))
    flat = texts if len(shape) == 1 else [text for row in texts for text in row]
    return np.frombuffer(b"".join(flat), np.uint8).reshape(*shape, -1).astype(np.int32)
