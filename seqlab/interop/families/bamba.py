"""Bamba: Mamba-2 with a few layers of attention, which rotates half a head (IBM, 2024)."""

from typing import Any

import fiddle as fdl

from seqlab.interop.families import decoder, hybrid
from seqlab.interop.families.keys import Keys
from seqlab.interop.folder import PretrainedError
from seqlab.models import Attention, LanguageModel

MODEL_TYPE = "bamba"
CLASS = "BambaForCausalLM"
WEIGHTS = "jamba"
MIXERS = ("Attention", "Mamba2")
DEFAULTS = {
    "vocab_size": 128_000,
    "intermediate_size": 14_336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 262_144,
    "rms_norm_eps": 1e-5,
}
IRRELEVANT = (*hybrid.IRRELEVANT, "z_loss_coefficient", "layer_types")


def from_config(keys: Keys) -> fdl.Config:
    """The config of the model for a config.json."""
    bias, depth = keys.flag("attention_bias", False), decoder.depth_of(keys)
    longest = keys.size("max_position_embeddings", DEFAULTS["max_position_embeddings"])
    width = decoder.heads_of(keys, DEFAULTS)["head_dim"]
    keys.expect("partial_rotary_factor", 0.5)  # transformers knows no other
    keys.expect("attn_rotary_emb", width // 2, None)
    base, scaling, share = decoder.rotary(keys, longest, fraction=0.5)
    given = keys.get("attn_layer_indices") or []
    if not isinstance(given, list) or not all(isinstance(layer, int) for layer in given):
        raise PretrainedError(f"attn_layer_indices: got {given!r}, expected a list of layers")
    mixer = hybrid.mamba2_of(keys, keys.number("rms_norm_eps", 1e-5))
    return decoder.language_model(
        keys,
        defaults=DEFAULTS,
        windows=[None] * depth,
        bias=bias,
        out_bias=bias,
        attention={"rotary_base": base, "rotary_scaling": scaling, "rotary_width": int(width * share)},
        others=[None if i in given else mixer for i in range(depth)],
        channel_mixer=decoder.swiglu(keys, DEFAULTS, bias=True),
    )


def to_config(model: LanguageModel) -> dict[str, Any]:
    """The config.json of a model; raises PretrainedError with the reason if it is not of this family."""
    blocks = list(model.backbone.blocks)
    mixer = hybrid.first_mamba2(model)
    return (
        decoder.described(model, partial=True)
        | hybrid.mamba2_described(mixer)
        | {
            "attn_layer_indices": [i for i, block in enumerate(blocks) if isinstance(block.mixer, Attention)],
            "attention_bias": decoder.biases_of(model)[0],
            "mlp_bias": blocks[0].channel_mixer.down.bias is not None,
        }
    )
