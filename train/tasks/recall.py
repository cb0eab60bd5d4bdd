"""Induction heads and associative recall (Hungry Hungry Hippos, arXiv 2212.14052): which token followed the
trigger last time?

Tokens are numbered as in the original, whose vocabulary is a sorted list of strings: "." first, then "0",
"1", "10", ..., and "=>" last.
"""

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
from jaxtyping import Int

from seqlab.checks import UserError, check_at_least
from seqlab.train.tasks.examples import IGNORE, VALIDATION, Examples, Symbols

DOT, SIGN = ".", "=>"


@dataclasses.dataclass(frozen=True)
class _Recall:
    vocab_size: int = 20
    length: int = 40
    examples: int = 5000
    held_out: int = 500

    def __post_init__(self) -> None:
        check_at_least("vocab_size", self.vocab_size, 6, "two of them are signs")
        check_at_least("length", self.length, 4)
        for name in ("examples", "held_out"):
            check_at_least(name, getattr(self, name), 1)

    @property
    def tokenizer(self) -> Symbols:
        return Symbols(vocabulary(self.vocab_size))

    def train(self, seed: int) -> Examples:
        return self._examples(self.examples, seed % VALIDATION)

    def validation(self) -> Examples:
        return self._examples(self.held_out, VALIDATION)


@dataclasses.dataclass(frozen=True)
class Induction(_Recall):
    """Random tokens with the trigger "=>" in the middle and at the end, where the tokens that first followed
    it must be repeated.

    Args:
      length: steps of an example; the last trigger is `copied` steps before its end.
      copied: number of tokens to repeat.
      triggers: the maximal number of triggers in the middle (half of the examples have one).
      everywhere: score every next token, as in the original's training, not only the repeated ones.
    """

    copied: int = 1
    triggers: int = 1
    everywhere: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("copied", self.copied, 1)
        check_at_least("triggers", self.triggers, 1)
        check_at_least("length", self.length, 2 * self.copied + 2, f"2 * copied + 2, copied={self.copied}")

    def train(self, seed: int) -> Examples:
        return self._examples(self.examples, seed % VALIDATION, everywhere=self.everywhere)

    def _examples(self, count: int, seed: int, everywhere: bool = False) -> Examples:
        rng = np.random.default_rng(seed)
        options = {
            "vocab_size": self.vocab_size,
            "length": self.length - self.copied,
            "copied": self.copied,
            "triggers": self.triggers,
        }
        return next_tokens(
            distinct(lambda n: induction(rng, n, **options), count), None if everywhere else self.copied
        )


@dataclasses.dataclass(frozen=True)
class AssociativeRecall(_Recall):
    """Keys and values alternating, "=>", a key: its value is the target, or "." if the key has not occurred.

    Args:
      length: steps of an example, including the trigger and the key after it: a multiple of `keys + 1`.
      keys: tokens per key.
      allow_dot: whether keys that have not occurred may be queried.
    """

    keys: int = 1
    allow_dot: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("keys", self.keys, 1)
        check_at_least("length", self.length, 2 * (self.keys + 1), f"2 * (keys + 1), keys={self.keys}")
        if self.length % (self.keys + 1):
            raise UserError(f"length must be a multiple of keys + 1 = {self.keys + 1}, got {self.length}")

    def _examples(self, count: int, seed: int) -> Examples:
        rng = np.random.default_rng(seed)
        options = {
            "vocab_size": self.vocab_size,
            "length": self.length - self.keys - 1,
            "keys": self.keys,
            "allow_dot": self.allow_dot,
        }
        return next_tokens(distinct(lambda n: associative_recall(rng, n, **options), count), 1)


def vocabulary(vocab_size: int) -> list[str]:
    """The names of the tokens by number: those of `vocab_size - 2` numbers, "." and "=>", sorted as
    strings."""
    return sorted([*map(str, range(vocab_size - 2)), DOT, SIGN])


def induction(
    rng: np.random.Generator, count: int, *, vocab_size: int, length: int, copied: int = 1, triggers: int = 1
) -> Int[np.ndarray, "n t"]:
    """`count` sequences of `length` random tokens, the trigger and the `copied` answers, drawn from `rng`
    like the original."""
    names = vocabulary(vocab_size)
    sign = names.index(SIGN)
    chance = np.array([0.0 if name in (DOT, SIGN) else 1 / (vocab_size - 2) for name in names])
    sequences = np.full((count, length + 1 + copied), sign, np.int64)
    for row in sequences:
        row[:length] = rng.choice(vocab_size, length, p=chance)
        drawn = np.sort(rng.integers(length - (1 + copied), size=1 if rng.uniform() < 0.5 else triggers))
        kept = [drawn[0]]
        for place in drawn[1:]:
            if place - kept[-1] > copied:
                kept.append(place)
        answer = row[kept[0] + 1 : kept[0] + 1 + copied].copy()
        for place in kept:
            row[place], row[place + 1 : place + 1 + copied] = sign, answer
        row[length + 1 :] = answer
    return sequences


def associative_recall(
    rng: np.random.Generator,
    count: int,
    *,
    vocab_size: int,
    length: int,
    keys: int = 1,
    allow_dot: bool = True,
) -> Int[np.ndarray, "n t"]:
    """`count` sequences of `length` tokens of pairs (without an incomplete pair), the trigger, a key and its
    value.

    Drawn from `rng` like the original, with a new map from keys to values for every sequence. Half of the
    numbers, in string order, are keys, half values.
    """
    names = vocabulary(vocab_size)
    plain = [i for i, name in enumerate(names) if name not in (DOT, SIGN)]
    key_ids, value_ids = np.array(plain[: len(plain) // 2]), np.array(plain[len(plain) // 2 :])
    every_key = np.array(list(itertools.product(key_ids, repeat=keys)))
    sequences = []
    for _ in range(count):
        values = value_ids[rng.integers(len(value_ids), size=len(every_key))]
        shown, asked = np.split(rng.integers(len(every_key), size=length // (keys + 1) + 1), [-1])
        asked = asked[0]
        seen = list(dict.fromkeys(shown.tolist()))
        if not allow_dot and asked not in seen:
            asked = seen[rng.integers(len(seen))]
        answer = values[asked] if asked in seen else names.index(DOT)
        pairs = np.concatenate([every_key[shown], values[shown, None]], axis=1).ravel()
        sequences.append(np.concatenate([pairs, [names.index(SIGN)], every_key[asked], [answer]]))
    return np.stack(sequences)


def next_tokens(sequences: Int[np.ndarray, "n t"], scored: int | None) -> Examples:
    """Examples of predicting the next token, of which the last `scored` count, or all."""
    labels = sequences[:, 1:].copy()
    if scored is not None:
        labels[:, : labels.shape[1] - scored] = IGNORE
    return Examples(sequences[:, :-1], labels)


def distinct(draw: Callable[[int], Int[np.ndarray, "n t"]], count: int) -> Int[np.ndarray, "n t"]:
    """`count` sequences without repetitions, in the order in which they were first drawn by `draw(n)`.

    Raises ValueError if there are not enough.
    """
    found: dict[bytes, np.ndarray] = {}
    in_vain = 0  # drawn since the last new one
    for _ in range(100):
        before, missing = len(found), count - len(found)
        for row in draw(missing):
            found.setdefault(row.tobytes(), row)
        if len(found) == count:
            return np.stack(list(found.values()))
        in_vain = 0 if len(found) > before else in_vain + missing
        if in_vain >= 10_000:
            break
    raise UserError(
        f"examples: only {len(found)} different ones were found of {count}; ask for fewer, or for longer ones"
    )
