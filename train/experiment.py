"""The experiment that a config describes: one run, as a value."""

import dataclasses
from collections.abc import Callable
from typing import Any

from seqlab.checks import UserError
from seqlab.module import Module, Params
from seqlab.parallel.sharding import MeshSizes
from seqlab.train.quality import bits_per_token
from seqlab.train.step import Loss, next_token_loss


@dataclasses.dataclass
class Experiment:
    """A run: which model, on what data, trained how. `train.loop.run` executes it; `configs/` are functions
    that build it.

    Args:
      model: called as model(rngs=...) for the module.
      data: an object with `train(seed)` and `validation()`, sequences of windows (see `train.text.Text`), and
        a `tokenizer`, None where inputs are not tokens.
      optimizer: called as optimizer(steps) for an optax transformation.
      loss: (model, batch) -> (sum over targets, number of targets).
      metric: of the same form; reported by validation, see `train.quality`.
      steps, batch_size: the number of updates, and windows per update; `accumulate` splits a batch into that
        many parts, to save memory.
      seed: of parameters and data order.
      log_every, validate_every, checkpoint_every: in steps; `validation_windows` bounds the cost of one
        validation.
      keep: the number of checkpoints kept.
      start: where the parameters begin, instead of random: called as start() for parameters by name, such as
        `seqlab.studies.start.weights_at` of a path. It is not called when a run resumes.
      mesh: the device mesh; one device by default. It may change when a run resumes.
    """

    model: Callable[..., Module]
    data: Any
    optimizer: Callable[[int], Any]
    loss: Loss = next_token_loss
    metric: Loss = bits_per_token
    steps: int = 1000
    batch_size: int = 16
    accumulate: int = 1
    seed: int = 0
    log_every: int = 20
    validate_every: int = 200
    validation_windows: int = 64
    checkpoint_every: int = 200
    keep: int = 3
    start: Callable[[], Params] | None = None
    mesh: MeshSizes = MeshSizes()  # noqa: RUF009 - frozen

    def __post_init__(self):
        for name in (
            "steps",
            "batch_size",
            "accumulate",
            "log_every",
            "validate_every",
            "validation_windows",
            "checkpoint_every",
            "keep",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"{name} must be a positive integer, got {value!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise UserError(f"seed must be an integer in [0, 2**32), got {self.seed!r}")
        if self.batch_size % self.accumulate:
            raise UserError(f"accumulate must divide batch_size={self.batch_size}, got {self.accumulate}")
