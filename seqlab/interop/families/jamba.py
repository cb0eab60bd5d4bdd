"""Jamba: seven layers of Mamba to one of attention without positions, and mixtures of experts in every other
layer (arXiv 2403.19887)."""

from typing import Any

import fiddle as fdl

from seqlab.interop.families import decoder
from seqlab.interop.families.keys import Keys
from seqlab.interop.folder import PretrainedError
from seqlab.models import Attention, LanguageModel, Mamba, MixtureOfExperts

MODEL_TYPE = "jamba"
CLASS = "JambaForCausalLM"
WEIGHTS = "jamba"
MIXERS = ("Attention", "Mamba")
DEFAULTS = {
    "vocab_size": 65_536,
    "intermediate_size": 14_336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 262_144,
}
IRRELEVANT = (  # of training, and of the implementation; the kinds of layers follow from periods and offsets
    *(
        "router_aux_loss_coef",
        "use_mamba_kernels",
        "use_mambapy",
        "use_associative_scan",
        "num_logits_to_keep",
    ),
    *("calc_logits_for_entire_prompt", "layer_types", "layers_block_type", "layers_num_experts"),
)


def from_config(keys: Keys) -> fdl.Config:
    """The config of the model for a config.json."""
    keys.expect("sliding_window", None)
    depth, eps = decoder.depth_of(keys), keys.number("rms_norm_eps", 1e-6)
    dim, rank = keys.size("hidden_size", 4096), keys.get("mamba_dt_rank", "auto")
    mixer = fdl.Partial(
        Mamba,
        expand=keys.size("mamba_expand", 2),
        state_size=keys.size("mamba_d_state", 16),
        conv_width=keys.size("mamba_d_conv", 4),
        dt_rank=-(-dim // 16) if rank == "auto" else keys.size("mamba_dt_rank"),
        conv_bias=keys.flag("mamba_conv_bias", True),
        bias=keys.flag("mamba_proj_bias", False),
        selection_norm="weighted",
        norm_eps=eps,
    )
    dense = decoder.swiglu(keys, DEFAULTS)
    experts = keys.size("num_experts", 16)
    mixture = fdl.Partial(
        MixtureOfExperts,
        hidden=dense.hidden,
        experts=experts,
        chosen=keys.size("num_experts_per_tok", 2),
        normalize=False,
        activation=dense.activation,
    )
    attends, sparse = _every(keys, "attn", (8, 4), depth), _every(keys, "expert", (2, 1), depth)
    return decoder.language_model(
        keys,
        defaults=DEFAULTS,
        windows=[None] * depth,
        bias=False,
        out_bias=False,
        attention={"rotary_base": None},
        others=[None if attention else mixer for attention in attends],
        channel_mixer=decoder.alike([mixture if chosen and experts > 1 else dense for chosen in sparse]),
    )


def to_config(model: LanguageModel) -> dict[str, Any]:
    """The config.json of a model; raises PretrainedError with the reason if it is not of this family."""
    blocks = list(model.backbone.blocks)
    mixer = next((block.mixer for block in blocks if isinstance(block.mixer, Mamba)), None)
    if mixer is None or not decoder.attention_layers(model):
        raise PretrainedError("mixers: a jamba has layers of Mamba and of Attention")
    found = decoder.attention_of(model)
    del found["rope_parameters"]
    sparse = [isinstance(block.channel_mixer, MixtureOfExperts) for block in blocks]
    experts = {"num_experts": 1}
    if any(sparse):
        first = decoder.mixture_of(model)
        experts = {"num_experts": first.experts, "num_experts_per_tok": first.chosen}
    channel = blocks[0].channel_mixer
    hidden = channel.down.shape[1] if sparse[0] else decoder.hidden_of(channel)
    return (
        found
        | experts
        | _pattern("expert", sparse)
        | {
            **_pattern("attn", [isinstance(block.mixer, Attention) for block in blocks]),
            "intermediate_size": hidden,
            "hidden_act": decoder.activation_key(channel.activation),
            "rms_norm_eps": model.backbone.norm.eps,
            "mamba_expand": mixer.inner // mixer.dim,
            "mamba_d_state": mixer.state_size,
            "mamba_d_conv": mixer.conv.width,
            "mamba_dt_rank": mixer.dt_rank,
            "mamba_conv_bias": mixer.conv.bias is not None,
            "mamba_proj_bias": mixer.in_proj.bias is not None,
        }
    )


def _every(keys: Keys, kind: str, defaults: tuple[int, int], depth: int) -> list[bool]:
    """Which layers are at the offset of their period."""
    period = keys.size(f"{kind}_layer_period", defaults[0])
    offset = keys.get(f"{kind}_layer_offset", defaults[1])
    if isinstance(offset, bool) or not isinstance(offset, int) or not 0 <= offset < period:
        raise PretrainedError(f"{kind}_layer_offset: got {offset!r}, expected a number below {period}")
    return [i % period == offset for i in range(depth)]


def _pattern(kind: str, layers: list[bool]) -> dict[str, int]:
    """The shortest period, and the offset, of these layers; if there are none, of a layer beyond the last.
    What has no period is found by comparison."""
    offset = layers.index(True) if True in layers else len(layers)
    for period in range(offset + 1, len(layers) + 1):
        if all(each == (i % period == offset) for i, each in enumerate(layers)):
            break
    else:
        period = max(len(layers), offset + 1)
    return {f"{kind}_layer_period": period, f"{kind}_layer_offset": offset}
