"""Copying and selective copying (as in S4, arXiv 2111.00396, and Mamba, arXiv 2312.00752): repeat the data,
ignore the noise.

With the data at the beginning, a convolution of fixed length solves the task; with data at random steps, the
model has to select.
"""

import dataclasses

import numpy as np
from jaxtyping import Int

from seqlab.checks import check_at_least
from seqlab.train.tasks.examples import VALIDATION, Examples, Symbols, answers_at_the_end, numbers


@dataclasses.dataclass(frozen=True)
class Copying:
    """`data` tokens among noise, then as many markers, at which they must be repeated in order; `length`
    steps in total.

    Args:
      length: steps of an example, the markers included; the original's L is `length - 2 * data`.
      alphabet: noise is token 0, the marker `alphabet - 1`, data tokens are those between.
      selective: data are at random steps; otherwise at the first ones.
    """

    length: int = 64
    data: int = 8
    alphabet: int = 10
    selective: bool = True
    examples: int = 20_000
    held_out: int = 1000

    def __post_init__(self) -> None:
        check_at_least("data", self.data, 1)
        check_at_least("length", self.length, 2 * self.data, f"2 * data, data={self.data}")
        check_at_least("alphabet", self.alphabet, 3, "noise, marker and one token of data")
        for name in ("examples", "held_out"):
            check_at_least(name, getattr(self, name), 1)

    @property
    def tokenizer(self) -> Symbols:
        return numbers(self.alphabet)

    def train(self, seed: int) -> Examples:
        return self._draw(self.examples, seed % VALIDATION)

    def validation(self) -> Examples:
        return self._draw(self.held_out, VALIDATION)

    def _draw(self, count: int, seed: int) -> Examples:
        rng = np.random.default_rng(seed)
        tokens = rng.integers(1, self.alphabet - 1, (count, self.data))
        slots = np.tile(np.arange(self.data), (count, 1))
        if self.selective:
            places = rng.permuted(np.tile(np.arange(self.length - self.data), (count, 1)), axis=1)
            slots = np.sort(places[:, : self.data], axis=1)
        return answers_at_the_end(
            copying(tokens, slots, noise=self.length - 2 * self.data, alphabet=self.alphabet), tokens
        )


def copying(
    tokens: Int[np.ndarray, "n m"], slots: Int[np.ndarray, "n m"], *, noise: int, alphabet: int
) -> Int[np.ndarray, "n t"]:
    """The inputs of drawn numbers: `noise + m` steps with token i at slot i and 0 elsewhere, then m
    markers."""
    count, data = tokens.shape
    inputs = np.zeros((count, noise + 2 * data), np.int64)
    np.put_along_axis(inputs, slots, tokens, axis=1)
    inputs[:, noise + data :] = alphabet - 1
    return inputs
