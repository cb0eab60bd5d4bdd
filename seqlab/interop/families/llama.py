"""Llama, 1 to 3, and models of the same form: TinyLlama, SmolLM, DeepSeek's distilled models."""

from typing import Any

import fiddle as fdl

from seqlab.interop.families import decoder
from seqlab.interop.families.keys import Keys
from seqlab.interop.folder import PretrainedError
from seqlab.models import LanguageModel

MODEL_TYPE = "llama"
CLASS = "LlamaForCausalLM"
WEIGHTS = "llama"
MIXERS = ("Attention",)
DEFAULTS = {
    "vocab_size": 32_000,
    "intermediate_size": 11_008,
    "num_key_value_heads": 0,
    "max_position_embeddings": 2048,
}


def from_config(keys: Keys) -> fdl.Config:
    """The config of the model for a config.json."""
    depth, bias = decoder.depth_of(keys), keys.flag("attention_bias", False)
    if "sliding_attention" in decoder.layer_types(keys, ["full_attention"] * depth):
        raise PretrainedError("layer_types: a llama has full_attention alone, got 'sliding_attention'")
    windows: list[int | None] = [None] * depth
    return decoder.language_model(keys, defaults=DEFAULTS, windows=windows, bias=bias, out_bias=bias)


def to_config(model: LanguageModel) -> dict[str, Any]:
    """The config.json of a model; raises PretrainedError with the reason if it is not of this family."""
    found, biases, windows = decoder.described(model), decoder.biases_of(model), decoder.windows_of(model)
    if biases[0] != biases[1] or set(windows) != {None}:
        raise PretrainedError(
            f"no published family has biases {biases} of qkv and out with the windows {windows}"
        )
    return found | {"attention_bias": biases[0]}
