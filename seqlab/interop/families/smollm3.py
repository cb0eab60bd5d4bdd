"""SmolLM3: a Llama with layers without positions (NoPE, arXiv 2501.18795)."""

from typing import Any

import fiddle as fdl

from seqlab.interop.families import decoder
from seqlab.interop.families.keys import Keys
from seqlab.interop.folder import PretrainedError
from seqlab.models import LanguageModel

MODEL_TYPE = "smollm3"
CLASS = "SmolLM3ForCausalLM"
WEIGHTS = "llama"
MIXERS = ("Attention",)
DEFAULTS = {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 11_008,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32_768,
    "rope_theta": 2e6,
    "tie_word_embeddings": True,
}
IRRELEVANT = ("max_window_layers",)  # transformers does not read it either


def from_config(keys: Keys) -> fdl.Config:
    """The config of the model for a config.json."""
    bias, depth = keys.flag("attention_bias", False), decoder.depth_of(keys)
    turned = _turned(keys, depth)
    window = None if keys.get("sliding_window") is None else keys.size("sliding_window")
    window = window if keys.flag("use_sliding_window", False) else None
    kinds = ["full_attention" if window is None or has else "sliding_attention" for has in turned]
    kinds = decoder.layer_types(keys, kinds)
    if window is None and "sliding_attention" in kinds:
        raise PretrainedError("layer_types: got 'sliding_attention', and use_sliding_window gives no window")
    return decoder.language_model(
        keys,
        defaults=DEFAULTS,
        windows=[window if kind == "sliding_attention" else None for kind in kinds],
        bias=bias,
        out_bias=bias,
        layers=[{} if has else {"rotary_base": None, "rotary_scaling": None} for has in turned],
        channel_mixer=decoder.swiglu(keys, DEFAULTS, bias=True),
    )


def to_config(model: LanguageModel) -> dict[str, Any]:
    """The config.json of a model; raises PretrainedError with the reason if it is not of this family."""
    layers = decoder.attention_layers(model)
    found = decoder.described(model) | decoder.windows_described(model)
    return found | {
        "attention_bias": decoder.biases_of(model)[0],
        "mlp_bias": model.backbone.blocks[0].channel_mixer.down.bias is not None,
        "use_sliding_window": found["sliding_window"] is not None,
        "no_rope_layers": [int(layer.rotary_base is not None) for layer in layers],
    }


def _turned(keys: Keys, depth: int) -> list[bool]:
    """Whether each layer has rotary positions."""
    period = keys.size("no_rope_layer_interval", 4)
    given = keys.get("no_rope_layers")
    given = [int((i + 1) % period != 0) for i in range(depth)] if given is None else given
    if not isinstance(given, list) or len(given) < depth or not all(flag in (0, 1) for flag in given):
        raise PretrainedError(
            f"no_rope_layers: got {given!r}, expected a list of 0 and 1 of num_hidden_layers={depth}"
        )
    return [bool(flag) for flag in given[:depth]]
