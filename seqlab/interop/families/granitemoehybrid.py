"""Granite 4: Mamba-2 with a few layers of attention, dense or with mixtures of experts and a shared one, and
Granite's constant factors (IBM, 2025)."""

from typing import Any

import fiddle as fdl

from seqlab.interop.families import decoder, granite, hybrid
from seqlab.interop.families.keys import Keys
from seqlab.models import Attention, LanguageModel, MixtureOfExperts

MODEL_TYPE = "granitemoehybrid"
CLASS = "GraniteMoeHybridForCausalLM"
WEIGHTS = "granitemoehybrid"
MIXERS = ("Attention", "Mamba2")
DEFAULTS = {
    "vocab_size": 32_000,
    "intermediate_size": 11_008,
    "num_key_value_heads": 0,
    "max_position_embeddings": 2048,
}
IRRELEVANT = (*hybrid.IRRELEVANT, "router_aux_loss_coef", "init_method")


def from_config(keys: Keys) -> fdl.Config:
    """The config of the model for a config.json."""
    bias, depth = keys.flag("attention_bias", False), decoder.depth_of(keys)
    keys.expect("normalization_function", "rmsnorm")
    attention: dict[str, Any] = {"scale": keys.number("attention_multiplier", 1.0)}
    keys.expect("position_embedding_type", None, "nope", "rope")
    if keys.get("position_embedding_type") != "rope":
        attention["rotary_base"] = None
        for name in ("rope_theta", "rope_parameters", "rope_scaling", "partial_rotary_factor"):
            keys.get(name)
    mixer = hybrid.mamba2_of(keys, keys.number("rms_norm_eps", 1e-6))
    return decoder.language_model(
        keys,
        defaults=DEFAULTS,
        windows=[None] * depth,
        bias=bias,
        out_bias=bias,
        attention=attention,
        others=[None if attends else mixer for attends in hybrid.attends(keys, depth)],
        channel_mixer=_channel_mixer(keys),
        model=granite.factors(keys),
    )


def to_config(model: LanguageModel) -> dict[str, Any]:
    """The config.json of a model; raises PretrainedError with the reason if it is not of this family."""
    blocks = list(model.backbone.blocks)
    found = decoder.attention_of(model) | hybrid.mamba2_described(hybrid.first_mamba2(model))
    if decoder.attention_layers(model)[0].rotary_base is None:
        del found["rope_parameters"]
    channel = blocks[0].channel_mixer
    if not isinstance(channel, MixtureOfExperts):
        experts = {"num_local_experts": 0, "shared_intermediate_size": decoder.hidden_of(channel)}
    else:
        experts = {
            "num_local_experts": channel.experts,
            "num_experts_per_tok": channel.chosen,
            "intermediate_size": channel.down.shape[1],
            "shared_intermediate_size": decoder.hidden_of(channel.shared),
        }
    kinds = [isinstance(block.mixer, Attention) for block in blocks]
    return (
        found
        | experts
        | granite.factors_of(model)
        | {
            "layer_types": ["full_attention" if attends else "linear_attention" for attends in kinds],
            "position_embedding_type": "rope" if "rope_parameters" in found else None,
            "attention_bias": decoder.biases_of(model)[0],
            "hidden_act": decoder.activation_key(channel.activation),
            "rms_norm_eps": model.backbone.norm.eps,
        }
    )


def _channel_mixer(keys: Keys) -> fdl.Config:
    shared = keys.size("shared_intermediate_size", 1024)
    dense = decoder.swiglu(keys, DEFAULTS)
    chosen, experts = keys.size("num_experts_per_tok", 2), keys.get("num_local_experts", 8)
    if experts == 0:
        return fdl.copy_with(dense, hidden=shared)
    return fdl.Partial(
        MixtureOfExperts,
        hidden=dense.hidden,
        experts=keys.size("num_local_experts", 8),
        chosen=chosen,
        shared_hidden=shared,
        activation=dense.activation,
    )
