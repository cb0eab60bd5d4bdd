"""Models of images: pooling, convolutions and attention in one hierarchical backbone. Images are [b, h, w, channels], NHWC."""

from seqlab.models.images.metaformer import (
    METAFORMERS,
    POOLFORMERS,
    ImageBackbone,
    ImageClassifier,
    ImagePyramid,
    MLPHead,
    baseline,
    metaformer,
    poolformer,
)
from seqlab.models.images.mixers import IdentityMixing, ImageAttention, Pooling, RandomMixing, SepConv, SpatialLinear
from seqlab.models.images.parts import Conv, Downsample, ImageMixer, MapNorm, StarReLU

__all__ = [
    "METAFORMERS",
    "POOLFORMERS",
    "Conv",
    "Downsample",
    "IdentityMixing",
    "ImageAttention",
    "ImageBackbone",
    "ImageClassifier",
    "ImageMixer",
    "ImagePyramid",
    "MLPHead",
    "MapNorm",
    "Pooling",
    "RandomMixing",
    "SepConv",
    "SpatialLinear",
    "StarReLU",
    "baseline",
    "metaformer",
    "poolformer",
]
