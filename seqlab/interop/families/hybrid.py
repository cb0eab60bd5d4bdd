"""Shared parts of the families that mix Mamba-2 with attention."""

from collections.abc import Sequence
from typing import Any

import fiddle as fdl

from seqlab.interop.families import mamba2
from seqlab.interop.families.keys import Keys
from seqlab.interop.folder import PretrainedError
from seqlab.models import Attention, LanguageModel, Mamba2

IRRELEVANT = ("mamba_chunk_size", "num_logits_to_keep", "layers_block_type")  # of the implementation
_KINDS = {
    "attention": True,
    "full_attention": True,
    "mamba": False,
    "linear_attention": False,
}


def mamba2_of(keys: Keys, eps: float, **options: Any) -> fdl.Config:
    """The config of the Mamba-2 mixers; `eps`: of their norms. `options` replace what is read here."""
    dim, expand = keys.size("hidden_size", 4096), keys.size("mamba_expand", 2)
    heads, width = keys.size("mamba_n_heads", 128), keys.get("mamba_d_head", "auto")
    inner = options.get("inner") or expand * dim
    width = inner // heads if width == "auto" else keys.size("mamba_d_head")
    if width * heads != inner:
        raise PretrainedError(f"mamba_n_heads: got {heads} of {width}, expected {inner} channels in all")
    return fdl.Partial(
        Mamba2,
        **({} if "inner" in options else {"expand": expand}),
        head_dim=width,
        state_size=keys.size("mamba_d_state", 256),
        groups=keys.size("mamba_n_groups", 1),
        conv_width=keys.size("mamba_d_conv", 4),
        dt_limit=mamba2.limit(keys.get("time_step_limit")),
        conv_bias=keys.flag("mamba_conv_bias", True),
        bias=keys.flag("mamba_proj_bias", False),
        norm_eps=eps,
        **options,
    )


def mamba2_described(mixer: Mamba2) -> dict[str, Any]:
    """The keys of a Mamba-2 mixer."""
    return {
        "mamba_expand": mixer.inner // mixer.dim,
        "mamba_n_heads": mixer.heads,
        "mamba_d_head": mixer.inner // mixer.heads,
        "mamba_d_state": mixer.state_size,
        "mamba_n_groups": mixer.groups,
        "mamba_d_conv": mixer.conv.width,
        "mamba_conv_bias": mixer.conv.bias is not None,
        "mamba_proj_bias": mixer.in_proj.bias is not None,
        "time_step_limit": [mamba2.json_number(value) for value in mixer.dt_limit],
    }


def attends(keys: Keys, depth: int, default: Sequence[str] | None = None) -> list[bool]:
    """Which layers are attention, by layer_types; by default none."""
    found = keys.get("layer_types") or list(default or ["mamba"] * depth)
    if not isinstance(found, list) or len(found) != depth:
        raise PretrainedError(f"layer_types: got {found!r}, expected a list of num_hidden_layers={depth}")
    for kind in found:
        if kind not in _KINDS:
            raise PretrainedError(
                f"layer_types: got {kind!r}, expected one of {', '.join(map(repr, _KINDS))}"
            )
    return [_KINDS[kind] for kind in found]


def first_mamba2(model: LanguageModel) -> Mamba2:
    """The first mixer of that class, of a model that has attention too."""
    mixers = [block.mixer for block in model.backbone.blocks]
    found = next((mixer for mixer in mixers if isinstance(mixer, Mamba2)), None)
    if found is None or not any(isinstance(mixer, Attention) for mixer in mixers):
        raise PretrainedError("mixers: this family has layers of Mamba2 and of Attention")
    return found
