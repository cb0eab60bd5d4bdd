"""Shared parts of the families of decoders: attention with rotary positions, SwiGLU, RMS norms."""

from collections.abc import Mapping, Sequence
from typing import Any

import fiddle as fdl
from flax import nnx

from seqlab.interop.families.keys import Keys
from seqlab.interop.folder import PretrainedError
from seqlab.models import Attention, Full, LanguageModel, MixtureOfExperts, RMSNorm, SwiGLU, Window
from seqlab.models.layers import RotaryScaling

_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ACTIVATIONS = {  # transformers' names, and ours
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "squared_relu",
}
_DEPTH = 10_000  # maximal number of layers


def language_model(
    keys: Keys,
    *,
    defaults: Mapping[str, Any],
    windows: Sequence[int | None],
    bias: bool,
    out_bias: bool,
    head_dim: int | None = None,
    attention: Mapping[str, Any] | None = None,
    layers: Sequence[Mapping[str, Any]] | None = None,
    others: Sequence[fdl.Config | None] | None = None,
    channel_mixer: fdl.Config | tuple[fdl.Config, ...] | None = None,
    norm: fdl.Config | None = None,
    model: Mapping[str, Any] | None = None,
) -> fdl.Config:
    """The config of a model of this kind.

    Args:
      keys: the keys of config.json; the common ones are read here.
      defaults: transformers' defaults of vocab_size, intermediate_size, num_key_value_heads (0: the number of
        heads), max_position_embeddings, and where they differ from Llama's of hidden_size,
        num_attention_heads, rope_theta, rms_norm_eps and tie_word_embeddings.
      windows: of every layer, None for the whole past.
      bias, out_bias: biases of the query, key and value projections, and of the output projection.
      head_dim: its default; None for hidden_size / num_attention_heads.
      attention: further options of all mixers. Without rotary options the common ones are read.
      layers: further options of every layer's mixer.
      others: mixers of layers that are no attention; None where a layer is.
      channel_mixer: in place of SwiGLU.
      norm: in place of RMSNorm, whose eps is read here.
      model: further options of the model.
    """
    longest = keys.size("max_position_embeddings", defaults["max_position_embeddings"])
    if norm is None:
        norm = fdl.Partial(RMSNorm, eps=keys.number("rms_norm_eps", defaults.get("rms_norm_eps", 1e-6)))
    options = dict(attention or {})
    if "rotary_base" not in options:
        base, scaling, _ = rotary(keys, longest, base=defaults.get("rope_theta", 10_000.0))
        options |= {"rotary_base": base, "rotary_scaling": scaling}
    if options.get("qk_norm"):
        options["norm_eps"] = norm.eps
    shared = fdl.Partial(Attention, **heads_of(keys, defaults, head_dim), bias=bias, out_bias=out_bias)
    mixers = []
    for window, own in zip(windows, layers or [{}] * len(windows), strict=True):
        cache = fdl.Config(Full, capacity=longest) if window is None else fdl.Config(Window, window)
        mixers.append(fdl.copy_with(shared, cache=cache, **options | own))
    mixers = [other or mixer for other, mixer in zip(others or [None] * len(mixers), mixers, strict=True)]
    own = {"tie_embeddings": keys.flag("tie_word_embeddings", defaults.get("tie_word_embeddings", False))}
    return fdl.Partial(
        LanguageModel,
        vocab_size=keys.size("vocab_size", defaults["vocab_size"]),
        dim=keys.size("hidden_size", defaults.get("hidden_size", 4096)),
        depth=depth_of(keys),
        mixers=alike(mixers),
        channel_mixer=channel_mixer or swiglu(keys, defaults),
        norm=norm,
        trained_length=longest,
        **own | dict(model or {}),
    )


def heads_of(keys: Keys, defaults: Mapping[str, Any], head_dim: int | None = None) -> dict[str, int]:
    """`heads`, `kv_heads` and `head_dim` of the mixers."""
    dim = keys.size("hidden_size", defaults.get("hidden_size", 4096))
    heads = keys.size("num_attention_heads", defaults.get("num_attention_heads", 32))
    if head_dim is None and not keys.has("head_dim") and dim % heads:
        raise PretrainedError(f"num_attention_heads: got {heads}, expected a divisor of hidden_size={dim}")
    # A null value is not the same as a missing key.
    least = defaults["num_key_value_heads"] if keys.get("num_key_value_heads", 0) == 0 else 0
    return {
        "heads": heads,
        "kv_heads": keys.size("num_key_value_heads", least or heads),
        "head_dim": keys.size("head_dim", head_dim or dim // heads),
    }


def swiglu(
    keys: Keys, defaults: Mapping[str, Any], key: str = "hidden_act", act: str = "silu", bias: bool = False
) -> fdl.Config:
    """The gated channel mixer. `key`, `act`: of the activation, and its default; `bias`: whether its
    projections may have biases."""
    if not bias:
        keys.expect("mlp_bias", False)
    options = {"bias": True} if bias and keys.flag("mlp_bias", False) else {}
    return fdl.Partial(
        SwiGLU,
        hidden=keys.size("intermediate_size", defaults["intermediate_size"]),
        activation=activation_of(keys, key, act),
        **options,
    )


def alike(mixers: Sequence[Any]) -> Any:
    """One factory where all are equal, else a tuple of one for each layer."""
    return mixers[0] if all(mixer == mixers[0] for mixer in mixers) else tuple(mixers)


def activation_of(keys: Keys, name: str, default: str) -> str:
    """The activation under the key `name`."""
    found = keys.get(name, default)
    if found is None:
        found = default
    if not isinstance(found, str) or found not in ACTIVATIONS:
        expected = ", ".join(map(repr, ACTIVATIONS))
        raise PretrainedError(f"{name}: got {found!r}, expected one of {expected}: nothing else is supported")
    return ACTIVATIONS[found]


def activation_key(activation: str) -> str:
    """The name that transformers has for an activation."""
    for theirs, ours in ACTIVATIONS.items():
        if ours == activation:
            return theirs
    raise PretrainedError(f"activation: no published family has {activation!r}")


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


def rotary(
    keys: Keys, longest: int, *, base: float = 10_000.0, fraction: float | None = None
) -> tuple[float, fdl.Config | None, float]:
    """Base and scaling of the rotary frequencies, and the rotated share of a head, in the form of any version
    of config.json.

    `rope_scaling`, if present, replaces `rope_parameters`, as in transformers.

    Args:
      longest: the trained length, which some scalings refer to.
      base: its default.
      fraction: the default of the share; None if the family rotates whole heads.
    """
    parameters, scaling = keys.get("rope_parameters"), keys.get("rope_scaling")
    name = "rope_scaling" if scaling else "rope_parameters"
    longest = keys.size("original_max_position_embeddings", longest)
    base = keys.number("rope_theta", base)
    if fraction is None:
        keys.expect("partial_rotary_factor", 1.0, 1, None)
    else:
        fraction = keys.number("partial_rotary_factor", fraction)
    return read_rope(scaling or parameters or {}, name, longest, base=base, fraction=fraction)


def read_rope(
    rope: Any, name: str, longest: int, *, base: float, fraction: float | None
) -> tuple[float, fdl.Config | None, float]:
    """The same of one object of rotary parameters, under the key `name`."""
    if not isinstance(rope, Mapping):
        raise PretrainedError(f"{name}: got {rope!r}, expected an object")
    inner = Keys({**rope, "rope_type": rope.get("rope_type", rope.get("type", "default"))}, ["type"])
    try:
        base, kind = inner.number("rope_theta", base), inner.get("rope_type")
        if fraction is None:
            inner.expect("partial_rotary_factor", 1.0, 1, None)
        share = 1.0 if fraction is None else inner.number("partial_rotary_factor", fraction)
        if share > 1:
            raise PretrainedError(f"partial_rotary_factor: got {share}, expected a number up to 1")
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
    return base, None if read is None else fdl.Config(RotaryScaling, **read), share


def rope_of(mixer: Attention, partial: bool = False) -> dict[str, Any]:
    """The rotary parameters of a mixer, as config.json has them; `partial`: with the rotated share of a head,
    whatever it is."""
    scaling = mixer.rotary_scaling
    rope = {"rope_type": "default", "rope_theta": mixer.rotary_base}
    if scaling is not None and scaling.low_freq_factor is None:
        rope |= {"rope_type": "linear", "factor": scaling.factor}
    elif scaling is not None:
        rope |= {"rope_type": "llama3", **scaling._asdict()}
    if partial or mixer.rotary_width != mixer.head_dim:
        rope["partial_rotary_factor"] = mixer.rotary_width / mixer.head_dim
    return rope


def windows_of(model: LanguageModel) -> list[int | None]:
    """The window of every layer of `model`, None for the whole past. Raises PretrainedError for other
    caches."""
    mixers = attention_layers(model)
    for mixer in mixers:
        if type(mixer.cache) not in (Full, Window) or getattr(mixer.cache, "sinks", 0):
            raise PretrainedError(
                f"cache: published families have full caches or plain windows, got {mixer.cache!r}"
            )
    windows = [mixer.cache.window if isinstance(mixer.cache, Window) else None for mixer in mixers]
    if len(set(windows) - {None}) > 1:
        raise PretrainedError(f"cache: published families have windows of one size, got {windows}")
    return windows


def attention_layers(model: LanguageModel) -> list[Attention]:
    """The mixers that are attention, or parts of mixers."""
    modules = [module for block in model.backbone.blocks for _, module in nnx.iter_modules(block.mixer)]
    return [module for module in modules if isinstance(module, Attention)]


def biases_of(model: LanguageModel) -> tuple[bool, bool]:
    """Whether the query, key and value projections have a bias, and the output projection."""
    first = attention_layers(model)[0]
    return first.qkv.bias is not None, first.out.bias is not None


def attention_of(model: LanguageModel, partial: bool = False) -> dict[str, Any]:
    """The keys of the attention layers (`partial`: see `rope_of`). Raises PretrainedError for options that no
    family has."""
    mixers = attention_layers(model)
    first = next((mixer for mixer in mixers if mixer.rotary_base is not None), mixers[0])
    if first.sink == "zero":
        raise PretrainedError(f"sink: no published family has {first.sink!r}")
    if first.v_head_dim != first.head_dim:
        raise PretrainedError(f"v_head_dim: no published family here has {first.v_head_dim}")
    windows_of(model)
    spans = [
        mixer.cache.capacity if isinstance(mixer.cache, Full) else mixer.cache.window for mixer in mixers
    ]
    return {
        "num_attention_heads": first.heads,
        "num_key_value_heads": first.kv_heads,
        "head_dim": first.head_dim,
        "rope_parameters": rope_of(first, partial),
        "max_position_embeddings": model.trained_length or max(spans),
    }


def described(model: LanguageModel, partial: bool = False) -> dict[str, Any]:
    """The common keys of the families. Raises PretrainedError for a model that none of them supports; what
    differs otherwise is found by comparison (`seqlab.interop.families.published_config`)."""
    first = model.backbone.blocks[0]
    if not isinstance(first.channel_mixer, SwiGLU):
        raise PretrainedError("channel_mixer: this family has SwiGLU")
    return attention_of(model, partial) | {
        "intermediate_size": hidden_of(first.channel_mixer),
        "hidden_act": activation_key(first.channel_mixer.activation),
        "rms_norm_eps": model.backbone.norm.eps,
    }


def hidden_of(mixer: SwiGLU) -> int:
    """The hidden width."""
    return mixer.down.weight.shape[0]


def mixture_of(model: LanguageModel) -> MixtureOfExperts:
    """The first mixture of experts."""
    for block in model.backbone.blocks:
        if isinstance(block.channel_mixer, MixtureOfExperts):
            return block.channel_mixer
    raise PretrainedError("channel_mixer: this family has a MixtureOfExperts")


def renamed(described: dict[str, Any], **names: str) -> dict[str, Any]:
    """`described` with other names of some keys."""
    return {names.get(key, key): value for key, value in described.items()}


def windows_described(model: LanguageModel) -> dict[str, Any]:
    """The keys of windows and layers."""
    windows = windows_of(model)
    return {
        "sliding_window": max((window for window in windows if window is not None), default=None),
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
    }


def qwen_described(model: LanguageModel) -> dict[str, Any]:
    """The keys of Qwen's families."""
    found = described(model) | windows_described(model)
    return found | {"use_sliding_window": found["sliding_window"] is not None}
