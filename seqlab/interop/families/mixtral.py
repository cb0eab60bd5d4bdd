"""Mixtral: a Mistral whose channel mixers are mixtures of experts (arXiv 2401.04088)."""

from typing import Any

import fiddle as fdl

from seqlab.interop.families import decoder
from seqlab.interop.families.keys import Keys
from seqlab.models import LanguageModel, MixtureOfExperts

MODEL_TYPE = "mixtral"
CLASS = "MixtralForCausalLM"
WEIGHTS = "mixtral"
MIXERS = ("Attention",)
DEFAULTS = {
    "vocab_size": 32_000,
    "intermediate_size": 14_336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-5,
}
IRRELEVANT = ("router_aux_loss_coef", "router_jitter_noise")  # of training


def from_config(keys: Keys) -> fdl.Config:
    """The config of the model for a config.json."""
    keys.expect("attention_bias", False)
    window = None if keys.get("sliding_window") is None else keys.size("sliding_window")
    mixer = fdl.Partial(
        MixtureOfExperts,
        hidden=keys.size("intermediate_size", DEFAULTS["intermediate_size"]),
        experts=keys.size("num_local_experts", 8),
        chosen=keys.size("num_experts_per_tok", 2),
        activation=decoder.activation_of(keys, "hidden_act", "silu"),
    )
    return decoder.language_model(
        keys,
        defaults=DEFAULTS,
        windows=[window] * decoder.depth_of(keys),
        bias=False,
        out_bias=False,
        channel_mixer=mixer,
    )


def to_config(model: LanguageModel) -> dict[str, Any]:
    """The config.json of a model; raises PretrainedError with the reason if it is not of this family."""
    first = decoder.mixture_of(model)
    return decoder.attention_of(model) | {
        "intermediate_size": first.down.shape[1],
        "hidden_act": decoder.activation_key(first.activation),
        "num_local_experts": first.experts,
        "num_experts_per_tok": first.chosen,
        "rms_norm_eps": model.backbone.norm.eps,
        "sliding_window": decoder.windows_of(model)[0],
    }
