"""Shared parts of Llama, Mistral and Qwen: attention with rotary positions and SwiGLU, with RMS norms."""

from collections.abc import Mapping, Sequence
from typing import Any

import fiddle as fdl

from seqlab.interop.families.keys import Keys
from seqlab.interop.folder import PretrainedError
from seqlab.models import Attention, Full, LanguageModel, RMSNorm, SwiGLU, Window
from seqlab.models.layers import RotaryScaling

_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_DEPTH = 10_000  # maximal number of layers


def language_model(
    keys: Keys,
    *,
    defaults: Mapping[str, int],
    windows: Sequence[int | None],
    bias: bool,
    out_bias: bool,
    head_dim: int | None = None,
    qk_norm: bool = False,
) -> fdl.Config:
    """The config of a model of this kind.

    Args:
      keys: the keys of config.json; the common ones are read here.
      defaults: transformers' defaults of vocab_size, intermediate_size, num_key_value_heads (0: the number of
        heads) and max_position_embeddings.
      windows: of every layer, None for the whole past.
      bias, out_bias: biases of the query, key and value projections, and of the output projection.
      head_dim: its default; None for hidden_size / num_attention_heads.
      qk_norm: whether queries and keys are normalised.
    """
    keys.expect("hidden_act", "silu", "swish")
    keys.expect("mlp_bias", False)
    keys.expect("partial_rotary_factor", 1.0, 1, None)
    dim, heads = keys.size("hidden_size", 4096), keys.size("num_attention_heads", 32)
    if head_dim is None and not keys.has("head_dim") and dim % heads:
        raise PretrainedError(f"num_attention_heads: got {heads}, expected a divisor of hidden_size={dim}")
    # A null value is not the same as a missing key.
    least = defaults["num_key_value_heads"] if keys.get("num_key_value_heads", 0) == 0 else 0
    longest = keys.size("max_position_embeddings", defaults["max_position_embeddings"])
    eps = keys.number("rms_norm_eps", 1e-6)
    base, scaling = _rotary(keys, longest)
    shared = fdl.Partial(
        Attention,
        heads=heads,
        kv_heads=keys.size("num_key_value_heads", least or heads),
        head_dim=keys.size("head_dim", head_dim or dim // heads),
        rotary_base=base,
        rotary_scaling=scaling,
        qk_norm=qk_norm,
        norm_eps=eps,
        bias=bias,
        out_bias=out_bias,
    )
    mixers = []
    for window in windows:
        cache = fdl.Config(Full, capacity=longest) if window is None else fdl.Config(Window, window)
        mixers.append(fdl.copy_with(shared, cache=cache))
    return fdl.Partial(
        LanguageModel,
        vocab_size=keys.size("vocab_size", defaults["vocab_size"]),
        dim=dim,
        depth=depth_of(keys),
        mixers=mixers[0] if all(mixer == mixers[0] for mixer in mixers) else tuple(mixers),
        channel_mixer=fdl.Partial(
            SwiGLU, hidden=keys.size("intermediate_size", defaults["intermediate_size"])
        ),
        norm=fdl.Partial(RMSNorm, eps=eps),
        tie_embeddings=keys.flag("tie_word_embeddings", False),
        trained_length=longest,
    )


def depth_of(keys: Keys) -> int:
    """The number of layers."""
    return keys.size("num_hidden_layers", 32, _DEPTH)


def layer_types(keys: Keys, default: Sequence[str]) -> list[str]:
    """ "full_attention" or "sliding_attention" for every layer; `default` if the key is missing or null."""
    found = keys.get("layer_types") or list(default)
    kinds = ("full_attention", "sliding_attention")
    if not isinstance(found, list) or len(found) != len(default):
        raise PretrainedError(
            f"layer_types: got {found!r}, expected a list of num_hidden_layers={len(default)}"
        )
    for kind in found:
        if kind not in kinds:
            raise PretrainedError(f"layer_types: got {kind!r}, expected one of {', '.join(map(repr, kinds))}")
    return found


def qwen_windows(keys: Keys) -> list[int | None]:
    """The windows of Qwen's layers: from layer max_window_layers on, if use_sliding_window is set."""
    depth, used = depth_of(keys), keys.flag("use_sliding_window", False)
    window = keys.size("sliding_window", 4096) if keys.get("sliding_window", 0) is not None else None
    first = keys.get("max_window_layers", 28)
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise PretrainedError(f"max_window_layers: got {first!r}, expected a number of layers")
    window = window if used else None
    plain = ["full_attention" if window is None or i < first else "sliding_attention" for i in range(depth)]
    kinds = layer_types(keys, plain)
    if window is None and "sliding_attention" in kinds:
        raise PretrainedError(
            "layer_types: a layer has sliding_attention, and use_sliding_window gives no window"
        )
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _rotary(keys: Keys, longest: int) -> tuple[float, fdl.Config | None]:
    """Base and scaling of the rotary frequencies, in the form of any version of config.json.

    `rope_scaling`, if present, replaces `rope_parameters`, as in transformers.
    """
    parameters, scaling = keys.get("rope_parameters"), keys.get("rope_scaling")
    rope = scaling or parameters or {}
    if not isinstance(rope, Mapping):
        raise PretrainedError(f"rope_scaling: got {rope!r}, expected an object")
    name = "rope_scaling" if scaling else "rope_parameters"
    inner = Keys({**rope, "rope_type": rope.get("rope_type", rope.get("type", "default"))}, ["type"])
    outer = keys.number("rope_theta", 10_000.0)
    try:
        base, kind = inner.number("rope_theta", outer), inner.get("rope_type")
        inner.expect("partial_rotary_factor", 1.0, 1, None)
        longest = keys.size("original_max_position_embeddings", longest)
        read = None
        if kind == "linear":
            read = {"factor": inner.number("factor")}
        elif kind == "llama3":
            original = inner.size("original_max_position_embeddings", longest)
            read = {key: inner.number(key) for key in _LLAMA3[:3]} | {_LLAMA3[3]: original}
        elif kind != "default":
            raise PretrainedError(f"rope_type: got {kind!r}, expected 'default', 'linear' or 'llama3'")
        for key in _LLAMA3:  # of other kinds, which transformers does not read either
            inner.get(key)
        unknown = inner.unread()
    except PretrainedError as error:
        raise PretrainedError(f"{name}: {error}") from error
    if unknown:
        raise PretrainedError(
            f"{name}: {unknown[0]}: got {rope[unknown[0]]!r}, which rope_type {kind!r} does not have"
        )
    return base, None if read is None else fdl.Config(RotaryScaling, **read)


def windows_of(model: LanguageModel) -> list[int | None]:
    """The window of every layer of `model`, None for the whole past. Raises PretrainedError for other
    caches."""
    mixers = [block.mixer for block in model.backbone.blocks]
    for mixer in mixers:
        if type(mixer.cache) not in (Full, Window) or getattr(mixer.cache, "sinks", 0):
            raise PretrainedError(
                f"cache: published families have full caches or plain windows, got {mixer.cache!r}"
            )
    windows = [mixer.cache.window if isinstance(mixer.cache, Window) else None for mixer in mixers]
    if len(set(windows) - {None}) > 1:
        raise PretrainedError(f"cache: published families have windows of one size, got {windows}")
    return windows


def biases_of(model: LanguageModel) -> tuple[bool, bool]:
    """Whether the query, key and value projections have a bias, and the output projection."""
    first = model.backbone.blocks[0].mixer
    return first.qkv.bias is not None, first.out.bias is not None


def described(model: LanguageModel, qk_norm: bool = False) -> dict[str, Any]:
    """The common keys of the families. Raises PretrainedError for a model that none of them supports."""
    blocks = list(model.backbone.blocks)
    mixers = [block.mixer for block in blocks]
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
    windows_of(model)
    if (first.q_norm is not None) != qk_norm:
        raise PretrainedError(f"qk_norm: this family has {'one' if qk_norm else 'none'}")
    scaling = first.rotary_scaling
    rope = {"rope_type": "default", "rope_theta": first.rotary_base}
    if scaling is not None and scaling.low_freq_factor is None:
        rope |= {"rope_type": "linear", "factor": scaling.factor}
    elif scaling is not None:
        rope |= {"rope_type": "llama3", **scaling._asdict()}
    spans = [
        mixer.cache.capacity if isinstance(mixer.cache, Full) else mixer.cache.window for mixer in mixers
    ]
    return {
        "num_attention_heads": first.heads,
        "num_key_value_heads": first.kv_heads,
        "head_dim": first.head_dim,
        "intermediate_size": blocks[0].channel_mixer.down.weight.shape[0],
        "rms_norm_eps": blocks[0].mixer_norm.eps,
        "rope_parameters": rope,
        "max_position_embeddings": model.trained_length or max(spans),
    }


def qwen_described(model: LanguageModel, qk_norm: bool) -> dict[str, Any]:
    """The keys of Qwen's families."""
    windows = windows_of(model)
    return described(model, qk_norm) | {
        "sliding_window": max((window for window in windows if window is not None), default=None),
        "use_sliding_window": set(windows) != {None},
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
    }
