"""Gemma: norms with 1 + weight, scaled embeddings, GeGLU (arXiv 2403.08295)."""

from typing import Any

import fiddle as fdl

from seqlab.interop.families import decoder
from seqlab.interop.families.keys import Keys
from seqlab.models import LanguageModel, RMSNorm

MODEL_TYPE = "gemma"
CLASS = "GemmaForCausalLM"
WEIGHTS = "llama"
MIXERS = ("Attention",)
DEFAULTS = {
    "vocab_size": 256_000,
    "hidden_size": 3072,
    "intermediate_size": 24_576,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
IRRELEVANT = ("hidden_activation",)  # transformers reads hidden_act alone


def from_config(keys: Keys) -> fdl.Config:
    """The config of the model for a config.json."""
    bias, depth = keys.flag("attention_bias", False), decoder.depth_of(keys)
    mixer = decoder.swiglu(keys, DEFAULTS, "hidden_act", "gelu_pytorch_tanh")
    if mixer.activation == "gelu":  # of early files, which mean the tanh form, as transformers knows
        mixer.activation = "gelu_tanh"
    return decoder.language_model(
        keys,
        defaults=DEFAULTS,
        windows=[None] * depth,
        bias=bias,
        out_bias=bias,
        head_dim=256,
        channel_mixer=mixer,
        norm=fdl.Partial(RMSNorm, eps=keys.number("rms_norm_eps", 1e-6), offset=1.0),
        model={"embedding_scale": keys.size("hidden_size", 3072) ** 0.5},
    )


def to_config(model: LanguageModel) -> dict[str, Any]:
    """The config.json of a model; raises PretrainedError with the reason if it is not of this family."""
    return decoder.described(model) | {"attention_bias": decoder.biases_of(model)[0]}
