"""Falcon-H1: attention and Mamba-2 side by side in every layer, with constant factors of all maps (arXiv
2507.22448)."""

from typing import Any

import fiddle as fdl

from seqlab.interop.families import decoder, hybrid
from seqlab.interop.families.keys import Keys
from seqlab.interop.folder import PretrainedError
from seqlab.models import Attention, LanguageModel, Mamba2, ParallelMixers

MODEL_TYPE = "falcon_h1"
CLASS = "FalconH1ForCausalLM"
WEIGHTS = "falcon_h1"
MIXERS = ("ParallelMixers",)
DEFAULTS = {
    "vocab_size": 128_000,
    "intermediate_size": 14_336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
}
IRRELEVANT = (*hybrid.IRRELEVANT, "mamba_use_mlp", "mlp_expansion_factor")  # transformers ignores them
_INS = ("attention_in_multiplier", "ssm_in_multiplier")
_OUTS = ("attention_out_multiplier", "ssm_out_multiplier")


def from_config(keys: Keys) -> fdl.Config:
    """The config of the model for a config.json."""
    bias = keys.flag("attention_bias", False)
    width = decoder.heads_of(keys, DEFAULTS)["head_dim"]
    channel = decoder.swiglu(keys, DEFAULTS, bias=True)
    channel.factors = tuple(_numbers(keys, "mlp_multipliers", 2))
    cfg = decoder.language_model(
        keys,
        defaults=DEFAULTS,
        windows=[None] * decoder.depth_of(keys),
        bias=bias,
        out_bias=bias,
        attention={"scale": width**-0.5 * keys.number("key_multiplier", 1.0)},
        channel_mixer=channel,
        model={
            "embedding_scale": keys.number("embedding_multiplier", 1.0),
            "logit_scale": keys.number("lm_head_multiplier", 1.0),
        },
    )
    cfg.mixers = fdl.Partial(
        ParallelMixers,
        mixers=[cfg.mixers, _mamba2(keys)],
        in_scales=[keys.number(name, 1.0) for name in _INS],
        out_scales=[keys.number(name, 1.0) for name in _OUTS],
    )
    return cfg


def to_config(model: LanguageModel) -> dict[str, Any]:
    """The config.json of a model; raises PretrainedError with the reason if it is not of this family."""
    first = model.backbone.blocks[0]
    if [type(mixer) for mixer in first.mixer.mixers] != [Attention, Mamba2]:
        raise PretrainedError("mixers: a falcon_h1 has Attention and Mamba2 in every layer, in this order")
    attention, mamba2 = first.mixer.mixers
    found = decoder.described(model) | hybrid.mamba2_described(mamba2)
    del found["mamba_expand"]
    scale = attention.head_dim**-0.5 if attention.scale is None else attention.scale
    norm = mamba2.norm
    return (
        found
        | dict(zip(_INS, first.mixer.in_scales, strict=True))
        | dict(zip(_OUTS, first.mixer.out_scales, strict=True))
        | {
            "key_multiplier": float(f"{scale * attention.head_dim**0.5:.12g}"),
            "embedding_multiplier": model.embedding_scale,
            "lm_head_multiplier": model.logit_scale,
            "mlp_multipliers": list(first.channel_mixer.factors),
            "ssm_multipliers": list(mamba2.factors or (1.0,) * 5),
            "mamba_d_ssm": mamba2.inner,
            "mamba_rms_norm": norm is not None,
            "mamba_norm_before_gate": norm is not None and not norm.gate_first,
            "projectors_bias": mamba2.out_proj.bias is not None,
            "attention_bias": attention.qkv.bias is not None,
            "mlp_bias": first.channel_mixer.down.bias is not None,
        }
    )


def _mamba2(keys: Keys) -> fdl.Config:
    """The config of the Mamba-2 mixers."""
    inner = keys.size("mamba_expand", 2) * keys.size("hidden_size", 4096)
    inner = keys.size("mamba_d_ssm", 1024) if keys.get("mamba_d_ssm", 1024) is not None else inner
    first = keys.flag("mamba_norm_before_gate", True)
    norm = "norm_first" if first else "gate_first"
    inside, outside = keys.flag("mamba_proj_bias", False), keys.flag("projectors_bias", False)
    if inside != outside:
        raise PretrainedError(f"projectors_bias: got {outside}, expected mamba_proj_bias={inside}")
    return hybrid.mamba2_of(
        keys,
        keys.number("rms_norm_eps", 1e-5),
        inner=inner,
        norm=norm if keys.flag("mamba_rms_norm", False) else None,
        factors=_numbers(keys, "ssm_multipliers", 5),
    )


def _numbers(keys: Keys, name: str, count: int) -> list[float]:
    """So many positive numbers under the key, by default ones."""
    found = keys.get(name) or [1.0] * count
    if not isinstance(found, list) or len(found) != count:
        raise PretrainedError(f"{name}: got {found!r}, expected {count} numbers")
    items = Keys({f"{name}[{i}]": value for i, value in enumerate(found)})
    return [items.number(f"{name}[{i}]") for i in range(count)]
