"""Models of images: pooling, convolutions, attention and wavelets in one hierarchical backbone. Images are [b, h, w, channels], NHWC."""

from seqlab.models.images.dense import ImageToMap, MapHead
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
from seqlab.models.images.parts import Conv, ConvTranspose, Downsample, ImageMixer, MapNorm, StarReLU
from seqlab.models.images.wavemix import (
    ParallelWaveMixing,
    PatchStem,
    ShuffleWaveMixing,
    StridedStem,
    WaveMixing,
    wave_backbone,
    wavemix,
)

__all__ = [
    "METAFORMERS",
    "POOLFORMERS",
    "Conv",
    "ConvTranspose",
    "Downsample",
    "IdentityMixing",
    "ImageAttention",
    "ImageBackbone",
    "ImageClassifier",
    "ImageMixer",
    "ImagePyramid",
    "ImageToMap",
    "MLPHead",
    "MapHead",
    "MapNorm",
    "ParallelWaveMixing",
    "PatchStem",
    "Pooling",
    "RandomMixing",
    "SepConv",
    "ShuffleWaveMixing",
    "SpatialLinear",
    "StarReLU",
    "StridedStem",
    "WaveMixing",
    "baseline",
    "metaformer",
    "poolformer",
    "wave_backbone",
    "wavemix",
]
