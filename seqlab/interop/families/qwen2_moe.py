"""Qwen1.5-MoE and Qwen2-MoE: a Qwen2 with mixtures of experts, of which one is shared and gated (arXiv
2407.10671)."""

from typing import Any

import fiddle as fdl

from seqlab.interop.families import decoder
from seqlab.interop.families.keys import Keys
from seqlab.interop.families.qwen3_moe import channel_mixers, mixtures_of
from seqlab.interop.folder import PretrainedError
from seqlab.models import LanguageModel

MODEL_TYPE = "qwen2_moe"
CLASS = "Qwen2MoeForCausalLM"
WEIGHTS = "llama"
MIXERS = ("Attention",)
DEFAULTS = {
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 32_768,
    "moe_intermediate_size": 1408,
    "num_experts": 60,
    "num_experts_per_tok": 4,
}
IRRELEVANT = ("router_aux_loss_coef",)  # of training


def from_config(keys: Keys) -> fdl.Config:
    """The config of the model for a config.json."""
    depth, used = decoder.depth_of(keys), keys.flag("use_sliding_window", False)
    window = keys.size("sliding_window", 4096) if keys.get("sliding_window", 4096) else None
    first = keys.get("max_window_layers", 28)
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise PretrainedError(f"max_window_layers: got {first!r}, expected a number of layers")
    kinds = [
        "sliding_attention" if used and i % 2 == 0 and i < first else "full_attention" for i in range(depth)
    ]
    kinds = decoder.layer_types(keys, kinds)
    if "sliding_attention" in kinds and not (used and window):
        raise PretrainedError("layer_types: got 'sliding_attention', and use_sliding_window gives no window")
    return decoder.language_model(
        keys,
        defaults=DEFAULTS,
        windows=[window if kind == "sliding_attention" else None for kind in kinds],
        bias=keys.flag("qkv_bias", True),
        out_bias=False,
        channel_mixer=channel_mixers(
            keys,
            DEFAULTS,
            depth,
            shared_hidden=keys.size("shared_expert_intermediate_size", 5632),
            shared_gate=True,
        ),
    )


def to_config(model: LanguageModel) -> dict[str, Any]:
    """The config.json of a model; raises PretrainedError with the reason if it is not of this family."""
    windows = decoder.windows_described(model)
    return (
        decoder.attention_of(model)
        | mixtures_of(model)
        | windows
        | {
            "shared_expert_intermediate_size": decoder.hidden_of(decoder.mixture_of(model).shared),
            "rms_norm_eps": model.backbone.norm.eps,
            "qkv_bias": decoder.biases_of(model)[0],
            "use_sliding_window": windows["sliding_window"] is not None,
            "sliding_window": windows["sliding_window"] or 0,  # as transformers writes it
        }
    )
