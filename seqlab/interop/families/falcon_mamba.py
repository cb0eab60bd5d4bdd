"""Falcon-Mamba: a Mamba with norms of the step size, the input map and the output map (arXiv 2410.05355)."""

from typing import Any

import fiddle as fdl

from seqlab.interop.families import mamba
from seqlab.interop.families.keys import Keys
from seqlab.models import LanguageModel

MODEL_TYPE = "falcon_mamba"
CLASS = "FalconMambaForCausalLM"
WEIGHTS = "mamba"
MIXERS = ("Mamba",)
IRRELEVANT = (*mamba.IRRELEVANT, "use_falcon_mambapy")


def from_config(keys: Keys) -> fdl.Config:
    """The config of the model for a config.json."""
    mixer = mamba.mixer_of(keys, selection_norm="plain", norm_eps=keys.number("mixer_rms_eps", 1e-6))
    return mamba.language_model(keys, mixer, vocab_size=50_280, dim=768, depth=32, tied=True)


def to_config(model: LanguageModel) -> dict[str, Any]:
    """The config.json of a model; raises PretrainedError with the reason if it is not of this family."""
    return mamba.to_config(model) | {"mixer_rms_eps": model.backbone.blocks[0].mixer.dt_norm.eps}
