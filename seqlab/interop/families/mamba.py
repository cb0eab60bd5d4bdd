"""Mamba, in transformers' form (folders whose names end with -hf)."""

from typing import Any

import fiddle as fdl

from seqlab.interop.families.keys import Keys
from seqlab.interop.folder import PretrainedError
from seqlab.models import LanguageModel, Mamba, RMSNorm

MODEL_TYPE = "mamba"
CLASS = "MambaForCausalLM"
WEIGHTS = "mamba"
MIXERS = ("Mamba",)
IRRELEVANT = (  # initialisation, implementation options, and leftovers of conversions
    *("time_step_scale", "time_step_min", "time_step_max", "time_step_init_scheme", "time_step_floor"),
    *("rescale_prenorm_residual", "residual_in_fp32", "use_mambapy", "use_associative_scan", "chunk_size"),
    *("fused_add_norm", "pad_vocab_size_multiple", "d_inner", "d_model", "n_layer", "norm_before_gate"),
)


def from_config(keys: Keys) -> fdl.Config:
    """The config of the model for a config.json."""
    return language_model(keys, mixer_of(keys), vocab_size=50_280, dim=768, depth=32, tied=True)


def mixer_of(keys: Keys, **options: Any) -> fdl.Config:
    """The config of the mixers, with further options."""
    dim = keys.size("hidden_size", 768)
    inner = keys.size("intermediate_size", keys.size("expand", 2) * dim)
    rank = keys.get("time_step_rank", "auto")
    return fdl.Partial(
        Mamba,
        expand=whole("intermediate_size", inner, dim),
        state_size=keys.size("state_size", 16),
        conv_width=keys.size("conv_kernel", 4),
        dt_rank=None if rank == "auto" else keys.size("time_step_rank"),
        conv_bias=keys.flag("use_conv_bias", True),
        bias=keys.flag("use_bias", False),
        **options,
    )


def to_config(model: LanguageModel) -> dict[str, Any]:
    """The config.json of a model; raises PretrainedError with the reason if it is not of this family."""
    first = model.backbone.blocks[0].mixer
    return common(model) | {
        "intermediate_size": first.inner,
        "expand": first.inner // first.dim,
        "state_size": first.state_size,
        "time_step_rank": first.dt_rank,
    }


def language_model(
    keys: Keys, mixer: fdl.Config, *, vocab_size: int, dim: int, depth: int, tied: bool
) -> fdl.Config:
    """The config of a model of Mamba or Mamba-2 around its mixers; the rest is what missing keys stand
    for."""
    keys.expect("hidden_act", "silu", "swish")
    keys.expect("rms_norm", True)
    keys.expect("ssm_cfg", {})
    layers = keys.size("num_hidden_layers", depth, 10_000)
    keys.expect("layer_types", ["linear_attention"] * layers)
    return fdl.Partial(
        LanguageModel,
        vocab_size=keys.size("vocab_size", vocab_size),
        dim=keys.size("hidden_size", dim),
        depth=layers,
        mixers=mixer,
        channel_mixer=None,
        norm=fdl.Partial(RMSNorm, eps=keys.number("layer_norm_epsilon", 1e-5)),
        tie_embeddings=keys.flag("tie_word_embeddings", tied),
    )


def common(model: LanguageModel) -> dict[str, Any]:
    """The common keys of Mamba and Mamba-2."""
    blocks = list(model.backbone.blocks)
    first = blocks[0].mixer
    if any(block.channel_mixer is not None for block in blocks):
        raise PretrainedError(f"channel_mixer: the published {type(first).__name__} has none")
    return {
        "hidden_act": "silu",
        "layer_norm_epsilon": blocks[0].mixer_norm.eps,
        "conv_kernel": first.conv.width,
        "use_conv_bias": first.conv.bias is not None,
        "use_bias": first.in_proj.bias is not None,
    }


def whole(name: str, inner: int, dim: int) -> int:
    """The inner width relative to the width of the model."""
    if inner % dim:
        raise PretrainedError(f"{name}: got {inner}, expected a multiple of hidden_size={dim}")
    return inner // dim
