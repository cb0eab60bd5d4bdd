"""Runs as values: the model of a run folder, ready to stream or to evaluate."""

import functools
import os
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from seqlab.module import Module, merge, split
from seqlab.tokens import Tokenizer
from seqlab.train.quality import Quality, quality_of


class RunError(ValueError):
    """A folder that is no run, or a run that cannot be used yet; the message says what is missing."""


class Run(NamedTuple):
    """A trained model: `config` is the Fiddle config that built it, `step` the checkpoint that its parameters are from.

    `tokenizer` is None where the model's inputs are not tokens.
    """

    model: Module
    tokenizer: Tokenizer | None
    config: Any
    step: int


class Evaluation(NamedTuple):
    """`value` of the task's `quality` (bits a token, accuracy, ...) over `targets`."""

    quality: Quality
    value: float
    targets: int


def load(workdir: str | os.PathLike[str], step: int | None = None) -> Run:
    """The model of a run folder, from its last good checkpoint or that of `step`.

    The folder's config is executed: load only what you would run.

    Raises:
      RunError: `workdir` is not the folder of a run, or the run has no checkpoint yet.
      ConfigError: its config names something that is not there (any more).
      CheckpointError: `step` does not exist or is damaged, or no checkpoint is good, with the reasons.
    """
    from seqlab.train import config
    from seqlab.train.checkpoint import Checkpoints

    workdir = pathlib.Path(workdir)
    file = workdir / "config.json"
    if not file.is_file():
        what = "does not exist" if not workdir.exists() else "is not a folder" if not workdir.is_dir() else "holds no config.json"
        raise RunError(f"{workdir} is not the folder of a run: it {what}")
    try:
        cfg = config.from_json(file.read_text())
    except config.ConfigError as error:
        raise config.ConfigError(f"{file}: {error}") from error
    experiment = config.build(cfg)
    static, abstract = split(nnx.eval_shape(lambda: experiment.model(rngs=nnx.Rngs(0))))
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        restored = checkpoints.restore(step, like={"params": abstract}, only="params")
    if restored is None:
        raise RunError(f"{workdir} has no checkpoint yet: train it first")
    number, state = restored
    model = merge(static, {name: jnp.asarray(value) for name, value in state["params"].items()})
    return Run(model, experiment.data.tokenizer, cfg, number)


def evaluate(model: Module, experiment: Any) -> Evaluation:
    """The metric of `experiment` for `model` on its held-out windows, the same that its training validates on."""
    from seqlab.train.loop import held_out_batches, validate
    from seqlab.train.step import evaluate_step

    static, params = split(model)
    step = jax.jit(functools.partial(evaluate_step, static, experiment.metric))
    return Evaluation(quality_of(experiment.metric), *validate(step, params, held_out_batches(experiment)))
