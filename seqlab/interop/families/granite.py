"""Granite 3: a Llama with constant factors of embeddings, branches, attention and logits (IBM, 2024)."""

from typing import Any

import fiddle as fdl

from seqlab.interop.families import decoder
from seqlab.interop.families.keys import Keys
from seqlab.models import LanguageModel

MODEL_TYPE = "granite"
CLASS = "GraniteForCausalLM"
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
    bias, depth = keys.flag("attention_bias", False), decoder.depth_of(keys)
    return decoder.language_model(
        keys,
        defaults=DEFAULTS,
        windows=[None] * depth,
        bias=bias,
        out_bias=bias,
        attention={"scale": keys.number("attention_multiplier", 1.0)},
        channel_mixer=decoder.swiglu(keys, DEFAULTS, bias=True),
        model=factors(keys),
    )


def to_config(model: LanguageModel) -> dict[str, Any]:
    """The config.json of a model; raises PretrainedError with the reason if it is not of this family."""
    own = {
        "attention_bias": decoder.biases_of(model)[0],
        "mlp_bias": model.backbone.blocks[0].channel_mixer.down.bias is not None,
    }
    return decoder.described(model) | own | factors_of(model)


def factors(keys: Keys) -> dict[str, Any]:
    """The factors as options of the model."""
    return {
        "branch_scale": keys.number("residual_multiplier", 1.0),
        "embedding_scale": keys.number("embedding_multiplier", 1.0),
        "logit_scale": 1 / keys.number("logits_scaling", 1.0),
    }


def factors_of(model: LanguageModel) -> dict[str, Any]:
    """The keys of the factors."""
    first = decoder.attention_layers(model)[0]
    return {
        "attention_multiplier": first.head_dim**-0.5 if first.scale is None else first.scale,
        "residual_multiplier": model.backbone.blocks[0].branch_scale,
        "embedding_multiplier": model.embedding_scale,
        "logits_scaling": 1 / model.logit_scale,
    }
