"""PoolFormer and the MetaFormer baselines: mixers, a block, whole networks with what they show of their
inside.

The first paper's code keeps maps as [b, c, h, w], the second's as [b, h, w, c] behind the input; the case's
`layout` says which.
"""

import functools

import jax
import numpy as np
from flax import nnx

from seqlab.interop.convert import convert
from seqlab.models import MLP, Block, LayerNorm
from seqlab.models.images import (
    ImageAttention,
    ImageBackbone,
    ImageClassifier,
    ImagePyramid,
    MapNorm,
    Pooling,
    SepConv,
)
from seqlab.models.images import baseline as build_baseline

partial = functools.partial


def check(case):
    names = set(case.params)
    if "downsample_layers.0.conv.weight" in names:
        return _check_baseline(case)
    if "patch_embed.proj.weight" in names:
        return _check_network(case)
    if "norm1.weight" in names:
        return _check_block(case)
    return _check_mixer(case)


def _nhwc(case, x):
    return x.transpose(0, 2, 3, 1) if "[B,C,H,W]" in case.meta["layout"] else x


def _as_there(case, name, y):
    """A map of ours in the layout of what is expected."""
    expected = case.expected(name)
    y = np.asarray(y)
    moved = y.transpose(0, 3, 1, 2) if y.ndim == 4 else y
    inside = "inside [B,H,W,C]" in case.meta["layout"] or case.meta["layout"] == "[B,H,W,C]"
    return y if inside or moved.shape != expected.shape else moved


def _compare(case, values):
    for name, y in values.items():
        if name in case.outs or name in case.mids:
            case.check(name, _as_there(case, name, y))


def _check_mixer(case):
    x, o = _nhwc(case, case.array("x")), case.options
    dim = x.shape[-1]
    if "dwconv.weight" in case.params:
        mixer = SepConv(dim, expand=o["expansion"], kernel=o["kernel"], rngs=nnx.Rngs(0))
    elif "qkv.weight" in case.params:
        mixer = ImageAttention(
            dim, head_dim=o.get("head_dim", 32), bias="proj.bias" in case.params, rngs=nnx.Rngs(0)
        )
    else:
        mixer = Pooling(dim, size=o["pool_size"])
    y, _ = convert(mixer, case.params)(x)
    _compare(case, {"y": y})


def _norm(case):
    """Over a whole map, or as LayerNormChannel over the channels of a place; the parameters look alike."""
    named = str(case.options.get("norm_layer", case.options.get("norm", "")))
    return partial(LayerNorm if "LayerNorm" in named else MapNorm, eps=case.options.get("eps", 1e-5))


def _check_block(case):
    x, o = _nhwc(case, case.array("x")), case.options
    block = Block(
        o["dim"],
        partial(Pooling, size=o["pool_size"]),
        partial(MLP, hidden=case.params["mlp.fc1.weight"].shape[0]),
        _norm(case),
        layer_scale=1e-5 if o["use_layer_scale"] else None,
        rngs=nnx.Rngs(0),
    )
    block = convert(block, case.params, architecture="poolformer")
    normed = block.mixer_norm(x)
    mixed = block.mixer(normed)[0]
    between = x + mixed * (1.0 if block.layer_scale_1 is None else block.layer_scale_1[...])
    second = block.channel_norm(between)
    _compare(
        case,
        {
            "norm1": normed,
            "token_mixer": mixed,
            "norm2": second,
            "mlp": block.channel_mixer(second)[0],
            "y": block(x)[0],
        },
    )


def _check_network(case):
    x, o = _nhwc(case, case.array("x")), case.options
    backbone = partial(
        ImageBackbone,
        o["embed_dims"],
        o["layers"],
        partial(Pooling, size=o["pool_size"]),
        inputs=x.shape[-1],
        channel_mixer=tuple(partial(MLP, expand=ratio) for ratio in o["mlp_ratios"]),
        norm=_norm(case),
        layer_scale=1e-5 if "network.0.0.layer_scale_1" in case.params else None,
    )
    if o.get("fork_feat"):
        model = convert(
            ImagePyramid(backbone, norm=_norm(case), rngs=nnx.Rngs(0)), case.params, architecture="poolformer"
        )
        for name, y in zip(sorted(case.outs), model(x), strict=True):
            _compare(case, {name: y})
        return
    model = convert(
        ImageClassifier(o["num_classes"], backbone, norm=_norm(case), rngs=nnx.Rngs(0)),
        case.params,
        architecture="poolformer",
    )
    maps, logits = jax.jit(lambda x: (_inside(model.backbone, x), model(x)))(x)
    named = {"patch_embed": maps[0]} | {f"network.{i}": y for i, y in enumerate(maps[1:])}
    _compare(case, named | {"norm": model.norm(maps[-1]), "y": logits})


def _inside(backbone, x):
    """What goes into every stage and what comes out of it, in turn."""
    maps = []
    for down, stage in zip(backbone.downs, backbone.stages, strict=True):
        maps.append(down(x))
        x = stage(maps[-1])
        maps.append(x)
    return maps


_KINDS = {"pwconv1.weight": SepConv, "qkv.weight": ImageAttention}


def _check_baseline(case):
    x, o = _nhwc(case, case.array("x")), case.options
    mixers = []
    for i in range(len(o["dims"])):
        held = {
            name.partition("token_mixer.")[2]
            for name in case.params
            if name.startswith(f"stages.{i}.0.token_mixer.")
        }
        mixers.append(next((kind for name, kind in _KINDS.items() if name in held), Pooling))
    scales = tuple(
        1.0 if f"stages.{i}.0.res_scale1.scale" in case.params else None for i in range(len(o["dims"]))
    )
    per_place = "(H,W,C)" not in o.get("norm", "")
    model = build_baseline(
        o["dims"],
        o["depths"],
        tuple(mixers),
        o["num_classes"],
        per_place=per_place,
        inputs=x.shape[-1],
        residual_scale=scales,
        rngs=nnx.Rngs(0),
    )
    model = convert(model, case.params, architecture="metaformer")
    maps, logits = jax.jit(lambda x: (_inside(model.backbone, x), model(x)))(x)
    named = {f"downsample_layers.{i}": y for i, y in enumerate(maps[::2])} | {
        f"stages.{i}": y for i, y in enumerate(maps[1::2])
    }
    _compare(case, named | {"norm": model.pooled(maps[-1]), "y": logits})
