"""OLMo-2: norms after the mixers, and queries and keys normalised over their whole width (arXiv
2501.00656)."""

from typing import Any

import fiddle as fdl

from seqlab.interop.families import decoder
from seqlab.interop.families.keys import Keys
from seqlab.models import LanguageModel

MODEL_TYPE = "olmo2"
CLASS = "Olmo2ForCausalLM"
WEIGHTS = "gemma2"
MIXERS = ("Attention",)
DEFAULTS = {
    "vocab_size": 50_304,
    "intermediate_size": 11_008,
    "num_key_value_heads": 0,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
}


def from_config(keys: Keys) -> fdl.Config:
    """The config of the model for a config.json."""
    bias, depth = keys.flag("attention_bias", False), decoder.depth_of(keys)
    return decoder.language_model(
        keys,
        defaults=DEFAULTS,
        windows=[None] * depth,
        bias=bias,
        out_bias=bias,
        attention={"qk_norm": "width"},
        model={"norms": "after"},
    )


def to_config(model: LanguageModel) -> dict[str, Any]:
    """The config.json of a model; raises PretrainedError with the reason if it is not of this family."""
    return decoder.described(model) | {"attention_bias": decoder.biases_of(model)[0]}
