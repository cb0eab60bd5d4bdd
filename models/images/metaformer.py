"""The image backbone: stages of blocks at decreasing resolution, whose mixers are constructor arguments; and
models built from it.

PoolFormer and the hybrids of "MetaFormer Is Actually What You Need for Vision" (arXiv 2111.11418), and the
models of "MetaFormer Baselines for Vision" (arXiv 2210.13452), are tables of arguments: see `poolformer` and
`metaformer`.
"""

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from seqlab.checks import UserError, check_choice, check_positive
from seqlab.models.backbone import Block
from seqlab.models.images.mixers import IdentityMixing, ImageAttention, Pooling, RandomMixing, SepConv
from seqlab.models.images.parts import Downsample, Map, MapNorm, StarReLU
from seqlab.models.kinds import make_norm
from seqlab.models.layers import MLP, Factory, LayerNorm, Linear
from seqlab.models.model import check_dtype
from seqlab.models.stochastic import Dropout
from seqlab.module import Module
from seqlab.shapes import accumulator

partial = functools.partial

_STEM = partial(Downsample, kernel=7, stride=4, padding=2)


class Stage(Module):
    """Blocks at one resolution and width."""

    def __init__(self, blocks: Sequence[Block]):
        self.blocks = nnx.List(blocks)

    def __call__(self, x: Map) -> Map:
        for block in self.blocks:
            x, _ = block(x)
        return x


class ImageBackbone(Module):
    """The output maps of the stages, [b, h, w, width], for images [b, h, w, inputs] of any size that the
    mixers accept.

    Args:
      widths, depths: of the stages.
      mixers: one factory for all stages or a tuple with one for each; a nested tuple is cycled within its
        stage.
      channel_mixer, norm, layer_scale, residual_scale: the block's, likewise for all or one for each.
      stem, down: factories of the layers before the first and before later stages, called as down(inputs,
        width, rngs=rngs).
      drop_path: the rate of the last block; it increases linearly from 0 at the first.
      positions: by stage, (h, w) of a learned position embedding that is added to its input, or None.
    """

    def __init__(
        self,
        widths: Sequence[int],
        depths: Sequence[int],
        mixers: Factory | tuple[Any, ...],
        *,
        inputs: int = 3,
        channel_mixer: Factory | tuple[Factory, ...] = MLP,
        norm: Factory | tuple[Factory, ...] = MapNorm,
        stem: Factory = _STEM,
        down: Factory = Downsample,
        layer_scale: float | tuple[float | None, ...] | None = None,
        residual_scale: float | tuple[float | None, ...] | None = None,
        drop_path: float = 0.0,
        positions: Sequence[tuple[int, int] | None] = (),
        rngs: nnx.Rngs,
    ):
        if len(widths) != len(depths) or not widths:
            raise UserError(f"widths and depths must name the same stages, got {widths} and {depths}")
        self.widths, self.depths = tuple(widths), tuple(depths)
        ways = [stem] + [down] * (len(widths) - 1)
        self.downs = nnx.List(
            [way(a, b, rngs=rngs) for way, a, b in zip(ways, (inputs, *widths[:-1]), widths, strict=True)]
        )
        self.stages, done, total = nnx.List(), 0, sum(check_positive("depths", depth) for depth in depths)
        for i, (dim, depth) in enumerate(zip(widths, depths, strict=True)):
            mixed = _of_stage("mixers", mixers, i, len(widths))
            mixed = mixed if isinstance(mixed, tuple) else (mixed,)
            named = {
                "channel_mixer": channel_mixer,
                "norm": norm,
                "layer_scale": layer_scale,
                "residual_scale": residual_scale,
            }
            options = {name: _of_stage(name, value, i, len(widths)) for name, value in named.items()}
            rates = [drop_path * j / max(total - 1, 1) for j in range(done, done + depth)]
            blocks = [
                Block(dim, mixed[j % len(mixed)], drop_path=rate, rngs=rngs, **options)
                for j, rate in enumerate(rates)
            ]
            self.stages.append(Stage(blocks))
            done += depth
        self.positioned = tuple(i for i, size in enumerate(positions) if size is not None)
        self.positions = nnx.List([Positions((*positions[i], widths[i])) for i in self.positioned])

    def __call__(self, images: Map) -> list[Map]:
        x, maps = images, []
        for i, (down, stage) in enumerate(zip(self.downs, self.stages, strict=True)):
            x = down(x)
            if i in self.positioned:
                x = self.positions[self.positioned.index(i)](x)
            x = stage(x)
            maps.append(x)
        return maps


def _of_stage(name: str, value: Any, i: int, stages: int) -> Any:
    if not isinstance(value, tuple | list):
        return value
    if len(value) != stages:
        raise UserError(f"{name} must be one value or one for each of {stages} stages, got {len(value)}")
    return tuple(value[i]) if isinstance(value[i], list) else value[i]


class Positions(Module):
    """x + a learned number per position and channel, initially zero, for one resolution."""

    torch_names: ClassVar = {"weight": "pos_embed"}
    torch_layout: ClassVar = {"weight": "[1, d, h, w]"}

    def __init__(self, shape: tuple[int, int, int]):
        self.weight = nnx.Param(jnp.zeros(shape))

    def __call__(self, x: Map) -> Map:
        if x.shape[1:] != self.weight.shape:
            raise UserError(
                f"x must be [b, h, w, d] with {self.weight.shape}, to which the embedding belongs, got "
                f"{x.shape}"
            )
        return x + self.weight[...].astype(x.dtype)


class MLPHead(Module):
    """The head of ConvFormer and CAFormer: fc2(dropout(norm(squared_relu(fc1 x))))."""

    def __init__(self, dim: int, outputs: int, *, expand: int = 4, dropout: float = 0.0, rngs: nnx.Rngs):
        self.fc1 = Linear(dim, expand * dim, bias=True, rngs=rngs)
        self.norm = LayerNorm(expand * dim)
        self.dropout = Dropout(dropout, rngs=rngs) if dropout else None
        self.fc2 = Linear(expand * dim, outputs, bias=True, scale=0.1, rngs=rngs)

    def __call__(self, x: Float[Array, "b d"]) -> Float[Array, "b o"]:
        x = self.norm(jnp.square(jax.nn.relu(self.fc1(x))))
        return self.fc2(x if self.dropout is None else self.dropout(x))


class ImageClassifier(Module):
    """Logits [b, outputs] of images [b, h, w, inputs]: a backbone, the mean of its last map, a norm before or
    after the mean, a head.

    Args:
      outputs: classes.
      backbone: called as backbone(rngs=rngs): images -> list of maps, the last of which is read; its
        `widths[-1]` is the head's width.
      norm: called as norm(width, rngs=rngs); None for none.
      normalise: "map" before the mean, "mean" after it.
      head: called as head(width, outputs, rngs=rngs); None for a linear map with bias.
      dtype: compute dtype of the backbone; head and logits are float32 at least.
    """

    def __init__(
        self,
        outputs: int,
        backbone: Factory,
        *,
        norm: Factory | None = MapNorm,
        normalise: str = "map",
        head: Factory | None = None,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        check_choice(normalise, ("map", "mean"), "normalise")
        self.outputs, self.normalise, self.dtype = (
            check_positive("outputs", outputs),
            normalise,
            check_dtype(dtype),
        )
        self.backbone = make_backbone(backbone, rngs)
        width = self.backbone.widths[-1]
        self.norm = None if norm is None else make_norm("norm", norm, width, rngs=rngs)
        self.head = (
            Linear(width, outputs, bias=True, scale=0.1, rngs=rngs)
            if head is None
            else head(width, outputs, rngs=rngs)
        )

    def features(self, images: Map) -> list[Map]:
        """The maps behind every stage."""
        return self.backbone(images.astype(self.dtype))

    def pooled(self, x: Map) -> Float[Array, "b d"]:
        """The input of the head from the last map, in float32 at least."""
        before = self.norm if self.normalise == "map" and self.norm is not None else lambda x: x
        mean = jnp.mean(before(x).astype(accumulator(x.dtype)), axis=(1, 2))
        return self.norm(mean) if self.normalise == "mean" and self.norm is not None else mean

    def __call__(self, images: Map) -> Float[Array, "b o"]:
        return self.head(self.pooled(self.features(images)[-1]))


def make_backbone(factory: Factory, rngs: nnx.Rngs) -> Any:
    """factory(rngs=rngs), checked to be an image backbone, which has the `widths` of its maps."""
    made = factory(rngs=rngs)
    if not getattr(made, "widths", None):
        raise UserError(
            f"{getattr(factory, 'where', 'backbone')}: {type(made).__name__} is no backbone of images, "
            "expected one that has widths, such as ImageBackbone or ViM2Backbone of seqlab.models.images"
        )
    return made


class ImagePyramid(Module):
    """The output maps of the stages, each with its own norm: the input of detectors and segmenters."""

    def __init__(self, backbone: Factory, *, norm: Factory = MapNorm, rngs: nnx.Rngs):
        self.backbone = make_backbone(backbone, rngs)
        self.norms = nnx.List([make_norm("norm", norm, width, rngs=rngs) for width in self.backbone.widths])

    def __call__(self, images: Map) -> list[Map]:
        return [norm(x) for norm, x in zip(self.norms, self.backbone(images), strict=True)]


_SMALL, _MEDIUM = (64, 128, 320, 512), (96, 192, 384, 768)

# size: widths, depths, drop path, layer scale
POOLFORMERS = {
    "s12": (_SMALL, (2, 2, 6, 2), 0.1, 1e-5),
    "s24": (_SMALL, (4, 4, 12, 4), 0.1, 1e-5),
    "s36": (_SMALL, (6, 6, 18, 6), 0.2, 1e-6),
    "m36": (_MEDIUM, (6, 6, 18, 6), 0.3, 1e-6),
    "m48": (_MEDIUM, (8, 8, 24, 8), 0.4, 1e-6),
}

# size of ConvFormer and CAFormer: widths, depths
_HYBRIDS = {
    "s18": (_SMALL, (3, 3, 9, 3)),
    "s36": (_SMALL, (3, 12, 18, 3)),
    "m36": ((96, 192, 384, 576), (3, 12, 18, 3)),
    "b36": ((128, 256, 512, 768), (3, 12, 18, 3)),
}

_MIXERS: dict[str, tuple[Factory, ...]] = {
    "identityformer": (IdentityMixing,) * 4,
    "randformer": (
        IdentityMixing,
        IdentityMixing,
        partial(RandomMixing, tokens=196),
        partial(RandomMixing, tokens=49),
    ),
    "poolformerv2": (Pooling,) * 4,
    "convformer": (SepConv,) * 4,
    "caformer": (SepConv, SepConv, ImageAttention, ImageAttention),
}

METAFORMERS = tuple(
    f"{name}_{size}"
    for name in _MIXERS
    for size in (_HYBRIDS if name in ("convformer", "caformer") else POOLFORMERS)
)


def poolformer(size: str, outputs: int = 1000, *, rngs: nnx.Rngs, **changes: Any) -> ImageClassifier:
    """PoolFormer of a published size, "s12" to "m48"; `changes` override
    arguments of `ImageBackbone`.

    Published weights: convert(model, tensors, architecture="poolformer").
    """
    check_choice(size, tuple(POOLFORMERS), "size")
    widths, depths, drop_path, scale = POOLFORMERS[size]
    options = {
        "widths": widths,
        "depths": depths,
        "mixers": Pooling,
        "drop_path": drop_path,
        "layer_scale": scale,
    } | changes
    return ImageClassifier(outputs, partial(ImageBackbone, **options), rngs=rngs)


def metaformer(name: str, outputs: int = 1000, *, rngs: nnx.Rngs, **changes: Any) -> ImageClassifier:
    """A model of the second paper by its published name, a key of METAFORMERS: "poolformerv2_s12",
    "convformer_b36", "caformer_s18", ...

    `changes` override arguments of `ImageBackbone`, such as `drop_path`, 0 by default. Published weights:
    convert(model, tensors, architecture="metaformer").
    """
    check_choice(name, METAFORMERS, "name")
    kind, _, size = name.partition("_")
    hybrid = kind in ("convformer", "caformer")
    widths, depths = (_HYBRIDS if hybrid else POOLFORMERS)[size][:2]
    return baseline(widths, depths, _MIXERS[kind], outputs, per_place=hybrid, rngs=rngs, **changes)


def baseline(
    widths: Sequence[int],
    depths: Sequence[int],
    mixers: Factory | tuple[Any, ...],
    outputs: int = 1000,
    *,
    per_place: bool = False,
    rngs: nnx.Rngs,
    **changes: Any,
) -> ImageClassifier:
    """The second paper's architecture around any mixers: norms without bias, StarReLU, residual scales in the
    later half of the stages.

    `per_place`, as in ConvFormer and CAFormer: norms over the channels of each position instead of the whole
    map, and the MLP head.
    """
    slim = partial(LayerNorm, eps=1e-6, bias=False)
    options = {
        "norm": slim if per_place else partial(MapNorm, eps=1e-6, bias=False),
        "channel_mixer": partial(MLP, activation=StarReLU, bias=False),
        "stem": partial(Downsample, kernel=7, stride=4, padding=2, after=slim),
        "down": partial(Downsample, before=slim),
        "residual_scale": tuple(None if i < len(widths) // 2 else 1.0 for i in range(len(widths))),
    } | changes
    return ImageClassifier(
        outputs,
        partial(ImageBackbone, widths, depths, mixers, **options),
        norm=partial(LayerNorm, eps=1e-6),
        normalise="mean",
        head=MLPHead if per_place else None,
        rngs=rngs,
    )
