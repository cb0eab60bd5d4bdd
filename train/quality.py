"""Metrics: the figure by which a task judges a model, on held-out data.

A metric is a function (model, batch) -> (sum, number) like a loss; the figure is the ratio over all batches.
Any loss is a metric; `@metric` adds its name and direction:

    @metric("accuracy", better="higher")
    def accuracy(model, batch): ...
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from seqlab.checks import check_choice
from seqlab.train.step import Batch, Loss, next_token_loss


class Quality(NamedTuple):
    """The names of a metric: `name` in files (with prefix "validation_"), `words` for people; `better` is
    "higher" or "lower"."""

    name: str
    words: str
    better: str

    def sentence(self, value: float) -> str:
        """The value in words: "1.9031 bits a token", "accuracy 0.9987"."""
        return f"{value:.4f} {self.words}" if " a " in self.words else f"{self.words} {value:.4f}"


def metric(words: str, better: str = "lower") -> Callable[[Loss], Loss]:
    """Mark a function as a metric: its own name is used in files, `words` for people."""
    check_choice(better, ("higher", "lower"), "better")

    def mark(function: Loss) -> Loss:
        function.quality = Quality(function.__name__, words, better)
        return function

    return mark


def quality_of(function: Loss) -> Quality:
    """The `Quality` of a marked metric; for other functions their name, with lower as better, as for
    losses."""
    name = getattr(function, "__name__", type(function).__name__)
    return getattr(function, "quality", Quality(name, name.replace("_", " "), "lower"))


@metric("bits a token")
def bits_per_token(model: Any, batch: Batch) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Cross entropy in bits over the valid targets, and their number; for byte tokens, bits per byte."""
    total, count = next_token_loss(model, batch)
    return total / math.log(2), count


@metric("accuracy", better="higher")
def accuracy(model: Any, batch: Batch) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The number of valid targets with the largest logit, and the number of targets."""
    logits, _ = model(batch["inputs"], None, batch.get("reset"), None)
    right = (jnp.argmax(logits, axis=-1) == batch["targets"]) & batch["valid"]
    return jnp.sum(right, dtype=jnp.float32), jnp.sum(batch["valid"], dtype=jnp.float32)
