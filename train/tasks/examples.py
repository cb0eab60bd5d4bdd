"""Shared parts of tasks: indexable examples, and names of tokens."""

import functools
import hashlib
import operator
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int, Num

from seqlab.checks import UserError
from seqlab.train.packing import Item

IGNORE = -100  # the label of a step that is not scored, as in the published generators
VALIDATION = 2**31  # held-out seeds start here: no run trains on them


class Examples:
    """A task's examples in memory, each an `Item`: `inputs`, `targets`, and `valid`, True where a step is
    scored.

    Args:
      inputs: [n, t] tokens, or [n, t, channels] numbers.
      labels: [n, t], `IGNORE` where a step is not scored.
    """

    def __init__(self, inputs: Num[np.ndarray, "n t *c"], labels: Int[np.ndarray, "n t"]) -> None:
        if inputs.shape[:2] != labels.shape:
            raise UserError(
                f"labels must have the shape {inputs.shape[:2]} of the inputs, got {labels.shape}"
            )
        self.inputs, self.labels = _compact(inputs), _compact(labels)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Item:
        index = operator.index(index)
        inputs, labels = self.inputs[index], self.labels[index]
        whole = np.issubdtype(inputs.dtype, np.integer)
        scored = labels != IGNORE
        return {
            "inputs": inputs.astype(np.int32 if whole else np.float32),
            "targets": np.where(scored, labels, 0).astype(np.int32),
            "valid": scored,
        }

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that differ when any example does."""
        digest = hashlib.sha256(f"{self.inputs.shape} {self.inputs.dtype} {self.labels.dtype} ".encode())
        digest.update(self.inputs)
        digest.update(self.labels)
        return digest.hexdigest()[:16]


def answers_at_the_end(inputs: Num[np.ndarray, "n t *c"], answers: Int[np.ndarray, "n m"]) -> Examples:
    """Examples whose last m steps are scored, with these answers."""
    labels = np.full(inputs.shape[:2], IGNORE, np.int64)
    labels[:, inputs.shape[1] - answers.shape[1] :] = answers
    return Examples(inputs, labels)


def _compact(values: Num[np.ndarray, "..."]) -> Num[np.ndarray, "..."]:
    """A read-only copy in the smallest sufficient dtype."""
    if np.issubdtype(values.dtype, np.integer):
        small = values.size == 0 or (values.min() >= -(2**15) and values.max() < 2**15)
        values = values.astype(np.int16 if small else np.int32)
    else:
        values = values.astype(np.float32)
    values = np.ascontiguousarray(values)
    values.setflags(write=False)
    return values


class Symbols:
    """A tokenizer of words: token i has the name `names[i]`, and text is names separated by blanks."""

    bos = None  # an example is complete and has no prefix

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._ids = {name: i for i, name in enumerate(self.names)}
        self.vocab_size = len(self.names)

    def encode(self, text: str | bytes) -> Int[np.ndarray, " t"]:
        """The tokens of names separated by blanks. Raises ValueError for an unknown name."""
        words = (text.decode() if isinstance(text, bytes) else text).split()
        unknown = [word for word in words if word not in self._ids]
        if unknown:
            raise UserError(
                f"{unknown[0]!r} is no token of this task; its {self.vocab_size} tokens are "
                f"{' '.join(self.names[:20])} ..."
            )
        return np.array([self._ids[word] for word in words], np.int32)

    def decode(self, tokens: Iterable[int]) -> str:
        """Names, each followed by a blank."""
        return "".join(map(self.push, tokens))

    def decoder(self) -> "Symbols":
        """Itself: every token is a whole word."""
        return self

    def push(self, token: int) -> str:
        """The name of `token` and a blank."""
        if not 0 <= int(token) < self.vocab_size:
            raise UserError(f"token: got {int(token)}, expected 0 to {self.vocab_size - 1}")
        return f"{self.names[int(token)]} "

    def finish(self) -> str:
        """Always empty."""
        return ""


def numbers(vocab_size: int) -> Symbols:
    """Tokens named by their numbers."""
    return Symbols([str(i) for i in range(vocab_size)])
