"""Runs as values: the model of a run folder, ready to stream or to evaluate."""

import functools
import os
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from seqlab.checks import UserError
from seqlab.module import Module, merge, split
from seqlab.tokenizers import Tokenizer
from seqlab.train.quality import Quality, quality_of


class RunError(UserError):
    """A folder that is no run, or a run that cannot be used yet; the message says what is missing."""


class Run(NamedTuple):
    """A trained model: `config` is the Fiddle config that built it, `step` the checkpoint that its parameters
    are from.

    Of a published model `config` is that of the model alone and `step` is 0. `tokenizer` is None where the
    model's inputs are not tokens, and where a published model came without tokenizer.json.
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
    """The model of a run folder, from its last good checkpoint or that of `step`; or a published model
    (Llama, Mamba, ...) from its folder or, as "organisation/name", from the hub.

    The config of a run is executed: load only what you would run. Published models are data alone.

    Raises:
      RunError: `workdir` is not the folder of a run, or the run has no checkpoint yet.
      PretrainedError: a published model that cannot be had or is not supported, with the reason.
      ConfigError: its config names something that is not there (any more).
      CheckpointError: `step` does not exist or is damaged, or no checkpoint is good, with the reasons.
    """
    from seqlab.interop import huggingface as pretrained
    from seqlab.train import config
    from seqlab.train.checkpoint import Checkpoints
    from seqlab.train.optim import average_of
    from seqlab.train.step import init_state

    name, workdir = str(workdir), pathlib.Path(workdir)
    if pretrained.is_hub_id(name) and not workdir.exists():
        workdir = pretrained.fetch(name)
    if pretrained.is_pretrained(workdir):
        if step is not None:
            raise RunError(f"step: got {step}, but {name} is a published model, which has no steps")
        model, cfg = pretrained.load_pretrained(workdir)
        return Run(model, pretrained.tokenizer_of(workdir), cfg, 0)
    file = workdir / "config.json"
    if not file.is_file():
        what = (
            "does not exist"
            if not workdir.exists()
            else "is not a folder"
            if not workdir.is_dir()
            else "holds no config.json"
        )
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
        number, params = restored[0], restored[1]["params"]
        begin = functools.partial(init_state, static, optimizer=experiment.optimizer(experiment.steps))
        average = average_of(jax.eval_shape(begin, abstract).optimizer)
        if average:
            params |= checkpoints.restore(number, like={"average": average}, only="average")[1]["average"]
    model = merge(static, {name: jnp.asarray(value) for name, value in params.items()})
    return Run(model, experiment.data.tokenizer, cfg, number)


def evaluate(model: Module, experiment: Any) -> Evaluation:
    """The metric of `experiment` for `model` on its held-out windows, the same that its training validates
    on."""
    from seqlab.train.loop import held_out_batches, validate
    from seqlab.train.step import evaluate_step

    static, params = split(model)
    step = jax.jit(functools.partial(evaluate_step, static, experiment.metric))
    return Evaluation(quality_of(experiment.metric), *validate(step, params, held_out_batches(experiment)))
