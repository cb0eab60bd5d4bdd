"""How good a model is: the one figure that its task is judged by, taken on held-out data.

A metric is a function (model, batch) -> (sum, number) like a loss; the figure is the ratio over all batches.
Any loss is a metric; `@metric` tells how to say it, and which way is better:

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
    """What a metric is called: `name` in files ("validation_" in front), `words` for people; `better` is
    "higher" or "lower"."""

    name: str
    words: str
    better: str

    def sentence(self, value: float) -> str:
        """The figure as one says it: "1.9031 bits a token", "accuracy 0.9987"."""
        return f"{value:.4f} {self.words}" if " a " in self.words else f"{self.words} {value:.4f}"


def metric(words: str, better: str = "lower") -> Callable[[Loss], Loss]:
    """Mark a function as a metric: its own name in files, these words for people."""
    check_choice(better, ("higher", "lower"), "better")

    def mark(function: Loss) -> Loss:
        function.quality = Quality(function.__name__, words, better)
        return function

    return mark


def quality_of(function: Loss) -> Quality:
    """What was marked by `metric`; of any other function its name, and that lower is better, as losses
    are."""
    name = getattr(function, "__name__", type(function).__name__)
    return getattr(function, "quality", Quality(name, name.replace("_", " "), "lower"))


@metric("bits a token")
def bits_per_token(model: Any, batch: Batch) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Cross entropy in bits over the valid targets, and their number; where tokens are bytes, bits a byte."""
    total, count = next_token_loss(model, batch)
    return total / math.log(2), count


@metric("accuracy", better="higher")
def accuracy(model: Any, batch: Batch) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """How many of the valid targets have the largest logit, and how many targets there are."""
    logits, _ = model(batch["inputs"], None, batch.get("reset"), None)
    right = (jnp.argmax(logits, axis=-1) == batch["targets"]) & batch["valid"]
    return jnp.sum(right, dtype=jnp.float32), jnp.sum(batch["valid"], dtype=jnp.float32)
