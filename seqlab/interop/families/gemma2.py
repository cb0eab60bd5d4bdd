"""Gemma 2: soft caps, sandwich norms, windows in every other layer, scaled embeddings (arXiv 2408.00118)."""

from collections.abc import Sequence
from typing import Any

import fiddle as fdl

from seqlab.interop.families import decoder
from seqlab.interop.families.keys import Keys
from seqlab.models import LanguageModel, RMSNorm

MODEL_TYPE = "gemma2"
CLASS = "Gemma2ForCausalLM"
WEIGHTS = "gemma2"
MIXERS = ("Attention",)
DEFAULTS = {
    "vocab_size": 256_000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def from_config(keys: Keys) -> fdl.Config:
    """The config of the model for a config.json."""
    kinds = ["full_attention" if i % 2 else "sliding_attention" for i in range(decoder.depth_of(keys))]
    attention = {"softcap": cap(keys, "attn_logit_softcapping", 50.0)}
    return language_model(keys, DEFAULTS, kinds, attention=attention, logit_softcap=30.0)


def to_config(model: LanguageModel) -> dict[str, Any]:
    """The config.json of a model; raises PretrainedError with the reason if it is not of this family."""
    return described(model) | {"attn_logit_softcapping": decoder.attention_layers(model)[0].softcap}


def language_model(
    keys: Keys,
    defaults: dict[str, Any],
    kinds: Sequence[str],
    *,
    attention: dict[str, Any],
    layers: list[dict[str, Any]] | None = None,
    logit_softcap: float | None,
) -> fdl.Config:
    """The config of a Gemma 2 or 3.

    Args:
      kinds: of every layer, the default of layer_types.
      attention, layers: further options of all mixers and of every layer's.
      logit_softcap: the default of final_logit_softcapping.
    """
    window = keys.size("sliding_window", 4096)
    found = decoder.layer_types(keys, kinds)
    bias = keys.flag("attention_bias", False)
    keys.get("hidden_act")  # transformers reads hidden_activation alone
    return decoder.language_model(
        keys,
        defaults=defaults,
        windows=[window if kind == "sliding_attention" else None for kind in found],
        bias=bias,
        out_bias=bias,
        head_dim=256,
        attention=attention | {"scale": keys.number("query_pre_attn_scalar", 256) ** -0.5},
        layers=layers,
        channel_mixer=decoder.swiglu(keys, defaults, "hidden_activation", "gelu_pytorch_tanh"),
        norm=fdl.Partial(RMSNorm, eps=keys.number("rms_norm_eps", 1e-6), offset=1.0),
        model={
            "norms": "both",
            "embedding_scale": keys.size("hidden_size", defaults["hidden_size"]) ** 0.5,
            "logit_softcap": cap(keys, "final_logit_softcapping", logit_softcap),
        },
    )


def described(model: LanguageModel) -> dict[str, Any]:
    """The keys of a Gemma 2 or 3."""
    first = decoder.attention_layers(model)[0]
    scale = first.head_dim**-0.5 if first.scale is None else first.scale
    found = decoder.renamed(decoder.described(model), hidden_act="hidden_activation")
    own = {
        "attention_bias": first.qkv.bias is not None,
        "query_pre_attn_scalar": _whole(scale**-2),
        "final_logit_softcapping": model.logit_softcap,
    }
    windows = decoder.windows_described(model)
    windows["sliding_window"] = windows["sliding_window"] or 4096  # transformers needs a number
    return found | windows | own


def cap(keys: Keys, name: str, default: float | None) -> float | None:
    """A soft cap: null for none, a missing key for the default."""
    return None if keys.get(name, default) is None else keys.number(name, default)


def _whole(value: float) -> float | int:
    """`value`, or the whole number that it is up to rounding."""
    return round(value) if abs(value - round(value)) < 1e-9 * value else value
