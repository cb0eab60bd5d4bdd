"""Configs of runs that begin with trained weights: of another run, of a published folder, or of a GGUF
file."""

import os
import pathlib

import fiddle as fdl

from seqlab.checks import UserError
from seqlab.interop import huggingface
from seqlab.interop.families import model_config
from seqlab.interop.folder import Folder
from seqlab.interop.gguf import GGUF
from seqlab.models.lora import lora
from seqlab.studies.runs import RunError
from seqlab.studies.start import tokenizer_at, weights_at
from seqlab.train import config


def begin_from(cfg: fdl.Config, path: str | os.PathLike[str], rank: int | None = None) -> fdl.Config:
    """A copy of the config of a run, with the model and the weights at `path`, and its tokenizer.

    Args:
      cfg: its data are `seqlab.train.text.Text`, if the model at `path` has a tokenizer.
      path: as for `weights_at`.
      rank: of low-rank maps, which alone are trained (`seqlab.models.lora`); None to train all weights.

    Raises:
      PretrainedError, RunError: there is no such model.
      UserError: the data cannot be read with its tokenizer.
    """
    cfg, place, name = fdl.deepcopy_with(cfg), pathlib.Path(path), str(path)
    if not place.exists() and place.suffix != ".gguf" and huggingface.is_hub_id(name):
        place = huggingface.fetch(name)
    place = pathlib.Path(os.path.abspath(place))
    if place.suffix == ".gguf" and place.is_file():
        described, tokenizer = GGUF(place).described, fdl.Config(tokenizer_at, str(place))
    elif huggingface.is_pretrained(place):
        described = Folder(place).json("config.json")
        tokenizer = fdl.Config(tokenizer_at, str(place))
    else:
        file = place / "config.json"
        if not file.is_file():
            raise RunError(f"--start: {name} is no run, no published model and no GGUF file")
        saved = config.read(file)
        described, tokenizer = None, getattr(saved.data, "tokenizer", None)
    model = saved.model if described is None else model_config(described)
    cfg.model = model if rank is None else fdl.Partial(lora, model=model, rank=rank)
    cfg.start = fdl.Partial(weights_at, path=str(place))
    if tokenizer is not None:
        try:
            cfg.data.tokenizer = tokenizer
        except (AttributeError, TypeError) as error:
            kind = fdl.get_callable(cfg.data).__name__
            raise UserError(f"--start: data of {kind} cannot be read with another tokenizer") from error
    return cfg
