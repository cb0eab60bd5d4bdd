"""Phi-3, Phi-3.5 and Phi-4: a Llama with merged projections, rotated in part of a head (arXiv 2404.14219).

Its scaling "longrope" chooses frequencies by the length of the whole text, which no stream knows, and is
refused.
"""

from typing import Any

import fiddle as fdl

from seqlab.interop.families import decoder
from seqlab.interop.families.keys import Keys
from seqlab.interop.folder import PretrainedError
from seqlab.models import LanguageModel

MODEL_TYPE = "phi3"
CLASS = "Phi3ForCausalLM"
WEIGHTS = "phi3"
MIXERS = ("Attention",)
DEFAULTS = {
    "vocab_size": 32_064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_key_value_heads": 0,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}


def from_config(keys: Keys) -> fdl.Config:
    """The config of the model for a config.json."""
    keys.expect("attention_bias", False)
    window = None if keys.get("sliding_window") is None else keys.size("sliding_window")
    depth = decoder.depth_of(keys)
    longest = keys.size("max_position_embeddings", DEFAULTS["max_position_embeddings"])
    base, scaling, share = decoder.rotary(keys, longest, fraction=1.0)
    if scaling is not None:
        raise PretrainedError("rope_parameters: a phi3 has no scaling but 'longrope', which is not supported")
    width = decoder.heads_of(keys, DEFAULTS)["head_dim"]
    attention = {
        "rotary_base": base,
        "rotary_width": None if share == 1 else int(width * share),
    }
    return decoder.language_model(
        keys,
        defaults=DEFAULTS,
        windows=[window] * depth,
        bias=False,
        out_bias=False,
        attention=attention,
    )


def to_config(model: LanguageModel) -> dict[str, Any]:
    """The config.json of a model; raises PretrainedError with the reason if it is not of this family."""
    return decoder.described(model) | {"sliding_window": decoder.windows_of(model)[0]}
