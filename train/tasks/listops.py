"""ListOps as in the Long Range Arena (arXiv 1804.06028, 2011.04006): the value of nested MIN, MAX, MED and SM
of digits."""

import dataclasses
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from seqlab.checks import UserError, check_at_least
from seqlab.train.tasks.examples import IGNORE, VALIDATION, Examples, Symbols

PAD, CLOSE = 0, 15
OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
TOKENS = ("<pad>", *map(str, range(10)), *OPERATORS, "]")  # token 1 + d is the digit d
_LEAF = 0.25  # a node is an operator with this probability


class Tree(NamedTuple):
    """An expression as tokens, and its value."""

    tokens: tuple[int, ...]
    value: int


@dataclasses.dataclass(frozen=True)
class ListOps:
    """Expressions of more than `shortest` and fewer than `length` tokens, padded on the right; the target at
    the last token is the value, as a digit's token.

    The published task has length 2000, shortest 500, depth 10, arguments 10 and 96 000 examples.
    """

    length: int = 64
    shortest: int = 8
    depth: int = 5
    arguments: int = 4
    examples: int = 10_000
    held_out: int = 1000

    def __post_init__(self) -> None:
        check_at_least("arguments", self.arguments, 2)
        check_at_least("depth", self.depth, 2)
        check_at_least("shortest", self.shortest, 0)
        check_at_least("length", self.length, self.shortest + 2, f"shortest={self.shortest}")
        for name in ("examples", "held_out"):
            check_at_least(name, getattr(self, name), 1)

    @property
    def tokenizer(self) -> Symbols:
        return Symbols(TOKENS)

    def train(self, seed: int) -> Examples:
        known = set(self._trees(VALIDATION, self.held_out))
        return self._pad(self._trees(seed % VALIDATION, self.examples, known))

    def validation(self) -> Examples:
        return self._pad(self._trees(VALIDATION, self.held_out))

    def _trees(self, seed: int, count: int, known: set[Tree] | None = None) -> list[Tree]:
        trees = listops(
            random.Random(seed), self.depth, self.arguments, self.shortest, self.length, known or set()
        )
        return [next(trees) for _ in range(count)]

    def _pad(self, trees: list[Tree]) -> Examples:
        inputs = np.full((len(trees), self.length), PAD, np.int64)
        labels = np.full((len(trees), self.length), IGNORE, np.int64)
        for row, tree in enumerate(trees):
            inputs[row, : len(tree.tokens)] = tree.tokens
            labels[row, len(tree.tokens) - 1] = 1 + tree.value
        return Examples(inputs, labels)


def listops(
    rng: random.Random,
    depth: int,
    arguments: int,
    shortest: int,
    longest: int,
    known: set[Tree] | frozenset[Tree] = frozenset(),
) -> Iterator[Tree]:
    """Different trees of more than `shortest` and fewer than `longest` tokens, in the order of the original's
    draws, none of them `known`.

    Raises ValueError after 20 000 draws in a row without a new one.
    """
    seen, last = set(known), 0
    while last < 20_000:
        last += 1
        tree = draw(rng, depth, arguments)
        if shortest < len(tree.tokens) < longest and tree not in seen:
            seen.add(tree)
            last = 0
            yield tree
    raise UserError(
        f"examples: hardly any new expression of {shortest + 1} to {longest - 1} tokens (depth={depth}, "
        f"arguments={arguments}) after "
        f"{len(seen) - len(known)} of them; ask for fewer, or for larger ones"
    )


def draw(rng: random.Random, depth: int, arguments: int, level: int = 1) -> Tree:
    """One tree: a digit or an operator of 2 to `arguments` trees; at level `depth` digits only. The operator
    is drawn after its trees."""
    if level == depth or rng.random() > _LEAF:
        digit = rng.randint(0, 9)
        return Tree((1 + digit,), digit)
    parts = [draw(rng, depth, arguments, level + 1) for _ in range(rng.randint(2, arguments))]
    operator = rng.choice(OPERATORS)
    tokens = (TOKENS.index(operator), *(token for part in parts for token in part.tokens), CLOSE)
    return Tree(tokens, apply(operator, [part.value for part in parts]))


def apply(operator: str, values: Sequence[int]) -> int:
    """MIN, MAX, MED (the median, rounded down) or SM (the sum modulo 10) of digits."""
    if operator == "[MED":
        ordered, half = sorted(values), len(values) // 2
        return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) // 2
    return {"[MIN": min, "[MAX": max, "[SM": lambda digits: sum(digits) % 10}[operator](values)


def evaluate(tokens: Sequence[int]) -> int:
    """The value of an expression given as tokens; padding is skipped.

    Raises:
      ValueError: the tokens are not exactly one expression.
    """
    stack: list[tuple[str, list[int]]] = [("", [])]
    for place, token in enumerate(int(token) for token in tokens):
        if 1 <= token <= 10:
            stack[-1][1].append(token - 1)
        elif token == CLOSE and len(stack) > 1 and stack[-1][1]:
            value = apply(*stack.pop())
            stack[-1][1].append(value)
        elif 10 < token < CLOSE:
            stack.append((TOKENS[token], []))
        elif token != PAD:
            raise UserError(f"tokens: got {token} at place {place}, which ends nothing and begins nothing")
    if len(stack) > 1 or len(stack[0][1]) != 1:
        raise UserError(
            f"tokens: got {len(stack[0][1])} values and {len(stack) - 1} open lists, expected one expression"
        )
    return stack[0][1][0]


def bracketed(tokens: Sequence[int]) -> str:
    """The original's text: every list as a binary tree, with parentheses that its pipeline removes."""
    stack: list[str] = []
    for token in (int(token) for token in tokens):
        if 10 < token < CLOSE:
            stack.append(TOKENS[token])
            continue
        part = TOKENS[token] if token != CLOSE else f"( {stack.pop()} ] )"
        if not stack:
            return part
        stack[-1] = f"( {stack[-1]} {part} )"
    raise UserError("tokens: expected one whole expression")
