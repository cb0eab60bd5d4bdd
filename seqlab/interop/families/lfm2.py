"""LFM2: gated short convolutions with a few layers of attention (arXiv 2511.23404)."""

from typing import Any

import fiddle as fdl

from seqlab.interop.families import decoder
from seqlab.interop.families.keys import Keys
from seqlab.interop.folder import PretrainedError
from seqlab.models import Attention, GatedShortConv, LanguageModel, RMSNorm, SwiGLU

MODEL_TYPE = "lfm2"
CLASS = "Lfm2ForCausalLM"
WEIGHTS = "lfm2"
MIXERS = ("Attention", "GatedShortConv")
DEFAULTS = {
    "vocab_size": 65_536,
    "hidden_size": 2560,
    "intermediate_size": 12_288,
    "num_key_value_heads": 8,
    "max_position_embeddings": 128_000,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
IRRELEVANT = (  # of initialisation, and other names of what is read, which transformers ignores
    *("block_mlp_init_scale", "block_out_init_scale", "block_use_xavier_init", "conv_use_xavier_init"),
    *("block_dim", "block_norm_eps", "block_use_swiglu", "conv_dim", "conv_dim_out", "num_heads"),
    "use_pos_enc",
)


def from_config(keys: Keys) -> fdl.Config:
    """The config of the model for a config.json."""
    depth, eps = decoder.depth_of(keys), keys.number("norm_eps", 1e-5)
    conv = fdl.Partial(GatedShortConv, width=keys.size("conv_L_cache", 3), bias=keys.flag("conv_bias", False))
    tied = keys.flag("tie_word_embeddings", True)
    return decoder.language_model(
        keys,
        defaults=DEFAULTS,
        windows=[None] * depth,
        bias=False,
        out_bias=False,
        attention={"qk_norm": True},
        others=[None if attends else conv for attends in _attends(keys, depth)],
        channel_mixer=fdl.Partial(SwiGLU, hidden=_hidden(keys)),
        norm=fdl.Partial(RMSNorm, eps=eps),
        model={"tie_embeddings": keys.flag("tie_embedding", tied)},
    )


def to_config(model: LanguageModel) -> dict[str, Any]:
    """The config.json of a model; raises PretrainedError with the reason if it is not of this family."""
    mixers = [block.mixer for block in model.backbone.blocks]
    conv = next((mixer for mixer in mixers if isinstance(mixer, GatedShortConv)), None)
    if conv is None or not decoder.attention_layers(model):
        raise PretrainedError("mixers: an lfm2 has layers of GatedShortConv and of Attention")
    found = decoder.attention_of(model)
    del found["head_dim"]
    return found | {
        "intermediate_size": decoder.hidden_of(model.backbone.blocks[0].channel_mixer),
        "block_auto_adjust_ff_dim": False,
        "norm_eps": model.backbone.norm.eps,
        "conv_L_cache": conv.conv.width,
        "conv_bias": conv.conv.bias is not None,
        "layer_types": ["full_attention" if isinstance(mixer, Attention) else "conv" for mixer in mixers],
    }


def _attends(keys: Keys, depth: int) -> list[bool]:
    """Which layers are attention."""
    chosen, kinds = keys.get("full_attn_idxs"), keys.get("layer_types")
    if kinds is None:
        chosen = list(range(depth)) if chosen is None else chosen
        if not isinstance(chosen, list) or not all(isinstance(layer, int) for layer in chosen):
            raise PretrainedError(f"full_attn_idxs: got {chosen!r}, expected a list of layers")
        return [i in chosen for i in range(depth)]
    fine = isinstance(kinds, list) and len(kinds) == depth
    if not fine or any(kind not in ("conv", "full_attention") for kind in kinds):
        raise PretrainedError(
            f"layer_types: got {kinds!r}, expected 'conv' or 'full_attention' for num_hidden_layers={depth}"
        )
    return [kind == "full_attention" for kind in kinds]


def _hidden(keys: Keys) -> int:
    """The hidden width of the channel mixers."""
    hidden = keys.size("intermediate_size", DEFAULTS["intermediate_size"])
    hidden, multiple = keys.size("block_ff_dim", hidden), keys.size("block_multiple_of", 256)
    factor = keys.number("block_ffn_dim_multiplier", 1.0)
    if not keys.flag("block_auto_adjust_ff_dim", True):
        return hidden
    return -(-int(factor * int(2 * hidden / 3)) // multiple) * multiple
