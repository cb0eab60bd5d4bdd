"""RecurrentGemma (Griffin): gated linear recurrences with windows of attention, Gemma's scaled embeddings and
norms (arXiv 2404.07839)."""

from typing import Any

import fiddle as fdl
import ml_dtypes
import numpy as np

from seqlab.interop.families import decoder, gemma2
from seqlab.interop.families.keys import Keys
from seqlab.interop.folder import PretrainedError
from seqlab.models import RGLRU, Attention, LanguageModel, RMSNorm, SwiGLU

MODEL_TYPE = "recurrent_gemma"
CLASS = "RecurrentGemmaForCausalLM"
WEIGHTS = "recurrent_gemma"
MIXERS = ("Attention", "RGLRU")
DEFAULTS = {
    "vocab_size": 256_000,
    "hidden_size": 2560,
    "intermediate_size": 7680,
    "num_attention_heads": 10,
    "num_key_value_heads": 0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
IRRELEVANT = (  # of initialisation; the kinds of layers follow from block_types
    *("w_init_variance_scale", "final_w_init_variance_scale", "layer_types", "layers_block_type"),
    "head_dim",  # transformers takes hidden_size / num_attention_heads
)
_KINDS = ("recurrent", "recurrent", "attention")


def from_config(keys: Keys) -> fdl.Config:
    """The config of the model for a config.json."""
    depth, dim = decoder.depth_of(keys), keys.size("hidden_size", DEFAULTS["hidden_size"])
    heads = keys.size("num_attention_heads", DEFAULTS["num_attention_heads"])
    if dim % heads:
        raise PretrainedError(f"num_attention_heads: got {heads}, expected a divisor of hidden_size={dim}")
    longest = keys.size("max_position_embeddings", DEFAULTS["max_position_embeddings"])
    base, scaling, share = decoder.rotary(keys, longest, fraction=0.5)
    activation = decoder.activation_of(keys, "hidden_activation", "gelu_pytorch_tanh")
    window = keys.size("sliding_window", keys.size("attention_window_size", 2048))
    recurrent = fdl.Partial(
        RGLRU,
        width=keys.size("lru_width", dim),
        heads=heads,
        conv_width=keys.size("conv1d_width", 4),
        activation=activation,
    )
    mixer = fdl.Partial(
        SwiGLU,
        hidden=keys.size("intermediate_size", DEFAULTS["intermediate_size"]) // 2,
        activation=activation,
        bias=True,
    )
    return decoder.language_model(
        keys,
        defaults=DEFAULTS,
        windows=[window] * depth,
        bias=keys.flag("attention_bias", False),
        out_bias=True,
        head_dim=dim // heads,
        attention={
            "rotary_base": base,
            "rotary_scaling": scaling,
            "rotary_width": int(dim // heads * share),
        },
        others=[None if kind == "attention" else recurrent for kind in _kinds(keys, depth)],
        channel_mixer=mixer,
        norm=fdl.Partial(RMSNorm, eps=keys.number("rms_norm_eps", 1e-6), offset=1.0),
        model={
            # Rounded to bfloat16, as published.
            "embedding_scale": float(np.asarray(dim**0.5).astype(ml_dtypes.bfloat16)),
            "logit_softcap": gemma2.cap(keys, "logits_soft_cap", 30.0),
        },
    )


def to_config(model: LanguageModel) -> dict[str, Any]:
    """The config.json of a model; raises PretrainedError with the reason if it is not of this family."""
    mixers = [block.mixer for block in model.backbone.blocks]
    recurrent = next((mixer for mixer in mixers if isinstance(mixer, RGLRU)), None)
    if recurrent is None or not decoder.attention_layers(model):
        raise PretrainedError("mixers: a recurrent_gemma has layers of RGLRU and of Attention")
    found = decoder.attention_of(model, partial=True)
    del found["head_dim"], found["max_position_embeddings"]
    channel = model.backbone.blocks[0].channel_mixer
    return found | {
        "attention_window_size": decoder.windows_of(model)[0],
        "lru_width": recurrent.width,
        "conv1d_width": recurrent.conv.width,
        "block_types": ["attention" if isinstance(mixer, Attention) else "recurrent" for mixer in mixers],
        "intermediate_size": 2 * decoder.hidden_of(channel),
        "hidden_activation": decoder.activation_key(channel.activation),
        "logits_soft_cap": model.logit_softcap,
        "attention_bias": decoder.biases_of(model)[0],
        "rms_norm_eps": model.backbone.norm.eps,
    }


def _kinds(keys: Keys, depth: int) -> list[str]:
    """The kinds of the layers: block_types, repeated."""
    found = keys.get("block_types") or list(_KINDS)
    if not isinstance(found, list) or any(kind not in _KINDS for kind in found):
        raise PretrainedError(f"block_types: got {found!r}, expected a list of 'recurrent' and 'attention'")
    return [found[i % len(found)] for i in range(depth)]
