"""Loading of runs: the model of a run folder, ready to stream or to evaluate."""

import contextlib
import functools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from seqlab import names
from seqlab.checks import UserError, nearest
from seqlab.models.lora import merged
from seqlab.models.model import Model, check_dtype
from seqlab.module import Module, in_evaluation, merge, split
from seqlab.studies.start import origin_of
from seqlab.tokenizers import Tokenizer
from seqlab.train.quality import Quality, quality_of


class RunError(UserError):
    """A folder that is not a run, or a run that cannot be used yet; the message says what is missing."""


class Run(NamedTuple):
    """A trained model: `config` is its Fiddle config, `step` the checkpoint of its parameters.

    `model` is a `Model` for type checkers; that of a run on images has no state. For a published model
    `config` is that of the model and `step` is 0. `tokenizer` is None if the inputs are not tokens, and for a
    published model without tokenizer.json.
    """

    model: Model
    tokenizer: Tokenizer | None
    config: Any
    step: int

    def chat(self, messages: Sequence[Mapping[str, Any]], *, answer: bool = True, **variables: Any) -> Any:
        """A conversation as tokens [t] int32, by the model's own chat template: a prompt for
        `stream_generate`.

        Args:
          messages: {"role": "user", "content": "..."} and so on, the oldest first.
          answer: end where the model's answer begins.
          variables: further variables of the template, such as tools or enable_thinking.

        Raises:
          ChatError: the model has no chat template, it refuses the messages, or the optional package jinja2
            is missing.
        """
        from seqlab.interop.chat import ChatError, render

        template = getattr(self.tokenizer, "template", None)
        if template is None:
            raise ChatError("this model has no chat template: give it text, with `prompt`")
        text = render(template, messages, answer=answer, names=self.tokenizer.names, **variables)
        return self.tokenizer.encode(text)


class Evaluation(NamedTuple):
    """`value` of the task's metric (bits per token, accuracy, ...) over `targets`."""

    quality: Quality
    value: float
    targets: int


def load(
    workdir: str | os.PathLike[str], step: int | None = None, *, trust: bool = False, dtype: str | None = None
) -> Run:
    """The model of a run folder, from its last good checkpoint or that of `step`; or a published model
    (Llama, Mamba, ...) from its folder, from a GGUF file or, as "organisation/name", from the hub.

    Published models are only data. The config of a run is executed, so it may only name parts of seqlab's own
    configs.

    Args:
      trust: also import names outside seqlab in the config of a run, for instance your own mixers. This runs
        their code: use it only for configs you know. It has no effect on published models.
      dtype: the compute dtype, "float32", "bfloat16" or "float64", instead of that of its config (float32 for
        published models). Parameters stay float32.

    Raises:
      RunError: `workdir` is not the folder of a run, or the run has no checkpoint yet.
      PretrainedError: a published model that is unavailable or not supported, with the reason.
      ConfigError: a name in its config does not exist (any more) or is not trusted.
      CheckpointError: `step` does not exist or is damaged, or no checkpoint is good, with the reasons.
    """
    from seqlab.interop import huggingface as pretrained

    name, workdir = str(workdir), pathlib.Path(workdir)
    if not workdir.exists() and workdir.suffix != ".gguf" and pretrained.is_hub_id(name):
        _check_no_run(workdir)
        workdir = pretrained.fetch(name)
        if not pretrained.is_pretrained(workdir):
            raise pretrained.PretrainedError(
                f"{name} is no published model: its config.json has no model_type"
            )
    if pretrained.is_pretrained(workdir):
        if step is not None:
            raise RunError(f"step: got {step}, but {name} is a published model, which has no steps")
        model, cfg = pretrained.load_pretrained(workdir, dtype=dtype)
        return Run(model, pretrained.tokenizer_of(workdir), cfg, 0)
    if workdir.suffix == ".gguf" and workdir.is_file():
        if step is not None:
            raise RunError(f"step: got {step}, but {name} is a published model, which has no steps")
        model, cfg, tokenizer = pretrained.load_gguf(workdir, dtype=dtype)
        return Run(model, tokenizer, cfg, 0)
    return _load_run(workdir, step, trust, dtype)


def _load_run(workdir: pathlib.Path, step: int | None, trust: bool, dtype: str | None) -> Run:
    from seqlab.train import config
    from seqlab.train.checkpoint import Checkpoints
    from seqlab.train.optim import average_of
    from seqlab.train.step import init_state

    file = workdir / "config.json"
    if not file.is_file():
        raise RunError(_no_run(workdir))
    cfg = config.read(file, trust=trust)
    if dtype is not None:
        cfg = config.override(cfg, f"model.dtype={check_dtype(dtype)}")
    with contextlib.nullcontext() if trust else names.restricted():
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
    model = in_evaluation(merge(static, {name: jnp.asarray(value) for name, value in params.items()}))
    model = merged(model)
    if isinstance(model, Model) and (origin := origin_of(experiment.start)) is not None:
        model.origin = origin
    length = getattr(experiment.data, "length", None)
    if isinstance(model, Model) and model.trained_length is None and isinstance(length, int):
        model.trained_length = length
    return Run(model, experiment.data.tokenizer, cfg, number)


def _no_run(workdir: pathlib.Path) -> str:
    """Why `workdir` is not a run folder, and which runs are next to it."""
    if workdir.is_dir():
        gguf = ": name the GGUF file in it" if any(workdir.glob("*.gguf")) else ""
        return f"{workdir} is not the folder of a run: it holds no config.json{gguf}"
    if workdir.exists():
        return f"{workdir} is not the folder of a run: it is not a folder"
    beside = sorted(str(file.parent) for file in workdir.parent.glob("*/config.json"))
    known = nearest(str(workdir), beside).replace(" Valid:", " Runs there:") if beside else ""
    return f"{workdir} is not the folder of a run: it does not exist{known}"


def _check_no_run(workdir: pathlib.Path) -> None:
    """Refuse a misspelt run: if its parent folder holds runs, the hub is not asked."""
    if any(workdir.parent.glob("*/config.json")):
        raise RunError(_no_run(workdir))


def evaluate(model: Module, experiment: Any) -> Evaluation:
    """The metric of `experiment` for `model` on its held-out windows, the same as in its training."""
    from seqlab.train.loop import held_out_batches, validate
    from seqlab.train.step import evaluate_step
    from seqlab.train.trial import check_sums

    static, params = split(in_evaluation(model))
    batches = held_out_batches(experiment)
    check_sums("metric", experiment.metric, static, params, batches[0])
    step = jax.jit(functools.partial(evaluate_step, static, experiment.metric))
    return Evaluation(quality_of(experiment.metric), *validate(step, params, batches))
