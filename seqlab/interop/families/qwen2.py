"""Qwen2 and Qwen2.5: a Llama with biases of queries, keys and values, and windows in the upper layers."""

from typing import Any

import fiddle as fdl

from seqlab.interop.families import decoder
from seqlab.interop.families.keys import Keys
from seqlab.interop.folder import PretrainedError
from seqlab.models import LanguageModel

MODEL_TYPE = "qwen2"
CLASS = "Qwen2ForCausalLM"
WEIGHTS = "llama"
MIXERS = ("Attention",)
DEFAULTS = {
    "vocab_size": 151_936,
    "intermediate_size": 22_016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
}


def from_config(keys: Keys) -> fdl.Config:
    """The config of the model for a config.json."""
    keys.expect("attention_bias", True)
    keys.expect("use_mrope", False)
    windows = decoder.qwen_windows(keys)
    return decoder.language_model(keys, defaults=DEFAULTS, windows=windows, bias=True, out_bias=False)


def to_config(model: LanguageModel) -> dict[str, Any]:
    """The config.json of a model; raises PretrainedError with the reason if it is not of this family."""
    if decoder.biases_of(model) != (True, False):
        raise PretrainedError("a qwen2 has biases of queries, keys and values alone")
    return decoder.qwen_described(model)
