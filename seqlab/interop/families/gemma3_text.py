"""Gemma 3, text: Gemma 2 with normalised queries and keys instead of soft caps, five windows to one full
layer, and rotary frequencies of their own in windows (arXiv 2503.19786)."""

from collections.abc import Mapping
from typing import Any

import fiddle as fdl

from seqlab.interop.families import decoder, gemma2
from seqlab.interop.families.keys import Keys
from seqlab.interop.folder import PretrainedError
from seqlab.models import LanguageModel, Window

MODEL_TYPE = "gemma3_text"
CLASS = "Gemma3ForCausalLM"
WEIGHTS = "gemma2"
MIXERS = ("Attention",)
DEFAULTS = gemma2.DEFAULTS | {"vocab_size": 262_208, "max_position_embeddings": 131_072}
_BASES = {"full_attention": ("rope_theta", 1e6), "sliding_attention": ("rope_local_base_freq", 1e4)}


def from_config(keys: Keys) -> fdl.Config:
    """The config of the model for a config.json."""
    period = keys.size("sliding_window_pattern", keys.size("_sliding_window_pattern", 6))
    kinds = [
        "sliding_attention" if (i + 1) % period else "full_attention" for i in range(decoder.depth_of(keys))
    ]
    keys.expect("attn_logit_softcapping", None)  # transformers reads none
    ropes = _ropes(keys)
    layers = [ropes[kind] for kind in decoder.layer_types(keys, kinds)]
    attention = {"qk_norm": True, "norm_offset": 1.0, **layers[0]}
    return gemma2.language_model(
        keys, DEFAULTS, kinds, attention=attention, layers=layers, logit_softcap=None
    )


def to_config(model: LanguageModel) -> dict[str, Any]:
    """The config.json of a model; raises PretrainedError with the reason if it is not of this family."""
    ropes: dict[str, Any] = {}
    for mixer in decoder.attention_layers(model):
        kind = "sliding_attention" if isinstance(mixer.cache, Window) else "full_attention"
        ropes.setdefault(kind, decoder.rope_of(mixer))
    return gemma2.described(model) | {"rope_parameters": ropes}


def _ropes(keys: Keys) -> dict[str, dict[str, Any]]:
    """The rotary options of full layers and of windows. In the older form rope_scaling is of full layers."""
    given, scaling = keys.get("rope_parameters") or {}, keys.get("rope_scaling") or {}
    if not isinstance(given, Mapping) or given.keys() - _BASES or not isinstance(scaling, Mapping):
        expected = f"an object of {' and '.join(_BASES)}"
        raise PretrainedError(f"rope_parameters: got {given!r} and {scaling!r}, expected {expected}")
    longest = keys.size("max_position_embeddings", DEFAULTS["max_position_embeddings"])
    keys.expect("partial_rotary_factor", 1.0, 1, None)
    found = {}
    for kind, (name, default) in _BASES.items():
        base, rope = keys.number(name, default), given.get(kind) or {}
        if not isinstance(rope, Mapping):
            raise PretrainedError(f"rope_parameters: {kind}: got {rope!r}, expected an object")
        rope = {**rope, **scaling} if kind == "full_attention" else rope
        read = decoder.read_rope(rope, f"rope_parameters: {kind}", longest, base=base, fraction=None)
        found[kind] = {"rotary_base": read[0], "rotary_scaling": read[1]}
    return found
