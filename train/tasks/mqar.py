"""Multi-query associative recall (Zoology, arXiv 2312.04927): pairs of key and value, then keys again, each
to be answered by its value."""

import dataclasses

import numpy as np
from jaxtyping import Int

from seqlab.checks import UserError, check_at_least
from seqlab.train.tasks.examples import IGNORE, VALIDATION, Examples, Symbols, numbers


@dataclasses.dataclass(frozen=True)
class MQAR:
    """`pairs` bindings in `length` steps over `vocab_size` tokens, the lower half keys, the upper half
    values.

    Args:
      power: the positions of queries: slot s after the pairs has probability proportional to s^(power - 1).
        0.01 puts most of them close, 1 is uniform.
      fill: the filler between queries: random tokens (as published since), or the token 0 (as in the paper's
        figure).
      examples, held_out: numbers of training and validation examples.
    """

    vocab_size: int = 64
    length: int = 64
    pairs: int = 8
    power: float = 0.01
    fill: bool = False
    examples: int = 20_000
    held_out: int = 1000

    def __post_init__(self) -> None:
        check_at_least("pairs", self.pairs, 1)
        check_at_least("length", self.length, 4 * self.pairs, f"4 * pairs, pairs={self.pairs}")
        check_at_least(
            "vocab_size",
            self.vocab_size,
            2 * self.pairs + 2,
            f"pairs={self.pairs} keys are drawn from half of it",
        )
        if self.length % 2:
            raise UserError(f"length must be even, got {self.length}")
        if not self.power > 0:
            raise UserError(f"power must be positive, got {self.power!r}")
        for name in ("examples", "held_out"):
            check_at_least(name, getattr(self, name), 1)

    @property
    def tokenizer(self) -> Symbols:
        return numbers(self.vocab_size)

    def train(self, seed: int) -> Examples:
        return self._draw(self.examples, seed % VALIDATION)

    def validation(self) -> Examples:
        return self._draw(self.held_out, VALIDATION)

    def _draw(self, count: int, seed: int) -> Examples:
        inputs, labels, _ = mqar(
            seed,
            count,
            vocab_size=self.vocab_size,
            length=self.length,
            pairs=self.pairs,
            power=self.power,
            fill=self.fill,
        )
        return Examples(inputs, labels)


def mqar(
    seed: int,
    count: int,
    *,
    vocab_size: int,
    length: int,
    pairs: int,
    power: float = 0.01,
    fill: bool = False,
) -> tuple[Int[np.ndarray, "n t"], Int[np.ndarray, "n t"], Int[np.ndarray, "n k"]]:
    """Inputs, labels, and the slot of each pair's query: as drawn by the original under
    `np.random.seed(seed)`.

    Only the filler comes from another generator; the original draws it with torch.
    """
    rng = np.random.RandomState(seed)  # the legacy generator, whose stream is frozen
    low, high = np.arange(1, vocab_size // 2), np.arange(vocab_size // 2, vocab_size)
    keys = np.stack([rng.choice(low, pairs, replace=False) for _ in range(count)])
    values = np.stack([rng.choice(high, pairs, replace=False) for _ in range(count)])
    slots = (length - 2 * pairs) // 2
    chance = power * np.arange(1, slots + 1) ** (power - 1)
    chance /= chance.sum()
    gaps = np.stack([rng.choice(slots, pairs, replace=False, p=chance) for _ in range(count)])
    noise = np.random.default_rng([seed, 1]).integers(0, vocab_size, (count, length)) if fill else None
    return (*assemble(keys, values, gaps, length, noise), gaps)


def assemble(
    keys: Int[np.ndarray, "n k"],
    values: Int[np.ndarray, "n k"],
    gaps: Int[np.ndarray, "n k"],
    length: int,
    noise: Int[np.ndarray, "n t"] | None = None,
) -> tuple[Int[np.ndarray, "n t"], Int[np.ndarray, "n t"]]:
    """Inputs and labels from draws: k1 v1 k2 v2 ..., then key i at step 2k + 2 gap_i with label value i.

    `noise` fills all other steps; 0 without it.
    """
    count, pairs = keys.shape
    inputs = np.zeros((count, length), np.int64)
    labels = np.full((count, length), IGNORE, np.int64)
    inputs[:, 0 : 2 * pairs : 2], inputs[:, 1 : 2 * pairs : 2] = keys, values
    np.put_along_axis(inputs, 2 * pairs + 2 * gaps, keys, axis=1)
    np.put_along_axis(labels, 2 * pairs + 2 * gaps, values, axis=1)
    return (inputs if noise is None else np.where(inputs == 0, noise, inputs)), labels
