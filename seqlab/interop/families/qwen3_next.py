"""Qwen3-Next: gated delta networks with a few layers of gated attention, and mixtures of experts with a
shared one (arXiv 2412.06464, 2505.06708)."""

from typing import Any

import fiddle as fdl
import numpy as np

from seqlab.interop.families import decoder, hybrid
from seqlab.interop.families.keys import Keys
from seqlab.interop.families.packing import Packed
from seqlab.interop.families.qwen3_moe import channel_mixers, mixtures_of
from seqlab.interop.folder import PretrainedError
from seqlab.models import Attention, GatedDeltaNet, LanguageModel, RMSNorm

MODEL_TYPE = "qwen3_next"
CLASS = "Qwen3NextForCausalLM"
WEIGHTS = "qwen3_next"
MIXERS = ("Attention", "GatedDeltaNet")
DEFAULTS = {
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32_768,
    "moe_intermediate_size": 512,
    "num_experts": 512,
    "num_experts_per_tok": 10,
}
IRRELEVANT = ("router_aux_loss_coef",)  # of training


def from_config(keys: Keys) -> fdl.Config:
    """The config of the model for a config.json."""
    bias, depth = keys.flag("attention_bias", False), decoder.depth_of(keys)
    eps = keys.number("rms_norm_eps", 1e-6)
    longest = keys.size("max_position_embeddings", DEFAULTS["max_position_embeddings"])
    base, scaling, share = decoder.rotary(keys, longest, fraction=0.25)
    width = decoder.heads_of(keys, DEFAULTS, 256)["head_dim"]
    keys_wide, values_wide = keys.size("linear_key_head_dim", 128), keys.size("linear_value_head_dim", 128)
    delta = fdl.Partial(
        GatedDeltaNet,
        heads=keys.size("linear_num_key_heads", 16),
        value_heads=keys.size("linear_num_value_heads", 32),
        head_dim=keys_wide,
        expand_v=values_wide / keys_wide,
        conv_width=keys.size("linear_conv_kernel_dim", 4),
        norm_eps=eps,
    )
    period = keys.size("full_attention_interval", 4)
    plain = ["linear_attention" if (i + 1) % period else "full_attention" for i in range(depth)]
    return decoder.language_model(
        keys,
        defaults=DEFAULTS,
        windows=[None] * depth,
        bias=bias,
        out_bias=bias,
        head_dim=256,
        attention={
            "rotary_base": base,
            "rotary_scaling": scaling,
            "rotary_width": int(width * share),
            "qk_norm": True,
            "norm_offset": 1.0,
            "gate": True,
        },
        others=[None if attends else delta for attends in hybrid.attends(keys, depth, plain)],
        channel_mixer=channel_mixers(
            keys,
            DEFAULTS,
            depth,
            normalize=True,
            shared_hidden=keys.size("shared_expert_intermediate_size", 512),
            shared_gate=True,
        ),
        norm=fdl.Partial(RMSNorm, eps=eps, offset=1.0),
    )


def to_config(model: LanguageModel) -> dict[str, Any]:
    """The config.json of a model; raises PretrainedError with the reason if it is not of this family."""
    delta = _delta(model)
    kinds = [isinstance(block.mixer, Attention) for block in model.backbone.blocks]
    return (
        decoder.attention_of(model, partial=True)
        | mixtures_of(model)
        | {
            "shared_expert_intermediate_size": decoder.hidden_of(decoder.mixture_of(model).shared),
            "layer_types": ["full_attention" if attends else "linear_attention" for attends in kinds],
            "linear_num_key_heads": delta.head_counts[1],
            "linear_num_value_heads": delta.head_counts[2],
            "linear_key_head_dim": delta.head_shape[0],
            "linear_value_head_dim": delta.head_shape[1],
            "linear_conv_kernel_dim": delta.conv.width,
            "attention_bias": decoder.biases_of(model)[0],
            "rms_norm_eps": model.backbone.norm.eps,
        }
    )


def packed(model: LanguageModel) -> Packed:
    """The projections of queries and gates, published head by head, and those of the delta networks,
    published key head by key head."""
    first, delta = decoder.attention_layers(model)[0], _delta(model)
    rows = np.arange(2 * first.heads * first.head_dim).reshape(first.heads, 2, first.head_dim)
    query, gate = rows[:, 0].ravel(), rows[:, 1].ravel()
    heads, share = delta.head_counts[1], delta.head_counts[2] // delta.head_counts[1]
    key, value = delta.head_shape
    wide = _split(heads, {"q_proj": key, "k_proj": key, "v_proj": share * value, "g_proj": share * value})
    ends = np.cumsum([heads * key, heads * key, heads * share * value])
    conv = np.split(np.arange(ends[-1]), ends[:-1])
    return {
        "self_attn.q_proj": {"self_attn.q_proj": query, "self_attn.gate_proj": gate},
        "linear_attn.in_proj_qkvz": wide,
        "linear_attn.in_proj_ba": _split(heads, {"b_proj": share, "a_proj": share}),
        "linear_attn.conv1d": {
            f"linear_attn.{name}_conv1d": part for name, part in zip("qkv", conv, strict=True)
        },
    }


def _split(heads: int, widths: dict[str, int]) -> dict[str, np.ndarray]:
    """The rows of each part of a projection that is published key head by key head."""
    total = sum(widths.values())
    rows = np.arange(heads * total).reshape(heads, total)
    parts = np.split(rows, np.cumsum(list(widths.values()))[:-1], axis=1)
    return {f"linear_attn.{name}": part.ravel() for name, part in zip(widths, parts, strict=True)}


def _delta(model: LanguageModel) -> GatedDeltaNet:
    mixers = [block.mixer for block in model.backbone.blocks]
    found = next((mixer for mixer in mixers if isinstance(mixer, GatedDeltaNet)), None)
    if found is None or not decoder.attention_layers(model):
        raise PretrainedError("mixers: a qwen3_next has layers of GatedDeltaNet and of Attention")
    return found
