"""Weights under their published names: `convert(model, tensors)` loads a PyTorch state dict into a model,
`published(model)` returns one.

A module declares the published names of its parts, where they differ, in these attributes:

    torch_names     attribute -> published name; "" = same level, a tuple = concatenated outputs, a list = one
                    name per item, a dict = one name per class of the part:
                    dict[str, str | tuple[str, ...] | list[str] | dict[str, str]]
    torch_layout    parameter -> PyTorch's layout, a key of LAYOUTS: dict[str, str]
    torch_sizes     (of the object) attribute -> outputs of each concatenated map, if they differ:
                    dict[str, tuple[int, ...]]
    torch_stacks    (of the object) parameter -> how many published tensors its first axis stacks, whose names
                    have their number in place of {}: dict[str, int]

Names of whole architectures (for example a language model's layers) are such tables by class name, in
ARCHITECTURES.
"""

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, ArrayLike

from seqlab.checks import UserError, check_choice
from seqlab.module import M, merge, split

Names = Mapping[str, str | tuple[str, ...] | list[str] | Mapping[str, str]]

# From PyTorch's layout to ours, and back.
LAYOUTS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]] = {
    "[out, in]": (np.transpose, np.transpose),
    "[d, 1, w]": (lambda w: w[:, 0].T, lambda w: w.T[:, None]),  # a depthwise Conv1d
    "[e, out, in]": (lambda w: w.swapaxes(1, 2), lambda w: w.swapaxes(1, 2)),  # several linear maps
    "[out, in, w]": (lambda w: w.transpose(2, 1, 0), lambda w: w.transpose(2, 1, 0)),  # a Conv1d
    "[out, in, h, w]": (lambda w: w.transpose(2, 3, 1, 0), lambda w: w.transpose(3, 2, 0, 1)),  # a Conv2d
    # A ConvTranspose2d.
    "[in, out, h, w]": (lambda w: w.transpose(2, 3, 0, 1), lambda w: w.transpose(2, 3, 0, 1)),
    "[out, in, 1]": (lambda w: w[..., 0].T, lambda w: w.T[..., None]),  # a Conv1d of width 1 is a linear map
    "[1, d, h, w]": (lambda w: w[0].transpose(1, 2, 0), lambda w: w.transpose(2, 0, 1)[None]),
}

_MAMBA: dict[str, Names] = {
    "LanguageModel": {"embedding": "backbone.embeddings", "head": "lm_head"},
    "Backbone": {"blocks": "layers", "norm": "norm_f"},
    "Block": {"mixer_norm": "norm"},
}

_FLA: dict[str, Names] = {  # the models of flash-linear-attention around any of its layers
    "LanguageModel": {"embedding": "model.embeddings", "backbone": "model", "head": "lm_head"},
    "Backbone": {"blocks": "layers"},
    "Block": {"mixer_norm": "attn_norm", "mixer": "attn", "channel_norm": "mlp_norm", "channel_mixer": "mlp"},
}

_LLAMA: dict[str, Names] = {
    "LanguageModel": {"embedding": "model.embed_tokens", "backbone": "model", "head": "lm_head"},
    "Backbone": {"blocks": "layers"},
    "Block": {
        "mixer_norm": "input_layernorm",
        "mixer": "self_attn",
        "channel_norm": "post_attention_layernorm",
        "channel_mixer": "mlp",
    },
}

_GEMMA: dict[str, Names] = _LLAMA | {  # sandwich norms
    "Block": {
        **_LLAMA["Block"],
        "mixer_out_norm": "post_attention_layernorm",
        "channel_norm": "pre_feedforward_layernorm",
        "channel_out_norm": "post_feedforward_layernorm",
    },
}

_PHI3: dict[str, Names] = _LLAMA | {
    "Attention": {"qkv": "qkv_proj", "out": "o_proj"},
    "SwiGLU": {"gate_up": "gate_up_proj", "down": "down_proj"},
}

_MIXTRAL: dict[str, Names] = _LLAMA | {
    "Block": _LLAMA["Block"] | {"channel_mixer": "block_sparse_moe"},
    "MixtureOfExperts": {
        "router": "gate",
        "gate_up": ("experts.{}.w1.weight", "experts.{}.w3.weight"),
        "down": "experts.{}.w2.weight",
    },
}

_JAMBA: dict[str, Names] = _LLAMA | {
    "Backbone": {"blocks": "layers", "norm": "final_layernorm"},
    "Block": {
        "mixer_norm": "input_layernorm",
        "mixer": {"Attention": "self_attn", "Mamba": "mamba", "Mamba2": "mamba"},
        "channel_norm": "pre_ff_layernorm",
        "channel_mixer": "feed_forward",
    },
    "Mamba": {"dt_norm": "dt_layernorm", "b_norm": "b_layernorm", "c_norm": "c_layernorm"},
    "MixtureOfExperts": {"router": "router"},
}

_GRANITE_HYBRID: dict[str, Names] = _LLAMA | {
    "Block": _LLAMA["Block"]
    | {
        "mixer": {"Attention": "self_attn", "Mamba2": "mamba"},
        "channel_mixer": {"SwiGLU": "shared_mlp", "MixtureOfExperts": ""},
    },
    "SwiGLU": {"gate_up": "input_linear", "down": "output_linear"},
    "MixtureOfExperts": {
        "router": "block_sparse_moe.router.layer",
        "gate_up": "block_sparse_moe.input_linear.weight",
        "down": "block_sparse_moe.output_linear.weight",
        "shared": "shared_mlp",
    },
}

_LFM2: dict[str, Names] = _LLAMA | {
    "Backbone": {"blocks": "layers", "norm": "embedding_norm"},
    "Block": {
        "mixer_norm": "operator_norm",
        "mixer": {"Attention": "self_attn", "GatedShortConv": "conv"},
        "channel_norm": "ffn_norm",
        "channel_mixer": "feed_forward",
    },
    "Attention": {"out": "out_proj", "q_norm": "q_layernorm", "k_norm": "k_layernorm"},
    "SwiGLU": {"gate_up": ("w1", "w3"), "down": "w2"},
}

_QWEN3_NEXT: dict[str, Names] = _LLAMA | {
    "Block": _LLAMA["Block"] | {"mixer": {"Attention": "self_attn", "GatedDeltaNet": "linear_attn"}},
    "GatedDeltaNet": {"norm": "norm", "out": "out_proj"},
}

_FALCON_H1: dict[str, Names] = _JAMBA | {
    "Block": _JAMBA["Block"] | {"mixer": ""},
    "ParallelMixers": {"mixers": ["self_attn", "mamba"]},
}

_RECURRENT_GEMMA: dict[str, Names] = _LLAMA | {
    "Backbone": {"blocks": "layers", "norm": "final_norm"},
    "Block": {
        "mixer_norm": "temporal_pre_norm",
        "mixer": "temporal_block",
        "channel_norm": "channel_pre_norm",
        "channel_mixer": "mlp_block",
    },
}

_NEOX: dict[str, Names] = {
    "LanguageModel": {"embedding": "gpt_neox.embed_in", "backbone": "gpt_neox", "head": "embed_out"},
    "Backbone": {"blocks": "layers", "norm": "final_layer_norm"},
    "Block": _LLAMA["Block"] | {"mixer": "attention"},
    "Attention": {"out": "dense"},
    "MLP": {"up": "dense_h_to_4h", "down": "dense_4h_to_h"},
}

_LMUFORMER: dict[str, Names] = {
    "Backbone": {"blocks": "block"},
    "Block": {"mixer": "attn", "channel_mixer": "mlp"},
}

# The image models of the two MetaFormer papers number the parts of the network consecutively, or by stage.
_METABLOCK: dict[str, Names] = {
    "ImageClassifier": {"backbone": ""},
    "Stage": {"blocks": ""},
    "MLP": {"up": "fc1", "down": "fc2", "activation": "act"},
}


def _poolformer(positions: tuple[int, ...] = ()) -> dict[str, Names]:
    """PoolFormer's names; a stage in `positions` is preceded by a position embedding, which has its own
    number."""
    stages, downs, embeddings, number = [], ["patch_embed"], [], 0
    for i in range(4):
        if i in positions:
            embeddings.append(f"network.{number}")
            number += 1
        stages.append(f"network.{number}")
        downs.append(f"network.{number + 1}")
        number += 2
    return _METABLOCK | {
        "ImagePyramid": {"backbone": "", "norms": ["norm0", "norm2", "norm4", "norm6"]},
        "ImageBackbone": {"downs": downs[:4], "stages": stages, "positions": embeddings},
        "Downsample": {"conv": "proj"},
        "Block": {
            "mixer_norm": "norm1",
            "mixer": "token_mixer",
            "channel_norm": "norm2",
            "channel_mixer": "mlp",
        },
    }


_METAFORMER: dict[str, Names] = _METABLOCK | {
    "ImageBackbone": {"downs": "downsample_layers"},
    "Block": {
        **_poolformer()["Block"],
        **{f"residual_scale_{i}": f"res_scale{i}.scale" for i in (1, 2)},
        **{f"layer_scale_{i}": f"layer_scale{i}.scale" for i in (1, 2)},
    },
}

_WAVEMIX: dict[str, Names] = {
    "ImageClassifier": {"backbone": "", "head": "pool.2"},
    "ImageToMap": {"backbone": "", "head": "expand"},
    "ImageBackbone": {"downs": ["conv"], "stages": [""]},
    "Stage": {"blocks": "layers"},
    "Block": {"mixer": ""},
}

ARCHITECTURES: dict[str, dict[str, Names]] = {
    "mamba": _MAMBA,
    "mamba2": _MAMBA,
    "fla": _FLA,
    "falcon_h1": _FALCON_H1,
    "granitemoehybrid": _GRANITE_HYBRID,
    "jamba": _JAMBA,
    "lfm2": _LFM2,
    "llama": _LLAMA,
    "gemma2": _GEMMA,
    "mixtral": _MIXTRAL,
    "phi3": _PHI3,
    "neox": _NEOX,
    "qwen3_next": _QWEN3_NEXT,
    "recurrent_gemma": _RECURRENT_GEMMA,
    "lmuformer": _LMUFORMER,
    "poolformer": _poolformer(),
    "metaformer_ppaa": _poolformer(positions=(2, 3)),
    "metaformer_pppa": _poolformer(positions=(3,)),
    "metaformer": _METAFORMER,
    "wavemix": _WAVEMIX,
}

# In state dicts, but not weights: counters, constants of positions and of Legendre memories, and the second
# name of a tied head.
IGNORED = (r".*\.num_batches_tracked", r".*rotary.*inv_freq", r".*\.lmu\.[ABH]", r"lm_head\.weight")


class MissingTensorError(UserError, KeyError):
    """A parameter whose published tensor is missing."""

    __str__ = ValueError.__str__  # KeyError would quote the message


def convert(
    model: M,
    tensors: Mapping[str, ArrayLike],
    *,
    architecture: str | None = None,
    prefix: str = "",
    ignore: tuple[str, ...] = IGNORED,
) -> M:
    """A copy of `model` with the published weights `tensors` (anything convertible to NumPy, by their
    original names).

    Args:
      architecture: the naming scheme of a whole model, a key of ARCHITECTURES; single modules need none.
      prefix: the prefix of this model's tensors; others are ignored.
      ignore: regular expressions of names that may remain unused.

    Raises:
      MissingTensorError (a KeyError and a ValueError): a tensor is missing (with the nearest name).
      ValueError: a tensor has another shape than its parameter, or is not used by any parameter.
    """
    if architecture is not None:
        check_choice(architecture, tuple(ARCHITECTURES), "architecture")
    tables = ARCHITECTURES[architecture] if architecture else {}
    if prefix:
        tensors = {
            name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)
        }
    static, params = split(model)
    sources = {source.ours: source for source in _walk(model, "", ("",), tables)}
    used, new = set(), {}
    # The largest first: while it is there twice, little else is.
    for name, old in sorted(params.items(), key=lambda item: -item[1].size):
        if name not in sources:  # not a published weight
            new[name] = old
            continue
        theirs, value = sources[name].theirs, sources[name].read(tensors)
        if value.shape != old.shape:
            raise UserError(
                f"{' + '.join(theirs)} has shape {value.shape} in this layout, parameter {name} needs "
                f"{old.shape}"
            )
        new[name] = jnp.asarray(value, old.dtype)
        used.update(theirs)
    left = [
        name
        for name in tensors
        if name not in used and not any(re.fullmatch(pattern, name) for pattern in ignore)
    ]
    if left:
        raise UserError(
            f"{len(left)} tensors have no place in the model: {', '.join(sorted(left)[:5])}; wrong options "
            "or architecture?"
        )
    return merge(static, new)


def published(model: nnx.Module, architecture: str | None = None) -> dict[str, np.ndarray]:
    """The weights of `model` under their published names and in PyTorch's layouts, the input of `convert`. A
    tied head occurs once."""
    if architecture is not None:
        check_choice(architecture, tuple(ARCHITECTURES), "architecture")
    _, params = split(model)
    tensors = {}
    for source in _walk(model, "", ("",), ARCHITECTURES[architecture] if architecture else {}):
        tensors |= source.write(np.asarray(params[source.ours]))
    return tensors


def published_names(model: nnx.Module, architecture: str | None = None) -> dict[str, tuple[str, ...]]:
    """Our parameter name -> the published name, or names if our parameter concatenates several."""
    tables = ARCHITECTURES[architecture] if architecture else {}
    return {source.ours: source.theirs for source in _walk(model, "", ("",), tables)}


class _Source(NamedTuple):
    """A parameter and its published tensors: several if outputs of several published maps are concatenated
    (`sizes` are their outputs, None if equal), and as often as it stacks them.

    `layout`: the tensors' layout. `stack`: tensors along the first axis of the parameter; None: it has no
    such axis.
    """

    ours: str
    theirs: tuple[str, ...]
    layout: str | None
    sizes: tuple[int, ...] | None
    stack: int | None = None

    def read(self, tensors: Mapping[str, ArrayLike]) -> np.ndarray:
        """The parameter's value."""
        parts = [_layed_out(_find(tensors, name, self.ours), name, self.layout) for name in self.theirs]
        if self.stack is None:
            return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
        width = len(parts) // self.stack
        items = [parts[i : i + width] for i in range(0, len(parts), width)]
        return np.stack([np.concatenate(item, axis=-1) for item in items])

    def write(self, value: np.ndarray) -> dict[str, np.ndarray]:
        """The tensors of a value."""
        items = [value] if self.stack is None else list(value)
        width = len(self.theirs) // len(items)
        edges = width if self.sizes is None or width == 1 else np.cumsum(self.sizes)[:-1]
        parts = [part for item in items for part in np.split(item, edges, axis=-1)]
        back = (lambda part: part) if self.layout is None else LAYOUTS[self.layout][1]
        return {name: np.ascontiguousarray(back(part)) for name, part in zip(self.theirs, parts, strict=True)}


def _walk(
    module: nnx.Module,
    ours: str,
    theirs: tuple[str, ...],
    tables: Mapping[str, Names],
    sizes: tuple[int, ...] | None = None,
) -> Iterator[_Source]:
    """The sources of every parameter, named `ours` + its path here and `theirs` + its published path."""
    cls = type(module)
    names = {**getattr(cls, "torch_names", {}), **tables.get(cls.__name__, {})}
    layouts, all_sizes = getattr(cls, "torch_layout", {}), getattr(module, "torch_sizes", {})
    stacks = getattr(module, "torch_stacks", {})
    for attribute, value in vars(module).items():
        listed = names.get(attribute, attribute)
        if isinstance(listed, Mapping):
            listed = listed.get(type(value).__name__, attribute)
        joined = tuple(
            _join(parent, name)
            for parent in theirs
            for name in ((listed,) if isinstance(listed, str) else listed)
        )
        if isinstance(value, nnx.Param | nnx.BatchStat):
            stack, layout = stacks.get(attribute), layouts.get(attribute)
            if stack is not None and "{}" not in joined[0]:  # published in one tensor
                stack, layout = None, "[e, out, in]"
            elif stack is not None:
                joined = tuple(name.replace("{}", str(i)) for i in range(stack) for name in joined)
            own = all_sizes.get(attribute, sizes)
            yield _Source(ours + attribute, joined, layout, own, stack)
        elif isinstance(value, nnx.List) and isinstance(listed, list):
            # Further names belong to larger models.
            for i, (item, name) in enumerate(zip(value, joined[: len(value)], strict=True)):
                yield from _walk(item, f"{ours}{attribute}.{i}.", (name,), tables)
        elif isinstance(value, nnx.List):
            for i, item in enumerate(value):
                yield from _walk(
                    item, f"{ours}{attribute}.{i}.", tuple(_join(name, str(i)) for name in joined), tables
                )
        elif isinstance(value, nnx.Module):
            yield from _walk(value, f"{ours}{attribute}.", joined, tables, all_sizes.get(attribute, sizes))


def _join(parent: str, name: str) -> str:
    return f"{parent}.{name}" if parent and name else parent or name


def _find(tensors: Mapping[str, ArrayLike], name: str, ours: str) -> np.ndarray:
    if name not in tensors:
        near = difflib.get_close_matches(name, tensors, 1)
        raise MissingTensorError(
            f"no tensor {name} for parameter {ours}" + (f"; did you mean {near[0]}?" if near else "")
        )
    return np.asarray(tensors[name])


def _layed_out(value: np.ndarray, name: str, layout: str | None) -> Array | np.ndarray:
    if layout is None:
        return value
    if layout == "[out, in]":  # a convolution of width 1 is a linear map
        value = value.reshape(value.shape[:2] + tuple(size for size in value.shape[2:] if size != 1))
    if value.ndim != layout.count(",") + 1:
        raise UserError(f"{name} has shape {value.shape}, expected {layout}")
    return LAYOUTS[layout][0](value)
