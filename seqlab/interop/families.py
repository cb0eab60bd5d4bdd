"""How published families of models are described in their config.json, and which of our models computes the
same.

`model_config` reads such a description, `published_config` writes one. What a description asks for and seqlab
does not compute is refused.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import fiddle as fdl

from seqlab.checks import check_choice
from seqlab.interop.folder import PretrainedError
from seqlab.models import Attention, Full, LanguageModel, Mamba, Mamba2, RMSNorm, SwiGLU, Window
from seqlab.models.layers import RotaryScaling

# The name in config.json -> how the weights are named, a key of `seqlab.interop.convert.ARCHITECTURES`.
FAMILIES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "llama",
    "qwen3": "llama",
    "mamba": "mamba",
    "mamba2": "mamba2",
}


def model_config(published_config: Mapping[str, Any]) -> fdl.Config:
    """The config of `LanguageModel` that a published config.json describes.

    Raises:
      PretrainedError: another family, or an option of it that is not supported.
    """
    family = published_config.get("model_type")
    if family not in FAMILIES:
        raise PretrainedError(f"model_type: got {family!r}, expected one of {', '.join(FAMILIES)}")
    describe = {"mamba": _from_mamba, "mamba2": _from_mamba2}.get(family, _from_llama)
    return describe(dict(published_config))


def published_config(model: LanguageModel) -> dict[str, Any]:
    """The config.json of the published family that computes what `model` does.

    Raises:
      PretrainedError: there is none, with the reason.
    """
    if not isinstance(model, LanguageModel):
        raise PretrainedError(f"only a LanguageModel has a published form, got {type(model).__name__}")
    model = model.unrolled()
    blocks, dim = list(model.backbone.blocks), model.backbone.dim
    mixers = [block.mixer for block in blocks]
    kinds = {type(mixer).__name__ for mixer in mixers}
    if not all(
        isinstance(norm, RMSNorm) for norm in (model.backbone.norm, *(block.mixer_norm for block in blocks))
    ):
        raise PretrainedError("norm: published families have RMSNorm")
    common = {
        "vocab_size": model.vocab_size,
        "hidden_size": dim,
        "num_hidden_layers": len(blocks),
        "tie_word_embeddings": model.head is None,
    }
    if kinds == {"Attention"}:
        return common | _to_llama(mixers, blocks)
    if kinds in ({"Mamba"}, {"Mamba2"}):
        if any(block.channel_mixer is not None for block in blocks):
            raise PretrainedError(f"channel_mixer: the published {kinds.pop()} has none")
        return (
            common
            | {"layer_norm_epsilon": blocks[0].mixer_norm.eps}
            | (_to_mamba if kinds == {"Mamba"} else _to_mamba2)(mixers)
        )
    raise PretrainedError(f"mixers: no published family here is made of {', '.join(sorted(kinds))}")


# Attention with SwiGLU: Llama, Mistral, Qwen.


def _from_llama(c: dict[str, Any]) -> fdl.Config:
    family, heads = c["model_type"], c["num_attention_heads"]
    _expect(c, "hidden_act", "silu")
    _expect(c, "mlp_bias", False)
    eps = c.get("rms_norm_eps", 1e-6)
    base, scaling = _rotary(c)
    bias = c.get("attention_bias", family == "qwen2")
    shared = fdl.Partial(
        Attention,
        heads=heads,
        kv_heads=c.get("num_key_value_heads") or heads,
        head_dim=c.get("head_dim") or c["hidden_size"] // heads,
        rotary_base=base,
        rotary_scaling=scaling,
        qk_norm=family == "qwen3",
        norm_eps=eps,
        bias=bias,
        out_bias=bias and family != "qwen2",
    )
    mixers = []
    for window in _windows(c):
        cache = (
            fdl.Config(Full, capacity=c["max_position_embeddings"])
            if window is None
            else fdl.Config(Window, window)
        )
        mixers.append(fdl.copy_with(shared, cache=cache))
    alike = all(mixer == mixers[0] for mixer in mixers)
    return _language_model(
        c, mixers[0] if alike else tuple(mixers), fdl.Partial(SwiGLU, hidden=c["intermediate_size"]), eps
    )


def _windows(c: dict[str, Any]) -> Iterator[int | None]:
    """The window of every layer, None for the whole past."""
    depth, window = c["num_hidden_layers"], c.get("sliding_window")
    if c["model_type"] == "llama" or (
        c["model_type"] != "mistral" and not c.get("use_sliding_window", False)
    ):
        window = None
    first = 0 if c["model_type"] == "mistral" else c.get("max_window_layers", depth)
    kinds = c.get("layer_types") or [
        "sliding_attention" if i >= first else "full_attention" for i in range(depth)
    ]
    for kind in kinds:
        check_choice(kind, ("full_attention", "sliding_attention"), "layer_types")
        yield window if kind == "sliding_attention" else None


def _rotary(c: dict[str, Any]) -> tuple[float, fdl.Config | None]:
    """Base and scaling of the rotary frequencies, in the form of any version of config.json."""
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    base, kind = (
        rope.get("rope_theta", c.get("rope_theta", 10_000.0)),
        rope.get("rope_type", rope.get("type", "default")),
    )
    if kind == "default":
        return float(base), None
    if kind == "linear":
        return float(base), fdl.Config(RotaryScaling, factor=float(rope["factor"]))
    if kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        return float(base), fdl.Config(RotaryScaling, **{name: rope[name] for name in names})
    raise PretrainedError(f"rope_type: got {kind!r}, expected 'default', 'linear' or 'llama3'")


def _to_llama(mixers: Sequence[Attention], blocks: Sequence[Any]) -> dict[str, Any]:
    first = mixers[0]
    if not all(type(block.channel_mixer) is SwiGLU for block in blocks):
        raise PretrainedError("channel_mixer: published families have SwiGLU")
    for name, fine in {"rotary_base": first.rotary_base is not None, "sink": first.sink is None}.items():
        if not fine:
            raise PretrainedError(f"{name}: no published family has {getattr(first, name)!r}")
    if first.rotary_width != first.head_dim:
        raise PretrainedError(
            f"rotary_width: published families turn the whole head, got {first.rotary_width} of "
            f"{first.head_dim}"
        )
    for mixer in mixers:
        if type(mixer.cache) not in (Full, Window) or getattr(mixer.cache, "sinks", 0):
            raise PretrainedError(
                f"cache: published families have full caches or plain windows, got {mixer.cache!r}"
            )
    windows = [mixer.cache.window if isinstance(mixer.cache, Window) else None for mixer in mixers]
    biases = (first.qkv.bias is not None, first.out.bias is not None)
    if first.q_norm is not None:
        family, fine = "qwen3", biases in ((False, False), (True, True))
    elif set(windows) == {None} and biases[0] == biases[1]:
        family, fine = "llama", True
    elif biases == (True, False):
        family, fine = "qwen2", True
    else:
        family, fine = "mistral", biases == (False, False) and len(set(windows)) == 1
    if not fine or len(set(windows) - {None}) > 1:
        raise PretrainedError(
            f"no published family has biases {biases} of qkv and out with the windows {windows}"
        )
    scaling = first.rotary_scaling
    rope = {"rope_type": "default", "rope_theta": first.rotary_base}
    if scaling is not None and scaling.low_freq_factor is None:
        rope |= {"rope_type": "linear", "factor": scaling.factor}
    elif scaling is not None:
        rope |= {"rope_type": "llama3", **scaling._asdict()}
    described = {
        "model_type": family,
        "architectures": [
            {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
            + "ForCausalLM"
        ],
        "num_attention_heads": first.heads,
        "num_key_value_heads": first.kv_heads,
        "head_dim": first.head_dim,
        "intermediate_size": blocks[0].channel_mixer.down.weight.shape[0],
        "hidden_act": "silu",
        "rms_norm_eps": blocks[0].mixer_norm.eps,
        "rope_parameters": rope,
        "max_position_embeddings": max(
            mixer.cache.capacity if isinstance(mixer.cache, Full) else mixer.cache.window for mixer in mixers
        ),
    }
    if family in ("llama", "qwen3"):
        described["attention_bias"] = biases[0]
    if family != "llama":
        described["sliding_window"] = max((w for w in windows if w is not None), default=None)
    if family in ("qwen2", "qwen3"):
        described["use_sliding_window"] = described["sliding_window"] is not None
        described["layer_types"] = ["full_attention" if w is None else "sliding_attention" for w in windows]
    return described


# State spaces.


def _from_mamba(c: dict[str, Any]) -> fdl.Config:
    _expect(c, "hidden_act", "silu")
    inner = c.get("intermediate_size") or c["expand"] * c["hidden_size"]
    rank = c.get("time_step_rank", "auto")
    mixer = fdl.Partial(
        Mamba,
        expand=_whole("intermediate_size", inner, c["hidden_size"]),
        state_size=c.get("state_size", 16),
        conv_width=c.get("conv_kernel", 4),
        dt_rank=None if rank == "auto" else rank,
        conv_bias=c.get("use_conv_bias", True),
        bias=c.get("use_bias", False),
    )
    return _language_model(c, mixer, None, c.get("layer_norm_epsilon", 1e-5))


def _from_mamba2(c: dict[str, Any]) -> fdl.Config:
    _expect(c, "hidden_act", "silu")
    _expect(c, "rms_norm", True)
    eps = c.get("layer_norm_epsilon", 1e-5)
    mixer = fdl.Partial(
        Mamba2,
        expand=_whole("num_heads * head_dim", c["num_heads"] * c["head_dim"], c["hidden_size"]),
        head_dim=c["head_dim"],
        state_size=c["state_size"],
        groups=c["n_groups"],
        conv_width=c["conv_kernel"],
        dt_limit=tuple(map(float, c.get("time_step_limit", (0.0, float("inf"))))),
        conv_bias=c.get("use_conv_bias", True),
        bias=c.get("use_bias", False),
        norm_eps=eps,
    )
    return _language_model(c, mixer, None, eps)


def _to_mamba(mixers: Sequence[Mamba]) -> dict[str, Any]:
    first = mixers[0]
    return {
        "model_type": "mamba",
        "architectures": ["MambaForCausalLM"],
        "intermediate_size": first.inner,
        "expand": first.inner // first.dim,
        "state_size": first.state_size,
        "conv_kernel": first.conv.width,
        "time_step_rank": first.dt_rank,
        "use_conv_bias": first.conv.bias is not None,
        "use_bias": first.in_proj.bias is not None,
        "hidden_act": "silu",
    }


def _to_mamba2(mixers: Sequence[Mamba2]) -> dict[str, Any]:
    first = mixers[0]
    return {
        "model_type": "mamba2",
        "architectures": ["Mamba2ForCausalLM"],
        "num_heads": first.heads,
        "head_dim": first.inner // first.heads,
        "expand": first.inner // first.dim,
        "state_size": first.state_size,
        "n_groups": first.groups,
        "conv_kernel": first.conv.width,
        "time_step_limit": list(first.dt_limit),
        "use_conv_bias": first.conv.bias is not None,
        "use_bias": first.in_proj.bias is not None,
        "hidden_act": "silu",
    }


# What the families share.


def _language_model(c: dict[str, Any], mixers: Any, channel_mixer: Any, eps: float) -> fdl.Config:
    return fdl.Partial(
        LanguageModel,
        vocab_size=c["vocab_size"],
        dim=c["hidden_size"],
        depth=c["num_hidden_layers"],
        mixers=mixers,
        channel_mixer=channel_mixer,
        norm=fdl.Partial(RMSNorm, eps=eps),
        tie_embeddings=c.get("tie_word_embeddings", c["model_type"] == "mamba"),
    )


def _expect(c: dict[str, Any], name: str, value: Any) -> None:
    if c.get(name, value) != value:
        raise PretrainedError(f"{name}: got {c[name]!r}, expected {value!r}: nothing else is supported")


def _whole(name: str, inner: int, dim: int) -> int:
    if inner % dim:
        raise PretrainedError(f"{name}: got {inner}, expected a multiple of hidden_size={dim}")
    return inner // dim
