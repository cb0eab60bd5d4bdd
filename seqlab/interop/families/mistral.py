"""Mistral: a Llama whose layers all have one window, or none."""

from typing import Any

import fiddle as fdl

from seqlab.interop.families import decoder
from seqlab.interop.families.keys import Keys
from seqlab.interop.folder import PretrainedError
from seqlab.models import LanguageModel

MODEL_TYPE = "mistral"
CLASS = "MistralForCausalLM"
WEIGHTS = "llama"
MIXERS = ("Attention",)
DEFAULTS = {
    "vocab_size": 32_000,
    "intermediate_size": 14_336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
}


def from_config(keys: Keys) -> fdl.Config:
    """The config of the model for a config.json."""
    keys.expect("attention_bias", False)
    given = keys.get("sliding_window", 4096)  # missing: the default window; null: none
    window = None if given is None else keys.size("sliding_window", 4096)
    depth = decoder.depth_of(keys)
    kind = "full_attention" if window is None else "sliding_attention"
    if set(decoder.layer_types(keys, [kind] * depth)) != {kind}:
        raise PretrainedError(
            f"layer_types: with sliding_window={window} every layer of a mistral has {kind}"
        )
    return decoder.language_model(
        keys, defaults=DEFAULTS, windows=[window] * depth, bias=False, out_bias=False
    )


def to_config(model: LanguageModel) -> dict[str, Any]:
    """The config.json of a model; raises PretrainedError with the reason if it is not of this family."""
    windows = set(decoder.windows_of(model))
    if len(windows) > 1 or any(decoder.biases_of(model)):
        raise PretrainedError("a mistral has one window in all layers, and no biases")
    return decoder.described(model) | {"sliding_window": windows.pop()}
