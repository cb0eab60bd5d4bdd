"""Qwen3-MoE: a Qwen3 whose channel mixers are mixtures of experts, in all or some layers (arXiv
2505.09388)."""

from collections.abc import Mapping
from typing import Any

import fiddle as fdl

from seqlab.interop.families import decoder
from seqlab.interop.families.keys import Keys
from seqlab.interop.folder import PretrainedError
from seqlab.models import LanguageModel, MixtureOfExperts

MODEL_TYPE = "qwen3_moe"
CLASS = "Qwen3MoeForCausalLM"
WEIGHTS = "llama"
MIXERS = ("Attention",)
DEFAULTS = {
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32_768,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}
IRRELEVANT = ("router_aux_loss_coef", "max_window_layers")  # of training, and not read by transformers


def from_config(keys: Keys) -> fdl.Config:
    """The config of the model for a config.json."""
    bias, depth = keys.flag("attention_bias", False), decoder.depth_of(keys)
    window = None if keys.get("sliding_window", 4096) is None else keys.size("sliding_window", 4096)
    window = window if keys.flag("use_sliding_window", False) else None
    return decoder.language_model(
        keys,
        defaults=DEFAULTS,
        windows=[window] * depth,
        bias=bias,
        out_bias=bias,
        attention={"qk_norm": True},
        channel_mixer=channel_mixers(keys, DEFAULTS, depth),
    )


def to_config(model: LanguageModel) -> dict[str, Any]:
    """The config.json of a model; raises PretrainedError with the reason if it is not of this family."""
    window = decoder.windows_of(model)[0]
    return (
        decoder.attention_of(model)
        | mixtures_of(model)
        | {
            "rms_norm_eps": model.backbone.norm.eps,
            "attention_bias": decoder.biases_of(model)[0],
            "sliding_window": window,
            "use_sliding_window": window is not None,
        }
    )


def channel_mixers(
    keys: Keys, defaults: Mapping[str, Any], depth: int, normalize: bool = False, **options: Any
) -> Any:
    """The channel mixers of a Qwen with experts: of every layer, or one for all.

    Args:
      normalize: the default of norm_topk_prob.
      options: further options of the mixtures.
    """
    dense = decoder.swiglu(keys, defaults)
    mixture = fdl.Partial(
        MixtureOfExperts,
        hidden=keys.size("moe_intermediate_size", defaults["moe_intermediate_size"]),
        experts=keys.size("num_local_experts", keys.size("num_experts", defaults["num_experts"])),
        chosen=keys.size("num_experts_per_tok", defaults["num_experts_per_tok"]),
        normalize=keys.flag("norm_topk_prob", normalize),
        activation=dense.activation,
        **options,
    )
    step, plain = keys.size("decoder_sparse_step", 1), keys.get("mlp_only_layers") or []
    if not isinstance(plain, list) or not all(isinstance(layer, int) for layer in plain):
        raise PretrainedError(f"mlp_only_layers: got {plain!r}, expected a list of layers")
    return decoder.alike([dense if i in plain or (i + 1) % step else mixture for i in range(depth)])


def mixtures_of(model: LanguageModel) -> dict[str, Any]:
    """The keys of the channel mixers."""
    first, channels = decoder.mixture_of(model), [block.channel_mixer for block in model.backbone.blocks]
    plain = [i for i, mixer in enumerate(channels) if not isinstance(mixer, MixtureOfExperts)]
    own = {"intermediate_size": decoder.hidden_of(channels[plain[0]])} if plain else {}
    return own | {
        "hidden_act": decoder.activation_key(first.activation),
        "moe_intermediate_size": first.down.shape[1],
        "num_experts": first.experts,
        "num_experts_per_tok": first.chosen,
        "norm_topk_prob": first.normalize,
        "mlp_only_layers": plain,
    }
