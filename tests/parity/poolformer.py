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
    IdentityMixing,
    ImageAttention,
    ImageBackbone,
    ImageClassifier,
    ImagePyramid,
    MapNorm,
    Pooling,
    RandomMixing,
    SepConv,
    SpatialLinear,
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
    else:
        mixer = _mixer(case, case.params)(dim, rngs=nnx.Rngs(0))
    y, _ = convert(mixer, case.params)(x)
    _compare(case, {"y": y})


def _mixer(case, held, stage=0):
    """The token mixer that has the parameters `held`; without any the meta tells pooling from none."""
    o = case.options
    if "pwconv1.weight" in held:
        return SepConv
    if "qkv.weight" in held:
        inner, options = held["qkv.weight"].shape[0] // 3, {"bias": "proj.bias" in held}
        return partial(ImageAttention, head_dim=o.get("head_dim", 32), inner=inner, **options)
    for name, kind in (("fc.weight", SpatialLinear), ("random_matrix", RandomMixing)):
        if name in held:
            return partial(kind, tokens=len(held[name]))
    named = o.get("token_mixers", o.get("token_mixer", ""))
    named = str(named[stage] if isinstance(named, list) else f"{named} {case.meta.get('class', '')}").lower()
    if "identity" in named and "pool" not in named:
        return IdentityMixing
    return partial(Pooling, size=o.get("pool_size", 3))


def _norm(case):
    """Over a whole map, or as LayerNormChannel over the channels of a place; the parameters look alike."""
    named = str(case.options.get("norm_layer", case.options.get("norm", "")))
    return partial(LayerNorm if "LayerNorm" in named else MapNorm, eps=case.options.get("eps", 1e-5))


def _check_block(case):
    x, o = _nhwc(case, case.array("x")), case.options
    block = Block(
        o["dim"],
        _mixer(case, _below(case, "token_mixer.")),
        partial(MLP, hidden=case.params["mlp.fc1.weight"].shape[0]),
        _norm(case),
        layer_scale=1e-5 if "layer_scale_1" in case.params else None,
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


def _below(case, prefix):
    return {
        name.removeprefix(prefix): value for name, value in case.params.items() if name.startswith(prefix)
    }


def _places(case):
    """By stage the shape of its embedding of places, or None; and the number of the stage in the network."""
    positions, numbers, number = [], [], 0
    for i in range(4):
        embedding = case.params.get(f"network.{number}.pos_embed")
        positions.append(None if embedding is None else embedding.shape[2:])
        number += embedding is not None
        numbers.append(number)
        number += 2 if i < 3 else 1
    return positions, numbers


def _check_network(case):
    x, o = _nhwc(case, case.array("x")), case.options
    positions, numbers = _places(case)
    embedded = tuple(i for i, size in enumerate(positions) if size is not None)
    architecture = {(): "poolformer", (2, 3): "metaformer_ppaa", (3,): "metaformer_pppa"}[embedded]
    backbone = partial(
        ImageBackbone,
        o["embed_dims"],
        o["layers"],
        tuple(_mixer(case, _below(case, f"network.{n}.0.token_mixer."), i) for i, n in enumerate(numbers)),
        positions=positions,
        inputs=x.shape[-1],
        channel_mixer=tuple(partial(MLP, expand=ratio) for ratio in o["mlp_ratios"]),
        norm=_norm(case),
        layer_scale=1e-5 if "network.0.0.layer_scale_1" in case.params else None,
    )
    if o.get("fork_feat"):
        model = convert(
            ImagePyramid(backbone, norm=_norm(case), rngs=nnx.Rngs(0)), case.params, architecture=architecture
        )
        for name, y in zip(sorted(case.outs), model(x), strict=True):
            _compare(case, {name: y})
        return
    model = convert(
        ImageClassifier(o["num_classes"], backbone, norm=_norm(case), rngs=nnx.Rngs(0)),
        case.params,
        architecture=architecture,
    )
    maps, logits = jax.jit(lambda x: (_inside(model.backbone, x), model(x)))(x)
    named = {"patch_embed": maps[0]} | {f"network.{n}": maps[2 * i + 1] for i, n in enumerate(numbers)}
    named |= {f"network.{n + 1}": maps[2 * i + 2] for i, n in enumerate(numbers[:-1])}
    _compare(case, named | {"norm": model.norm(maps[-1]), "y": logits})


def _inside(backbone, x):
    """What goes into every stage and what comes out of it, in turn."""
    maps = []
    for i, (down, stage) in enumerate(zip(backbone.downs, backbone.stages, strict=True)):
        maps.append(down(x))
        x = maps[-1]
        if i in backbone.positioned:
            x = backbone.positions[backbone.positioned.index(i)](x)
        x = stage(x)
        maps.append(x)
    return maps


def _check_baseline(case):
    x, o = _nhwc(case, case.array("x")), case.options
    mixers = [_mixer(case, _below(case, f"stages.{i}.0.token_mixer."), i) for i in range(len(o["dims"]))]
    scales = tuple(
        1.0 if f"stages.{i}.0.res_scale1.scale" in case.params else None for i in range(len(o["dims"]))
    )
    layer_scales = tuple(
        1.0 if f"stages.{i}.0.layer_scale1.scale" in case.params else None for i in range(len(o["dims"]))
    )
    heads = "head.fc1.weight" in case.params  # it belongs to the models whose norms are per place
    per_place = "(H,W,C)" not in o["norm"] if "norm" in o else heads
    model = build_baseline(
        o["dims"],
        o["depths"],
        tuple(mixers),
        o["num_classes"],
        per_place=per_place,
        inputs=x.shape[-1],
        residual_scale=scales,
        layer_scale=layer_scales,
        rngs=nnx.Rngs(0),
    )
    model = convert(model, case.params, architecture="metaformer")
    maps, logits = jax.jit(lambda x: (_inside(model.backbone, x), model(x)))(x)
    named = {f"downsample_layers.{i}": y for i, y in enumerate(maps[::2])} | {
        f"stages.{i}": y for i, y in enumerate(maps[1::2])
    }
    _compare(case, named | {"norm": model.pooled(maps[-1]), "y": logits})
