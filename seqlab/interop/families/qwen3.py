"""Qwen3: normalised queries and keys, an independent head width, and windows in the upper layers."""

from typing import Any

import fiddle as fdl

from seqlab.interop.families import decoder
from seqlab.interop.families.keys import Keys
from seqlab.interop.families.qwen2 import DEFAULTS
from seqlab.interop.folder import PretrainedError
from seqlab.models import LanguageModel

MODEL_TYPE = "qwen3"
CLASS = "Qwen3ForCausalLM"
WEIGHTS = "llama"
MIXERS = ("Attention",)


def from_config(keys: Keys) -> fdl.Config:
    """The config of the model for a config.json."""
    bias, windows = keys.flag("attention_bias", False), decoder.qwen_windows(keys)
    return decoder.language_model(
        keys,
        defaults=DEFAULTS,
        windows=windows,
        bias=bias,
        out_bias=bias,
        head_dim=128,
        attention={"qk_norm": True},
    )


def to_config(model: LanguageModel) -> dict[str, Any]:
    """The config.json of a model; raises PretrainedError with the reason if it is not of this family."""
    biases = decoder.biases_of(model)
    if biases[0] != biases[1]:
        raise PretrainedError(f"a qwen3 has all biases or none, got {biases} of qkv and out")
    return decoder.qwen_described(model) | {"attention_bias": biases[0]}
