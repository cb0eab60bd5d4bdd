"""GPT-NeoX and Pythia: parallel mixers, LayerNorm, biases, rotation of a quarter of a head (arXiv 2204.06745,
2304.01373)."""

from typing import Any

import fiddle as fdl
import numpy as np

from seqlab.interop.families import decoder
from seqlab.interop.families.keys import Keys
from seqlab.interop.families.packing import Packed
from seqlab.models import MLP, LanguageModel, LayerNorm

MODEL_TYPE = "gpt_neox"
CLASS = "GPTNeoXForCausalLM"
WEIGHTS = "neox"
MIXERS = ("Attention",)
DEFAULTS = {
    "vocab_size": 50_432,
    "hidden_size": 6144,
    "intermediate_size": 24_576,
    "num_attention_heads": 64,
    "num_key_value_heads": 0,
    "max_position_embeddings": 2048,
}
IRRELEVANT = ("classifier_dropout",)


def from_config(keys: Keys) -> fdl.Config:
    """The config of the model for a config.json."""
    bias, depth = keys.flag("attention_bias", True), decoder.depth_of(keys)
    longest = keys.size("max_position_embeddings", DEFAULTS["max_position_embeddings"])
    base = keys.number("rotary_emb_base", 10_000.0)
    base, scaling, share = decoder.rotary(keys, longest, base=base, fraction=keys.number("rotary_pct", 0.25))
    width = decoder.heads_of(keys, DEFAULTS)["head_dim"]
    mixer = fdl.Partial(
        MLP,
        hidden=keys.size("intermediate_size", DEFAULTS["intermediate_size"]),
        activation=decoder.activation_of(keys, "hidden_act", "gelu"),
    )
    return decoder.language_model(
        keys,
        defaults=DEFAULTS,
        windows=[None] * depth,
        bias=bias,
        out_bias=bias,
        attention={"rotary_base": base, "rotary_scaling": scaling, "rotary_width": int(width * share)},
        channel_mixer=mixer,
        norm=fdl.Partial(LayerNorm, eps=keys.number("layer_norm_eps", 1e-5)),
        model={"parallel": keys.flag("use_parallel_residual", True)},
    )


def to_config(model: LanguageModel) -> dict[str, Any]:
    """The config.json of a model; raises PretrainedError with the reason if it is not of this family."""
    first = model.backbone.blocks[0]
    found = decoder.attention_of(model, partial=True)
    del found["num_key_value_heads"], found["head_dim"]
    return found | {
        "intermediate_size": first.channel_mixer.up.weight.shape[1],
        "hidden_act": decoder.activation_key(first.channel_mixer.activation),
        "layer_norm_eps": model.backbone.norm.eps,
        "attention_bias": decoder.biases_of(model)[0],
        "use_parallel_residual": first.parallel,
    }


def packed(model: LanguageModel) -> Packed:
    """The projection of queries, keys and values, published head by head."""
    first = decoder.attention_layers(model)[0]
    rows = np.arange(first.heads * 3 * first.head_dim).reshape(first.heads, 3, first.head_dim)
    parts = {f"attention.{name}_proj": rows[:, i].ravel() for i, name in enumerate("qkv")}
    return {"attention.query_key_value": parts}
